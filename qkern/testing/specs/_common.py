"""What the cases of several ops have in common."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from qkern import formats
from qkern.testing._spec import DTYPES, LAYOUTS, Case

FLAT_SHAPES = ((0,), (1,), (2,), (63,), (64,), (65,), (3, 7), (5, 128), (129, 33), (3, 1111))
BIG_SHAPE = (61, 1030)
LONG_BLOCKS = (8192, 16384)
"""Block sizes beyond what a GPU's block of threads has at once."""
LONG_SHAPE = (3, 11_003)
"""Two of the longest blocks, which cross rows, and an odd part of one."""


def unique(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Each case once, in order."""
    return tuple(dict.fromkeys(cases))


def table_formats() -> tuple[Case, ...]:
    """A case of each kind of code table."""
    return (
        Case((), format="nf4"),
        Case((), format="fp4"),
        Case((), format="custom", codebook="unsorted"),
    )


def cases_of_8_bits(values: Sequence[str]) -> tuple[Case, ...]:
    """Cases of the two 8-bit ops, with these distributions."""
    cases = []
    for dtype, name in itertools.product(DTYPES, formats.MAPS):
        base = Case((), dtype, block_size=256, map=name)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [replace(base, shape=LONG_SHAPE, block_size=bs) for bs in LONG_BLOCKS]
        cases += [replace(base, shape=BIG_SHAPE, values=v, block_size=32) for v in values]
    cases += [
        Case((17, 99), dtype, layout=layout)
        for dtype, layout in itertools.product(DTYPES, LAYOUTS[1:])
    ]
    return unique(cases)


def map_values(case: Case) -> Sequence[float]:
    """The 256 values of the case's map."""
    signed = case.map == "signed"
    return formats.DYNAMIC_MAP_SIGNED if signed else formats.DYNAMIC_MAP_UNSIGNED


def bytes_of_8_bits(case: Case) -> int:
    """What either 8-bit op reads and writes."""
    blocks = formats.num_blocks(case.numel, case.block_size)
    return case.numel * (case.dtype.itemsize + 1) + 4 * blocks + 4 * 256
