"""Products of bfloat16: cases that reach every part of them, and bugs to plant.

``python -m lab.emulated_cpu.bfloat16 PROGRAM ISA``: the cases on a built server. Prints ``caught by
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
from .build import AMX, BFLOAT16

ISAS = {"avx512bf16": (torch.bfloat16,), "amx": (torch.bfloat16, torch.float16)}
"""The instruction sets, and the dtypes that they multiply by products of bfloat16."""
FLAVOURS = {"avx512bf16": BFLOAT16, "amx": AMX}
"""What has each."""
_DTYPE = torch.bfloat16
_CASES = (
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
PRODUCTS = {"linear_4bit": 0, "linear_4bit_dx": 0, "linear_4bit_add": 5, "linear_4bit_dx_add": 16}
"""The matmuls, each with its term's rank."""

_PAIRS, _STRIP, _TILE = "kernels_pairs.h", "kernels_bf16.h", "kernels_multiply.h"
_AMX, _TILED = "kernels_amx.h", "kernels_tiled.h"


def _bug(name: str, file: str, old: str, new: str, caught_by: str = "values") -> Mutant:
    return Mutant(name, file, old, new, "avx512bf16", caught_by)


def _amx_bug(name: str, file: str, old: str, new: str, caught_by: str = "values") -> Mutant:
    return Mutant(name, file, old, new, "amx", caught_by)


MUTANTS = (
    _bug(
        "the other order",
        _PAIRS,
        "(second, first));\n    const __m512i order",
        "(first, second));\n    const __m512i order",
    ),
    _bug("one row's table", _PAIRS, "0x0010'0000", "0x0000'0000"),
    _bug("the other nibbles", _PAIRS, "0x0000'0000'0004'0004", "0x0004'0004'0000'0000"),
    _bug(
        "the first half twice", _PAIRS, "row_codes<8>(bytes), table)", "row_codes<0>(bytes), table)"
    ),
    _bug("half a row of x", _PAIRS, "size_t>(n) *", "size_t>(n / 2) *"),
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
    _amx_bug("columns twice", _AMX, "w + kTile * kInterleave", "w"),
    _amx_bug("rows of x twice", _AMX, "x + kTile * x_stride", "x + 0 * x_stride"),
    _amx_bug("sums of others", _AMX, "_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 4, 7)"),
    _amx_bug("no second part of x", _AMX, "x + kDepthMultiple, a_stride", "x + 0, a_stride"),
    _amx_bug("no second part of W", _AMX, "w + kInterleave * kTileCols", "w + 0 * kTileCols"),
    _amx_bug("parts overlap", _AMX, "kParts * slice + 32", "slice + 32"),
    _amx_bug("half the panel", _TILED, "slice * Engine::kParts * kTileCols)", "slice * kTileCols)"),
    _amx_bug("rows as they lie", _AMX, "std::is_same_v<T, Element> && ", ""),
    _amx_bug("a part twice", _PAIRS, "(value - to_float(first))", "(to_float(first))"),
    _amx_bug("the rest of the other", _PAIRS, "second, high(pairs)", "second, low(pairs)"),
    _amx_bug("a run too long", _PAIRS, "kParts * kRun + i % kRun", "kRun + i % kRun"),
    _amx_bug("half a run", _PAIRS, "Simd::store(at + kRun,", "Simd::store(at + kRun / 2,"),
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


def check(isa: str, program: Path | None = None) -> str | None:
    """What notices a mistake, and where; None if nothing does."""
    for side in ("after", "before"):
        target = backend.EmulatedTarget(FLAVOURS[isa], isa, side, program=program)
        for name, rank in PRODUCTS.items():
            for case in (replace(c, dtype=dtype, rank=rank) for dtype in ISAS[isa] for c in _CASES):
                if found := _mistake(name, case, target):
                    return found
    return None


if __name__ == "__main__":
    report(check(sys.argv[2], Path(sys.argv[1])))
