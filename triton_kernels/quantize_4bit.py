"""quantize_4bit: blocks of 32 to 4096 values to 4-bit codes and a float32 absmax each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import codec, launch
from qkern.triton_kernels.codec import UNIT, block_absmax, block_reciprocal, count_below, look_up


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
    SIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``BLOCKS`` blocks a program.

    ``SIGNED`` codes are a sign and a magnitude's code. ``WHOLE`` says that the last block is not
    short, so that masks leave accesses wide.
    """
    tl.static_assert(BLOCK_SIZE // UNIT * UNIT == BLOCK_SIZE)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    inside = block * BLOCK_SIZE < n
    x = tl.load(x_ptr + element, mask=inside[:, None] if WHOLE else element < n, other=0.0)
    x = x.to(tl.float32)
    absmax = block_absmax(x)
    tl.store(absmax_ptr + block, absmax, mask=inside)
    t = x * block_reciprocal(absmax)[:, None]
    codes = look_up(codes_ptr, count_below(thresholds_ptr, tl.abs(t) if SIGNED else t, 4), 16)
    if SIGNED:
        codes += tl.where(x < 0.0, 8, 0)
    high, low = tl.split(tl.reshape(codes, (BLOCKS, BLOCK_SIZE // 2, 2)))
    packed = (high * 16 + low).to(tl.uint8)
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
        SIGNED=format == "fp4",
        WHOLE=n % block_size == 0,
        **config.options,
    )
