"""linear_4bit: y = x Wᵀ + bias on a 4-bit W, which is decoded a tile at a time.

With few rows of x there are few tiles of y, so K is split among programs: each writes a float32
part, and a second kernel adds the parts in order. No atomics: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import codec, launch, tune
from qkern.triton_kernels.codec import UNIT, decode_tile, load_offset
from qkern.weight import Weight


@triton.jit
def sum_terms(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset,
    map_ptr,
    table_ptr,
    x_rows,
    inside,
    columns,
    begin,
    end,
    N,
    K,
    unit_shift,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Float32 sums of the terms ``[begin, end)`` of a tile of x Wᵀ; ``begin`` starts a tile.

    ``x_rows`` points to the beginnings of the tile's rows, of which those ``inside`` exist.
    ``UPCAST`` multiplies in float32, for devices whose dot product has no such 16-bit type.
    """
    tl.static_assert(BLOCK_K // UNIT * UNIT == BLOCK_K)
    dtype: tl.constexpr = tl.float32 if UPCAST else x_rows.dtype.element_ty
    sum = tl.zeros((inside.shape[0], columns.shape[0]), tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        x = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k[None, :] < K), other=0.0)
        weight = decode_tile(
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset,
            map_ptr,
            table_ptr,
            columns,
            first,
            N,
            K,
            unit_shift,
            BLOCK_K,
            ALIGNED,
        )
        weight = tl.trans(weight.to(dtype))
        sum = tl.dot(x.to(dtype), weight, sum, input_precision="ieee")
    return sum


@triton.jit
def _linear_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    table_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    unit_shift,
    k_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of y, or of one of its parts ``[splits, M, N]``, which sum ``k_split`` terms each.

    Programs go through the rows of x first, so that those which run together share W in the cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    tile_m = program % tiles_m
    tile_n = program // tiles_m % tiles_n
    split = (program // tiles_m // tiles_n).to(tl.int64)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    sum = sum_terms(
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        load_offset(nested_offset_ptr),
        map_ptr,
        table_ptr,
        x_ptr + rows[:, None] * stride_xm,
        rows < M,
        columns,
        split * k_split,
        tl.minimum((split + 1) * k_split, K),
        N,
        K,
        unit_shift,
        BLOCK_K,
        ALIGNED,
        UPCAST,
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        sum += bias[None, :]
    y = y_ptr + (split * M + rows[:, None]) * N + columns[None, :]
    tl.store(y, sum.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _sum_parts_kernel(
    parts_ptr, bias_ptr, out_ptr, numel, N, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """``out`` of ``parts[PARTS, numel]``, added from first to last; its rows have N elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < numel
    sum = tl.load(parts_ptr + element, mask=mask, other=0.0)
    offset = element
    for _ in range(1, PARTS):
        offset += numel
        sum += tl.load(parts_ptr + offset, mask=mask, other=0.0)
    if bias_ptr is not None:
        sum += tl.load(bias_ptr + element % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, sum.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``parts`` ``[parts, M, N]``, added in order, and ``bias`` into ``out`` ``[M, N]``."""
    config = launch.SUM_PARTS
    _sum_parts_kernel[(triton.cdiv(out.numel(), config.elements),)](
        parts,
        bias,
        out,
        out.numel(),
        parts.shape[2],
        PARTS=parts.shape[0],
        BLOCK=config.elements,
        **config.options,
    )


def split_matmul(
    op: str,
    start_kernel: Callable[[int, Tensor, launch.Matmul], None],
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    target: launch.Target,
    batch_invariant: bool,
) -> None:
    """``x`` ``[M, depth]`` times a weight into ``out`` ``[M, columns]``, in parts where it pays.

    ``start_kernel`` starts so many programs, which write ``out`` or float32 parts of it.
    """
    rows, depth = x.shape
    columns = out.shape[1]

    def start(config: launch.Matmul) -> None:
        parts = config.parts
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_out)
        if parts == 1:
            start_kernel(tiles, out, config)
            return
        sums = torch.empty((parts, *out.shape), dtype=torch.float32, device=x.device)
        start_kernel(tiles * parts, sums, config)
        sum_parts(sums, bias, out)

    start(tune.matmul(op, start, target, x.dtype, rows, columns, depth, batch_invariant))


def start_tiles(
    kernel: Any,
    programs: int,
    x: Tensor,
    weight: Weight,
    results: tuple[Tensor | int | None, ...],
    shape: tuple[int, int],
    blocks: tuple[int, int],
    config: launch.Matmul,
    **constants: bool,
) -> None:
    """Start the forward's kernel, or the input gradient's.

    ``shape`` is the weight's ``(N, K)`` and ``blocks`` the tile's; ``results`` is what the kernel
    takes between ``x`` and the sizes, ``constants`` what it takes beyond them.
    """
    N, K = shape
    kernel[(programs,)](
        *codec.pointers(weight),
        x,
        *results,
        x.shape[0],
        N,
        K,
        x.stride(0),
        codec.unit_shift(weight.block_size),
        config.depth_per_part,
        BLOCK_M=config.block_m,
        BLOCK_N=blocks[0],
        BLOCK_K=blocks[1],
        ALIGNED=K % UNIT.value == 0,
        UPCAST=config.upcast,
        **constants,
        **config.options,
    )


def linear_4bit(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    y: Tensor,
    target: launch.Target,
    batch_invariant: bool = False,
) -> None:
    """``x`` ``[M, K]``, of unit inner stride, times the ``[N, K]`` weight into ``y`` ``[M, N]``."""
    shape = y.shape[1], x.shape[1]

    def start(programs: int, out: Tensor, config: launch.Matmul) -> None:
        blocks = config.block_out, config.block_depth
        results = bias if config.parts == 1 else None, out
        start_tiles(_linear_4bit_kernel, programs, x, weight, results, shape, blocks, config)

    split_matmul("linear_4bit", start, x, bias, y, target, batch_invariant)
