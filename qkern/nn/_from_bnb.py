"""A model that bitsandbytes quantised, turned over in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkern import _bnb
from qkern.nn import _sources
from qkern.nn._options import Options, check_finite_weight, replace_module
from qkern.nn.embedding import Embedding4bit
from qkern.nn.linear import Linear4bit
from qkern.tensor import QuantizedTensor

_MODULES = "bitsandbytes.nn.modules"
_IN_4_BITS = ("Linear4bit", "Embedding4bit")
_IN_8_BITS = ("Linear8bitLt", "Embedding8bit")


def from_bnb(model: nn.Module) -> nn.Module:
    """Turn the 4-bit layers of bitsandbytes in ``model`` into qkern's, in place and without copies.

    ``Linear4bit`` (``LinearNF4``, ``LinearFP4``) becomes :class:`Linear4bit`, ``Embedding4bit``
    (``EmbeddingNF4``, ``EmbeddingFP4``) :class:`Embedding4bit`, on the same packed codes and scales
    whatever their ``quant_storage``, with the same bias, hooks, attributes, mode and
    ``compute_dtype``. Layers that share a weight share it still. What requires grad is left as it
    is.

    Memory is needed only where a weight is not as bitsandbytes made it: for scales that have to be
    restored (see :meth:`qkern.QuantizedTensor.from_bnb`); for a weight that bitsandbytes repacked
    in an evaluation on a processor with BF16 instructions, whose scales it has rounded to bfloat16
    already; for a table of which the last block is short. A layer that bitsandbytes would quantise
    only when it is moved to a device is quantised by qkern, in the layer's format.

    Args:
        model: a model with such layers, without adapters of PEFT.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no such layer; one of them is in 8 bits, has lost its scales or
            carries what would be lost (hooks on its state dict, a ``forward`` of its own), is
            offloaded by accelerate, or shares its weight with a module of another class; ``model``
            has adapters, or is wrapped for data parallelism. All before anything is changed.
        TypeError: ``model`` is a single layer, or a layer is of a subclass with a ``forward`` of
            its own.
    """
    if _kind(model) is not None:
        raise TypeError("model: got a single layer; takes a model that has it as a submodule")
    _sources.check_model(model)
    groups: dict[int, dict[int, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if (kind := _kind(module)) is not None:
            _check(path, module, kind)
            group = groups.setdefault(id(module.weight), {})
            group.setdefault(id(module), []).append(path)
    if not groups:
        raise ValueError("model: has no layer that bitsandbytes quantised to 4 bits")
    _check_shared(model, groups)
    layers = (model.get_submodule(p[0]) for group in groups.values() for p in group.values())
    _sources.check_held_elsewhere(model, layers)
    # Views of the parameters, but for what must be restored. Dense ones are quantised one by one.
    found = {key: _weight(*_first(model, group)) for key, group in groups.items()}
    for key, group in groups.items():
        qw = found.pop(key)
        shared: Linear4bit | None = None
        for paths in group.values():
            old = model.get_submodule(paths[0])
            if qw is None:
                with torch.inference_mode(False):
                    qw = _options(old).quantize(_plain(old.weight))
            replace_module(model, paths, new := _replacement(old, qw, shared))
            shared = new if isinstance(new, Linear4bit) else None
    return model


def _kind(module: nn.Module) -> str | None:
    """The class of bitsandbytes that it is of, in 4 or 8 bits."""
    known = (kind for kind in type(module).__mro__ if _is_theirs(kind, *_IN_4_BITS, *_IN_8_BITS))
    kind = next(known, None)
    return None if kind is None else kind.__name__


def _is_theirs(kind: type, *names: str) -> bool:
    return kind.__module__ == _MODULES and kind.__name__ in names


def _check(path: str, layer: nn.Module, kind: str) -> None:
    if kind in _IN_8_BITS:
        raise ValueError(f"model: {path} is a {kind} of bitsandbytes, in 8 bits; takes 4 bits")
    own: Any = next(k for k in type(layer).__mro__ if _is_theirs(k, kind))
    if type(layer).forward is not own.forward:
        raise TypeError(
            f"model: {path} is a {type(layer).__name__}, a subclass of bitsandbytes' {kind} with a "
            "forward of its own"
        )
    if extra := (set(layer._parameters) - {"weight", "bias"}) | set(layer._buffers):
        raise ValueError(f"model: {path} holds {', '.join(sorted(extra))} too")
    if layer._modules:
        raise ValueError(f"model: {path} holds {', '.join(sorted(layer._modules))} too")
    if (reason := _sources.strange_call(layer)) is not None:
        raise ValueError(f"model: {path} ({type(layer).__name__}) {reason}")


def _check_shared(model: nn.Module, groups: dict[int, dict[int, list[str]]]) -> None:
    """ValueError where a weight is also that of another module, which would keep it."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, held in module.named_parameters(recurse=False):
            if id(held) in groups and id(module) not in groups[id(held)]:
                raise ValueError(f"model: {path}.{name} is also the weight of a 4-bit layer")
    for group in groups.values():
        kinds = {_kind(model.get_submodule(paths[0])): paths[0] for paths in group.values()}
        if len(kinds) > 1 or (len(group) > 1 and "Embedding4bit" in kinds):
            raise ValueError(f"model: the weight of {' and '.join(kinds.values())} is shared")


def _first(model: nn.Module, group: dict[int, list[str]]) -> tuple[str, nn.Module]:
    path = next(iter(group.values()))[0]
    return path, model.get_submodule(path)


def _weight(path: str, layer: nn.Module) -> QuantizedTensor | None:
    """The layer's weight as bitsandbytes has it; None for one that it has not quantised yet."""
    weight: Any = layer.weight
    # FSDP may leave the state at the layer alone.
    state: Any = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        if getattr(weight, "bnb_quantized", True) or not weight.is_floating_point():
            raise ValueError(f"model: {path}.weight has lost its quant_state, so its scales")
        try:
            options = _options(layer)
            options.quantize(torch.empty_like(_plain(weight), device="meta"))
            check_finite_weight(_plain(weight), options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {path}.weight: {error}") from error
        return None
    nested = None
    if state.nested:
        inner = state.state2
        dtype = str(inner.dtype).removeprefix("torch.")
        nested = _bnb.Nested(inner.absmax, inner.code, state.offset, inner.blocksize, dtype)
    repacked = getattr(state, "packing_format_for_cpu", False)
    parts = _bnb.Parts(
        _plain(weight),
        state.absmax,
        state.code,
        nested,
        state.quant_type,
        state.blocksize,
        tuple(state.shape),
        state.original_dtype if repacked else state.dtype,
    )
    try:
        qw = _bnb.assemble(f"{path}.weight", parts)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    if qw.shape != (takes := _shape(layer)):
        raise ValueError(f"model: {path}.weight: got shape {list(qw.shape)}; takes {list(takes)}")
    return qw


def _plain(weight: Any) -> Tensor:
    """The same memory as a plain tensor: views of a ``Params4bit`` are such again."""
    plain: Tensor = weight.detach().as_subclass(Tensor)
    return plain


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def _options(layer: nn.Module) -> Options:
    """How bitsandbytes would quantise it."""
    weight: Any = layer.weight
    nested = bool(weight.compress_statistics)
    return Options(weight.quant_type, weight.blocksize, nested, None, True, None)


def _replacement(old: Any, qw: QuantizedTensor, shared: Linear4bit | None) -> nn.Module:
    if _kind(old) == "Embedding4bit":
        # bitsandbytes casts what it looks up to this.
        table = Embedding4bit(qw.to(dtype=old.dtype), old.padding_idx)
        _sources.carry_over(old, table)
        return table
    if shared is None:
        new = Linear4bit.from_quantized(qw, old.bias)
    else:
        new = shared.with_same_weight(old.bias)
    new.compute_dtype = old.compute_dtype
    new.take_over(old)
    # Where transformers made the layer it says of what.
    made_of = vars(old).get("source_cls", nn.Linear)
    new.source_class = made_of if _sources.is_conv1d(made_of) else nn.Linear
    return new
