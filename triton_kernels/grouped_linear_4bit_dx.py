"""grouped_linear_4bit_dx: dx = dy W of each of several experts; see ``grouped_linear_4bit``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import launch
from qkern.triton_kernels.codec import load_offset
from qkern.triton_kernels.grouped_linear_4bit import find_rows, start_grouped
from qkern.triton_kernels.linear_4bit_dx import sum_terms_dx
from qkern.weight import Weight


@triton.jit(do_not_specialize=["experts", "tiles_m", "M"])
def _grouped_linear_4bit_dx_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    table_ptr,
    dy_ptr,
    dx_ptr,
    offsets_ptr,
    experts,
    tiles_m,
    packed_size,
    scales,
    nested_scales,
    M,
    N,
    K,
    stride_dym,
    unit_shift,
    n_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile of dx, or nothing; see ``_grouped_linear_4bit_kernel``."""
    program = tl.program_id(0)
    column = (program // tiles_m).to(tl.int64) * BLOCK_K
    expert, first, count = find_rows(offsets_ptr, experts, M, program % tiles_m, BLOCK_M)
    if first >= M:
        return
    # Rows of no expert have no terms.
    terms = tl.where(expert < 0, 0, N)
    owner = tl.maximum(expert, 0).to(tl.int64)
    packed_ptr += owner * packed_size
    absmax_ptr += owner * scales
    if nested_absmax_ptr is not None:
        nested_absmax_ptr += owner * nested_scales
        nested_offset_ptr += owner
    offset = load_offset(nested_offset_ptr)
    dy_ptr += first * stride_dym
    dx_ptr += first * K
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    inside = rows < count
    columns = column + tl.arange(0, BLOCK_K)
    dy_rows = dy_ptr + rows[:, None] * stride_dym

    if SPLIT:
        # The first part is added to negative zeros, which leave a zero of either sign as it is.
        sum = tl.zeros((BLOCK_M, BLOCK_K), tl.float32) * tl.where(terms > 0, -1.0, 1.0)
        for begin in range(0, terms, n_split):
            part = sum_terms_dx(
                packed_ptr,
                absmax_ptr,
                nested_absmax_ptr,
                offset,
                map_ptr,
                table_ptr,
                dy_rows,
                inside,
                column,
                begin,
                tl.minimum(begin + n_split, N),
                N,
                K,
                unit_shift,
                BLOCK_N,
                BLOCK_K,
                ALIGNED,
                UPCAST,
            )
            sum += part
    else:
        sum = sum_terms_dx(
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            offset,
            map_ptr,
            table_ptr,
            dy_rows,
            inside,
            column,
            0,
            terms,
            N,
            K,
            unit_shift,
            BLOCK_N,
            BLOCK_K,
            ALIGNED,
            UPCAST,
        )
    dx = dx_ptr + rows[:, None] * K + columns[None, :]
    tl.store(dx, sum.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < K))


def grouped_linear_4bit_dx(
    dy: Tensor,
    weight: Weight,
    offsets: Tensor,
    dx: Tensor,
    target: launch.Target,
    batch_invariant: bool = False,
) -> None:
    """``dy`` ``[M, N]``, of unit inner stride, by the ``[N, K]`` weights: ``dx`` ``[M, K]``."""
    shape = dy.shape[1], dx.shape[1]
    config = launch.grouped(target, dy.dtype, len(dy), len(offsets), *shape[::-1], batch_invariant)
    blocks = config.block_depth, config.block_out
    kernel = _grouped_linear_4bit_dx_kernel
    start_grouped(kernel, dy, weight, (), offsets, dx, shape, blocks, config)
