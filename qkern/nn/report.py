"""What of a model is in 4 bits, and what of it stays dense."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qkern.nn._adapters import LoRALayer
from qkern.nn._experts import routers
from qkern.nn._heads import find_heads
from qkern.nn._module import TENSORS, QuantizedModule, parameter
from qkern.nn._names import is_inside, plain_paths

_logger = logging.getLogger("qkern.nn")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A whole component of a path."""


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Dense weights of one shape and dtype whose names differ by numbers alone."""

    name: str
    """Their name in the model, of several with ``*`` for the numbers:
    ``model.layers.*.mlp.experts.down_proj``."""
    names: tuple[str, ...]
    """The name of each."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    """Of all of them."""
    expected: bool
    """Whether they are of embeddings, heads, convolutions or routers, which are known to stay
    dense."""

    def __str__(self) -> str:
        count = f"{len(self.names)} x " if len(self.names) > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} ({count}{list(self.shape)} {dtype}, {_size(self.nbytes)})"


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What :func:`quantization_report` found in a model."""

    nbytes: int
    """Of all parameters and buffers; what is shared counts once."""
    quantized_nbytes: int
    """Of weights in 4 bits, with their scales."""
    quantized_elements: int
    """That those weights stand for."""
    dense: tuple[DenseWeights, ...]
    """Dense weights that together have more than the asked share of ``nbytes``, largest first."""

    def __str__(self) -> str:
        text = f"{_size(self.quantized_nbytes)} of {_size(self.nbytes)} are in 4 bits"
        if self.quantized_elements:
            text += f", {self.quantized_nbytes / self.quantized_elements:.3f} bytes a weight"
        if self.dense:
            text += f"; dense: {', '.join(map(str, self.dense))}"
        return text


def quantization_report(model: nn.Module, share: float = 0.01) -> QuantizationReport:
    """How many bytes of ``model`` are in 4 bits, and which of its weights stay dense.

    Weights are floating-point parameters of two dimensions or more; experts that a model keeps in
    one tensor of three are such. Adapters are none, nor are the biases of experts. Those of one
    shape and dtype whose names differ by numbers, as in all layers of a model, count as one.

    Args:
        model: any module.
        share: of the model's bytes, beyond which dense weights are listed: 0 lists all of them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``share`` is not from 0 to 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; takes an nn.Module")
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}; takes a number from 0 to 1")
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    names, heads = plain_paths(model), find_heads(model).spared
    quantized: dict[int, int] = {}
    packed: dict[int, int] = {}
    adapters: set[int] = set()
    dense: dict[int, tuple[str, Tensor, bool]] = {}
    choosing = set(routers(model))
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantizedModule):
            packed[id(parameter(module, "weight"))] = math.prod(module._weight_shape)
            for name in TENSORS:
                if (tensor := own.pop(name, None)) is not None:
                    quantized[id(tensor)] = held[id(tensor)]
            own.pop("bias", None)  # of experts it is a matrix
        if isinstance(module, LoRALayer):
            adapters.update(map(id, own.values()))
        expected = isinstance(module, nn.Embedding | _ConvNd) or id(module) in heads
        expected |= path in choosing or type(module).__name__.endswith("Router")
        for name, tensor in own.items():
            whole = f"{names[path]}.{name}" if names[path] else name
            first, _, before = dense.get(id(tensor), (whole, tensor, False))
            dense[id(tensor)] = first, tensor, before or expected
    groups: dict[tuple[str, tuple[int, ...], torch.dtype, bool], list[tuple[str, int]]] = {}
    for key, (name, tensor, expected) in dense.items():
        is_weight = tensor.dim() >= 2 and tensor.is_floating_point() and not name.endswith("_bias")
        if key not in adapters and is_weight:
            kind = _NUMBER.sub("*", name), tuple(tensor.shape), tensor.dtype, expected
            groups.setdefault(kind, []).append((name, held[key]))
    total = sum(held.values())
    found = [
        DenseWeights(
            name if len(each) > 1 else each[0][0],
            tuple(n for n, _ in each),
            *(shape, dtype, nbytes, expected),
        )
        for (name, shape, dtype, expected), each in groups.items()
        if (nbytes := sum(size for _, size in each)) > share * total or not share
    ]
    found.sort(key=lambda weights: weights.nbytes, reverse=True)
    return QuantizationReport(total, sum(quantized.values()), sum(packed.values()), tuple(found))


def log_dense(report: QuantizationReport, skip: Iterable[str] = ()) -> None:
    """Say once what stays dense: a warning where it is not expected and not in ``skip``."""
    skip = tuple(skip)
    unexpected = [
        weights
        for weights in report.dense
        if not weights.expected and not all(is_inside(name, skip) for name in weights.names)
    ]
    if unexpected:
        _logger.warning(
            "Weights stay dense beside embeddings, heads, convolutions and routers: %s. In all, %s",
            ", ".join(map(str, unexpected)),
            report,
        )
    else:
        _logger.info("%s", report)


def _size(nbytes: int) -> str:
    """Bytes in a unit of three digits or so."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:.3g} GB"
