"""What stands in for bitsandbytes' `matmul_4bit` and its autograd Function.

Theirs make the dense weight in forward and in backward; these multiply by the 4-bit codes in both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qkern.functional import autocast, autocast_enabled, linear_by_weight
from qkern.integrations import _bnb_ops
from qkern.ops import _dispatch_modes, _is_dynamo_compiling

devices: tuple[str, ...] = ()
"""The device types that are enabled. On others bitsandbytes' own code runs."""

own_matmul_4bit: Any = None
"""bitsandbytes' `matmul_4bit`, once it was replaced."""

own_function: Any = None
"""bitsandbytes' autograd Function `MatMul4Bit`, likewise."""


def _is_traced() -> bool:
    """Whether tensors may have no values to look at."""
    return bool(_is_dynamo_compiling() or _dispatch_modes())


class Product(Function):
    """``A @ W.T + bias`` by the op `gemm_4bit`.

    For tracers, which see the ops only, and for scales that qkern's kernels cannot decode: those
    the ops decode, in each pass, so that no pass keeps them. Nothing dense is saved, nor ``A``.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, layout: Any, *tensors: Any) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        _save(ctx, layout, tensors)
        return _gemm(A, bias, layout, tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``A`` and ``bias``, where needed."""
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, ctx.layout, ctx.saved_tensors)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(tuple(range(dy.dim() - 1))) if dy.dim() > 1 else dy
        return dx, dbias, *_NO_GRADIENTS


class InputGradient(Function):
    """``dy @ W`` by the op `gemm_4bit_dx`."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, layout: Any, *tensors: Any) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        _save(ctx, layout, tensors)
        return _gemm_dx(dy, layout, tensors)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``dy``: the map is linear, so it is the forward again."""
        ddy = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():
                ddy = Product.apply(ddx, None, ctx.layout, *ctx.saved_tensors)
            else:
                ddy = _gemm(ddx, None, ctx.layout, ctx.saved_tensors)
        return ddy, *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 6
"""Of the layout and the five tensors of a weight."""


def _save(ctx: Any, layout: Any, tensors: Sequence[Any]) -> None:
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*tensors)
        ctx.layout = layout


def _input_gradient(dy: Tensor, layout: Any, tensors: Sequence[Any]) -> Tensor:
    if torch.is_grad_enabled():  # gradients are differentiated in turn
        return InputGradient.apply(dy, layout, *tensors)
    return _gemm_dx(dy, layout, tensors)


def _gemm(A: Tensor, bias: Tensor | None, layout: Any, tensors: Sequence[Any]) -> Tensor:
    shape, blocksize, quant_type = layout
    stored, absmax, *nested = tensors
    op = torch.ops.bitsandbytes.gemm_4bit.default
    return op(A, stored, shape, absmax, blocksize, quant_type, bias, *nested)


def _gemm_dx(dy: Tensor, layout: Any, tensors: Sequence[Any]) -> Tensor:
    shape, blocksize, quant_type = layout
    stored, absmax, *nested = tensors
    op = torch.ops.qkern_bitsandbytes.gemm_4bit_dx.default
    return op(dy, stored, shape, absmax, blocksize, quant_type, *nested)


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: Any,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The function of that name of bitsandbytes, with the weight in 4 bits in forward and backward.

    ``A`` is ``[..., in_features]``, ``quant_state.shape`` is ``[out_features, in_features]``.
    Returns ``[..., out_features]`` in ``A``'s dtype, under autocast in that one's; or ``out``,
    which then has the result.
    """
    if not (isinstance(A, Tensor) and A.device.type in devices) or quant_state is None:
        return own_matmul_4bit(A, B, quant_state, out=out, bias=bias)
    if len(quant_state.shape) != 2:
        raise ValueError(
            f"quant_state: got shape {list(quant_state.shape)}; takes two sizes, "
            "[out_features, in_features]"
        )
    B, quant_state = _usual(B, quant_state)
    result = _product(A, B, quant_state, bias)
    if out is None:
        return result
    if out.shape != result.shape:
        raise ValueError(f"out: got shape {list(out.shape)}; takes {list(result.shape)}")
    out.copy_(result)
    return out


class MatMul4Bit:
    """For code that took bitsandbytes' `matmul_4bit` before it was replaced, which calls this."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: Any = None,
    ) -> Tensor:
        """The product, in the order of arguments of bitsandbytes' Function."""
        if A.device.type in devices:
            return matmul_4bit(A, B, quant_state, out=out, bias=bias)
        return own_function.apply(A, B, out, bias, quant_state)


def _product(A: Tensor, B: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    shape = state.shape
    if A.dim() and A.shape[-1] == shape[0] != shape[1]:
        return _transposed_product(A, B, state, bias)
    known = not _is_traced() and (
        not state.nested
        or state.state2.blocksize != _bnb_ops.NESTED_BLOCK_SIZE
        or _bnb_ops.is_own_map(state.state2.code)
    )
    if known:
        with torch._C.DisableTorchFunctionSubclass():  # of Params4bit, which takes its time
            stored, absmax, absmax_8bit, code, offset = _tensors(B, state)
            layout = state.blocksize, state.quant_type
            weight = _bnb_ops.weight(stored, absmax, *layout, absmax_8bit, code, offset, shape)
        return linear_by_weight(A, weight, shape, bias)
    if autocast_enabled(A):
        A, bias = autocast(A, bias)
    return Product.apply(A, bias, _layout(state), *_tensors(B, state))


def _transposed_product(A: Tensor, B: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    """``A @ W + bias`` by a weight that was quantised as ``[in_features, out_features]``."""
    if not _is_dynamo_compiling():
        warnings.warn(
            f"quant_state: got shape {list(state.shape)}, which is [in_features, out_features]; "
            "bitsandbytes takes it for the last time: quantise the transposed weight",
            DeprecationWarning,
            stacklevel=4,
        )
    if autocast_enabled(A):
        A, bias = autocast(A, bias)
    if bias is None:
        return InputGradient.apply(A, _layout(state), *_tensors(B, state))
    # Rounded once, after the bias is added.
    product = InputGradient.apply(A.float(), _layout(state), *_tensors(B, state))
    return (product + bias).to(A.dtype)


def _layout(state: Any) -> tuple[tuple[int, ...], int, str]:
    return tuple(state.shape), state.blocksize, state.quant_type


def _tensors(B: Tensor, state: Any) -> tuple[Any, ...]:
    """The codes, and the four tensors of scales as `gemm_4bit` takes them."""
    stored = B.data if not _is_dynamo_compiling() else B.view(-1, 1)
    if not state.nested:
        return stored, state.absmax, None, None, None
    inner = state.state2
    if inner.blocksize == _bnb_ops.NESTED_BLOCK_SIZE:
        return stored, inner.absmax, state.absmax, inner.code, state.offset
    from bitsandbytes.functional import dequantize_blockwise

    return stored, dequantize_blockwise(state.absmax, inner) + state.offset, None, None, None


def _usual(B: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A weight that was packed for CPU inference before, as it was; others as they are."""
    if not getattr(state, "packing_format_for_cpu", False):
        return B, state
    from bitsandbytes.nn.modules import Params4bit

    if isinstance(B, Params4bit) and B.quant_state is state:
        B.data, _ = unpack(B.data, state)
        return B, state
    # Somebody else holds the state with the packed codes.
    stored, state = unpack(B, copy.copy(state))
    return stored, state


def unpack(packed_weight: Tensor, quant_state: Any, block_n: int = 32) -> tuple[Tensor, Any]:
    """Undo bitsandbytes' packing for CPU inference: the usual codes; and ``quant_state``, changed.

    The scales are what they were rounded to, in float32 and no longer quantised themselves: what
    the weight computed since it was packed, it computes still. Warns that they are rounded.
    """
    shape = tuple(quant_state.shape)
    stored = _bnb_ops.unpacked_codes(packed_weight, shape)
    stored = stored.view(quant_state.original_qshape)
    if storage := getattr(quant_state, "original_storage_type", None):
        stored = stored.view(storage)
    quant_state.absmax = _bnb_ops.flat_scales(quant_state.absmax, shape, quant_state.blocksize)
    quant_state.nested, quant_state.state2, quant_state.offset = False, None, None
    quant_state.dtype = quant_state.original_dtype
    quant_state.packing_format_for_cpu = False
    warnings.warn(
        f"weight: got one of shape {list(shape)} that bitsandbytes packed for CPU inference before "
        "qkern.integrations.bitsandbytes.enable(); it is unpacked, but its scales stay rounded to "
        "bfloat16. Enable before the first forward, or load the weight again",
        stacklevel=2,
    )
    return stored, quant_state
