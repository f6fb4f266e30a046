"""dequantize_4bit: codes and scales, double-quantised or not, to values in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qkern.triton_kernels import codec, launch
from qkern.triton_kernels.codec import (
    UNIT,
    UNIT_BYTES,
    interleave_codes,
    load_offset,
    load_scales,
    look_up,
)
from qkern.weight import Weight


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    table_ptr,
    out_ptr,
    n,
    unit_shift,
    UNITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``UNITS`` units a program. ``WHOLE`` says that the last is not short: accesses stay wide."""
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    byte = unit[:, None] * UNIT_BYTES + tl.arange(0, UNIT_BYTES)[None, :]
    element = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    inside = unit * UNIT < n
    packed_mask = inside[:, None] if WHOLE else byte < (n + 1) // 2
    packed = tl.load(packed_ptr + byte, mask=packed_mask, other=0)
    offset = load_offset(nested_offset_ptr)
    scales = load_scales(absmax_ptr, nested_absmax_ptr, offset, map_ptr, unit >> unit_shift, inside)
    values = look_up(table_ptr, interleave_codes(packed), 16) * scales[:, None]
    out = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + element, out, mask=inside[:, None] if WHOLE else element < n)


def dequantize_4bit(weight: Weight, out: Tensor, target: launch.Target) -> None:
    """Values of ``weight`` into the contiguous, not empty ``out``."""
    n = out.numel()
    config = launch.codes(target)
    _dequantize_4bit_kernel[(triton.cdiv(n, config.elements),)](
        *codec.pointers(weight),
        out,
        n,
        codec.unit_shift(weight.block_size),
        UNITS=config.elements // UNIT.value,
        WHOLE=n % UNIT.value == 0,
        **config.options,
    )
