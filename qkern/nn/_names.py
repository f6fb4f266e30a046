"""Names of modules as the model's author gave them, without what wrappers and adapters put in.

A name says nothing of what put it there: a model may have a submodule ``module`` or ``base_layer``
of its own. So the module that holds the name decides, by its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from qkern.nn._adapters import LoRALayer

# Classes that compute what one child of theirs computes, by their module and name, since most are
# of packages that need not be there; and the names under which they hold it, at last the one
# without the framework's own wrappers. Subclasses count too.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): ("_orig_mod",),
    ("torch.nn.parallel.data_parallel", "DataParallel"): ("module",),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): ("module",),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): (
        "_fsdp_wrapped_module",
    ),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): (
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel"): ("module",),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): ("module",),
    ("deepspeed.inference.engine", "InferenceEngine"): ("module",),
    ("lightning_fabric.wrappers", "_FabricModule"): ("_forward_module", "_original_module"),
    ("lightning.fabric.wrappers", "_FabricModule"): ("_forward_module", "_original_module"),
}


def is_inside(path: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is the path or a run of whole components of it."""
    return any(f".{name}." in f".{path}." for name in names)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data-parallel, compiling and other wrappers."""
    while names := wrapped_names(model):
        child = model._modules[names[-1]]
        assert child is not None
        model = child
    return model


def wrapped_names(module: nn.Module) -> tuple[str, ...]:
    """The names under which ``module`` holds what it only wraps; none for other modules."""
    for kind in type(module).__mro__:
        names = _WRAPPERS.get((kind.__module__, kind.__qualname__), ())
        if names and all(module._modules.get(name) is not None for name in names):
            return names
    return ()


def plain_paths(model: nn.Module) -> dict[str, str]:
    """Paths of all modules as ``named_modules`` has them, and as they are without wrappers.

    The base layer of an adapter has the path of the layer that the adapter is on.
    """
    return dict(_walk(model, "", ""))


def plain_name(model: nn.Module, key: str) -> str:
    """A key of the model's state dict, without wrappers and adapters."""
    module, parts = model, key.split(".")
    found: list[str] = []
    while True:
        wrapped = wrapped_names(module)
        name = parts[0]
        if wrapped and name not in wrapped and name not in (*module._parameters, *module._buffers):
            name = wrapped[-1]  # some wrappers leave themselves out of the keys
            parts.insert(0, name)
        child = module._modules.get(name)
        if child is None:
            return ".".join(found + parts)
        if name not in _transparent(module):
            found.append(name)
        del parts[0]
        module = child


def _walk(module: nn.Module, actual: str, plain: str) -> Iterator[tuple[str, str]]:
    yield actual, plain
    transparent = _transparent(module)
    for name, child in module._modules.items():
        if child is not None:
            inside = plain if name in transparent else _join(plain, name)
            yield from _walk(child, _join(actual, name), inside)


def _transparent(module: nn.Module) -> tuple[str, ...]:
    return ("base_layer",) if isinstance(module, LoRALayer) else wrapped_names(module)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
