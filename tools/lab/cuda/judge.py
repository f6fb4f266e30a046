"""Runs cases on one build of the emulated kernels, in a process that may crash.

``python -m lab.cuda.judge FOLDER OP SCHEDULES...``: the module in FOLDER, the cases of OP, each
under the schedules (indices into `backend.SCHEDULES`). Prints ``caught by WHAT: ...`` and exits
with 3 at the first mistake.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.cuda import adamw, experts, ways
from lab.cuda.emulator import backend, build
from lab.mutants import report
from qkern import testing
from qkern.testing import Case

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def _cases(shapes: object, **fields: object) -> tuple[Case, ...]:
    return tuple(Case(shape, **fields) for shape in shapes)  # type: ignore[attr-defined, arg-type]


def _grouped(
    groups: tuple[int, ...], weight: tuple[int, int], dtype: torch.dtype, none: int, **fields: Any
) -> Case:
    """A product by experts, with ``none`` rows of no expert."""
    return Case((sum(groups) + none, *weight), dtype, groups=groups, **fields)


MMA_FORWARD = (
    Case((7, 40, 128 * 6), HALF, 64, double_quant=True, bias=True),
    Case((16, 136, 544), BFLOAT, 32),
    # Shares of two tiles, the last one's second cut short.
    Case((7, 40, 8096), HALF, 64, double_quant=True),
    Case((21, 33, 640), BFLOAT, 64, double_quant=True),
    Case((65, 24, 416), HALF, 32, format="fp4", bias=True),
)
CASES: dict[str, tuple[str, tuple[Case, ...]]] = {
    "adamw_step": (
        "adamw_step",
        (
            Case((2111,), FLOAT, 256),
            Case((3, 1111), BFLOAT, 256, bits=8, stochastic_rounding=True),
            Case((7, 333), HALF, 256, layout="offset", bits=8),
            *(Case((5, 515), FLOAT, 256, values=v, bits=8) for v in ("special", "nonfinite")),
            Case((5, 515), BFLOAT, 256, values="huge", bits=8),
        ),
    ),
    **dict.fromkeys(adamw.STEPS, ("adamw_step", ())),
    "quantize_4bit": (
        "quantize_4bit",
        (
            *_cases([(1,), (65,), (515,), (1024,)], block_size=32),
            *_cases([(333,), (8200,)], dtype=BFLOAT, block_size=64, values="ties"),
            Case((700,), HALF, 64, "fp4", values="special"),
            Case((700,), FLOAT, 64, values="nonfinite"),
            Case((512,), FLOAT, 64, values="zeros"),
            Case((600,), FLOAT, 64, values="ties"),
            Case((600,), FLOAT, 64, "custom", codebook="unsorted"),
        ),
    ),
    "dequantize_4bit": (
        "dequantize_4bit",
        (
            Case((3001,), BFLOAT, 64),
            Case((4, 2048), FLOAT, 32, double_quant=True),
            Case((65, 513), HALF, 32, "fp4", double_quant=True),
            Case((2048,), BFLOAT, 4096),
        ),
    ),
    "quantize_absmax": (
        "quantize_absmax",
        (
            *_cases([(1,), (300,), (5000,)]),
            *_cases([(n,) for n in testing.HALFWAY_TAILS], values="halfway"),
            *(Case((300,), values=v) for v in ("negative", "zeros")),
            Case((5000,), values="uneven"),
        ),
    ),
    "linear_4bit_mma": ("linear_4bit", MMA_FORWARD),
    "linear_4bit_vector": (
        "linear_4bit",
        (
            Case((1, 37, 2112), HALF, 64, double_quant=True, bias=True),
            Case((3, 20, 1056), FLOAT, 32),
            # x is staged twice in each share.
            Case((3, 2, 18 * 1024), FLOAT, 64),
            Case((8, 3, 9 * 1024), HALF, 64),
            Case((1, 9, 130), BFLOAT, 64),
        ),
    ),
    "linear_4bit_tiled": ("linear_4bit", (Case((70, 66, 99), FLOAT, 64, bias=True),)),
    "linear_4bit_dx_mma": (
        "linear_4bit_dx",
        (
            Case((9, 456, 96), HALF, 32, double_quant=True),
            Case((70, 200, 160), BFLOAT, 64),
            Case((16, 72, 288), BFLOAT, 32, format="fp4"),
            Case((130, 104, 64), HALF, 64),
        ),
    ),
    # Both tiles; more tiles than places in a part, and a half of one at the end.
    "linear_4bit_wgmma": (
        "linear_4bit",
        (
            Case((7, 40, 768), HALF, 64, double_quant=True, bias=True),
            Case((130, 136, 544), BFLOAT, 32),
            Case((200, 24, 4224), BFLOAT, 64, double_quant=True),
            Case((9, 136, 672), HALF, 64, bias=True, batch_invariant=True),
        ),
    ),
    "linear_4bit_dx_wgmma": (
        "linear_4bit_dx",
        (
            Case((9, 456, 96), HALF, 32, double_quant=True),
            Case((70, 200, 160), BFLOAT, 64, batch_invariant=True),
            Case((130, 2184, 320), BFLOAT, 64),
        ),
    ),
    # All tiles that there can be, rows of no expert, scales of several nested blocks.
    "grouped_linear_4bit_vector": (
        "grouped_linear_4bit",
        (
            _grouped((1, 1, 1), (12, 64), HALF, 1, block_size=32, double_quant=True, bias=True),
            _grouped((0, 5, 1, 0, 3), (264, 1056), BFLOAT, 2, block_size=32, double_quant=True),
            _grouped((2, 0, 7), (9, 131), FLOAT, 1, bias=True),
        ),
    ),
    "grouped_linear_4bit_mma": (
        "grouped_linear_4bit",
        (
            _grouped((65, 129, 0, 1), (40, 160), HALF, 1, double_quant=True, bias=True),
            _grouped((3, 0, 9, 1), (264, 1056), HALF, 2, block_size=32, double_quant=True),
            _grouped((3, 2), (24, 96), HALF, 0),
        ),
    ),
    "grouped_linear_4bit_dx_mma": (
        "grouped_linear_4bit_dx",
        (
            _grouped((65, 129, 0, 1), (40, 160), HALF, 1, double_quant=True),
            _grouped((3, 0, 9, 1), (264, 1056), HALF, 2, block_size=32, double_quant=True),
        ),
    ),
    "grouped_linear_4bit_tiled": (
        "grouped_linear_4bit",
        (
            _grouped(tuple(i % 3 for i in range(70)), (9, 67), FLOAT, 2, bias=True),
            _grouped((0, 1, 65), (66, 131), BFLOAT, 3, double_quant=True, bias=True),
        ),
    ),
    # All tiles; terms that need several of them, and more than a chain; experts of several lanes.
    "grouped_matmul_into": (
        "grouped_matmul_into",
        (
            _grouped((3, 0, 18), (20, 300), BFLOAT, 2, mixed=True),
            _grouped((3, 0, 18), (20, 300), HALF, 2, layout="transposed", accumulate=True),
            _grouped((66, 0, 3), (70, 40), HALF, 1, mixed=True, accumulate=True),
            _grouped(tuple(i % 3 for i in range(70)), (70, 20), FLOAT, 3, own_results=True),
            _grouped((0, 5, 40), (9, 33), HALF, 3, own_results=True, layout="transposed"),
            _grouped((300, 0, 7), (66, 40), BFLOAT, 2, own_results=True, accumulate=True),
        ),
    ),
    "grouped_offsets": ("grouped_linear_4bit", ()),
    "grouped_into_offsets": ("grouped_matmul_into", ()),
    "huge_stride": ("linear_4bit", ()),
}
"""Cases by what they are to reach; those for ``wgmma``, or of a 4-bit product by experts, are on
the path that the name ends with."""


def huge_stride(target: testing.Target) -> None:
    """Two rows of x that lie more than 2**31 elements apart: memory that is reserved, not used."""
    rows, columns = 8, 1024
    weight = torch.randn(rows, columns)
    packed, absmax = torch.ops.qkern.quantize_4bit(weight, "nf4", 64, None)
    stride = 2**31 + 64
    memory = torch.empty(stride + columns, dtype=torch.bfloat16)
    x = memory.as_strided((2, columns), (stride, 1))
    x.copy_(torch.randn(2, columns))
    arguments = (packed, absmax, None, None, None, "nf4", 64, rows)
    with target.activate():
        y = torch.ops.qkern.linear_4bit(x, *arguments)
        expected = torch.ops.qkern.linear_4bit(x.clone(), *arguments)
    assert torch.equal(y, expected), "rows far apart"


def wrong_offsets(target: testing.Target) -> None:
    """Numbers that are no ends of rows, on every path."""
    for spec, path in itertools.product((experts.FORWARD, experts.GRADIENT), ("mma", "tiled")):
        with ways.forced(path):
            experts.check_wrong_offsets(spec, Case((0, 16, 64), HALF, 32), target)
    with ways.forced("vector"):
        experts.check_wrong_offsets(experts.FORWARD, Case((0, 16, 64), HALF, 32), target)


def judge(folder: str, op: str, schedules: list[int]) -> str | None:
    """What is wrong with the module in ``folder``, as ``KIND: WHERE: WHAT``."""
    library = build.load(Path(folder))
    name, cases = CASES[op]
    for schedule in schedules:
        order = backend.SCHEDULES[schedule]
        on_path: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if "wgmma" in op:
            order = replace(order, capability=90)
        if "wgmma" in op or (op.startswith("grouped_linear") and cases):
            on_path = partial(ways.forced, op.rpartition("_")[2])
        target = backend.EmulatedTarget(library, order)
        at = f"{op} under {target.isa}"
        try:
            if op == "huge_stride":
                huge_stride(target)
            if op == "grouped_offsets":
                wrong_offsets(target)
            if op == "grouped_into_offsets":
                # Large tiles find their rows in the same way, and take minutes under a sanitizer.
                experts.check_wrong_offsets_into(target, shapes=(experts.NARROW,))
            if op in adamw.STEPS:
                adamw.STEPS[op](target)
            for case in cases:
                at = f"{case} under {target.isa}"
                with on_path():
                    testing.check(testing.OPS[name], case, target, "cpu")
        except AssertionError as wrong:
            nan = re.search(r"\bnan\b|is not finite", str(wrong))
            what = "schedule" if schedule != ORDERLY else "poison" if nan else "numbers"
            return f"{what}: {at}: {str(wrong).splitlines()[0]}"
        except (RuntimeError, ValueError) as refused:
            return f"launch: {at}: {refused}"
    return None


ORDERLY = backend.SCHEDULES.index(backend.Schedule("forward", late_copies=False))

if __name__ == "__main__":
    report(judge(sys.argv[1], sys.argv[2], [int(index) for index in sys.argv[3:]]))
