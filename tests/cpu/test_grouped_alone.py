"""The matmuls by experts without torch's dispatcher: the same results, and nothing wrong taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedExperts, testing
from qkern.backends import cpu
from qkern.weight import Weight
from tests.observers import Ops
from tests.references import assert_none_kept

pytestmark = pytest.mark.skipif(
    not cpu.fast,
    reason="no native kernels, or a torch without DLPack's C exchange interface",
)

E, N, K, R, ROWS = 3, 6, 64, 5, 7
ENDS = 2, 2, 6


class Tagged(Tensor):
    """A subclass, whose elements may mean something else."""


def experts(**options: Any) -> QuantizedExperts:
    return qkern.quantize_experts(torch.randn(E, N, K), **options)


def offsets(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(ENDS, dtype=dtype)


def arguments(name: str, **options: Any) -> list[Any]:
    """Right ones for a product by experts."""
    weight = tuple(experts(**options).weight)
    left = torch.randn(ROWS, R)
    if name.startswith("grouped_linear_4bit_dx"):
        base = [torch.randn(ROWS, N), weight, K, offsets()]
        term = [left, torch.randn(E, R, K), 0.5]
    else:
        base = [torch.randn(ROWS, K), weight, N, offsets(), torch.randn(E, N)]
        term = [left, torch.randn(E, R, N), 0.5]
    return [*base, *(term if name.endswith("_add") else []), False, 1]


PRODUCTS = [
    *("grouped_linear_4bit", "grouped_linear_4bit_dx"),
    *("grouped_linear_4bit_add", "grouped_linear_4bit_dx_add"),
]
GROUPED = [*PRODUCTS, "grouped_matmul_into"]
WEIGHTS = [{}, {"double_quant": False}, {"format": "custom", "codebook": torch.linspace(-1, 1, 16)}]
each_product = pytest.mark.parametrize("name", PRODUCTS)


def wrong_tensors(value: Tensor) -> list[Any]:
    """Other tensors than ``value``, of none of which a kernel may be told that it is that."""
    line = value.reshape(-1)
    return [
        *(value.to("meta"), value.to_sparse(), value.as_subclass(Tagged)),
        *(line[:0], torch.cat([line, line]), line[:-1]),
        value.double() if value.is_floating_point() else value.short(),
    ]


@pytest.mark.parametrize("options", WEIGHTS, ids=["double_quant", "plain", "custom"])
@each_product
def test_the_kernels_take_nothing_wrong(name: str, options: dict[str, Any]) -> None:
    kernel, right = cpu.fast[name], arguments(name, **options)
    assert kernel(*right) is not None
    flat = [*right, *right[1]]
    bias = 4 if name in ("grouped_linear_4bit", "grouped_linear_4bit_add") else None
    for position, value in enumerate(flat):
        wrong: list[Any] = ["nf5", -1, 0, 1 << 40, 1 << 70, object(), [value]]
        if value is not None and position != bias:
            wrong.append(None)
        if isinstance(value, tuple):
            wrong += [list(value), value[:-1], (*value, None)]
        if isinstance(value, Tensor):
            wrong += wrong_tensors(value)
            if position < len(right):
                wrong.append(value[None])
            elif options.get("codebook") is not value:
                wrong.append(value[0])  # of one expert
        for bad in wrong:
            given = [*flat[:position], bad, *flat[position + 1 :]]
            changed = given[: len(right)]
            if position >= len(right):
                changed[1] = tuple(given[len(right) :])
            assert kernel(*changed) is None, (position, bad)
    with pytest.raises(TypeError, match=r"takes \d+( or 8)? arguments"):
        kernel(*right[:-1])


@each_product
@pytest.mark.parametrize(
    "ends", [(3, 2, 6), (-1, 2, 6), (2, 2, ROWS + 1), (2, 1 << 62, 6), (1 << 31, 2, 6)]
)
def test_the_kernels_take_no_rows_that_are_not_there(name: str, ends: tuple[int, ...]) -> None:
    right = arguments(name)
    right[3] = torch.tensor(ends)
    assert cpu.fast[name](*right) is None
    if max(ends) < 1 << 31:
        right[3] = right[3].int()
        assert cpu.fast[name](*right) is None


@each_product
def test_what_a_plain_tensor_may_look_like(name: str) -> None:
    kernel, right = cpu.fast[name], arguments(name)
    expected = kernel(*right)
    assert expected.shape == (ROWS, right[2])

    def with_one(position: int, value: Any) -> None:
        testing.assert_bitwise(
            kernel(*[*right[:position], value, *right[position + 1 :]]), expected
        )

    x = right[0]
    with_one(0, x.t().contiguous().t())
    with_one(0, x.repeat(1, 2)[:, : x.shape[1]])
    with_one(0, torch.nn.Parameter(x))
    with_one(3, offsets(torch.int32))
    as_integers = [
        part.view(torch.int32) if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in right[1]
    ]
    flat = [part.view(-1) if isinstance(part, Tensor) else part for part in as_integers]
    for weight in (Weight(*right[1]), tuple(as_integers), tuple(flat)):
        with_one(1, weight)
    if name.endswith("_add"):
        at = 4 if "_dx" in name else 5
        factor = right[at + 1]
        with_one(at + 1, factor.mT.contiguous().mT)
        right[at + 1] = factor[:1].expand(E, -1, -1)
        expected = kernel(*[*right[: at + 1], right[at + 1].contiguous(), *right[at + 2 :]])
        with_one(at + 1, right[at + 1])


def test_the_width_of_x_is_the_weights() -> None:
    right = arguments("grouped_linear_4bit")
    kernel = cpu.fast["grouped_linear_4bit"]
    assert kernel(*right, K) is not None
    for wrong in (K - 1, 2 * K, "64", None):
        # None asks for nothing: the weight then says what x has.
        assert (kernel(*right, wrong) is None) == (wrong is not None)


def matrices(own_b: bool) -> list[Tensor]:
    a = torch.randn(ROWS, K)
    if own_b:
        return [torch.randn(ROWS, R), a, torch.randn(E, K, R)]
    return [torch.randn(E, K, R), a, torch.randn(ROWS, R)]


@pytest.mark.parametrize("own_b", [True, False], ids=["own_b", "own_out"])
def test_the_dense_product_takes_nothing_wrong(own_b: bool) -> None:
    kernel, given = cpu.fast["grouped_matmul_into"], [*matrices(own_b), offsets(), 0.5, True, 1]
    assert kernel(*given)
    for position, value in enumerate(given):
        wrong: list[Any] = [None, "x", object(), [value], 1 << 70, -1]
        if isinstance(value, Tensor):
            wrong += wrong_tensors(value)
            if position < 3:
                wrong += [value[None], torch._neg_view(value), given[1 if position == 0 else 0]]
        if position == 0:
            wrong += [value.mT.contiguous().mT, torch.empty(*value.shape, 2)[..., 0]]
        for bad in wrong:
            changed = [*given[:position], bad, *given[position + 1 :]]
            assert kernel(*changed) is None, (position, bad)
    for ends in ((3, 2, 6), (2, 2, ROWS + 1)):
        assert kernel(*given[:3], torch.tensor(ends), *given[4:]) is None
    with pytest.raises(TypeError, match="takes 7 arguments"):
        kernel(*given[:-1])


@pytest.mark.parametrize("own_b", [True, False], ids=["own_b", "own_out"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_what_matrices_may_look_like(own_b: bool, accumulate: bool) -> None:
    kernel, (out, a, b) = cpu.fast["grouped_matmul_into"], matrices(own_b)
    rest = [offsets(), 0.5, accumulate, 1]
    expected = out.clone()
    assert kernel(expected, a, b, *rest)
    apart = torch.stack([a, torch.full_like(a, torch.nan)], dim=2)[..., 0]
    for left, right in ((a.t().contiguous().t(), b), (a, b.mT.contiguous().mT), (apart, b)):
        found = out.clone()
        assert kernel(found, left, right, *rest)
        testing.assert_bitwise(found, expected)


def test_the_public_function_skips_the_op_where_nobody_can_tell() -> None:
    qw, x, ends = experts(), torch.randn(ROWS, K), offsets()
    expected = torch.ops.qkern.grouped_linear_4bit(x, *qw.weight, N, ends)
    answers: list[Any] = []
    kernel = cpu.fast["grouped_linear_4bit"]

    def observed(*given: Any) -> Any:
        answers.append(kernel(*given))
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu.fast, "grouped_linear_4bit", observed)
        y = qkern.grouped_linear_4bit(x, qw, ends)
        assert len(answers) == 1
        assert answers[0] is y
    testing.assert_bitwise(y, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, qw, ends: qkern.grouped_linear_4bit(x, qw, ends),
        lambda x, qw, ends: qkern.grouped_lora_linear(
            x, qw, ends, torch.ones(E, R, K), torch.ones(E, N, R), 1.0
        ),
    ],
    ids=["plain", "lora"],
)
def test_who_watches_sees_the_op(call: Callable[..., Tensor]) -> None:
    qw, x = experts(), torch.randn(ROWS, K)
    with Ops() as seen:
        call(x, qw, offsets())
    assert any("grouped_linear_4bit" in name for name in seen.seen)


@pytest.mark.parametrize("name", GROUPED)
def test_no_reference_is_kept(name: str) -> None:
    kernel = cpu.fast[name]
    if name == "grouped_matmul_into":
        right: list[Any] = [*matrices(True), offsets(), 0.5, True, 1]
        others = [[right[0].double(), *right[1:]]]
    else:
        right = arguments(name)
        strided = right[0].repeat(2, 2)[::2, ::2]
        others = [[x, *right[1:]] for x in (right[0].double(), strided)]

    def run() -> None:
        for given in (right, *others):
            kernel(*given)

    assert_none_kept(run, (*right, *others[-1]))
