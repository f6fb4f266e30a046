"""Names of modules as the model's author gave them, without what wrappers and adapters put in.

A name says nothing of what put it there: a model may have a submodule ``module`` or ``base_layer``
of its own. So the module that holds the name decides, by its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from qkern.nn.lora import LoRALinear

# Classes that compute what one child of theirs computes, by their module and name, since most are
# of packages that need not be there. Subclasses count too.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): "module",
    ("deepspeed.inference.engine", "InferenceEngine"): "module",
    # It holds the model twice; this one is without the strategy's own wrapper.
    ("lightning_fabric.wrappers", "_FabricModule"): "_original_module",
    ("lightning.fabric.wrappers", "_FabricModule"): "_original_module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data-parallel, compiling and other wrappers."""
    while (name := _wrapped_name(model)) is not None:
        model = _child(model, name)
    return model


def plain_paths(model: nn.Module) -> dict[str, str]:
    """Paths of all modules as ``named_modules`` has them, and as they are without wrappers.

    The base layer of an adapter has the path of the layer that the adapter is on.
    """
    return dict(_walk(model, "", ""))


def plain_name(name: str, paths: Mapping[str, str]) -> str:
    """A key of the model's state dict without wrappers; ``paths`` are of `plain_paths`."""
    path, _, last = name.rpartition(".")
    rest = last
    while path not in paths:
        path, _, last = path.rpartition(".")
        rest = f"{last}.{rest}"
    return f"{paths[path]}.{rest}" if paths[path] else rest


def _walk(module: nn.Module, actual: str, plain: str) -> Iterator[tuple[str, str]]:
    yield actual, plain
    transparent = "base_layer" if isinstance(module, LoRALinear) else _wrapped_name(module)
    for name, child in module._modules.items():
        if child is not None:
            inside = plain if name == transparent else _join(plain, name)
            yield from _walk(child, _join(actual, name), inside)


def _wrapped_name(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        name = _WRAPPERS.get((kind.__module__, kind.__qualname__))
        if name is not None and module._modules.get(name) is not None:
            return name
    return None


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules[name]
    assert child is not None
    return child


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
