"""adamw_step: AdamW on any number of parameters, in one launch for those of a dtype.

A table in device memory holds the tensors' addresses. The arithmetic is that of
``csrc/include/qkern/optim_math.h``: the same operations in the same order, each rounded once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern import formats
from qkern._tables import map_on
from qkern.triton_kernels import codec, launch
from qkern.triton_kernels.codec import block_absmax, block_reciprocal, count_below, look_up

_BLOCK = tl.constexpr(formats.STATE_BLOCK_SIZE)
_QUIET_NAN = tl.constexpr(0x7FC0)
"""bfloat16's."""
_MAX_GRADIENT = tl.constexpr(formats.MAX_GRADIENT)
_INFINITY = tl.constexpr(math.inf)

# A row of the table, int64: the addresses of a parameter's tensors (0 is absent) and factors, its
# number of elements, its number among all, the first of its blocks of random numbers, the seed, and
# the first program that works on it.
_PARAM = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)
_EXP_AVG_ABSMAX = tl.constexpr(4)
_EXP_AVG_SQ_ABSMAX = tl.constexpr(5)
_FACTORS = tl.constexpr(6)
_NUMEL = tl.constexpr(7)
_INDEX = tl.constexpr(8)
_FIRST_BLOCK = tl.constexpr(9)
_SEED = tl.constexpr(10)
_FIRST_PROGRAM = tl.constexpr(11)
_WORDS = tl.constexpr(12)

# The places of the factors, float32.
_factor = tuple(formats.ADAMW_FACTORS).index
_GRAD_SCALE = tl.constexpr(_factor("grad_scale"))
_DECAY = tl.constexpr(_factor("decay"))
_BETA1_COMPLEMENT = tl.constexpr(_factor("beta1_complement"))
_BETA2 = tl.constexpr(_factor("beta2"))
_BETA2_COMPLEMENT = tl.constexpr(_factor("beta2_complement"))
_STEP_SIZE = tl.constexpr(_factor("step_size"))
_ROOT_BIAS2_INVERSE = tl.constexpr(_factor("root_bias2_inverse"))
_EPS = tl.constexpr(_factor("eps"))
_SKIP = tl.constexpr(_factor("skip"))
_STEP = tl.constexpr(_factor("step"))

_TYPES = (tl.float32, tl.bfloat16, tl.float16)
"""By their numbers in ``_args.DTYPE_IDS``."""
_WIDEST = tl.constexpr(16)
"""Bytes of the widest access, which has to be at a multiple of them."""


@triton.jit
def _find_row(table_ptr, count, program):
    """The row of the parameter that a program works on: the last whose first program is not later.

    A search, because a list of parameters may be long; its loads hit the L1 cache.
    """
    low = tl.full((), 0, tl.int64)
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        started = tl.load(table_ptr + middle * _WORDS + _FIRST_PROGRAM) <= program
        low = tl.where(started, middle, low)
        high = tl.where(started, high, middle)
    return table_ptr + low * _WORDS


@triton.jit
def _address(row_ptr, word, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table; ``ALIGNED`` says that it is a multiple of 16 bytes."""
    address = tl.load(row_ptr + word).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, _WIDEST) if ALIGNED else address


@triton.jit
def _hash(x):
    """Wellons' "lowbias32" of uint32: a bijection that looks random."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _block_seed(seed, index, block):
    """The uint32 seeds of blocks of 256 neighbours, of which the i-th draws ``_hash(seed + i)``."""
    x = _hash(seed.to(tl.uint32))
    x = _hash(x ^ (seed >> 32).to(tl.uint32))
    x = _hash(x ^ index.to(tl.uint32))
    x = _hash(x ^ block.to(tl.uint32))
    return _hash(x ^ (block >> 32).to(tl.uint32))


@triton.jit
def _round_stochastically(x, random):
    """bfloat16 of ``x``, up or down with the probability of being nearer."""
    bits = (x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return (
        tl.where(x != x, _QUIET_NAN, bits.to(tl.int32)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    )


@triton.jit
def _bounded(grad):
    """A finite gradient whose square is finite; an infinity and a NaN stay what they are."""
    bounded = tl.where(grad < 0.0, -_MAX_GRADIENT, _MAX_GRADIENT)
    magnitude = tl.abs(grad)
    return tl.where((magnitude > _MAX_GRADIENT) & (magnitude < _INFINITY), bounded, grad)


@triton.jit
def _load_moment(state_ptr, absmax_ptr, map_ptr, element, block, mask, inside, CODES: tl.constexpr):
    """A moment in float32."""
    if CODES:
        codes = tl.load(state_ptr + element, mask=mask, other=0)
        scales = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        values = look_up(map_ptr, codes, 256) * scales[:, None]
    else:
        values = tl.load(state_ptr + element, mask=mask, other=0.0)
    return values


@triton.jit
def _store_moment(
    values,
    state_ptr,
    absmax_ptr,
    thresholds_ptr,
    element,
    block,
    mask,
    inside,
    WHOLE: tl.constexpr,
    CODES: tl.constexpr,
):
    """A moment as ``quantize_8bit`` encodes it, or as it is."""
    if CODES:
        # What lies outside stays zero, which no block's absmax notices.
        values = values if WHOLE else tl.where(mask, values, 0.0)
        absmax = block_absmax(values)
        tl.store(absmax_ptr + block, absmax, mask=inside)
        codes = count_below(thresholds_ptr, values * block_reciprocal(absmax)[:, None], 8)
        tl.store(state_ptr + element, codes.to(tl.uint8), mask=mask)
    else:
        tl.store(state_ptr + element, values, mask=mask)


@triton.jit
def _update(
    row_ptr,
    signed_map_ptr,
    signed_thresholds_ptr,
    unsigned_map_ptr,
    unsigned_thresholds_ptr,
    first_block,
    n,
    TYPE: tl.constexpr,
    CODES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``BLOCKS`` blocks of a parameter. ``WHOLE`` says that none of them is short."""
    STATE: tl.constexpr = tl.uint8 if CODES else tl.float32
    param_ptr = _address(row_ptr, _PARAM, TYPE, ALIGNED)
    grad_ptr = _address(row_ptr, _GRAD, TYPE, ALIGNED)
    exp_avg_ptr = _address(row_ptr, _EXP_AVG, STATE, ALIGNED)
    exp_avg_sq_ptr = _address(row_ptr, _EXP_AVG_SQ, STATE, ALIGNED)
    exp_avg_absmax_ptr = _address(row_ptr, _EXP_AVG_ABSMAX, tl.float32, False)
    exp_avg_sq_absmax_ptr = _address(row_ptr, _EXP_AVG_SQ_ABSMAX, tl.float32, False)

    # Before what uses them, for loads keep their order.
    factors_ptr = _address(row_ptr, _FACTORS, tl.float32, False)
    grad_scale = tl.load(factors_ptr + _GRAD_SCALE)
    decay = tl.load(factors_ptr + _DECAY)
    beta1_complement = tl.load(factors_ptr + _BETA1_COMPLEMENT)
    beta2 = tl.load(factors_ptr + _BETA2)
    beta2_complement = tl.load(factors_ptr + _BETA2_COMPLEMENT)
    step_size = tl.load(factors_ptr + _STEP_SIZE)
    root_bias2_inverse = tl.load(factors_ptr + _ROOT_BIAS2_INVERSE)
    eps = tl.load(factors_ptr + _EPS)

    block = first_block + tl.arange(0, BLOCKS)
    place = tl.arange(0, _BLOCK)
    element = block[:, None] * _BLOCK + place[None, :]
    inside = block * _BLOCK < n
    mask = inside[:, None] if WHOLE else element < n

    param = tl.load(param_ptr + element, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + element, mask=mask, other=0.0).to(tl.float32)
    m = _load_moment(
        exp_avg_ptr, exp_avg_absmax_ptr, signed_map_ptr, element, block, mask, inside, CODES
    )
    v = _load_moment(
        exp_avg_sq_ptr, exp_avg_sq_absmax_ptr, unsigned_map_ptr, element, block, mask, inside, CODES
    )

    g = grad * grad_scale
    if CODES:
        # An infinite moment would make its block NaN.
        g = _bounded(g)
    m = m + (g - m) * beta1_complement
    share = (g * g) * beta2_complement
    if not CODES:
        # Where the square is infinite, the other way about, as torch multiplies always.
        share = tl.where(g * g == _INFINITY, (beta2_complement * g) * g, share)
    v = v * beta2 + share
    denominator = tl.math.sqrt_rn(v) * root_bias2_inverse + eps
    param = param * decay - tl.math.div_rn(m * step_size, denominator)

    if STOCHASTIC:
        seed = (tl.load(row_ptr + _SEED) << 31) ^ tl.load(factors_ptr + _STEP).to(tl.int64)
        blocks_before = tl.load(row_ptr + _FIRST_BLOCK)
        block_seed = _block_seed(seed, tl.load(row_ptr + _INDEX), blocks_before + block)
        random = _hash(block_seed[:, None] + place[None, :].to(tl.uint32))
        rounded = _round_stochastically(param, random)
    else:
        rounded = param.to(TYPE)
    tl.store(param_ptr + element, rounded, mask=mask)
    _store_moment(
        m,
        exp_avg_ptr,
        exp_avg_absmax_ptr,
        signed_thresholds_ptr,
        element,
        block,
        mask,
        inside,
        WHOLE,
        CODES,
    )
    _store_moment(
        v,
        exp_avg_sq_ptr,
        exp_avg_sq_absmax_ptr,
        unsigned_thresholds_ptr,
        element,
        block,
        mask,
        inside,
        WHOLE,
        CODES,
    )


@triton.jit(do_not_specialize=["count"])
def _adamw_step_kernel(
    table_ptr,
    signed_map_ptr,
    signed_thresholds_ptr,
    unsigned_map_ptr,
    unsigned_thresholds_ptr,
    count,
    TYPE: tl.constexpr,
    CODES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``BLOCKS`` blocks of 256 elements a program, of one of ``count`` parameters of ``TYPE``.

    ``CODES``: moments have 8 bits. ``ALIGNED``: addresses are multiples of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    row_ptr = _find_row(table_ptr, count, program)
    n = tl.load(row_ptr + _NUMEL)
    first_block = (program - tl.load(row_ptr + _FIRST_PROGRAM)) * BLOCKS
    # A mask for each element would make accesses narrow.
    whole = (n % _BLOCK == 0) | ((first_block + BLOCKS) * _BLOCK <= n)
    skip = tl.load(_address(row_ptr, _FACTORS, tl.float32, False) + _SKIP)
    if skip == 0.0:
        if whole:
            _update(
                row_ptr,
                signed_map_ptr,
                signed_thresholds_ptr,
                unsigned_map_ptr,
                unsigned_thresholds_ptr,
                first_block,
                n,
                TYPE,
                CODES,
                STOCHASTIC,
                ALIGNED,
                BLOCKS,
                True,
            )
        else:
            _update(
                row_ptr,
                signed_map_ptr,
                signed_thresholds_ptr,
                unsigned_map_ptr,
                unsigned_thresholds_ptr,
                first_block,
                n,
                TYPE,
                CODES,
                STOCHASTIC,
                ALIGNED,
                BLOCKS,
                False,
            )


def _by_value(words: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of ``words``, written by kernels that have them as arguments."""
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), words)
    return table


def _on_device(words: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of ``words``, made without waiting for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A copy in a graph would read the host's memory again at each replay.
        return _by_value(words, device)
    return torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)


def adamw_step(
    pieces: Sequence[tuple[Any, ...]],
    in_codes: bool,
    seed: int | None,
    device: torch.device,
    target: launch.Target,
) -> None:
    """Update parameters on ``device``, none of them empty: those of ``_args.adamw_pieces``.

    ``in_codes``: moments have 8 bits. ``seed``: of stochastic rounding, where wanted.
    """
    config = launch.step(target)
    tables: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
    programs: Counter[tuple[int, bool]] = Counter()
    for *addresses, dtype, n, index, offset in pieces:
        # An absent scale is one that no kernel looks at.
        addresses = [address or 0 for address in addresses]
        kind = dtype, all(address % _WIDEST.value == 0 for address in addresses[:4])
        first_block = offset // _BLOCK.value
        tables[kind] += [*addresses, n, index, first_block, seed or 0, programs[kind]]
        programs[kind] += triton.cdiv(n, config.elements)
    maps = [
        read(name, device) if in_codes else None
        for name in ("signed", "unsigned")
        for read in (map_on, codec.dynamic_thresholds)
    ]
    for (dtype, aligned), words in tables.items():
        _adamw_step_kernel[(programs[dtype, aligned],)](
            _on_device(words, device),
            *maps,
            len(words) // _WORDS.value,
            TYPE=_TYPES[dtype],
            CODES=in_codes,
            STOCHASTIC=seed is not None and _TYPES[dtype] is tl.bfloat16,
            ALIGNED=aligned,
            BLOCKS=config.elements // _BLOCK.value,
            **config.options,
        )
