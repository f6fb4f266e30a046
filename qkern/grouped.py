"""Gradients of the matmul by experts with respect to its input and biases.

As in `qkern.autograd`: weights are frozen, only their packed tensors and the offsets are saved, the
map is linear in ``x``, and derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qkern.autograd import held, is_differentiated, no_autocast
from qkern.backends import forced
from qkern.ops import call, forward_derivatives
from qkern.reference import groups
from qkern.weight import Weight

_NO_GRADIENTS = (None,) * (3 + len(Weight._fields))
"""Of the weight's fields and the three arguments before them."""


class GroupedLinear4bit(Function):
    """The op ``grouped_linear_4bit``; the fields of the weight come last, one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        out_features: int,
        batch_invariant: bool | None,
        *weight: Any,
    ) -> Tensor:
        """Run the op; save offsets and packed weight when a gradient will need them."""
        _save(ctx, x, offsets, batch_invariant, weight)
        return call(
            "grouped_linear_4bit", x, Weight(*weight), out_features, offsets, bias, batch_invariant
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``bias``, where needed."""
        dx = dbias = None
        offsets, *tensors = ctx.saved_tensors
        in_features, batch_invariant = ctx.static
        if ctx.needs_input_grad[0]:
            weight = Weight(*tensors, *ctx.layout)
            with held(ctx.forced):
                dx = grouped_linear_4bit_dx(dy, offsets, in_features, batch_invariant, weight)
        if ctx.needs_input_grad[1]:
            dbias = sums_by_expert(dy, offsets)
        return dx, dbias, *_NO_GRADIENTS


class GroupedLinear4bitDx(Function):
    """The op ``grouped_linear_4bit_dx``, with the weight's fields last."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        unused: None,
        offsets: Tensor,
        in_features: int,
        batch_invariant: bool | None,
        *weight: Any,
    ) -> Tensor:
        """Run the op; save offsets and packed weight when a gradient will need them."""
        _save(ctx, dy, offsets, batch_invariant, weight)
        return call(
            "grouped_linear_4bit_dx", dy, Weight(*weight), in_features, offsets, batch_invariant
        )

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``dy``, where needed."""
        ddy = None
        if ctx.needs_input_grad[0]:
            offsets, *tensors = ctx.saved_tensors
            out_features, batch_invariant = ctx.static
            weight = Weight(*tensors, *ctx.layout)
            with held(ctx.forced):
                ddy = grouped_linear_4bit(ddx, None, offsets, out_features, batch_invariant, weight)
        return ddy, None, *_NO_GRADIENTS


def _save(
    ctx: Any, x: Tensor, offsets: Tensor, batch_invariant: bool | None, weight: Sequence[Any]
) -> None:
    """What gradients need, if any is needed; ``x`` itself is not."""
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    if needs_x or needs_bias:
        ctx.save_for_backward(offsets, *(weight[:5] if needs_x else ()))
        ctx.layout = weight[5:]
        ctx.static = (x.shape[-1], batch_invariant)
        ctx.forced = forced()


# With tangents, in classes of their own: torch.compile takes no Function that has a jvp.


def _save_for_tangents(ctx: Any, others: Sequence[Any]) -> None:
    """Of the arguments after the first two: offsets, sizes, and the weight's fields."""
    ctx.save_for_forward(others[0], *others[3:8])
    ctx.of_tangents = others[1:3], others[8:]


def _arguments_of_tangents(ctx: Any) -> tuple[Any, ...]:
    offsets, *tensors = ctx.saved_tensors
    static, layout = ctx.of_tangents
    return (offsets, *static, *tensors, *layout)


class GroupedLinear4bitOfDuals(GroupedLinear4bit):
    """`GroupedLinear4bit` with forward-mode derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        """Run the op; save offsets and packed weight."""
        _save_for_tangents(ctx, others)
        return GroupedLinear4bit.forward(ctx, x, bias, *others)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        """The same map of the tangents of ``x`` and ``bias``."""
        return GroupedLinear4bitOfDuals.apply(x, bias, *_arguments_of_tangents(ctx))


class GroupedLinear4bitDxOfDuals(GroupedLinear4bitDx):
    """`GroupedLinear4bitDx` with forward-mode derivatives."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, unused: None, *others: Any) -> Tensor:
        """Run the op; save offsets and packed weight."""
        _save_for_tangents(ctx, others)
        return GroupedLinear4bitDx.forward(ctx, dy, unused, *others)

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, *others: Any) -> Tensor:
        """The same map of the tangent of ``dy``."""
        return GroupedLinear4bitDxOfDuals.apply(dy, None, *_arguments_of_tangents(ctx))


class LoRAGroupedLinear4bit(Function):
    """The op ``grouped_linear_4bit_add`` with an adapter for each expert as its term.

    ``x`` and ``adapter_input`` are ``[M, in_features]`` of one dtype; ``adapter_input`` None stands
    for ``x`` (no dropout). ``lora_a`` ``[E, r, in_features]`` and ``lora_b`` ``[E, out_features,
    r]`` are float32. The other arguments are those of `GroupedLinear4bit`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        adapter_input: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        out_features: int,
        scaling: float,
        batch_invariant: bool | None,
        *weight: Any,
    ) -> Tensor:
        """Run the op; save the adapter's input, ``h``, A, B, the offsets and the packed weight."""
        kept = x if adapter_input is None else adapter_input
        y, hidden = lora_product(
            *(x, kept, lora_a, lora_b, bias, offsets, out_features, scaling, batch_invariant),
            Weight(*weight),
        )
        trained = any(ctx.needs_input_grad[2:4])  # a frozen adapter keeps no activation
        adapter = (kept, hidden) if trained else (None, None)
        ctx.save_for_backward(*adapter, lora_a, lora_b, offsets, *weight[:5])
        ctx.layout = weight[5:]
        ctx.static = (x.shape[-1], scaling, batch_invariant)
        ctx.forced, ctx.shared_input = forced(), adapter_input is None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``adapter_input``, ``lora_a``, ``lora_b`` and ``bias``."""
        with no_autocast(dy.device.type), held(ctx.forced):
            found = LoRAGroupedLinear4bit._gradients(ctx, dy)
        return *found, None, *_NO_GRADIENTS

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, hidden, lora_a, lora_b, offsets, *tensors = ctx.saved_tensors
        in_features, scaling, batch_invariant = ctx.static
        needs_x, needs_input, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:5]
        weight = Weight(*tensors, *ctx.layout)
        dx = dinput = da = db = None
        graph = is_differentiated()
        multiply = differentiable_product if graph else product
        outer = differentiable_outer if graph else outer_product
        if needs_b:
            if graph:
                hidden = multiply(kept, lora_a.mT, offsets)  # the saved one is no function of both
            # The transpose of dy.T @ hidden: a product with few rows is faster than a narrow one.
            db = outer(hidden, dy, offsets, scaling).mT
        shares = needs_x and ctx.shared_input
        if needs_a or needs_input or shares:
            dhidden = multiply(dy, lora_b, offsets, scaling)
            if needs_a:
                da = outer(dhidden, kept, offsets)
            if needs_input:
                dinput = multiply(dhidden, lora_a, offsets).to(dy.dtype)
        if shares and not graph:
            term = offsets, dhidden, lora_a, 1.0, batch_invariant
            dx = call("grouped_linear_4bit_dx_add", dy, weight, in_features, *term)
        elif needs_x:
            dx = grouped_linear_4bit_dx(dy, offsets, in_features, batch_invariant, weight)
            if shares:
                dx = dx + multiply(dhidden, lora_a, offsets).to(dy.dtype)
        return dx, dinput, da, db, sums_by_expert(dy, offsets) if needs_bias else None


_FEW_ROWS = 16
"""Below, products of a few rows have kernels of their own, which add no term."""


def lora_product(
    x: Tensor,
    adapter_input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    scaling: float,
    batch_invariant: bool | None,
    weight: Weight,
) -> tuple[Tensor, Tensor]:
    """What `LoRAGroupedLinear4bit` computes, and ``h``: ``adapter_input @ lora_a.T`` by experts."""
    hidden = product(adapter_input, lora_a.mT, offsets)
    base = x, weight, out_features, offsets, bias
    if batch_invariant is False and len(x) < _FEW_ROWS:
        y = call("grouped_linear_4bit", *base, batch_invariant)
        call("grouped_matmul_into", y, hidden, lora_b.mT, offsets, scaling, True)
    else:
        term = hidden, lora_b.mT, scaling
        y = call("grouped_linear_4bit_add", *base, *term, batch_invariant)
    return y, hidden


def product(a: Tensor, b: Tensor, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha * a[rows] @ b[e]`` of each expert, float32 ``[M, n]``; zeros in rows of none."""
    out = a.new_empty(len(a), b.shape[2], dtype=torch.float32)
    call("grouped_matmul_into", out, a, b, offsets, alpha, False)
    return out


def outer_product(a: Tensor, b: Tensor, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha * a[rows].T @ b[rows]`` of each expert, float32 ``[E, k, n]``."""
    out = a.new_empty(len(offsets), a.shape[1], b.shape[1], dtype=torch.float32)
    call("grouped_matmul_into", out, a, b, offsets, alpha, False)
    return out


def differentiable_product(a: Tensor, b: Tensor, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    """`product` with derivatives of any order, expert by expert."""
    rows = groups(offsets, len(a))
    wide = a.to(b.dtype)
    parts = [wide[own] @ b[expert] for expert, own in enumerate(rows)]
    parts.append(wide.new_zeros(len(a) - (rows[-1].stop if rows else 0), b.shape[2]))
    return torch.cat(parts) * alpha


def differentiable_outer(a: Tensor, b: Tensor, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    """`outer_product` with derivatives of any order, expert by expert."""
    rows = groups(offsets, len(a))
    return torch.stack([a[own].float().mT @ b[own].float() for own in rows]) * alpha


def recorded_grouped_linear_4bit(*args: Any) -> Tensor:
    """The op with derivatives; arguments as of `GroupedLinear4bit`."""
    kind = GroupedLinear4bitOfDuals if forward_derivatives() else GroupedLinear4bit
    return kind.apply(*args)


def grouped_linear_4bit(
    x: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    batch_invariant: bool | None,
    weight: Weight,
) -> Tensor:
    """The op, with derivatives where gradients are differentiated in turn."""
    if is_differentiated():
        return recorded_grouped_linear_4bit(
            x, bias, offsets, out_features, batch_invariant, *weight
        )
    return call("grouped_linear_4bit", x, weight, out_features, offsets, bias, batch_invariant)


def grouped_linear_4bit_dx(
    dy: Tensor, offsets: Tensor, in_features: int, batch_invariant: bool | None, weight: Weight
) -> Tensor:
    """The op of the input gradient, likewise."""
    if is_differentiated():
        kind = GroupedLinear4bitDxOfDuals if forward_derivatives() else GroupedLinear4bitDx
        return kind.apply(dy, None, offsets, in_features, batch_invariant, *weight)
    return call("grouped_linear_4bit_dx", dy, weight, in_features, offsets, batch_invariant)


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Of each row the expert, int64 ``[rows]``; E for those of none."""
    return torch.searchsorted(
        offsets, torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True
    )


def sums_by_expert(values: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each expert's rows: ``[rows, N] -> [E, N]``."""
    expert, experts = expert_of_rows(offsets, len(values)), len(offsets)
    if values.is_cpu:
        sums = values.new_zeros(experts + 1, values.shape[1], dtype=torch.float32)
        return sums.index_add(0, expert, values.float())[:-1].to(values.dtype)
    # By a matmul, which sums in one order whatever runs beside it, as adding by index on a GPU
    # does not. Rows of none may hold anything, and zero times a NaN is one.
    chosen = expert == torch.arange(experts, device=offsets.device)[:, None]
    values = values.where((expert < experts)[:, None], 0)
    return chosen.to(values.dtype) @ values
