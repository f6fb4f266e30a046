"""Experts as bitsandbytes keeps them in a state dict: each a layer of its own, or several.

Frameworks that had a list of experts kept gate and up apart, where now one tensor has both. Codes
of whole blocks are put together, or cut, as they are. Scales in 8 bits are not: their offset is the
mean of all of a weight's, so then they are restored, and held in float32 with the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qkern import _bnb, reference
from qkern.tensor import QuantizedTensor

Names = Sequence[str | Sequence[str]]
"""Of each expert the name of its weight, or of several whose rows follow one another."""


def from_bnb(tensors: Mapping[str, Tensor], names: Names) -> list[QuantizedTensor]:
    """The weight of each expert; ValueError where parts cannot be put together."""
    found = [joined([_bnb.from_bnb(name, tensors) for name in each], each) for each in _each(names)]
    if not all(qw.double_quant for qw in found):
        found = [with_plain_scales(qw) for qw in found]
    return found


def to_bnb(experts: Sequence[QuantizedTensor], names: Names) -> dict[str, Tensor]:
    """The tensors of all experts by name; ValueError where a weight cannot be cut."""
    if len(names) != len(experts):
        raise ValueError(f"names: got those of {len(names)} experts; takes {len(experts)}")
    found: dict[str, Tensor] = {}
    for qw, each in zip(experts, _each(names), strict=True):
        for name, part in zip(each, _cut(qw, each), strict=True):
            found |= _bnb.to_bnb(name, part)
    return found


def _each(names: Names) -> list[list[str]]:
    if isinstance(names, str):
        raise TypeError(f"names: got the string {names!r}; takes a list, an item for each expert")
    found = [[each] if isinstance(each, str) else list(each) for each in names]
    if not all(found):
        raise ValueError("names: got no name for an expert; takes one or more")
    return found


def with_plain_scales(qw: QuantizedTensor) -> QuantizedTensor:
    """The same weight with its scales in float32."""
    if not qw.double_quant:
        return qw
    absmax = reference.restored_absmax(qw.weight, 0, qw.absmax.numel())
    return replace(qw, absmax=absmax, nested_absmax=None, nested_offset=None)


def joined(parts: list[QuantizedTensor], names: list[str]) -> QuantizedTensor:
    """The weight whose rows are those of ``parts``, one after the other; ValueError as above."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for name, part in zip(names, parts, strict=True):
        for field in ("format", "block_size", "dtype", "device"):
            if getattr(part, field) != getattr(first, field):
                raise ValueError(
                    f"{name}: got {field} {getattr(part, field)}; takes {getattr(first, field)}, "
                    f"that of {names[0]}"
                )
        if part.ndim != 2 or part.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: got shape {list(part.shape)}; takes [rows, {first.shape[-1]}]"
            )
        _check_whole_blocks(name, part.numel(), part.block_size)
    parts = [with_plain_scales(part) for part in parts]
    return replace(
        parts[0],
        packed=torch.cat([part.packed for part in parts]),
        absmax=torch.cat([part.absmax for part in parts]),
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
    )


def _cut(qw: QuantizedTensor, names: list[str]) -> list[QuantizedTensor]:
    count = len(names)
    if count == 1:
        return [qw]
    rows, columns = qw.shape
    if rows % count:
        raise ValueError(f"{names[0]}: got {rows} rows for {count} weights; takes a multiple")
    shape = rows // count, columns
    _check_whole_blocks(names[0], math.prod(shape), qw.block_size)
    plain = with_plain_scales(qw)
    fields = zip(plain.packed.chunk(count), plain.absmax.chunk(count), strict=True)
    return [replace(plain, packed=packed, absmax=absmax, shape=shape) for packed, absmax in fields]


def _check_whole_blocks(name: str, numel: int, block_size: int) -> None:
    if numel % block_size:
        raise ValueError(
            f"{name}: got {numel} elements in blocks of {block_size}; takes whole blocks, where "
            "several weights are one expert's"
        )
