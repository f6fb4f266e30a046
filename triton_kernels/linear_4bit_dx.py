"""linear_4bit_dx: dx = dy W on a 4-bit W, decoded a tile at a time; see ``linear_4bit``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import launch
from qkern.triton_kernels.codec import UNIT, decode_tile, load_offset
from qkern.triton_kernels.linear_4bit import split_matmul, start_tiles
from qkern.weight import Weight


@triton.jit
def sum_terms_dx(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset,
    map_ptr,
    table_ptr,
    dy_rows,
    inside,
    first,
    begin,
    end,
    N,
    K,
    unit_shift,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Float32 sums of the terms ``[begin, end)`` of a tile of dy W from column ``first`` on.

    The other parameters are those of ``sum_terms``.
    """
    tl.static_assert(BLOCK_K // UNIT * UNIT == BLOCK_K)
    dtype: tl.constexpr = tl.float32 if UPCAST else dy_rows.dtype.element_ty
    sum = tl.zeros((inside.shape[0], BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        dy = tl.load(dy_rows + n[None, :], mask=inside[:, None] & (n[None, :] < N), other=0.0)
        weight = decode_tile(
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset,
            map_ptr,
            table_ptr,
            n,
            first,
            N,
            K,
            unit_shift,
            BLOCK_K,
            ALIGNED,
        )
        sum = tl.dot(dy.to(dtype), weight.to(dtype), sum, input_precision="ieee")
    return sum


@triton.jit
def _linear_4bit_dx_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    table_ptr,
    dy_ptr,
    dx_ptr,
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
):
    """A tile of dx, or of one of its parts ``[splits, M, K]``, which sum ``n_split`` terms each.

    The order of programs is that of ``_linear_4bit_kernel``.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    tile_m = program % tiles_m
    first = (program // tiles_m % tiles_k).to(tl.int64) * BLOCK_K
    split = (program // tiles_m // tiles_k).to(tl.int64)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first + tl.arange(0, BLOCK_K)

    sum = sum_terms_dx(
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        load_offset(nested_offset_ptr),
        map_ptr,
        table_ptr,
        dy_ptr + rows[:, None] * stride_dym,
        rows < M,
        first,
        split * n_split,
        tl.minimum((split + 1) * n_split, N),
        N,
        K,
        unit_shift,
        BLOCK_N,
        BLOCK_K,
        ALIGNED,
        UPCAST,
    )
    dx = dx_ptr + (split * M + rows[:, None]) * K + columns[None, :]
    tl.store(dx, sum.to(dx_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < K))


def linear_4bit_dx(
    dy: Tensor,
    weight: Weight,
    dx: Tensor,
    target: launch.Target,
    batch_invariant: bool = False,
) -> None:
    """``dy`` ``[M, N]``, of unit inner stride, times the ``[N, K]`` weight: ``dx`` ``[M, K]``."""
    shape = dy.shape[1], dx.shape[1]

    def start(programs: int, out: Tensor, config: launch.Matmul) -> None:
        blocks = config.block_depth, config.block_out
        start_tiles(_linear_4bit_dx_kernel, programs, dy, weight, (out,), shape, blocks, config)

    split_matmul("linear_4bit_dx", start, dy, None, dx, target, batch_invariant)
