"""Products of real sizes on every way, against float64 on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lab.cuda import ways
from lab.cuda.first_run.checks import Check
from lab.cuda.first_run.device import Device
from lab.cuda.first_run.products import Shape, multiply, possible, quantized, random
from qkern.backends._cuda_paths import Matmul
from qkern.testing import DTYPE_NAMES
from qkern.testing._judge import Sums, assert_sums

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4104, 11008))
"""The last is no multiple of a tile."""
ROWS = (1, 2, 3, 5, 16, 17, 64, 65, 257, 1023)
DRY_SHAPES = ((96, 128), (72, 96))
DRY_ROWS = (1, 3, 17)
KINDS = ((torch.bfloat16, True), (torch.float16, False))
"""Dtypes, each with whether scales are double-quantised."""

_BLOCK = 1024  # rows or columns of W in float64 at a time


class Problem(NamedTuple):
    device: Device
    shape: Shape
    rows: int
    dtype: torch.dtype
    double_quant: bool
    dx: bool

    @property
    def call(self) -> Matmul:
        return Matmul(self.dx, self.dtype, self.rows, *self.shape)

    def __str__(self) -> str:
        op, size = "dx" if self.dx else "forward", "x".join(map(str, self.shape))
        double = "-double_quant" if self.double_quant else ""
        return f"{op}-{size}-M{self.rows}-{DTYPE_NAMES[self.dtype]}{double}"


class Expected(NamedTuple):
    """The activations and what `assert_sums` takes: see there."""

    x: Tensor
    exact: Tensor
    scale: Tensor
    baseline: Tensor


@functools.lru_cache(maxsize=1)
def _exact_weight(device: Device, shape: Shape, double_quant: bool) -> Tensor:
    with device.target.activate():
        return quantized(device, shape, double_quant).dequantize(torch.float32)


@functools.lru_cache(maxsize=1)
def expected(problem: Problem) -> Expected:
    """By blocks of W, so that no whole float64 twin of it is needed."""
    weight = _exact_weight(problem.device, problem.shape, problem.double_quant)
    weight = weight if problem.dx else weight.t()  # [terms, features of the result]
    x = random(problem.device, problem.rows, len(weight)).to(problem.dtype)
    parts = []
    for part in weight.split(_BLOCK, dim=1):
        exact = x.double() @ part.double()
        scale = x.double().abs() @ part.double().abs()
        parts.append((exact, scale, x.float() @ part.to(problem.dtype).float()))
    exact, scale, baseline = (torch.cat(sums, dim=1) for sums in zip(*parts, strict=True))
    return Expected(x, exact, scale, baseline.to(problem.dtype))


def check(problem: Problem, way: str) -> None:
    """Raise AssertionError unless the product is as exact as `testing.assert_matmul` asks."""
    x, exact, scale, baseline = expected(problem)
    qw = quantized(problem.device, problem.shape, problem.double_quant)
    with problem.device.target.activate(), ways.forced(way):
        y = multiply(qw, x, problem.dx)
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}"
    # The second baseline is for float32 alone.
    assert_sums([Sums(y, exact, scale, baseline, lambda: baseline)])


def checks(device: Device) -> Iterator[Check]:
    """Neighbours share a weight and a product, so that each is made once."""
    shapes, rows = (DRY_SHAPES, DRY_ROWS) if device.dry else (SHAPES, ROWS)
    for shape in shapes:
        for dtype, double_quant in KINDS:
            for m in rows:
                for dx in (False, True):
                    problem = Problem(device, shape, m, dtype, double_quant, dx)
                    for way in possible(device, problem.call):
                        yield Check(f"{way} {problem}", partial(check, problem, way))
