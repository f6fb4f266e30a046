"""dequantize_8bit: bytes, a map of 256 and block scales to values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import launch
from qkern.triton_kernels.codec import UNIT, look_up, unit_shift


@triton.jit
def _dequantize_8bit_kernel(
    codes_ptr,
    absmax_ptr,
    map_ptr,
    out_ptr,
    n,
    unit_shift,
    UNITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``UNITS`` runs of 32 elements a program; ``WHOLE`` says that the last is not short."""
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    element = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    inside = unit * UNIT < n
    mask = inside[:, None] if WHOLE else element < n
    codes = tl.load(codes_ptr + element, mask=mask, other=0)
    scales = tl.load(absmax_ptr + (unit >> unit_shift), mask=inside, other=0.0)
    values = look_up(map_ptr, codes, 256) * scales[:, None]
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, map: Tensor, block_size: int, out: Tensor, target: launch.Target
) -> None:
    """Values of the contiguous, not empty ``codes`` into ``out``."""
    n = codes.numel()
    config = launch.codes(target)
    _dequantize_8bit_kernel[(triton.cdiv(n, config.elements),)](
        codes,
        absmax,
        map,
        out,
        n,
        unit_shift(block_size),
        UNITS=config.elements // UNIT.value,
        WHOLE=n % UNIT.value == 0,
        **config.options,
    )
