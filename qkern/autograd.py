"""Gradients of the 4-bit matmul with respect to its input and bias.

The weight is frozen: it gets no gradient, and only its existing packed tensors are saved. Neither
the dense weight nor the input is kept. The map is linear in ``x``, so the backward of the backward
is the forward op again, and gradients of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import qkern.ops  # noqa: F401  registers torch.ops.qkern

_linear_4bit = torch.ops.qkern.linear_4bit.default
_linear_4bit_dx = torch.ops.qkern.linear_4bit_dx.default


class Linear4bit(Function):
    """``x @ W.T + bias`` by the op ``linear_4bit``; arguments as there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        codebook: Tensor | None,
        bias: Tensor | None,
        format: str,
        block_size: int,
        out_features: int,
        batch_invariant: bool,
    ) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset, codebook)
            ctx.static = (format, block_size, x.shape[-1], batch_invariant)
        return _linear_4bit(
            x,
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            bias,
            format,
            block_size,
            out_features,
            batch_invariant,
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``bias``, where needed."""
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            args = (dy, *ctx.saved_tensors, *ctx.static)
            # Grad mode is on only under create_graph=True.
            dx = Linear4bitDx.apply(*args) if torch.is_grad_enabled() else _linear_4bit_dx(*args)
        if ctx.needs_input_grad[6]:
            dbias = dy.sum(tuple(range(dy.dim() - 1)))
        return dx, None, None, None, None, None, dbias, None, None, None, None


class Linear4bitDx(Function):
    """``dy @ W`` by the op ``linear_4bit_dx``; arguments as there."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        codebook: Tensor | None,
        format: str,
        block_size: int,
        in_features: int,
        batch_invariant: bool,
    ) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset, codebook)
            ctx.static = (format, block_size, dy.shape[-1], batch_invariant)
        return _linear_4bit_dx(
            dy,
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            format,
            block_size,
            in_features,
            batch_invariant,
        )

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``dy``, where needed."""
        ddy = None
        if ctx.needs_input_grad[0]:
            args = (ddx, *ctx.saved_tensors, None, *ctx.static)
            ddy = Linear4bit.apply(*args) if torch.is_grad_enabled() else _linear_4bit(*args)
        return ddy, None, None, None, None, None, None, None, None, None
