"""quantize_4bit: blocks of 32 to 16384 values to 4-bit codes and a float32 absmax each."""

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
    look_up,
    magnitude_bits,
)


@triton.jit
def _load_piece(
    x_ptr,
    block,
    first,
    n,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Float32 ``[len(block), PIECE]``, each block from its element ``first`` on; 0 outside."""
    element = block[:, None] * BLOCK_SIZE + (first + tl.arange(0, PIECE))[None, :]
    mask = (block * BLOCK_SIZE < n)[:, None] if WHOLE else element < n
    return tl.load(x_ptr + element, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    thresholds_ptr,
    codes_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
    SIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``BLOCKS`` blocks a program, ``PIECE`` elements of each at a time.

    ``SIGNED`` codes are a sign and a magnitude's code. ``WHOLE`` says that the last block is not
    short, so that masks leave accesses wide.
    """
    tl.static_assert(PIECE // UNIT * UNIT == PIECE)
    tl.static_assert(BLOCK_SIZE // PIECE * PIECE == BLOCK_SIZE)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    first_byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, PIECE // 2)[None, :]
    inside = block * BLOCK_SIZE < n
    x = _load_piece(x_ptr, block, 0, n, BLOCK_SIZE, PIECE, WHOLE)
    bits = magnitude_bits(x)
    for first in range(PIECE, BLOCK_SIZE, PIECE):
        piece = _load_piece(x_ptr, block, first, n, BLOCK_SIZE, PIECE, WHOLE)
        bits = tl.maximum(bits, magnitude_bits(piece))
    absmax = largest_magnitude(bits)
    tl.store(absmax_ptr + block, absmax, mask=inside)
    reciprocal = block_reciprocal(absmax)[:, None]
    for first in range(0, BLOCK_SIZE, PIECE):
        # A long block is read again, from the cache, rather than held in registers.
        if PIECE < BLOCK_SIZE:
            x = _load_piece(x_ptr, block, first, n, BLOCK_SIZE, PIECE, WHOLE)
        t = x * reciprocal
        codes = look_up(codes_ptr, count_below(thresholds_ptr, tl.abs(t) if SIGNED else t, 4), 16)
        if SIGNED:
            codes += tl.where(x < 0.0, 8, 0)
        high, low = tl.split(tl.reshape(codes, (BLOCKS, PIECE // 2, 2)))
        packed = (high * 16 + low).to(tl.uint8)
        byte = first_byte + first // 2
        tl.store(packed_ptr + byte, packed, mask=inside[:, None] if WHOLE else byte < (n + 1) // 2)


def quantize_4bit(
    x: Tensor,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    packed: Tensor,
    absmax: Tensor,
    target: launch.Target,
) -> None:
    """Codes of the contiguous, not empty ``x`` into ``packed``, scales into ``absmax``."""
    n = x.numel()
    thresholds, codes = codec.encode_tables(format, codebook, x.device)
    config = launch.codes(target)
    blocks = max(1, config.elements // block_size)
    _quantize_4bit_kernel[(triton.cdiv(n, blocks * block_size),)](
        x,
        thresholds,
        codes,
        packed,
        absmax,
        n,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
        PIECE=min(block_size, config.elements),
        SIGNED=format == "fp4",
        WHOLE=n % block_size == 0,
        **config.options,
    )
