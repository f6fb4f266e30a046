"""grouped_matmul_into: dense products by experts, of which one side is narrow, as adapters' are.

Factors of any dtypes and strides are multiplied in float32. Which rows are whose only the device
knows: see ``grouped_linear_4bit``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import launch
from qkern.triton_kernels.grouped_linear_4bit import CHUNK, find_rows


@triton.jit
def rows_of(offsets_ptr, M, expert):
    """``(first, count)`` of an expert's rows, by the rules of ``find_rows``."""
    first = (expert * 0).to(M.dtype)
    for chunk in range(0, expert, CHUNK):
        before = chunk + tl.arange(0, CHUNK)
        ends = tl.load(offsets_ptr + before.to(tl.int64), mask=before < expert, other=0)
        ends = tl.minimum(tl.maximum(ends, 0), M).to(M.dtype)
        first = tl.maximum(first, tl.max(ends, 0))
    end = tl.load(offsets_ptr + expert.to(tl.int64))
    end = tl.minimum(tl.maximum(end, 0), M).to(M.dtype)
    return first.to(tl.int64), tl.maximum(end - first, 0)


@triton.jit(do_not_specialize=["experts", "tiles_m", "M"])
def _grouped_matmul_into_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    offsets_ptr,
    experts,
    tiles_m,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_be,
    stride_bk,
    stride_bn,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWN_RESULTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """A tile of out, or nothing where all tiles have programs already.

    Experts share the ``M`` rows of a, ``[M, K]``. Out is ``[M, N]``, the products with b ``[E, K,
    N]``; with ``OWN_RESULTS`` it is ``[E, K, N]``, the products of a transposed with b ``[M, N]``.
    """
    program = tl.program_id(0)
    tile = program % tiles_m
    columns = (program // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if OWN_RESULTS:
        tiles_k = tl.cdiv(K, BLOCK_M)
        expert = tile // tiles_k
        row = (tile % tiles_k).to(tl.int64) * BLOCK_M
        first, terms = rows_of(offsets_ptr, M, expert)
        count = K - row
        a_ptr += first * stride_am
        b_ptr += first * stride_bk
        out_ptr += expert.to(tl.int64) * K * N
        stride_row, stride_term = stride_ak, stride_am
    else:
        expert, row, count = find_rows(offsets_ptr, experts, M, tile, BLOCK_M)
        if row >= M:
            return
        # Rows of no expert have no terms.
        terms = tl.where(expert < 0, 0, K)
        b_ptr += tl.maximum(expert, 0).to(tl.int64) * stride_be
        stride_row, stride_term = stride_am, stride_ak
    if ACCUMULATE and terms == 0:  # also a negative zero stays
        return
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    inside = rows[:, None] < count
    rows = row + rows[:, None]
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, terms, BLOCK_K):
        term = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(
            a_ptr + rows * stride_row + term[None, :] * stride_term,
            mask=inside & (term[None, :] < terms),
            other=0.0,
        )
        b = tl.load(
            b_ptr + term[:, None] * stride_bk + columns[None, :] * stride_bn,
            mask=(term[:, None] < terms) & (columns[None, :] < N),
            other=0.0,
        )
        sum = tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    # Without terms it is a zero whatever alpha is.
    sum *= tl.where(terms == 0, 0.0, alpha)
    out = out_ptr + rows * N + columns[None, :]
    mask = inside & (columns[None, :] < N)
    if ACCUMULATE:
        sum += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, sum.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    alpha: float,
    accumulate: bool,
    target: launch.Target,
) -> None:
    """``out = alpha * a[rows] @ b[e]``, or ``out[e] = alpha * a[rows].T @ b[rows]``, or added to.

    ``out`` is contiguous, ``a`` ``[M, K]``; the rows up to ``offsets[e]`` are expert e's.
    """
    (M, K), N, experts = a.shape, out.shape[-1], len(offsets)
    own_results = b.dim() == 2
    config = launch.into(target, own_results, K if own_results else M, N)
    if own_results:
        tiles_m = experts * triton.cdiv(K, config.block_m)
    else:
        tiles_m = launch.most_tiles(M, experts, config.block_m)
    _grouped_matmul_into_kernel[(tiles_m * triton.cdiv(N, config.block_out),)](
        *(a, b, out, offsets, experts, tiles_m, M, N, K, *a.stride()),
        *(b.stride(0) if b.dim() == 3 else 0, *b.stride()[-2:], alpha),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_out,
        BLOCK_K=config.block_depth,
        OWN_RESULTS=own_results,
        ACCUMULATE=accumulate,
        **config.options,
    )
