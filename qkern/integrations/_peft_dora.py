"""DoRA (arXiv 2402.09353) on a 4-bit weight: its row norms without the dense weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from qkern.functional import dequantize_8bit, linear_by_weight
from qkern.nn import Linear4bit
from qkern.tensor import QuantizedTensor

_SLICE_BYTES = 4 << 20  # of a dense weight in float32


def dense_rows(qw: QuantizedTensor) -> Iterator[tuple[slice, Tensor]]:
    """The matrix ``qw`` in float32, a slice of whole rows at a time: the slice and its values.

    The values are those of ``qw.dequantize``, bit for bit. A slice takes about 4 MiB, or as many
    rows as begin and end at a block's border.
    """
    rows, columns = qw.shape
    if not rows or not columns:
        return
    absmax = qw.absmax
    if qw.nested_absmax is not None and qw.nested_offset is not None:
        absmax = dequantize_8bit(absmax, qw.nested_absmax) + qw.nested_offset
    whole = math.lcm(columns, qw.block_size) // columns  # rows that end at a block's border
    step = max(_SLICE_BYTES // (4 * columns) // whole, 1) * whole
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        first, last = begin * columns, end * columns
        part = QuantizedTensor(
            qw.packed[first // 2 : (last + 1) // 2],
            absmax[first // qw.block_size : -(-last // qw.block_size)],
            None,
            None,
            qw.codebook,
            qw.format,
            qw.block_size,
            (end - begin, columns),
            torch.float32,
        )
        yield slice(begin, end), part.dequantize()


@torch.no_grad()
def row_norms(base: nn.Module, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The norms of the rows of ``W + scaling * lora_b @ lora_a``, float32 ``[out_features]``.

    ``base`` is the layer whose weight W is; no gradient is recorded, as DoRA has it.
    """
    lora_a, lora_b = lora_a.float(), lora_b.float()
    if isinstance(base, Linear4bit):
        qw = base.quantized
        norms = lora_b.new_empty(qw.shape[0])
        if qw.packed.is_meta or lora_b.is_meta:
            return norms
        for rows, dense in dense_rows(qw):
            dense.addmm_(lora_b[rows], lora_a, alpha=scaling)
            norms[rows] = torch.linalg.vector_norm(dense, dim=1)
        return norms
    dense = _matrix(base)
    return torch.linalg.vector_norm(dense.addmm(lora_b, lora_a, alpha=scaling), dim=1)


def _matrix(base: nn.Module) -> Tensor:
    """The weight of a dense layer in float32, ``[out_features, in_features]``."""
    weight: Any = base.weight
    return (weight if isinstance(base, nn.Linear) else weight.t()).float()


class DoraLayer(DoraLinearLayer):
    """The magnitude of each row, and what DoRA adds to the base's result."""

    def update_layer(
        self,
        *,
        base_layer: nn.Module,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        place_on_cpu: bool = False,
    ) -> None:
        """Set the magnitudes to the norms that the rows have now."""
        norms = row_norms(base_layer, lora_A.detach(), lora_B.detach(), scaling)
        self.weight = nn.Parameter(norms.cpu() if place_on_cpu else norms)

    def factors(self, base_layer: nn.Module, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Any:
        """Magnitude over norm of each row, ``[out_features]``; the norm is taken as a constant."""
        return self.weight / row_norms(base_layer, lora_a.detach(), lora_b.detach(), scaling)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is added to the base's result, ``[..., out_features]``.

        ``base_result`` is that result, bias included; None where ``x`` was dropped out, whose own
        product is then computed here.
        """
        bias = base_layer.bias
        if base_result is None:
            base_result = _product(base_layer, x)
        elif bias is not None:
            base_result = base_result - bias.to(base_result.dtype)
        factors = self.factors(base_layer, lora_A.weight, lora_B.weight, scaling)
        return (factors - 1) * base_result + factors * lora_B(lora_A(x)) * scaling


def _product(base: Any, x: Tensor) -> Tensor:
    """``x @ W.T`` without the bias."""
    if isinstance(base, Linear4bit):
        return linear_by_weight(x, base.as_operand(), base._weight_shape, None)
    return nn.functional.linear(x, _matrix(base).to(x.dtype))


class Dora(DoraLinearVariant):
    """PEFT's variant with `DoraLayer`."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give ``module`` the magnitudes of an adapter, which are trained too."""
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLayer(False)
        layer.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def merged(module: Any, adapter: str, base: nn.Module, weight: Tensor, delta: Tensor) -> Tensor:
        """``weight``, which may hold other adapters already, with this one.

        ``base`` is the layer with the weight that no adapter is in, of which the norms are.
        """
        layer = module.lora_magnitude_vector[adapter]
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        factors = layer.factors(base, a, b, module.scaling[adapter])
        merged: Tensor = factors.detach().to(weight.dtype).view(-1, 1) * (weight + delta)
        return merged
