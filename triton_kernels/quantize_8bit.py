"""quantize_8bit: blocks of 32 to 16384 values to a byte each, by a map of 256, and an absmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import codec, launch
from qkern.triton_kernels.codec import (
    UNIT,
    block_reciprocal,
    count_below,
    largest_magnitude,
    magnitude_bits,
)


@triton.jit
def _least_codes(map_ptr, nested_absmax, offset):
    """For each group the smallest code that restores to no negative scale, or the last."""
    # Restored values ascend with the code, since rounding keeps an order.
    map = tl.load(map_ptr + tl.arange(0, 256))
    restored = map[None, :] * nested_absmax[:, None] + offset
    return tl.minimum(tl.sum(tl.where(restored < 0.0, 1, 0), axis=1), 255)


@triton.jit
def _load_piece(
    x_ptr,
    offset_ptr,
    block,
    first,
    n,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``(x, element, mask)`` of each block from its element ``first`` on, without the offset.

    What lies outside the mask is 0, which no block's absmax notices.
    """
    element = block[:, None] * BLOCK_SIZE + (first + tl.arange(0, PIECE))[None, :]
    inside = block * BLOCK_SIZE < n
    mask = inside[:, None] if WHOLE else element < n
    x = tl.load(x_ptr + element, mask=mask, other=0.0).to(tl.float32)
    if offset_ptr is not None:
        x = tl.where(mask, x - tl.load(offset_ptr), 0.0)
    return x, element, mask


@triton.jit
def _quantize_8bit_kernel(
    x_ptr,
    offset_ptr,
    map_ptr,
    thresholds_ptr,
    codes_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``BLOCKS`` blocks a program, ``PIECE`` elements of each at a time.

    With an offset, of scales: of ``x - offset``, by codes that ``map`` restores to none below zero.
    """
    tl.static_assert(PIECE // UNIT * UNIT == PIECE)
    tl.static_assert(BLOCK_SIZE // PIECE * PIECE == BLOCK_SIZE)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    x, element, mask = _load_piece(x_ptr, offset_ptr, block, 0, n, BLOCK_SIZE, PIECE, WHOLE)
    bits = magnitude_bits(x)
    for first in range(PIECE, BLOCK_SIZE, PIECE):
        piece, _, _ = _load_piece(x_ptr, offset_ptr, block, first, n, BLOCK_SIZE, PIECE, WHOLE)
        bits = tl.maximum(bits, magnitude_bits(piece))
    absmax = largest_magnitude(bits)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < n)
    reciprocal = block_reciprocal(absmax)[:, None]
    for first in range(0, BLOCK_SIZE, PIECE):
        # A long block is read again, from the cache, rather than held in registers.
        if PIECE < BLOCK_SIZE:
            x, element, mask = _load_piece(
                x_ptr, offset_ptr, block, first, n, BLOCK_SIZE, PIECE, WHOLE
            )
        codes = count_below(thresholds_ptr, x * reciprocal, 8)
        if offset_ptr is not None:
            least = _least_codes(map_ptr, absmax, tl.load(offset_ptr))
            codes = tl.maximum(codes, least[:, None])
        tl.store(codes_ptr + element, codes.to(tl.uint8), mask=mask)


def encode_bytes(
    x: Tensor,
    offset: Tensor | None,
    map: Tensor | None,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    absmax: Tensor,
    target: launch.Target,
) -> None:
    """Codes of the contiguous, not empty ``x`` by ``codec.byte_thresholds``.

    ``offset`` and ``map`` come with scales: see the kernel.
    """
    n = x.numel()
    config = launch.codes(target)
    blocks = max(1, config.elements // block_size)
    _quantize_8bit_kernel[(triton.cdiv(n, blocks * block_size),)](
        x,
        offset,
        map,
        thresholds,
        codes,
        absmax,
        n,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
        PIECE=min(block_size, config.elements),
        WHOLE=n % block_size == 0,
        **config.options,
    )


def quantize_8bit(
    x: Tensor, map: Tensor, block_size: int, codes: Tensor, absmax: Tensor, target: launch.Target
) -> None:
    """Codes of the contiguous, not empty ``x`` by an ascending ``map``, scales into ``absmax``."""
    encode_bytes(x, None, None, codec.byte_thresholds(map), block_size, codes, absmax, target)
