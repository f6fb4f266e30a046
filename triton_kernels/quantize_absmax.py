"""quantize_absmax, double quantisation: the scales' exact mean, then codes of the differences.

A float32 is an integer below 2**24 times 2**(bin - 149), with a bin from 0 to 253. Programs add
such integers up as *limbs* of 24 bits, so the sum is exact whatever the order, and one program
rounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern import formats
from qkern._tables import map_on
from qkern.triton_kernels import codec, launch
from qkern.triton_kernels.quantize_8bit import encode_bytes

_LIMB_BITS = tl.constexpr(24)
_LIMB_MASK = tl.constexpr((1 << 24) - 1)
_USED_LIMBS = tl.constexpr(14)
"""Limbs of all bins (0 to 11), and two for the carries of 2**38 terms: more than memory holds."""
_LIMBS = tl.constexpr(16)
_LEAST_EXPONENT = tl.constexpr(-149)
_KEPT_BITS = tl.constexpr(62)
"""Bits of the sum that are rounded to float64, the last of them standing for all that follow."""


@triton.jit
def _sum_kernel(absmax_ptr, limbs_ptr, n, BLOCK: tl.constexpr):
    """int64 ``limbs[program, 16]`` of the program's terms; the last counts what is not finite."""
    program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    limb = tl.arange(0, _LIMBS)
    sums = tl.zeros((_LIMBS,), tl.int64)
    for start in range(program * BLOCK, n, stride):
        offset = start + tl.arange(0, BLOCK)
        bits = tl.load(absmax_ptr + offset, mask=offset < n, other=0.0).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) & 0xFF
        normal = tl.where(exponent != 0, 1, 0)
        mantissa = ((bits & 0x7FFFFF) + (normal << 23)).to(tl.int64)
        finite = exponent != 0xFF
        bin = exponent - normal
        place = bin // _LIMB_BITS
        shifted = tl.where(finite, mantissa << (bin % _LIMB_BITS).to(tl.int64), 0)
        low = shifted & _LIMB_MASK
        high = shifted >> _LIMB_BITS
        low = tl.where(bits < 0, -low, low)
        high = tl.where(bits < 0, -high, high)
        for i in tl.static_range(12):
            term = tl.where(place == i, low, 0) + tl.where(place == i - 1, high, 0)
            sums += tl.where(limb == i, tl.sum(term, axis=0), 0)
        not_finite = tl.sum(tl.where(finite, 0, 1).to(tl.int64), axis=0)
        sums += tl.where(limb == _LIMBS - 1, not_finite, 0)
    tl.store(limbs_ptr + program * _LIMBS + limb, sums)


@triton.jit
def _digit(limbs, index):
    return tl.sum(tl.where(tl.arange(0, _LIMBS) == index, limbs, 0), axis=0)


@triton.jit
def _carried(limbs):
    """The same sum with limbs from 0 to 2**24 - 1, but for the last one, which has the sign."""
    place = tl.arange(0, _LIMBS)
    for i in tl.static_range(_USED_LIMBS - 1):
        digit = _digit(limbs, i)
        limbs += tl.where(place == i + 1, digit >> _LIMB_BITS, 0)
        limbs = tl.where(place == i, digit & _LIMB_MASK, limbs)
    return limbs


@triton.jit(do_not_specialize=["n"])
def _mean_kernel(limbs_ptr, offset_ptr, n, PROGRAMS: tl.constexpr):
    """The sum of all limbs, rounded once to float64, over n, rounded to float32."""
    place = tl.arange(0, _LIMBS)
    part = tl.arange(0, PROGRAMS)[:, None] * _LIMBS + place[None, :]
    limbs = tl.sum(tl.load(limbs_ptr + part), axis=0)
    not_finite = _digit(limbs, _LIMBS - 1)
    limbs = _carried(tl.where(place < _USED_LIMBS, limbs, 0))
    negative = _digit(limbs, _USED_LIMBS - 1) < 0
    limbs = _carried(tl.where(negative, -limbs, limbs))

    top = tl.max(tl.where(limbs != 0, place, 0), axis=0)
    first = _digit(limbs, top)
    # A limb is exact in float32, whose exponent tells the number of its bits.
    width = ((first.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126).to(tl.int64)
    width = tl.maximum(width, 1)
    rest = (_digit(limbs, top - 2) << _LIMB_BITS) + _digit(limbs, top - 3)
    cut = width + (3 * _LIMB_BITS - _KEPT_BITS)
    kept = first << (_KEPT_BITS - width)
    kept += _digit(limbs, top - 1) << (_KEPT_BITS - _LIMB_BITS - width)
    kept += rest >> cut
    below = tl.sum(tl.where((place < top - 3) & (limbs != 0), 1, 0), axis=0)
    one = tl.full((), 1, tl.int64)
    kept = tl.where((below > 0) | ((rest & ((one << cut) - 1)) != 0), kept | 1, kept)

    exponent = top.to(tl.int64) * _LIMB_BITS + width + (_LEAST_EXPONENT - _KEPT_BITS)
    scale = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    total = kept.to(tl.float64) * scale
    mean = tl.where(negative, -total, total) / n.to(tl.float64)
    tl.store(offset_ptr, tl.where(not_finite == 0, mean.to(tl.float32), float("nan")))


def quantize_absmax(
    absmax: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    target: launch.Target,
) -> None:
    """Codes, second-level scales and offset of the contiguous, not empty ``absmax``."""
    n = absmax.numel()
    device = absmax.device
    config = launch.SUM
    # Whatever the order of these integer sums, the result is the same.
    limbs = torch.empty((config.programs, _LIMBS.value), dtype=torch.int64, device=device)
    _sum_kernel[(config.programs,)](absmax, limbs, n, BLOCK=config.elements, **config.options)
    _mean_kernel[(1,)](limbs, nested_offset, n, PROGRAMS=config.programs, **launch.MEAN.options)
    encode_bytes(
        absmax,
        nested_offset,
        map_on("signed", device),
        codec.dynamic_thresholds("signed", device),
        formats.NESTED_BLOCK_SIZE,
        codes,
        nested_absmax,
        target,
    )
