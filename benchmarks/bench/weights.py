"""Random 4-bit weights of any size, and exact parts of them without a dense twin of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import qkern
from qkern import formats, reference, testing

BLOCK_SIZE = 64
_PIECE = 1 << 24  # elements dequantised at a time


def case(shape: tuple[int, ...], dtype: torch.dtype) -> testing.Case:
    """NF4 in blocks of 64 with double quantisation, as the op table in `qkern.testing` asks."""
    return testing.Case(shape, dtype, BLOCK_SIZE, double_quant=True)


def inputs(op: str, of: testing.Case) -> testing.Inputs:
    """What the op table gives `op`, always the same."""
    generator = torch.Generator().manual_seed(0)
    return testing.OPS[op].make_inputs(of, torch.device("cpu"), generator)


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> qkern.QuantizedTensor:
    """Random storage, so that a weight of any size is made quickly and without a dense twin."""
    stored = inputs("dequantize_4bit", case(shape, dtype))
    return qkern.QuantizedTensor(*stored["weight"], shape, dtype)


def spread(n: int, count: int) -> Tensor:
    """At most `count` indices below `n`, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64).round().long().unique()


def rows(qw: qkern.QuantizedTensor, wanted: Tensor) -> Tensor:
    """``W[wanted, :]`` by the reference, in float32; `wanted` ascends."""
    step = _aligned_rows(qw)
    found = []
    for group in (wanted // step).unique().tolist():
        first = group * step
        piece = _dequantized(_slice(qw, first, min(first + step, qw.shape[0])))
        found.append(piece[wanted[(wanted >= first) & (wanted < first + step)] - first])
    return torch.cat(found)


def columns(qw: qkern.QuantizedTensor, wanted: Tensor) -> Tensor:
    """``W[:, wanted]ᵀ`` by the reference, in float32."""
    return torch.cat([_dequantized(piece)[:, wanted] for _, piece in pieces(qw)]).mT


def pieces(qw: qkern.QuantizedTensor) -> Iterator[tuple[slice, qkern.QuantizedTensor]]:
    """All rows as weights of their own, each with where it is."""
    aligned = _aligned_rows(qw)
    step = aligned * max(1, _PIECE // (aligned * qw.shape[1]))
    for first in range(0, qw.shape[0], step):
        last = min(first + step, qw.shape[0])
        yield slice(first, last), _slice(qw, first, last)


def _aligned_rows(qw: qkern.QuantizedTensor) -> int:
    """The fewest rows that are whole groups of scales, and so a weight by themselves."""
    group = qw.block_size * formats.NESTED_BLOCK_SIZE
    return group // math.gcd(qw.shape[1], group)


def _slice(qw: qkern.QuantizedTensor, first: int, last: int) -> qkern.QuantizedTensor:
    """Rows on the same memory; ``first * k`` must be a multiple of a group of scales."""
    k = qw.shape[1]
    start, stop = first * k, last * k
    blocks = slice(start // qw.block_size, formats.num_blocks(stop, qw.block_size))
    groups = slice(
        blocks.start // formats.NESTED_BLOCK_SIZE,
        formats.num_blocks(blocks.stop, formats.NESTED_BLOCK_SIZE),
    )
    return replace(
        qw,
        packed=qw.packed[start // 2 : formats.packed_size(stop)],
        absmax=qw.absmax[blocks],
        nested_absmax=None if qw.nested_absmax is None else qw.nested_absmax[groups],
        shape=(last - first, k),
        dtype=torch.float32,
    )


def _dequantized(qw: qkern.QuantizedTensor) -> Tensor:
    return reference.dequantize_4bit(qw.weight, qw.shape, torch.float32)
