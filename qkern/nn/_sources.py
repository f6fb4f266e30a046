"""Which dense layers another may stand in for, and what hangs on them that must come along.

A layer is taken only where its class is known to compute what its weight says. Any other class,
and anything that would be lost with the layer, is refused or left alone, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

_FROZEN = "qkern.nn.dense.FrozenLinear"

SAME_AS_LINEAR = frozenset(
    {
        "torch.nn.modules.linear.Linear",
        _FROZEN,
        # x @ weight.T + bias, written out.
        "transformers.models.falcon.modeling_falcon.FalconLinear",
    }
)
"""Classes that compute ``x Wᵀ + b``; by name, since their libraries need not be imported."""

LEFT_DENSE = frozenset(
    {
        # nn.MultiheadAttention computes with its weight instead of calling it.
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        # Small, with a forward of their own that returns scores and choices.
        "transformers.models.llama4.modeling_llama4.Llama4Router",
        "transformers.models.phimoe.modeling_phimoe.PhimoeTopKRouter",
    }
)
"""Subclasses of ``nn.Linear`` that ``"all-linear"`` passes over; of others it raises."""

_CONV1D = "transformers.pytorch_utils.Conv1D"
"""Computes ``x W + b``, with W ``[in, out]``: the transposed one of ``nn.Linear``."""

_HOOKS = (
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_backward_hooks",),
    ("_backward_pre_hooks",),
)
"""Hooks on a module's call: of each kind the dictionary, and those that say how to call them."""

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OF_ACCELERATE = frozenset({"_hf_hook", "_old_forward", "forward"})


# The attributes that each dense layer has. Said by its class, since making one would draw from the
# random generator, and on meta bring torch's compiler, which takes a second.
_OF_EVERY_LAYER = frozenset(
    (*vars(nn.Module()), *nn.Linear.__constants__, *nn.Embedding.__constants__)
)


# What layers with a 4-bit weight have for it.
_OF_QUANTIZED = frozenset(
    {
        "_format",
        "_block_size",
        "_weight_shape",
        "_weight_dtype",
        "_embed_scale",
        "_scale_is_rounded",
        "compute_dtype",
        "source_class",
    }
)

# And what bitsandbytes' have, of which a new layer takes what it needs.
_OF_BITSANDBYTES = frozenset(
    {"quant_state", "quant_storage", "compute_type_is_set", "support_avx512bf16_for_cpu"}
)


def class_name(module: nn.Module) -> str:
    """Where its class is defined, and its name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_linear(module: nn.Module) -> bool:
    """Whether its class is known to compute ``x Wᵀ + b``."""
    return type(module) is nn.Linear or class_name(module) in SAME_AS_LINEAR


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether it is the class ``Conv1D`` of transformers, whose weight is ``[in, out]``."""
    return f"{kind.__module__}.{kind.__qualname__}" == _CONV1D


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a ``Conv1D`` of transformers."""
    return is_conv1d(type(module))


def source_class(layer: nn.Module) -> type[nn.Module]:
    """The class of the layer that ``layer`` is or stands in for."""
    kind: type[nn.Module] = getattr(layer, "source_class", type(layer))
    return nn.Linear if class_name(layer) == _FROZEN else kind


def can_be_quantized(module: nn.Module) -> bool:
    """Whether a `Linear4bit` may stand in for it: a linear layer, its weight either way round."""
    return is_linear(module) or is_transposed(module)


def matrix(layer: nn.Module) -> Tensor:
    """Its weight as ``[out, in]``, detached, in the same memory."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if is_transposed(layer) else weight


def has_scale(module: nn.Module) -> bool:
    """Whether it is an embedding of transformers that multiplies its rows by ``embed_scale``."""
    library, _, name = class_name(module).rpartition(".")
    return (
        library.startswith("transformers.models.")
        and name.endswith("ScaledWordEmbedding")
        and not name.startswith("T5Gemma2")  # has rows that it puts in for one token
    )


def check_layer(argument: str, layer: nn.Module, kind: str) -> None:
    """TypeError, naming the class, unless ``layer`` is one of ``kind``, a key of ``_KNOWN``.

    ValueError where it is of a class that can, but carries what would be lost.
    """
    if not _KNOWN[kind](layer):
        raise TypeError(
            f"{argument}: got {type(layer).__name__}; takes exactly {kind}, "
            "for a subclass may compute something else"
        )
    reason = would_lose(layer)
    if reason is not None:
        raise ValueError(f"{argument}: {reason}")


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding or has_scale(module)


LINEAR = "nn.Linear"
LINEAR_OR_CONV1D = "nn.Linear or Conv1D of transformers"
EMBEDDING = "nn.Embedding"
_KNOWN: dict[str, Callable[[nn.Module], bool]] = {
    LINEAR: is_linear,
    LINEAR_OR_CONV1D: can_be_quantized,
    EMBEDDING: _is_embedding,
}


def would_lose(layer: nn.Module) -> str | None:
    """What a replacement of ``layer`` would lose, as the end of a message; None for nothing.

    Hooks on forward and backward, attributes, and accelerate's hooks that do not offload are
    carried over by `carry_over`.
    """
    return strange_parameters(layer) or strange_call(layer)


def strange_call(layer: nn.Module) -> str | None:
    """What `would_lose` says beside the layer's tensors: of its forward, methods and hooks."""
    held = vars(layer)
    if "_hf_hook" in held:
        if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            return "is offloaded by accelerate; quantise before offloading"
        if "_old_forward" not in held or not _is_own_method(layer, "_old_forward", "forward"):
            return "has a forward of its own below accelerate's hooks, which would be lost"
    for name in held:
        if name == "forward" and ("_hf_hook" in held or _is_own_method(layer, name, name)):
            continue
        if hasattr(type(layer), name):
            return f"has a {name} of its own, which would be lost; remove it, or skip the layer"
    if any(held.get(name) for name in _STATE_HOOKS):
        return "has hooks on its state dict, which would be lost; remove them, or skip the layer"
    return None


def strange_parameters(layer: nn.Module) -> str | None:
    """Why its parameters are not simply a weight and a bias; None where they are.

    So they are not under weight norm, pruning or a parametrisation, where the weight is computed
    anew for each call, and where it is a tensor of another kind (a DTensor, or quantised already).
    """
    held = layer._parameters
    if "weight" not in held or set(held) - {"weight", "bias"}:
        names = ", ".join(sorted(held))
        return (
            f"has the parameters {names}, so its weight is computed (weight norm, pruning?); "
            "make it permanent first, or skip the layer"
        )
    for name, parameter in held.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"has a {name} that is a {type(parameter).__name__}; takes a plain nn.Parameter"
    own = {"embed_scale"} if has_scale(layer) else set()
    for held_too in (layer._buffers, layer._modules):
        if extra := set(held_too) - own:
            return f"holds {', '.join(sorted(extra))} too, which would be lost; skip the layer"
    return None


def _is_own_method(module: nn.Module, name: str, method: str) -> bool:
    """Whether the attribute is but its class's method, as accelerate leaves when it goes."""
    found = vars(module)[name]
    function = getattr(found, "__func__", None)
    return getattr(found, "__self__", None) is module and function is getattr(type(module), method)


def carry_over(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks, attributes and mode of ``source``.

    The hooks' dictionaries are shared, so that handles given out before still remove their hooks.
    """
    for kind in _HOOKS:
        if getattr(source, kind[0]):
            vars(target).update((name, vars(source)[name]) for name in kind)
    target._is_full_backward_hook = source._is_full_backward_hook
    not_carried = _OF_EVERY_LAYER | _OF_ACCELERATE | _OF_QUANTIZED | _OF_BITSANDBYTES
    for name, value in vars(source).items():
        if name not in not_carried and name not in vars(target):
            vars(target)[name] = value
    share_placement(source, target)
    target.train(source.training)


def dense_layer(source: nn.Module, weight: nn.Parameter, **attributes: object) -> nn.Module:
    """A layer of the class that ``source`` stands in for, with all that it carries.

    Without its class's constructor, which would allocate and draw a weight.
    """
    kind = source_class(source)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight = weight
    for name, value in attributes.items():
        setattr(layer, name, value)
    carry_over(source, layer)
    return layer


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` have the hooks of ``source``, those to come too."""
    for kind in _HOOKS:
        vars(target).update((name, vars(source)[name]) for name in kind)
    target._is_full_backward_hook = source._is_full_backward_hook


def is_only_placed(layer: nn.Module) -> bool:
    """Whether accelerate calls it where it lies, as of a model spread over devices."""
    held = vars(layer)
    return (
        {"_hf_hook", "_old_forward"} <= held.keys()
        and _is_own_method(layer, "_old_forward", "forward")
        and not any(parameter.is_meta for parameter in layer.parameters(recurse=False))
    )


def share_placement(source: nn.Module, target: nn.Module) -> None:
    """Let accelerate call ``target`` as it calls ``source``, where it does."""
    if "_hf_hook" in vars(source):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(target, source._hf_hook)


def follows_placement(source: nn.Module, target: nn.Module) -> bool:
    """Whether accelerate calls ``target`` as it calls ``source``; removes a hook that is older."""
    hook, own = vars(source).get("_hf_hook"), vars(target).get("_hf_hook")
    if own is not None and own is not hook:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(target)
        own = None
    return own is hook


def execution_device(layer: nn.Module) -> torch.device | str | int | None:
    """Where accelerate computes a layer that it offloads; None for any other layer."""
    hook = vars(layer).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device: torch.device | str | int | None = getattr(one, "execution_device", None)
        if device is not None:
            return device
    return None


def check_held_elsewhere(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """ValueError where a module keeps one of ``layers`` in an attribute that is no submodule.

    It would go on calling the old layer there, and an adapter would be passed by.
    """
    ids = {id(layer) for layer in layers}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules" and _holds(value, ids):
                where = f"{path}.{name}" if path else name
                what = f"is a {type(value).__name__} that holds a layer"
                if isinstance(value, nn.Module):
                    what = "is no submodule, but it is a layer"
                raise ValueError(
                    f"model: {where} {what} to be replaced, and would keep it; use nn.ModuleList "
                    "or nn.ModuleDict, or skip the layer"
                )


_MAX_LOOKED_AT = 100_000
"""Containers of more are data. It ends the search in such that hold themselves, too."""


def _holds(value: object, ids: set[int]) -> bool:
    """Whether it is one of the modules ``ids``, or has one in containers within one another."""
    found = [value]
    for one in found:
        if id(one) in ids:
            return True
        if isinstance(one, dict | list | tuple | set) and len(found) < _MAX_LOOKED_AT:
            found.extend(one.values() if isinstance(one, dict) else one)
    return False


_COUNTED = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: nn.Module) -> None:
    """ValueError for a model that would fail later, or that others have taken into account."""
    for path, module in model.named_modules():
        kinds = type(module).__mro__
        where = path or "it"
        if any(k.__module__.startswith("peft.") for k in kinds):
            raise ValueError(
                f"model: {where} is PEFT's ({type(module).__name__}); quantise before PEFT adds "
                "its adapters, and use one library's adapters"
            )
        if any(kind.__name__ in _COUNTED for kind in kinds):
            raise ValueError(
                f"model: {where} is a {type(module).__name__}, which has counted its parameters "
                "already; wrap it afterwards"
            )
    check_tensors(model)


def check_tensors(model: nn.Module) -> None:
    """ValueError for parameters made under inference mode, or left on the meta device.

    A model whole on the meta device is taken, and what accelerate brings there between calls.
    """
    bare, real = None, None
    for name, parameter, owner in _parameters(model):
        if nn.parameter.is_lazy(parameter):
            kind = type(owner).__name__
            raise ValueError(f"model: {name} ({kind}) has no shape yet; call the model once first")
        if parameter.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so nothing can be trained "
                "with it; make the model outside, or under torch.no_grad"
            )
        if not parameter.is_meta:
            real = real or name
        elif "_hf_hook" not in vars(owner):
            bare = bare or name
    if bare is not None and real is not None:
        raise ValueError(
            f"model: {bare} is on the meta device and {real} is not; load all weights first, or "
            "make the whole model on meta for its structure alone"
        )


def check_trainable(model: nn.Module) -> None:
    """ValueError for parameters on the meta device that a training step would need."""
    for name, parameter, owner in _parameters(model):
        if parameter.is_meta and ("_hf_hook" not in vars(owner) or parameter.requires_grad):
            raise ValueError(
                f"model: {name} is on the meta device; load the weights first. What accelerate "
                "offloads cannot be trained"
            )


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield (f"{path}.{name}" if path else name), parameter, module
