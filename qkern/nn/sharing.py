"""Layers that share an input, as queries, keys and values, computed by one call."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkern.backends import _library
from qkern.functional import direct_backend, several_by_kernel
from qkern.nn._module import parameter
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear
from qkern.weight import Weight

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of layers that their module gives the same input, in models of transformers and others."""

_MOST_BYTES = 1 << 20
_MOST_ROWS = 8
"""More rows are computed as usual: there a call takes long, beside which nothing is to be saved."""

_MOST_LEFT = 4
"""How often in turn results may be left over before a group stops."""


def share_inputs(
    model: nn.Module, groups: Iterable[Sequence[str]] = SIBLINGS, *, enabled: bool = True
) -> nn.Module:
    """Let 4-bit layers that are given the same input compute by one call, for generation.

    The layers and the model's code stay as they are. The first layer of a group that is called
    computes the results of all, by :func:`qkern.linears_4bit`, and the others hand them out: if
    they are called with the same values, bit by bit, in tensors of the same shape and dtype, and
    their weights are the same tensors, unchanged. Otherwise they compute as ever. So results have
    the bits that they have without it, whatever happens between the calls and in other threads.

    It acts on a CPU where few rows are computed (8 at most) and nothing is recorded for a gradient,
    traced, compiled, cast by autocast or set by a block (:func:`qkern.batch_invariant` and others).
    Results that nobody asks for are dropped at the next call, and a group where that happens again
    and again stops. Copies and unpickled models do not share: call this again.

    ``groups``
        names of layers within one module, each group in the order of their calls. A group counts
        wherever a module has all of its layers, in 4 bits and of one input size.
    ``enabled``
        False ends it for all layers of ``model``.

    Returns ``model``. Raises ValueError where nothing is found, or a layer of a group has an
    adapter, with which the layer itself is not called.
    """
    if not enabled:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module._shared = None
        return model
    found = list(_groups(model, [tuple(names) for names in groups]))
    if not found:
        raise ValueError("groups: no module of model has all layers of one, in 4 bits")
    for layers in found:
        shared = SharedInput(layers)
        for layer in layers:
            layer._shared = shared
    return model


def _groups(model: nn.Module, groups: list[tuple[str, ...]]) -> Iterator[list[Linear4bit]]:
    for path, module in model.named_modules():
        for names in groups:
            layers = [module._modules.get(name) for name in names]
            for name, layer in zip(names, layers, strict=True):
                if isinstance(layer, LoRALinear):
                    raise ValueError(
                        f"model: {path}.{name} has an adapter; share the inputs of a model without"
                    )
            whole = [layer for layer in layers if type(layer) is Linear4bit]
            if len(whole) == len(names) > 1 and len({layer.in_features for layer in whole}) == 1:
                yield whole


class _State(NamedTuple):
    """By what a layer computes."""

    weight: Weight
    bias: Tensor | None
    marks: tuple[tuple[int, int, int], ...]
    """Of each tensor its id, its version and its address."""


class _Kept(NamedTuple):
    """What one call computed for the other layers."""

    values: bytes
    """Those of the input."""
    shape: torch.Size
    dtype: torch.dtype
    results: dict[int, tuple[Tensor, _State]]
    """By the id of the layer: its result, and by what that was computed."""


class SharedInput:
    """What the layers of one group have in common.

    Threads may use it at once: what is kept is replaced as a whole, a result is handed out once,
    and whoever gets it has asked for the product of the same values.
    """

    def __init__(self, layers: Sequence[Linear4bit]) -> None:
        # Weakly: the layers hold this.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._kept: _Kept | None = None
        self._left = 0

    def result(self, layer: Linear4bit, x: Tensor) -> Tensor | None:
        """The result of ``layer`` for ``x``, or None where the layer has to compute it."""
        library = _library.library
        if library is None or self._left >= _MOST_LEFT or type(x) is not Tensor:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or _bias_is_trained(layer)):
            return None
        kept = self._kept
        if kept is not None:
            y = self._take(kept, layer, x, library)
            if y is not None:
                return y
        return self._compute(layer, x, library)

    def _take(self, kept: _Kept, layer: Linear4bit, x: Tensor, library: Any) -> Tensor | None:
        found = kept.results.get(id(layer))
        if (
            found is None
            or x.dtype is not kept.dtype
            or x.shape != kept.shape
            or not library.tensor_has_bytes(x, kept.values)
            or direct_backend() is None
            or not _is_same(_state(layer), found[1])
        ):
            return None
        taken = kept.results.pop(id(layer), None)
        if not kept.results:
            self._left = 0
            if self._kept is kept:
                self._kept = None
        return None if taken is None else taken[0]

    def _compute(self, layer: Linear4bit, x: Tensor, library: Any) -> Tensor | None:
        if x.dim() == 0 or x.numel() > _MOST_ROWS * layer.in_features:
            return None
        layers = [held for ref in self._layers if (held := ref()) is not None]
        states = [_state(one) for one in layers]
        values = library.tensor_bytes(x, _MOST_BYTES)
        known = [state for state in states if state is not None]
        if len(known) != len(self._layers) or values is None:
            return None
        weights, biases = tuple(s.weight for s in known), tuple(s.bias for s in known)
        ys = several_by_kernel(x, weights, [one._weight_shape for one in layers], biases)
        if ys is None:
            return None
        results = {id(one): (y, state) for one, y, state in zip(layers, ys, known, strict=True)}
        if id(layer) not in results:  # a replica has its dictionary, and other tensors
            return None
        mine, _ = results.pop(id(layer))
        self._left += self._kept is not None
        self._kept = _Kept(values, x.shape, x.dtype, results)
        return mine


def _bias_is_trained(layer: Linear4bit) -> bool:
    bias = parameter(layer, "bias")
    return bias is not None and bias.requires_grad


def _state(layer: Linear4bit) -> _State | None:
    """None where it could change unnoticed, as tensors made in inference mode do."""
    weight, bias = layer.as_operand(), parameter(layer, "bias")
    marks = []
    for tensor in (*weight[:5], bias):
        if tensor is not None:
            if type(tensor) is not nn.Parameter or tensor.is_inference():
                return None
            marks.append((id(tensor), tensor._version, tensor.data_ptr()))
    if layer.compute_dtype is not None:
        return None
    return _State(weight, bias, tuple(marks))


def _is_same(now: _State | None, then: _State) -> bool:
    # Tensors by their marks: `then` holds them, so that no other has the id of one.
    return now is not None and now.marks == then.marks and now.weight[5:] == then.weight[5:]
