"""The matmuls by experts, beyond the op table: bits, rows of none, offsets that are wrong."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedExperts, backends, testing
from qkern.backends import cpu
from qkern.testing import DTYPES, Target
from qkern.weight import Weight

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
FORMATS = {
    "nf4": {"format": "nf4", "block_size": 64},
    "nested": {"format": "nf4", "block_size": 32, "double_quant": True},
    "fp4": {"format": "fp4", "block_size": 256, "double_quant": True},
    "custom": {"format": "custom", "block_size": 128, "double_quant": True},
}
formats_of_weights = pytest.mark.parametrize("kind", FORMATS)
SHAPES = [(37, 129), (65, 63), (96, 256), (1, 1), (3, 7)]
"""Of most, N K is odd and no block divides it: an expert ends in half a byte and a part of one."""


def experts_of(count: int, n: int, k: int, kind: str = "nested") -> QuantizedExperts:
    """Weights whose values, scales and nested offsets all differ from expert to expert."""
    options: dict[str, Any] = {"double_quant": False} | FORMATS[kind]
    if options["format"] == "custom":
        options["codebook"] = torch.linspace(-1, 0.9, 16)
    w = torch.randn(count, n, k) * (1 + torch.arange(count))[:, None, None]
    return qkern.quantize_experts(w, **options)


def offsets_of(*counts: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Where the rows of experts with so many of them end."""
    return torch.tensor(list(itertools.accumulate(counts)), dtype=dtype)


def forward(
    x: Tensor, qw: QuantizedExperts, offsets: Tensor, bias: Tensor | None, invariant: bool
) -> Tensor:
    return torch.ops.qkern.grouped_linear_4bit(x, *qw.weight, qw.shape[1], offsets, bias, invariant)


def backward(dy: Tensor, qw: QuantizedExperts, offsets: Tensor, invariant: bool) -> Tensor:
    return torch.ops.qkern.grouped_linear_4bit_dx(dy, *qw.weight, qw.shape[2], offsets, invariant)


def both(rows: int, qw: QuantizedExperts, offsets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The results of both ops with drawn activations, the same at every call."""
    x, dy = activations(rows, qw, dtype)
    return [forward(x, qw, offsets, None, False), backward(dy, qw, offsets, False)]


def activations(rows: int, qw: QuantizedExperts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, qw.shape[2], generator=generator).to(dtype),
        torch.randn(rows, qw.shape[1], generator=generator).to(dtype),
    )


def one_by_one(
    op: str, x: Tensor, qw: QuantizedExperts, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """By the op of one weight, expert by expert; zeros for rows of none."""
    _, n, k = qw.shape
    of_dx = op == "linear_4bit_dx"
    out, begin = x.new_zeros(len(x), k if of_dx else n), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            weight: Weight = qw.weight.of_expert(expert, n * k)
            others: list[Any] = [k] if of_dx else [n, None if bias is None else bias[expert]]
            out[begin:end] = getattr(torch.ops.qkern, op)(x[begin:end], *weight, *others, True)
        begin = end
    return out


@formats_of_weights
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_an_experts_rows_have_the_bits_of_its_own_matmul(
    target: Target, dtype: torch.dtype, shape: tuple[int, int], kind: str
) -> None:
    qw = experts_of(5, *shape, kind)
    if qw.nested_offset is not None and math.prod(shape) > 1:
        assert len(set(qw.nested_offset.tolist())) == 5, "else one for all would pass"
    offsets = offsets_of(3, 0, 1, 40, 17)
    x, dy = activations(64, qw, dtype)  # three rows are of none
    bias = torch.randn(5, shape[0]).to(dtype)
    with target.activate():
        for b in (bias, None):
            y = forward(x, qw, offsets, b, True)
            testing.assert_bitwise(y, one_by_one("linear_4bit", x, qw, offsets, b), str(b))
        dx = backward(dy, qw, offsets, True)
        testing.assert_bitwise(dx, one_by_one("linear_4bit_dx", dy, qw, offsets))
    assert (y[61:] == 0).all()
    assert (dx[61:] == 0).all()


@dtypes
def test_offsets_of_either_dtype_give_the_same(target: Target, dtype: torch.dtype) -> None:
    qw = experts_of(4, 37, 129)
    with target.activate():
        narrow = both(30, qw, offsets_of(3, 0, 20, 5), dtype)
        wide = both(30, qw, offsets_of(3, 0, 20, 5, dtype=torch.int64), dtype)
    for a, b in zip(narrow, wide, strict=True):
        testing.assert_bitwise(a, b)


@dtypes
def test_one_expert_is_one_matmul(target: Target, dtype: torch.dtype) -> None:
    qw = experts_of(1, 37, 129)
    x, dy = activations(9, qw, dtype)
    with target.activate():
        y = forward(x, qw, offsets_of(9), None, True)
        whole = torch.ops.qkern.linear_4bit(x, *qw[0].weight, 37, None, True)
        testing.assert_bitwise(y, whole)
        dx = backward(dy, qw, offsets_of(9), True)
        testing.assert_bitwise(dx, torch.ops.qkern.linear_4bit_dx(dy, *qw[0].weight, 129, True))


@pytest.mark.parametrize("chosen", [0, 150, 299])
def test_one_of_many_experts_has_all_rows(target: Target, chosen: int) -> None:
    qw = experts_of(300, 5, 33)
    offsets = offsets_of(*(12 * (expert == chosen) for expert in range(300)))
    x, dy = activations(12, qw, torch.float32)
    with target.activate():
        y, dx = forward(x, qw, offsets, None, True), backward(dy, qw, offsets, True)
        one = qw[chosen].weight
        testing.assert_bitwise(y, torch.ops.qkern.linear_4bit(x, *one, 5, None, True))
        testing.assert_bitwise(dx, torch.ops.qkern.linear_4bit_dx(dy, *one, 33, True))


def test_many_experts_have_some_rows_each(target: Target) -> None:
    qw = experts_of(300, 5, 33)
    offsets = offsets_of(*(expert * 7 % 5 for expert in range(300)))
    rows = int(offsets[-1])
    x, dy = activations(rows, qw, torch.float32)
    with target.activate():
        y, dx = forward(x, qw, offsets, None, True), backward(dy, qw, offsets, True)
        testing.assert_bitwise(y, one_by_one("linear_4bit", x, qw, offsets))
        testing.assert_bitwise(dx, one_by_one("linear_4bit_dx", dy, qw, offsets))


@dtypes
def test_without_rows_there_is_nothing(target: Target, dtype: torch.dtype) -> None:
    qw = experts_of(3, 37, 129)
    with target.activate():
        y, dx = both(0, qw, offsets_of(0, 0, 0), dtype)
    assert (y.shape, dx.shape) == ((0, 37), (0, 129))
    assert y.dtype == dx.dtype == dtype


@dtypes
def test_without_experts_all_rows_are_of_none(target: Target, dtype: torch.dtype) -> None:
    weight = Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), *(None,) * 3, "nf4", 64)
    none = torch.empty(0, dtype=torch.int32)
    with target.activate():
        y = torch.ops.qkern.grouped_linear_4bit(
            torch.randn(4, 129).to(dtype), *weight, 37, none, torch.empty(0, 37, dtype=dtype)
        )
        dx = torch.ops.qkern.grouped_linear_4bit_dx(
            torch.randn(4, 37).to(dtype), *weight, 129, none
        )
    testing.assert_bitwise(y, torch.zeros(4, 37, dtype=dtype))
    testing.assert_bitwise(dx, torch.zeros(4, 129, dtype=dtype))


@dtypes
def test_rows_of_no_expert_are_zeros_whatever_they_hold(target: Target, dtype: torch.dtype) -> None:
    qw = experts_of(2, 37, 129)
    x, dy = activations(7, qw, dtype)
    x[3:] = math.nan
    dy[3:] = math.inf
    bias = torch.ones(2, 37, dtype=dtype)
    with target.activate():
        y, dx = (
            forward(x, qw, offsets_of(1, 2), bias, False),
            backward(dy, qw, offsets_of(1, 2), False),
        )
    assert y[:3].isfinite().all()
    assert dx[:3].isfinite().all()
    testing.assert_bitwise(y[3:], torch.zeros(4, 37, dtype=dtype))
    testing.assert_bitwise(dx[3:], torch.zeros(4, 129, dtype=dtype))


@pytest.mark.parametrize("row", [0, 6, 30, 63])
@dtypes
def test_a_nan_stays_in_its_row(target: Target, dtype: torch.dtype, row: int) -> None:
    qw = experts_of(4, 37, 129)
    offsets = offsets_of(1, 6, 0, 57)
    x, dy = activations(64, qw, dtype)
    with target.activate():
        clean = forward(x, qw, offsets, None, False), backward(dy, qw, offsets, False)
        x[row, 5] = dy[row, 5] = math.nan
        found = forward(x, qw, offsets, None, False), backward(dy, qw, offsets, False)
    for before, after in zip(clean, found, strict=True):
        assert after[row].isnan().all()
        others = torch.arange(64) != row
        testing.assert_bitwise(after[others], before[others])


@pytest.mark.parametrize("double_quant", [False, True])
@dtypes
def test_scales_of_experts_without_rows_reach_nothing(
    target: Target, dtype: torch.dtype, double_quant: bool
) -> None:
    qw = experts_of(5, 37, 129, "nested" if double_quant else "nf4")
    offsets = offsets_of(0, 6, 0, 20, 0)
    name = "nested_offset" if double_quant else "absmax"
    with target.activate():
        clean = both(28, qw, offsets, dtype)
        getattr(qw, name)[::2] = math.nan
        found = both(28, qw, offsets, dtype)
        for before, after in zip(clean, found, strict=True):
            testing.assert_bitwise(after, before)
        getattr(qw, name)[3] = math.nan
        for after in both(28, qw, offsets, dtype):
            assert after[6:26].isnan().all(), "it is read where there are rows"
            assert after[:6].isfinite().all()


WRONG = {
    "descends": ((4, 3, 8), "got 3 for expert 1 after 4"),
    "negative": ((-1, 3, 8), "got -1 for expert 0 after 0"),
    "beyond": ((4, 5, 9), "got 9 for expert 2 after 5"),
    "beyond at first": ((9, 9, 9), "got 9 for expert 0 after 0"),
    "far beyond": ((1, 2, 2**31 - 1), f"got {2**31 - 1} for expert 2 after 2"),
}


@pytest.mark.parametrize("ends", WRONG)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_that_are_none_are_refused(target: Target, ends: str, dtype: torch.dtype) -> None:
    numbers, said = WRONG[ends]
    qw = experts_of(3, 37, 129)
    offsets = torch.tensor(numbers, dtype=dtype)
    x, dy = activations(8, qw, torch.float32)
    message = f"^offsets: {said}; takes ascending numbers from 0 to 8, the rows of x$"
    with target.activate():
        for call in (
            lambda: forward(x, qw, offsets, None, False),
            lambda: backward(dy, qw, offsets, False),
            lambda: qkern.grouped_linear_4bit(x, qw, offsets),
            lambda: qkern.grouped_linear_4bit(x, qw, offsets, check_offsets=True),
            lambda: qkern.grouped_linear_4bit(x.clone().requires_grad_(), qw, offsets),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.skipif(cpu.missing_reason() is not None, reason="qkern._C is not built")
def test_a_wrong_offset_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are no terms, for which no kernel is called."""
    qw = experts_of(2, 3, 64)
    offsets = torch.tensor([3, 1])
    with backends.use("cpu"):
        monkeypatch.setattr(backends.cpu, "_multiply", lambda product: pytest.fail("ran"))
        for x in (torch.randn(4, 64), torch.randn(0, 64)):
            with pytest.raises(ValueError, match=r"^offsets: got"):
                forward(x, qw, offsets, None, False)
