"""grouped_linear_4bit: ``linear_4bit`` of each of several experts with its rows of x.

Where an expert's rows end is known on the device only. So there are programs for as many tiles of
rows as any offsets can make, each looks up which tile is its own, and those without one return.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qkern import formats
from qkern.triton_kernels import launch
from qkern.triton_kernels.codec import load_offset
from qkern.triton_kernels.linear_4bit import start_tiles, sum_terms
from qkern.weight import Weight

CHUNK = tl.constexpr(128)
"""Experts that a program looks at together: one a thread of the four warps that most tiles have."""


@triton.jit
def _later(begin_a, end_a, begin_b, end_b):
    return tl.maximum(begin_a, begin_b), tl.maximum(end_a, end_b)


@triton.jit
def find_rows(offsets_ptr, experts, M, tile, BLOCK_M: tl.constexpr):
    """Whose rows a tile has, and which: ``(expert, first, count)``.

    The tiles of an expert's rows come after those of the expert before. The last are those of the
    rows that no expert has, where ``expert`` is -1; a tile beyond these has a ``first`` from M on.

    An end counts as the one before where it is below that, and as M where it is above: every row is
    in one tile whatever the offsets are.
    """
    zero = (tile * 0).to(M.dtype)
    found, first, end = zero, zero, zero
    rows, tiles = zero, zero  # of the experts before the chunk
    for chunk in range(0, experts, CHUNK):
        expert = chunk + tl.arange(0, CHUNK)
        known = expert < experts
        begins_ptr = offsets_ptr + expert.to(tl.int64)
        begins = tl.load(begins_ptr - 1, mask=known & (expert > 0), other=0)
        ends = tl.load(begins_ptr, mask=known, other=0)
        begins = tl.minimum(tl.maximum(begins, 0), M).to(M.dtype)
        ends = tl.minimum(tl.maximum(ends, 0), M).to(M.dtype)
        begins, ends = tl.associative_scan((begins, ends), 0, _later)
        begins = tl.maximum(begins, rows)
        ends = tl.maximum(ends, rows)
        own_tiles = tl.where(known, tl.cdiv(ends - begins, BLOCK_M), 0)
        own = tile - (tiles + tl.cumsum(own_tiles, 0) - own_tiles)
        here = (own >= 0) & (own < own_tiles)
        found += tl.sum(tl.where(here, expert + 1, 0), 0)
        first += tl.sum(tl.where(here, begins + own * BLOCK_M, 0), 0)
        end += tl.sum(tl.where(here, ends, 0), 0)
        rows = tl.max(ends, 0)
        tiles += tl.sum(own_tiles, 0)
    rest = rows.to(tl.int64) + (tile - tiles).to(tl.int64) * BLOCK_M
    first = tl.where(found == 0, rest, first.to(tl.int64))
    count = tl.minimum(tl.where(found == 0, M, end) - first, BLOCK_M).to(tl.int32)
    return found.to(tl.int32) - 1, first, count


@triton.jit(do_not_specialize=["experts", "tiles_m", "M"])
def _grouped_linear_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    table_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    experts,
    tiles_m,
    packed_size,
    scales,
    nested_scales,
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
    SPLIT: tl.constexpr,
):
    """A tile of y, or nothing where all tiles have programs already.

    An expert has ``packed_size`` bytes of codes, ``scales`` scales and ``nested_scales`` of theirs.
    ``SPLIT`` sums ``k_split`` terms at a time and these parts in order: the bits are those that
    ``linear_4bit`` has of parts. The order of programs is that of ``_linear_4bit_kernel``.
    """
    program = tl.program_id(0)
    tile_n = program // tiles_m
    expert, first, count = find_rows(offsets_ptr, experts, M, program % tiles_m, BLOCK_M)
    if first >= M:
        return
    # Rows of no expert have no terms, nor a bias.
    terms = tl.where(expert < 0, 0, K)
    owner = tl.maximum(expert, 0).to(tl.int64)
    packed_ptr += owner * packed_size
    absmax_ptr += owner * scales
    if nested_absmax_ptr is not None:
        nested_absmax_ptr += owner * nested_scales
        nested_offset_ptr += owner
    offset = load_offset(nested_offset_ptr)
    x_ptr += first * stride_xm
    y_ptr += first * N
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    inside = rows < count
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + rows[:, None] * stride_xm

    if SPLIT:
        # The first part is added to negative zeros, which leave a zero of either sign as it is.
        sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) * tl.where(terms > 0, -1.0, 1.0)
        for begin in range(0, terms, k_split):
            part = sum_terms(
                packed_ptr,
                absmax_ptr,
                nested_absmax_ptr,
                offset,
                map_ptr,
                table_ptr,
                x_rows,
                inside,
                columns,
                begin,
                tl.minimum(begin + k_split, K),
                N,
                K,
                unit_shift,
                BLOCK_K,
                ALIGNED,
                UPCAST,
            )
            sum += part
    else:
        sum = sum_terms(
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            offset,
            map_ptr,
            table_ptr,
            x_rows,
            inside,
            columns,
            0,
            terms,
            N,
            K,
            unit_shift,
            BLOCK_K,
            ALIGNED,
            UPCAST,
        )
    if bias_ptr is not None:
        bias_ptr += owner * N
        end = tl.where(expert < 0, 0, N)
        bias = tl.load(bias_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
        sum += bias[None, :]
    y = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y, sum.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < N))


def start_grouped(
    kernel: Any,
    x: Tensor,
    weight: Weight,
    bias: tuple[Tensor | None, ...],
    offsets: Tensor,
    out: Tensor,
    shape: tuple[int, int],
    blocks: tuple[int, int],
    config: launch.Matmul,
) -> None:
    """Start the forward's kernel, or the input gradient's, which takes no ``bias``.

    ``shape`` is that of each weight; the other parameters are ``start_tiles``'s.
    """
    rows, experts = x.shape[0], offsets.shape[0]
    scales = formats.num_blocks(shape[0] * shape[1], weight.block_size)
    tiles_m = launch.most_tiles(rows, experts, config.block_m)
    start_tiles(
        kernel,
        tiles_m * triton.cdiv(out.shape[1], config.block_out),
        x,
        weight,
        (
            *(*bias, out, offsets, experts, tiles_m),
            *(formats.packed_size(shape[0] * shape[1]), scales),
            formats.num_blocks(scales, formats.NESTED_BLOCK_SIZE),
        ),
        shape,
        blocks,
        config,
        SPLIT=config.parts > 1,
    )


def grouped_linear_4bit(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    offsets: Tensor,
    y: Tensor,
    target: launch.Target,
    batch_invariant: bool = False,
) -> None:
    """``x`` ``[M, K]``, of unit inner stride, by the ``[N, K]`` weights into ``y`` ``[M, N]``.

    The rows up to ``offsets[e]``, int32 or int64, are expert e's, whose fields in ``weight`` and
    bias come after those of the experts before.
    """
    shape = y.shape[1], x.shape[1]
    config = launch.grouped(target, x.dtype, len(x), len(offsets), *shape, batch_invariant)
    blocks = config.block_out, config.block_depth
    start_grouped(
        _grouped_linear_4bit_kernel, x, weight, (bias,), offsets, y, shape, blocks, config
    )
