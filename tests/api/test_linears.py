"""Several weights in one call: bits as of single calls, the sum of gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedTensor, backends, testing
from qkern.backends import cpu

WIDTH = 128


def weights() -> list[QuantizedTensor]:
    torch.manual_seed(0)
    return [
        qkern.quantize_4bit(torch.randn(48, WIDTH)),
        qkern.quantize_4bit(torch.randn(17, WIDTH), "fp4", 32, False),
        qkern.quantize_4bit(torch.randn(5, WIDTH), "custom", codebook=torch.linspace(-1, 1, 16)),
    ]


def biases(dtype: torch.dtype) -> list[Tensor | None]:
    return [torch.randn(48).to(dtype), None, torch.randn(5).to(dtype)]


def single(x: Tensor, given: list[Tensor | None]) -> list[Tensor]:
    return [qkern.linear_4bit(x, qw, b) for qw, b in zip(weights(), given, strict=True)]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (3, 1), (9,), (2, 40), (0,)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "step"])
def test_bits_are_those_of_single_calls(
    dtype: torch.dtype, rows: tuple[int, ...], layout: str
) -> None:
    x = torch.randn(*rows, WIDTH).to(dtype)
    if layout == "transposed":
        x = x.mT.contiguous().mT if x.dim() > 1 else x
    elif layout == "step":
        x = torch.stack([x, x], -1)[..., 0]
    given = biases(dtype)
    for target in (t for t in testing.targets("cpu") if not t.reason):
        with target.activate():
            for y, expected in zip(
                qkern.linears_4bit(x, weights(), given), single(x, given), strict=True
            ):
                testing.assert_bitwise(y, expected, str(target))
    backwards = qkern.linears_4bit(x, weights()[::-1])
    for y, expected in zip(backwards[::-1], single(x, [None] * 3), strict=True):
        testing.assert_bitwise(y, expected)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_gradients_are_sums(dtype: torch.dtype) -> None:
    def run(function: Any) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(3, WIDTH).to(dtype).requires_grad_()
        given = biases(dtype)
        given[2].requires_grad_()
        ys = function(x, given)
        assert [y.requires_grad for y in ys] == [True] * 3
        sum(y.float().square().sum() for y in ys).backward()
        return [x.grad, given[2].grad, *ys]

    together = run(lambda x, given: qkern.linears_4bit(x, weights(), given))
    for actual, expected in zip(together, run(single), strict=True):
        testing.assert_bitwise(actual.detach(), expected.detach())
    x = torch.randn(2, WIDTH, dtype=torch.float32, requires_grad=True)
    y = qkern.linears_4bit(x, weights()[:1])[0]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


def test_only_what_needs_a_gradient_is_recorded() -> None:
    bias = torch.randn(48, requires_grad=True)
    ys = qkern.linears_4bit(torch.randn(1, WIDTH), weights(), [bias, None, None])
    assert [y.requires_grad for y in ys] == [True, False, False]


@pytest.mark.skipif("linears_4bit" not in cpu.fast, reason="qkern._C is not built")
def test_one_call_of_the_kernels_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = cpu.fast["linears_4bit"]

    def noted(x: Tensor, weights: tuple[Any, ...], *others: Any) -> Any:
        calls.append(len(weights))
        return kernel(x, weights, *others)

    monkeypatch.setattr(cpu, "fast", {"linears_4bit": noted})
    qkern.linear_4bit(torch.randn(1, WIDTH), weights()[0])  # chooses the backend
    for x in (torch.randn(1, WIDTH), torch.randn(30, WIDTH)):
        qkern.linears_4bit(x, weights(), biases(torch.float32))
    assert calls == [3, 3]


def test_blocks_autocast_and_tracers() -> None:
    x, given = torch.randn(5, WIDTH), biases(torch.float32)
    with qkern.batch_invariant():
        together = qkern.linears_4bit(x, weights(), given)
        alone = qkern.linears_4bit(x[:1], weights(), given)
    for y, one in zip(together, alone, strict=True):
        testing.assert_bitwise(y[:1], one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = qkern.linears_4bit(x, weights(), given)
        for y, expected in zip(cast, single(x, given), strict=True):
            assert y.dtype == torch.bfloat16
            testing.assert_bitwise(y, expected)
    with backends.use("reference"):
        for y, expected in zip(
            qkern.linears_4bit(x, weights()), single(x, [None] * 3), strict=True
        ):
            testing.assert_bitwise(y, expected)
    qws = weights()
    compiled = torch.compile(
        lambda x: qkern.linears_4bit(x, qws), fullgraph=True, backend="aot_eager"
    )
    for y, expected in zip(compiled(x), single(x, [None] * 3), strict=True):
        testing.assert_bitwise(y, expected)
    meta = qkern.linears_4bit(x.to("meta"), [qw.to("meta") for qw in qws])
    assert [tuple(y.shape) for y in meta] == [(5, 48), (5, 17), (5, 5)]


def test_wrong_arguments_name_themselves() -> None:
    x, qws = torch.randn(2, WIDTH), weights()
    narrow = qkern.quantize_4bit(torch.randn(4, 64))
    cases: list[tuple[type[Exception], str, Any]] = [
        (
            TypeError,
            r"qws\[1\]: got torch.float32 tensor; takes a QuantizedTensor",
            (x, [qws[0], x]),
        ),
        (ValueError, "qws: got none; takes one", (x, [])),
        (ValueError, "biases: got 1 for 3 weights; takes as many", (x, qws, [None])),
        (ValueError, r"x: got shape \[2, 128\]", (x, [qws[0], narrow])),
        (TypeError, "bias: got torch.float16", (x, qws[:1], [torch.zeros(48).half()])),
        (TypeError, "x: got torch.int64", (x.long(), qws)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            qkern.linears_4bit(*arguments)
