"""quantize_4bit: values to codes and scales."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from qkern import formats
from qkern.testing._spec import CODEBOOKS, DTYPES, LAYOUTS, Case, Inputs, OpSpec
from qkern.testing._values import codebook_tensor, place, source
from qkern.testing.specs._common import (
    BIG_SHAPE,
    FLAT_SHAPES,
    LONG_BLOCKS,
    LONG_SHAPE,
    table_formats,
    unique,
)


def _code_table(case: Case) -> Sequence[float]:
    if case.codebook is not None:
        return CODEBOOKS[case.codebook]
    return formats.NF4_CODES if case.format == "nf4" else formats.FP4_MAGNITUDES


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = {
        "x": source(case, _code_table(case), generator),
        "format": case.format,
        "block_size": case.block_size,
        "codebook": codebook_tensor(case),
    }
    return place(inputs, case, device, "x")


def _cases() -> tuple[Case, ...]:
    cases = []
    for dtype, base in itertools.product(DTYPES, table_formats()):
        base = replace(base, dtype=dtype)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [
            replace(base, shape=LONG_SHAPE, values=values, block_size=bs)
            for values, bs in itertools.product(("ties", "nonfinite"), LONG_BLOCKS)
        ]
        cases += [
            replace(base, shape=BIG_SHAPE, values=values, block_size=bs)
            for values in ("special", "ties", "zeros", "nonfinite")
            for bs in (32, 64, 512)
        ]
    for dtype, layout in itertools.product(DTYPES, LAYOUTS[1:]):
        cases.append(Case((17, 99), dtype, layout=layout))
        cases.append(Case((4, 5, 33), dtype, layout=layout, format="fp4", block_size=32))
    for name, values in itertools.product(CODEBOOKS, ("normal", "special", "ties")):
        cases.append(Case((37, 131), format="custom", codebook=name, values=values))
    return unique(cases)


def _bytes(case: Case) -> int:
    blocks = formats.num_blocks(case.numel, case.block_size)
    return case.numel * case.dtype.itemsize + formats.packed_size(case.numel) + 4 * blocks


SPEC = OpSpec(
    "quantize_4bit",
    _cases(),
    _inputs,
    "bitwise",
    _bytes,
    main="x",
)
