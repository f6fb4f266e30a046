"""matmul_into: a product of dense matrices of any of three dtypes, into memory that is there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from qkern.testing._spec import DTYPES, LAYOUTS, Case, Inputs, OpSpec
from qkern.testing._values import normal, place, with_layout
from qkern.testing.specs._common import unique

# (m, n, k) about as an adapter has them: narrow in n, in m or in k.
SHAPES = (
    *((0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 1, 1), (3, 2, 5), (7, 16, 64), (64, 8, 257)),
    *((33, 16, 256), (16, 33, 515), (129, 65, 3), (200, 193, 16), (13, 400, 64), (1, 40, 300)),
    *((6, 4, 1027), (385, 17, 31), (70, 70, 70)),
    # Panels in several parts, which tile after tile of rows packs again.
    *((193, 7, 5000), (390, 385, 171)),
)


def _dtypes(case: Case) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of a, b and out: as activations and an adapter's factors are multiplied and added."""
    if not case.mixed:
        return case.dtype, case.dtype, case.dtype
    wide = torch.float32
    return (wide, wide, case.dtype) if case.accumulate else (case.dtype, wide, wide)


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    m, n, k = case.shape
    a, b, out = (normal(shape, generator) for shape in ((m, k), (k, n), (m, n)))
    if case.values == "special":
        a = a * torch.exp2(4 * normal((m, 1), generator)).clamp(2**-8, 2**6)
    of_a, of_b, of_out = _dtypes(case)
    a = a.to(of_a)
    b = with_layout(b.to(of_b), case.layout if case.layout != "expanded" else "transposed")
    out = with_layout(out.to(of_out), case.layout if case.layout == "rows" else "contiguous")
    inputs: Inputs = {"a": a, "b": b, "alpha": 0.75, "accumulate": case.accumulate, "out": out}
    return place(inputs, case, device, "a")


def _cases() -> tuple[Case, ...]:
    cases = []
    for dtype, mixed, accumulate in itertools.product(DTYPES, (False, True), (False, True)):
        base = Case((), dtype, mixed=mixed, accumulate=accumulate)
        cases += [replace(base, shape=shape) for shape in SHAPES]
        cases += [
            replace(base, shape=shape, layout=layout)
            for layout, shape in itertools.product(LAYOUTS[1:], ((21, 18, 70), (16, 40, 99)))
        ]
        cases.append(replace(base, shape=(40, 16, 300), values="special"))
    return unique(cases)


def _bytes(case: Case) -> int:
    m, n, k = case.shape
    a, b, out = (dtype.itemsize for dtype in _dtypes(case))
    return a * m * k + b * n * k + out * m * n * (1 + case.accumulate)


def _flops(case: Case) -> int:
    return 2 * math.prod(case.shape)


SPEC = OpSpec("matmul_into", _cases(), _inputs, "product", _bytes, _flops, main="a")
