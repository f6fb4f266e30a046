"""The matmul by experts: its gradients of any order, compiled, under autocast, in every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import qkern
from qkern import QuantizedExperts, testing
from qkern.testing import DTYPES, Target

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
ENDS = (4, 4, 5, 16)
ROWS, N, K = 19, 37, 130
"""The second expert has no rows, and the last three rows have no expert."""


@pytest.fixture(autouse=True)
def _on_target(target: Target) -> Iterator[None]:
    with target.activate():
        yield


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def experts(**options: Any) -> QuantizedExperts:
    return qkern.quantize_experts(torch.randn(4, N, K) * 0.05, **options)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def ends(dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ENDS, dtype=dtype)


def dense_product(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the op stands for, by torch's matmul of each expert."""
    parts, begin = [], 0
    for expert, end in enumerate(ENDS):
        part = x[begin:end] @ weights[expert].mT
        parts.append(part if bias is None else part + bias[expert])
        begin = end
    return torch.cat([*parts, x.new_zeros(len(x) - begin, weights.shape[1])])


def exact(qw: QuantizedExperts, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Float64 weights, and leaves like those given."""
    doubles = (t.detach().double().requires_grad_() for t in leaves)
    return qw.dequantize(torch.float32).double(), *doubles


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
@dtypes
def test_gradients_of_input_and_bias(dtype: torch.dtype, double_quant: bool) -> None:
    qw = experts(double_quant=double_quant)
    x, bias = leaf(ROWS, K, dtype=dtype), leaf(4, N, dtype=dtype)
    y = qkern.grouped_linear_4bit(x, qw, ends(), bias)
    dy = torch.randn(ROWS, N).to(dtype)
    y.backward(dy)
    weights = qw.dequantize(torch.float32)
    begin = 0
    for expert, end in enumerate(ENDS):
        rows = slice(begin, end)
        testing.assert_matmul(y[rows], x[rows], weights[expert], bias[expert])
        testing.assert_matmul(x.grad[rows], dy[rows], weights[expert].mT)
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(
            bias.grad[expert].double(), dy[rows].double().sum(0), rtol=tolerance, atol=tolerance
        )
        begin = end
    for rest in (y[begin:], x.grad[begin:], bias.grad[1]):
        assert (rest == 0).all()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)


def test_gradients_are_those_of_float64() -> None:
    """Through a nonlinear loss, against float64 autograd on the exact dequantised weights."""
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)
    qkern.grouped_linear_4bit(x, qw, ends(), bias).cos().square().sum().backward()
    w64, x64, bias64 = exact(qw, x, bias)
    dense_product(x64, w64, bias64).cos().square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", ["x", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    qw, x, bias = experts(), torch.randn(ROWS, K), torch.randn(4, N)
    given = {"x": x, "bias": bias}
    given[trained].requires_grad_()
    qkern.grouped_linear_4bit(x, qw, ends(), bias).square().sum().backward()
    w64, x64, bias64 = exact(qw, x, bias)
    dense_product(x64, w64, bias64).square().sum().backward()
    expected = {"x": x64, "bias": bias64}[trained].grad
    torch.testing.assert_close(given[trained].grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert ({"x": bias, "bias": x}[trained]).grad is None


def test_a_nan_gradient_of_rows_of_none_reaches_nothing() -> None:
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)
    dy = torch.ones(ROWS, N)
    clean = torch.autograd.grad(qkern.grouped_linear_4bit(x, qw, ends(), bias), (x, bias), dy)
    dy[ENDS[-1] :] = torch.nan
    found = torch.autograd.grad(qkern.grouped_linear_4bit(x, qw, ends(), bias), (x, bias), dy)
    for before, after in zip(clean, found, strict=True):
        testing.assert_bitwise(after, before)


def test_a_nan_gradient_stays_in_its_row_and_its_experts_bias() -> None:
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)
    dy = torch.ones(ROWS, N)
    dy[2, 3] = torch.nan
    y = qkern.grouped_linear_4bit(x, qw, ends(), bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert dx[2].isnan().all()
    assert dx[torch.arange(ROWS) != 2].isfinite().all()
    assert dbias.isnan().sum() == 1


@dtypes
def test_gradient_does_not_depend_on_the_gradients_strides(dtype: torch.dtype) -> None:
    qw, x, bias = experts(), leaf(ROWS, K, dtype=dtype), leaf(4, N, dtype=dtype)

    def gradients(dy: Tensor) -> tuple[Tensor, ...]:
        y = qkern.grouped_linear_4bit(x, qw, ends(), bias)
        return torch.autograd.grad(y, (x, bias), dy)

    for layout in testing.LAYOUTS:
        dy = testing.with_layout(torch.randn(ROWS, N).to(dtype), layout)
        for found, expected in zip(gradients(dy), gradients(dy.contiguous()), strict=True):
            testing.assert_bitwise(found, expected, layout)


def test_double_backward() -> None:
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)

    def penalty(
        x: Tensor, bias: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        loss = product(x, bias).tanh().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, bias))

    ours = penalty(x, bias, lambda x, bias: qkern.grouped_linear_4bit(x, qw, ends(), bias))
    w64, x64, bias64 = exact(qw, x, bias)
    theirs = penalty(x64, bias64, lambda x, bias: dense_product(x, w64, bias))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dual", ["x", "bias", "both"])
def test_forward_mode(dual: str) -> None:
    qw = experts()
    x, bias = torch.randn(ROWS, K), torch.randn(4, N)
    tangents = torch.randn(ROWS, K), torch.randn(4, N)
    with forward_ad.dual_level():
        y = qkern.grouped_linear_4bit(
            x if dual == "bias" else forward_ad.make_dual(x, tangents[0]),
            qw,
            ends(),
            bias if dual == "x" else forward_ad.make_dual(bias, tangents[1]),
        )
        primal, tangent = forward_ad.unpack_dual(y)
    w64 = qw.dequantize(torch.float32).double()
    x_tangent = tangents[0].double() * (dual != "bias")
    expected = dense_product(x_tangent, w64, tangents[1].double() * (dual != "x"))
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-5)
    testing.assert_bitwise(primal, qkern.grouped_linear_4bit(x, qw, ends(), bias))


def test_the_tangent_of_a_gradient() -> None:
    qw, x, direction = experts(), torch.randn(ROWS, K), torch.randn(ROWS, K)
    w64 = qw.dequantize(torch.float32).double()

    def curvature(x: Tensor, direction: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.requires_grad_(), direction)
            (dx,) = torch.autograd.grad(product(dual).cos().sum(), dual, create_graph=True)
            tangent = forward_ad.unpack_dual(dx).tangent
            assert tangent is not None
            return tangent.detach()

    found = curvature(x.clone(), direction, lambda x: qkern.grouped_linear_4bit(x, qw, ends()))
    expected = curvature(x.double(), direction.double(), lambda x: dense_product(x, w64))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_functorchs_derivatives_are_refused_as_those_of_one_weight_are() -> None:
    qw, x = experts(), torch.randn(ROWS, K)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: qkern.grouped_linear_4bit(x, qw, ends()), (x,), (x,))


def test_backward_keeps_the_weight_and_the_offsets_alone() -> None:
    qw, x, bias, offsets = experts(), leaf(ROWS, K), leaf(4, N), ends()
    saved: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(noted, lambda tensor: tensor):
        qkern.grouped_linear_4bit(x, qw, offsets, bias)
    held = {t.untyped_storage().data_ptr() for t in (offsets, *qw.tensors().values())}
    assert {t.untyped_storage().data_ptr() for t in saved} == held


def test_checkpointing_changes_nothing() -> None:
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)

    def loss(x: Tensor) -> Tensor:
        return qkern.grouped_linear_4bit(x, qw, ends(), bias).tanh().sum()

    plain = torch.autograd.grad(loss(x), (x, bias))
    again = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), (x, bias))
    for a, b in zip(again, plain, strict=True):
        testing.assert_bitwise(a, b)


@pytest.mark.parametrize(
    ("backend", "with_bias"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_compiled_forward_and_backward(backend: str, with_bias: bool) -> None:
    qw = experts()

    def loss(x: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        return qkern.grouped_linear_4bit(x * 2, qw, offsets, bias).tanh().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for dtype in (torch.int32, torch.int64):
        x, bias = leaf(ROWS, K), leaf(4, N) if with_bias else None
        given = [x, *([bias] if bias is not None else [])]
        plain = loss(x, bias, ends(dtype))
        ours = compiled(x, bias, ends(dtype))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(plain, given)
        for a, b in zip(torch.autograd.grad(ours, given), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    qw, x, bias = experts(), leaf(ROWS, K), leaf(4, N)
    with torch.autocast(device.type, dtype):
        y = qkern.grouped_linear_4bit(x, qw, ends(), bias)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    low_x, low_bias = (t.detach().to(dtype).requires_grad_() for t in (x, bias))
    low = qkern.grouped_linear_4bit(low_x, qw, ends(), low_bias)
    low.float().square().sum().backward()
    testing.assert_bitwise(y, low)
    testing.assert_bitwise(x.grad, low_x.grad.float())
    testing.assert_bitwise(bias.grad, low_bias.grad.float())


@dtypes
def test_a_batch_invariant_block_gives_the_bits_of_one_matmul(dtype: torch.dtype) -> None:
    """The gradient too, for which the block has ended."""
    qw, x, bias = experts(), leaf(ROWS, K, dtype=dtype), leaf(4, N, dtype=dtype)
    dy = torch.randn(ROWS, N).to(dtype)
    with qkern.batch_invariant():
        y = qkern.grouped_linear_4bit(x, qw, ends(), bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    begin = 0
    for expert, end in enumerate(ENDS):
        # Row by row: what an expert's other rows are does not matter either.
        for row in range(begin, end):
            one = x.detach()[row : row + 1].requires_grad_()
            with qkern.batch_invariant():
                alone = qkern.linear_4bit(one, qw[expert], bias[expert])
            (gradient,) = torch.autograd.grad(alone, one, dy[row : row + 1])
            testing.assert_bitwise(y[row : row + 1], alone, str(row))
            testing.assert_bitwise(dx[row : row + 1], gradient, str(row))
        begin = end


def test_check_offsets_raises_and_changes_nothing_else() -> None:
    qw, x = experts(), torch.randn(ROWS, K)
    for dtype in (torch.int32, torch.int64):
        checked = qkern.grouped_linear_4bit(x, qw, ends(dtype), check_offsets=True)
        testing.assert_bitwise(checked, qkern.grouped_linear_4bit(x, qw, ends(dtype)))
    wrong = torch.tensor([4, 3, 5, 16])
    with pytest.raises(ValueError, match=r"^offsets: got 3 for expert 1 after 4; takes"):
        qkern.grouped_linear_4bit(x, qw, wrong, check_offsets=True)
