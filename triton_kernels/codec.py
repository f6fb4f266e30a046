"""What a code stands for: the tables on a device, and the device functions that read them.

The tables are those of ``qkern.formats``. Kernels take them as pointers, so that one kernel serves
every format. A *unit* is 32 elements, the smallest block: 16 bytes of codes, which is one access,
under one scale. Every larger block is a whole number of units.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern import formats, reference
from qkern._tables import kept_on_device, map_on
from qkern.weight import Weight

UNIT = tl.constexpr(formats.MIN_BLOCK_SIZE)
UNIT_BYTES = tl.constexpr(formats.MIN_BLOCK_SIZE // 2)

_NESTED_SHIFT = tl.constexpr(formats.NESTED_BLOCK_SIZE.bit_length() - 1)
_QUIET_NAN_BITS = tl.constexpr(0x7FC00000)
_INF_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


def unit_shift(block_size: int) -> int:
    """Base-2 logarithm of the units in a block."""
    return block_size.bit_length() - formats.MIN_BLOCK_SIZE.bit_length()


@kept_on_device
def code_table(format: str, device: torch.device) -> Tensor:
    """The float32 ``[16]`` values of ``"nf4"`` or ``"fp4"``, made once for a device."""
    return formats.code_tensor(format, device)


@kept_on_device
def dynamic_thresholds(name: str, device: torch.device) -> Tensor:
    """A map's thresholds, float32 ``[256]``, the last infinite; made once for a device."""
    thresholds = {
        "signed": formats.DYNAMIC_THRESHOLDS_SIGNED,
        "unsigned": formats.DYNAMIC_THRESHOLDS_UNSIGNED,
    }
    return _padded(thresholds[name], 256, device)


def byte_thresholds(map: Tensor) -> Tensor:
    """The thresholds of an ascending float32 ``[256]`` map, as ``dynamic_thresholds``."""
    return torch.nn.functional.pad(reference.byte_thresholds(map), (0, 1), value=math.inf)


@kept_on_device
def _encode_tables(format: str, device: torch.device) -> tuple[Tensor, Tensor]:
    thresholds, codes = {
        "nf4": (formats.NF4_MIDPOINTS, tuple(range(16))),
        "fp4": (formats.FP4_MAGNITUDE_THRESHOLDS, formats.FP4_MAGNITUDE_CODES + (0,) * 8),
    }[format]
    return (
        _padded(thresholds, 16, device),
        torch.tensor(codes, dtype=torch.int32, device=device),
    )


def encode_tables(
    format: str, codebook: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``(thresholds float32 [16], codes int32 [16])``: code of each count of thresholds below t.

    Thresholds ascend and end in infinities. FP4's are those of magnitudes.
    """
    if codebook is None:
        return _encode_tables(format, device)
    values, order = codebook.sort(stable=True)
    midpoints = (values[:-1] + values[1:]) * 0.5
    return torch.nn.functional.pad(midpoints, (0, 1), value=math.inf), order.to(torch.int32)


def pointers(weight: Weight) -> tuple[Tensor | None, ...]:
    """The first six arguments of every kernel that decodes ``weight``, which is checked."""
    device = weight.device
    table = code_table(weight.format, device) if weight.codebook is None else weight.codebook
    restore = None if weight.nested_absmax is None else map_on("signed", device)
    return *weight.tensors[:4], restore, table


def _padded(values: tuple[float, ...], size: int, device: torch.device) -> Tensor:
    padded = values + (math.inf,) * (size - len(values))
    return torch.tensor(padded, dtype=torch.float32, device=device)


# Triton 3.2 has no gather, and 3.3's compiler fails on one from 256 entries.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4):

    @triton.jit
    def look_up(table_ptr, index, SIZE: tl.constexpr):
        """``table[index]`` for an integer ``index`` of any shape, all of it below ``SIZE``.

        A gather from registers goes through shared memory: an access a look-up, without conflicts
        among the 16 values of a code table, which lie in 16 banks.
        """
        table = tl.load(table_ptr + tl.arange(0, SIZE))
        # One dimension: a table has no other that could match the index's.
        flat = tl.reshape(index.to(tl.int32), (index.numel,))
        return tl.reshape(tl.gather(table, flat, 0), index.shape)

else:

    @triton.jit
    def look_up(table_ptr, index, SIZE: tl.constexpr):
        """The same for older versions: each look-up is a load, from the L1 cache."""
        return tl.load(table_ptr + index.to(tl.int32))


@triton.jit
def load_scales(absmax_ptr, nested_absmax_ptr, nested_offset, map_ptr, block, mask):
    """Float32 scales of the blocks ``block`` (int64, any shape); 0 where not ``mask``.

    Two roundings where the scales are double-quantised; launches turn fused multiply-add off.
    """
    if nested_absmax_ptr is None:
        scales = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        codes = tl.load(absmax_ptr + block, mask=mask, other=0)
        nested_absmax = tl.load(nested_absmax_ptr + (block >> _NESTED_SHIFT), mask=mask, other=0.0)
        # An offset of a byte would count as signed.
        restored = tl.load(map_ptr + codes.to(tl.int32)) * nested_absmax + nested_offset
        scales = tl.where(mask, restored, 0.0)
    return scales


@triton.jit
def load_offset(nested_offset_ptr):
    """What is added to every double-quantised scale; 0 where there is none."""
    return 0.0 if nested_offset_ptr is None else tl.load(nested_offset_ptr)


@triton.jit
def interleave_codes(packed):
    """The codes ``[..., 2 n]`` of bytes ``[..., n]``; a byte's first is its high nibble."""
    return tl.interleave(packed >> 4, packed & 15)


@triton.jit
def decode_tile(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset,
    map_ptr,
    table_ptr,
    rows,
    first,
    N,
    K,
    unit_shift,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Float32 ``[len(rows), COLUMNS]`` of a weight ``[N, K]``, from column ``first`` on; 0 outside.

    ``rows`` is int64 ``[R]``, ``first`` a multiple of ``COLUMNS``. ``ALIGNED`` says that K is a
    multiple of a unit, so that codes are read a unit at a time; else each is on its own.
    """
    tl.static_assert(COLUMNS // UNIT * UNIT == COLUMNS)
    ROWS: tl.constexpr = rows.shape[0]
    if ALIGNED:
        UNITS: tl.constexpr = COLUMNS // UNIT
        units_per_row = K // UNIT
        column = first // UNIT + tl.arange(0, UNITS)
        units = rows[:, None] * units_per_row + column[None, :]
        inside = (rows[:, None] < N) & (column[None, :] < units_per_row)
        byte = units[:, :, None] * UNIT_BYTES + tl.arange(0, UNIT_BYTES)[None, None, :]
        packed = tl.load(packed_ptr + byte, mask=inside[:, :, None], other=0)
        values = look_up(table_ptr, interleave_codes(packed), 16)
        scales = load_scales(
            absmax_ptr, nested_absmax_ptr, nested_offset, map_ptr, units >> unit_shift, inside
        )
        weight = tl.reshape(values * scales[:, :, None], (ROWS, COLUMNS))
    else:
        column = first + tl.arange(0, COLUMNS)
        element = rows[:, None] * K + column[None, :]
        inside = (rows[:, None] < N) & (column[None, :] < K)
        packed = tl.load(packed_ptr + (element >> 1), mask=inside, other=0)
        shift = ((element & 1) ^ 1) * 4
        values = look_up(table_ptr, (packed.to(tl.int32) >> shift.to(tl.int32)) & 15, 16)
        block = (element // UNIT) >> unit_shift
        scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_offset, map_ptr, block, inside)
        weight = values * scales
    return weight


@triton.jit
def magnitude_bits(x):
    """Int32, the magnitudes of the float32 ``x`` as integers.

    They compare as the magnitudes do, with a NaN above infinity, which a float maximum would lose.
    """
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS


@triton.jit
def largest_magnitude(bits):
    """Float32 ``[R]``, the largest of each row of `magnitude_bits`; NaN where one is not finite."""
    bits = tl.max(bits, axis=1)
    bits = tl.where(bits >= _INF_BITS, _QUIET_NAN_BITS, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def block_absmax(x):
    """Float32 ``[R]``, the largest magnitude of each row of ``x``; NaN where one is not finite."""
    return largest_magnitude(magnitude_bits(x))


@triton.jit
def block_reciprocal(absmax):
    """``1 / absmax``, rounded to nearest; 0 for a block of zeros."""
    one = tl.full(absmax.shape, 1.0, tl.float32)
    return tl.where(absmax == 0.0, 0.0, tl.math.div_rn(one, absmax))


@triton.jit
def count_below(thresholds_ptr, t, BITS: tl.constexpr):
    """The number of ascending thresholds below each ``t``, int32; 0 for a NaN.

    There are ``2**BITS`` thresholds, of which the last is infinite.
    """
    count = tl.zeros(t.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = 1 << (BITS - 1 - bit)
        threshold = look_up(thresholds_ptr, count + (step - 1), 1 << BITS)
        count += tl.where(t > threshold, step, 0)
    return count
