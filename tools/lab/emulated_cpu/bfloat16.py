"""Bfloat16 products on pairs: cases that reach every part of them, and bugs to plant.

``python -m lab.emulated_cpu.bfloat16 PROGRAM``: the cases on a built server. Prints ``caught by
WHAT`` and exits with 3 at the first mistake.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lab.mutants import Mutant, report
from qkern import testing
from qkern.testing import OPS, Case

from . import backend
from .build import BFLOAT16

ISA = "avx512bf16"
_DTYPE = torch.bfloat16
CASES = (
    # Whole strips and every remainder of one, one panel and several, with and without an odd step.
    *(Case((m, 33, 64), _DTYPE, 64) for m in (6, 14, 15, 27)),
    Case((9, 40, 131), _DTYPE, 64),
    Case((29, 72, 640), _DTYPE, 32, double_quant=True, bias=True),
    Case((70, 41, 288), _DTYPE, 32, "fp4", bias=True),
    Case((8, 257, 64), _DTYPE, 64, double_quant=True),
    Case((17, 5, 1024), _DTYPE, 1024, "custom", codebook="unsorted"),
    Case((70, 96, 512), _DTYPE, 64, values="large"),
    Case((16, 31, 96), _DTYPE, 32, layout="offset"),
)
"""Of each matmul."""
PRODUCTS = {"linear_4bit": 0, "linear_4bit_dx": 0, "linear_4bit_add": 5, "linear_4bit_dx_add": 16}
"""The matmuls, each with its term's rank."""

_PAIRS, _STRIP, _TILE = "kernels_pairs.h", "kernels_bf16.h", "kernels_multiply.h"


def _bug(name: str, file: str, old: str, new: str, caught_by: str = "values") -> Mutant:
    return Mutant(name, file, old, new, ISA, caught_by)


MUTANTS = (
    _bug("the other order", _PAIRS, "(second, first)", "(first, second)"),
    _bug("one row's table", _PAIRS, "0x0010'0000", "0x0000'0000"),
    _bug("the other nibbles", _PAIRS, "0x0000'0000'0004'0004", "0x0004'0004'0000'0000"),
    _bug("the first half twice", _PAIRS, "row_codes<8>(bytes)", "row_codes<0>(bytes)"),
    _bug("half a row of x", _PAIRS, "n) * sizeof(Element)", "n / 2) * sizeof(Element)"),
    _bug("past the end of x", _PAIRS, "size_t>(n) *", "size_t>(n + 1) *", "access"),
    _bug(
        "a register twice",
        _TILE,
        "Step::multiply_add(x, w1, high)",
        "Step::multiply_add(x, w0, high)",
    ),
    _bug("sums forgotten", _TILE, "accumulate ? Simd::add(Simd::loadu(c), low)", "false ? low"),
    _bug("a row twice", _TILE, "a + stride, stride, w0", "a + kRows % 2 * stride, stride, w0"),
    _bug("the last pair", _TILE, "k < depth; k += Step", "k + 2 < depth; k += Step"),
    _bug("an odd step", _STRIP, "kDepthMultiple = PairStep::kSteps", "kDepthMultiple = 1"),
    _bug("rows overlap", _STRIP, "kRowStride = kDepth + 32", "kRowStride = kDepth - 32"),
)


def _mistake(name: str, case: Case, target: testing.Target) -> str | None:
    where = OPS[name].id(case, target)
    try:
        testing.check(OPS[name], case, target)
    except backend.ServerError as error:
        return f"access: {where}: {error}"
    except AssertionError as error:
        return f"values: {where}: {error}"
    return None


def check(program: Path | None = None) -> str | None:
    """What notices a mistake, and where; None if nothing does."""
    for side in ("after", "before"):
        target = backend.EmulatedTarget(BFLOAT16, ISA, side, program=program)
        for name, rank in PRODUCTS.items():
            for case in CASES:
                if found := _mistake(name, replace(case, rank=rank), target):
                    return found
    return None


if __name__ == "__main__":
    report(check(Path(sys.argv[1])))
