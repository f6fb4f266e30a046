"""dequantize_4bit: codes and scales to values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from qkern import formats
from qkern.testing._spec import CODEBOOKS, DTYPES, Case, Inputs, OpSpec
from qkern.testing._values import place, random_weight, weight_bytes
from qkern.testing.specs._common import (
    BIG_SHAPE,
    FLAT_SHAPES,
    LONG_BLOCKS,
    LONG_SHAPE,
    table_formats,
    unique,
)


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = {
        "weight": random_weight(case, case.numel, generator),
        "shape": list(case.shape),
        "dtype": case.dtype,
    }
    return place(inputs, case, device, "weight")


def _cases() -> tuple[Case, ...]:
    cases = []
    for dtype, base, dq in itertools.product(DTYPES, table_formats(), (False, True)):
        base = replace(base, dtype=dtype, double_quant=dq)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [replace(base, shape=LONG_SHAPE, block_size=bs) for bs in LONG_BLOCKS]
        cases += [
            replace(base, shape=BIG_SHAPE, values=values, block_size=32)
            for values in ("normal", "special", "zeros", "nonfinite")
        ]
    for dtype, dq in itertools.product(DTYPES, (False, True)):
        cases.append(Case((17, 99), dtype, layout="offset", double_quant=dq))
    cases += [Case((37, 131), format="custom", codebook=name) for name in CODEBOOKS]
    return unique(cases)


def _bytes(case: Case) -> int:
    return weight_bytes(case.numel, case) + case.numel * case.dtype.itemsize


SPEC = OpSpec("dequantize_4bit", _cases(), _inputs, "bitwise", _bytes, main="weight")
