"""grouped_matmul_into: dense products by experts, into memory that is there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from qkern import reference
from qkern.testing._judge import assert_bitwise, assert_sums, product_sums
from qkern.testing._spec import DTYPES, LAYOUTS, Case, Inputs, OpSpec
from qkern.testing._values import normal, place, with_layout
from qkern.testing.specs._common import unique
from qkern.testing.specs._grouped import groups_of

GROUPS = ((1,), (0, 3, 0, 2), (5, 1, 9, 2), (40, 0, 13), tuple(i * 7 % 5 for i in range(64)))
SHAPES = ((5, 7), (16, 64), (33, 16), (8, 257), (1, 1))


def _dtypes(case: Case) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of a, b and out: as activations and an adapter's factors are multiplied and added."""
    if not case.mixed:
        return case.dtype, case.dtype, case.dtype
    wide = torch.float32
    return (wide, wide, case.dtype) if case.accumulate else (case.dtype, wide, wide)


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    m, n, k = case.shape
    groups = groups_of(case)
    experts = len(groups)
    of_b, of_out = ((m, n), (experts, k, n)) if case.own_results else ((experts, k, n), (m, n))
    a, b, out = (normal(shape, generator) for shape in ((m, k), of_b, of_out))
    dtypes = _dtypes(case)
    a, out = a.to(dtypes[0]), out.to(dtypes[2])
    b = with_layout(b.to(dtypes[1]), case.layout if case.layout != "expanded" else "transposed")
    ends = torch.tensor(list(itertools.accumulate(groups)), dtype=torch.int32)
    inputs: Inputs = {"a": a, "b": b, "offsets": ends.long() if experts % 2 else ends}
    inputs |= {"alpha": 0.75, "accumulate": case.accumulate, "out": out}
    # A result is contiguous, wherever it begins.
    return place(inputs, case, device, "a")


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    shapes = itertools.cycle(SHAPES)
    for dtype, mixed, accumulate, own in itertools.product(
        DTYPES, (False, True), (False, True), (False, True)
    ):
        base = Case((), dtype, mixed=mixed, accumulate=accumulate, own_results=own)
        for index, groups in enumerate(GROUPS):
            n, k = next(shapes)
            shape = sum(groups) + index % 3, n, k
            cases.append(replace(base, shape=shape, groups=groups))
        some = replace(base, shape=(22, 18, 40), groups=(3, 0, 18))
        cases += [replace(some, layout=layout) for layout in LAYOUTS[1:]]
        cases.append(replace(base, shape=(4, 6, 5), groups=(0, 0)))
        cases.append(replace(base, shape=(4, 6, 0), groups=(1, 2)))
    return unique(cases)


def _judge(out: Tensor, inputs: Inputs) -> None:
    """Raise AssertionError unless each expert's part is right, and other rows are as they were."""
    a, b, alpha = inputs["a"], inputs["b"], inputs["alpha"]
    before = inputs["out"] if inputs["accumulate"] else None
    rows, sums = reference.groups(inputs["offsets"], len(a)), []
    for expert, own in enumerate(rows):
        if b.dim() == 3:
            place: slice | int = own
            factors = a[own], b[expert]
        else:
            place = expert
            factors = a[own].mT, b[own]
        was = None if before is None else before[place]
        sums.append(product_sums(out[place], *factors, alpha, was))
    assert_sums(sums)
    if b.dim() == 3:
        rest = out[rows[-1].stop :]
        expected = torch.zeros_like(rest) if before is None else before[rows[-1].stop :]
        assert_bitwise(rest, expected, "rows of no expert")


def _bytes(case: Case) -> int:
    m, n, k = case.shape
    a, b, out = (dtype.itemsize for dtype in _dtypes(case))
    experts = len(groups_of(case))
    if case.own_results:
        sizes = a * m * k + b * m * n + out * experts * k * n * (1 + case.accumulate)
    else:
        sizes = a * m * k + b * experts * k * n + out * m * n * (1 + case.accumulate)
    return sizes + experts * (8 if experts % 2 else 4)


def _flops(case: Case) -> int:
    return 2 * math.prod(case.shape)


SPEC = OpSpec(
    "grouped_matmul_into", _cases(), _inputs, "product", _bytes, _flops, main="a", judge=_judge
)
