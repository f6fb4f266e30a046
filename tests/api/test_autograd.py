"""Gradients: right, of any order, and bought without keeping anything but the weight itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import dropout, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qkern
from qkern import QuantizedTensor, testing
from qkern.testing import CODEBOOKS, DTYPES, Target

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
tables = pytest.mark.parametrize("table", ["nf4", "fp4", "asymmetric"])


@pytest.fixture(autouse=True)
def _on_target(target: Target) -> Iterator[None]:
    with target.activate():
        yield


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def weight(
    table: str = "nf4", shape: tuple[int, int] = (37, 130), **options: Any
) -> QuantizedTensor:
    w = torch.randn(shape) * 0.05
    if table in CODEBOOKS:
        options |= {"format": "custom", "codebook": torch.tensor(CODEBOOKS[table])}
    else:
        options |= {"format": table}
    return qkern.quantize_4bit(w, **options)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


class OpLog(TorchDispatchMode):
    """Names of the qkern ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qkern":
            self.ops.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
@tables
@dtypes
def test_gradients_of_input_and_bias(dtype: torch.dtype, table: str, double_quant: bool) -> None:
    qw = weight(table, double_quant=double_quant)
    x, bias = leaf(4, 5, 130, dtype=dtype), leaf(37, dtype=dtype)
    y = qkern.linear_4bit(x, qw, bias)
    dy = torch.randn(4, 5, 37).to(dtype)
    y.backward(dy)

    dense = qw.dequantize(torch.float32)
    testing.assert_matmul(y.flatten(0, 1), x.flatten(0, 1), dense, bias)
    testing.assert_matmul(x.grad.flatten(0, 1), dy.flatten(0, 1), dense.mT)
    expected = dy.double().sum((0, 1))
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(bias.grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradient_equals_float64_autograd() -> None:
    """Through a nonlinear loss, against float64 autograd on the exact dequantised weight."""
    qw = weight()
    x, bias = leaf(6, 130), leaf(37)
    qkern.linear_4bit(x, qw, bias).tanh().square().sum().backward()
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    linear(x64, qw.dequantize(torch.float32).double(), bias64).tanh().square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=1e-5, atol=1e-6)


@dtypes
def test_gradient_does_not_depend_on_the_gradients_strides(dtype: torch.dtype) -> None:
    """`sum` hands back an expanded gradient with stride 0; others are transposed or sliced."""
    qw, x = weight(), leaf(6, 130, dtype=dtype)
    for layout in testing.LAYOUTS:
        dy = testing.with_layout(torch.randn(6, 37).to(dtype), layout)
        (strided,) = torch.autograd.grad(qkern.linear_4bit(x, qw), x, dy)
        (dense,) = torch.autograd.grad(qkern.linear_4bit(x, qw), x, dy.contiguous())
        testing.assert_bitwise(strided, dense, layout)
    (summed,) = torch.autograd.grad(qkern.linear_4bit(x, qw).sum(), x)
    (ones,) = torch.autograd.grad(qkern.linear_4bit(x, qw), x, torch.ones(6, 37).to(dtype))
    testing.assert_bitwise(summed, ones)


def test_double_backward() -> None:
    qw = weight()
    x, bias = leaf(6, 130), leaf(37)
    w64 = qw.dequantize(torch.float32).double()

    def penalty(x: Tensor, bias: Tensor, forward: Any) -> tuple[Tensor, ...]:
        loss = forward(x, bias).tanh().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, bias))

    ours = penalty(x, bias, lambda x, bias: qkern.linear_4bit(x, qw, bias))
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    exact = penalty(x64, bias64, lambda x, bias: linear(x, w64, bias))
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@contextmanager
def recorded_saves() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def storages(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dual", ["x", "bias", "both"])
def test_forward_mode(dual: str, grad_mode: bool) -> None:
    qw = weight()
    x, x_tangent = torch.randn(2, 4, 5, 130)
    bias, bias_tangent = torch.randn(2, 37)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        y = qkern.linear_4bit(
            x if dual == "bias" else forward_ad.make_dual(x, x_tangent),
            qw,
            bias if dual == "x" else forward_ad.make_dual(bias, bias_tangent),
        )
        found = forward_ad.unpack_dual(y).tangent
    dense = qw.dequantize(torch.float32)
    if dual == "bias":
        assert torch.equal(found, bias_tangent.expand(4, 5, 37))
    else:
        testing.assert_matmul(
            found.flatten(0, 1),
            x_tangent.flatten(0, 1),
            dense,
            bias_tangent if dual == "both" else None,
        )


def test_forward_mode_over_backward() -> None:
    qw = weight()
    x, (dy, tangent) = leaf(5, 130), torch.randn(2, 5, 37)
    y = qkern.linear_4bit(x, qw)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        found = forward_ad.unpack_dual(dx)
        testing.assert_matmul(found.primal, dy, qw.dequantize(torch.float32).mT)
        testing.assert_matmul(found.tangent, tangent, qw.dequantize(torch.float32).mT)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_lora_forward_mode(grad_mode: bool) -> None:
    qw = weight()
    x, x_tangent = torch.randn(2, 4, 5, 130)
    a, a_tangent = torch.randn(2, 8, 130)
    b, b_tangent = torch.randn(2, 37, 8)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        duals = map(forward_ad.make_dual, (x, a, b), (x_tangent, a_tangent, b_tangent))
        dual_x, dual_a, dual_b = duals
        y = forward_ad.unpack_dual(qkern.lora_linear(dual_x, qw, dual_a, dual_b, 0.5))
    dense = qw.dequantize(torch.float32).double()
    x, x_tangent, a, a_tangent, b, b_tangent = (
        t.double() for t in (x, x_tangent, a, a_tangent, b, b_tangent)
    )
    torch.testing.assert_close(y.primal.double(), x @ (dense + b @ a / 2).mT, rtol=1e-5, atol=1e-4)
    expected = x_tangent @ (dense + b @ a / 2).mT + x @ (b_tangent @ a + b @ a_tangent).mT / 2
    torch.testing.assert_close(y.tangent.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
@tables
def test_only_the_packed_weight_is_saved(table: str, double_quant: bool) -> None:
    qw = weight(table, double_quant=double_quant)
    x, bias = leaf(6, 130), leaf(37)
    with recorded_saves() as saved:
        qkern.linear_4bit(x, qw, bias)
    assert {id(t) for t in saved} <= {id(t) for t in qw.tensors().values()}, "a copy was saved"
    assert storages(*saved) == storages(*qw.tensors().values())


def test_the_input_is_freed_after_forward() -> None:
    qw = weight()
    hidden = leaf(6, 130) * 1
    storage = weakref.ref(hidden.untyped_storage())
    y = qkern.linear_4bit(hidden, qw)
    del hidden
    gc.collect()
    assert storage() is None
    y.sum().backward()


def test_nothing_is_saved_for_the_bias_alone() -> None:
    qw, bias = weight(), leaf(37)
    with recorded_saves() as saved, OpLog() as log:
        y = qkern.linear_4bit(torch.randn(6, 130), qw, bias)
        y.sum().backward()
    assert saved == []
    assert log.ops == ["linear_4bit"], "the gradient of an input that needs none was computed"
    assert (bias.grad == 6).all()


def test_one_fused_op_in_each_pass() -> None:
    qw, x = weight(), leaf(6, 130)
    with OpLog() as log:
        y = qkern.linear_4bit(x, qw)
        assert log.ops == ["linear_4bit"]
        y.sum().backward()
    assert log.ops == ["linear_4bit", "linear_4bit_dx"]


def test_no_graph_where_no_gradient_is_asked_for() -> None:
    qw, x = weight(), leaf(6, 130)
    assert not qkern.linear_4bit(x.detach(), qw).requires_grad
    with torch.no_grad():
        assert not qkern.linear_4bit(x, qw).requires_grad
    with torch.inference_mode():
        y = qkern.linear_4bit(x, qw)
        assert y.is_inference()
    testing.assert_bitwise(y, qkern.linear_4bit(x, qw))


def test_the_weight_gets_no_gradient() -> None:
    qw, x = weight(), leaf(6, 130)
    qkern.linear_4bit(x, qw).sum().backward()
    assert all(t.grad is None and not t.requires_grad for t in qw.tensors().values())


def test_a_weight_changed_before_backward_is_noticed() -> None:
    qw, x = weight(), leaf(6, 130)
    y = qkern.linear_4bit(x, qw)
    qw.packed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dequantize_into_a_saved_tensor_is_noticed() -> None:
    """The op writes through a pointer, yet autograd's version counter must move."""
    qw, x = weight(), leaf(37, 130)
    out = torch.randn(37, 130)
    y = (x * out).sum()
    qw.dequantize(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@dtypes
def test_checkpointing_gives_the_same_bits(dtype: torch.dtype, reentrant: bool) -> None:
    first, second = weight(shape=(64, 130)), weight("fp4", shape=(37, 64))

    def block(x: Tensor) -> Tensor:
        return qkern.linear_4bit(qkern.linear_4bit(x, first).relu(), second)

    x = leaf(6, 130, dtype=dtype)
    block(x).sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    testing.assert_bitwise(x.grad, plain)


def test_accumulation_adds() -> None:
    qw, x = weight(), leaf(6, 130)
    qkern.linear_4bit(x, qw).sum().backward()
    once = x.grad.clone()
    qkern.linear_4bit(x, qw).sum().backward()
    testing.assert_bitwise(x.grad, once + once)
    y = qkern.linear_4bit(x, qw)
    x.grad = None
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    testing.assert_bitwise(x.grad, once + once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """As `F.linear`: 16-bit results inside, gradients in the leaves' own dtype."""
    qw, x, bias = weight(), leaf(6, 130), leaf(37)
    with torch.autocast(device.type, dtype=dtype):
        y = qkern.linear_4bit(x, qw, bias)
        assert y.dtype == dtype
        assert linear(x, torch.randn(37, 130)).dtype == dtype
    dy = torch.randn(6, 37).to(dtype)
    y.backward(dy)
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    dense = qw.dequantize(torch.float32)
    testing.assert_matmul(y, x.to(dtype), dense, bias.to(dtype))
    testing.assert_matmul(x.grad.to(dtype), dy, dense.mT)
    with torch.autocast(device.type, dtype=dtype), torch.autocast(device.type, enabled=False):
        assert qkern.linear_4bit(x, qw).dtype == torch.float32


def test_batch_invariance_holds_in_backward() -> None:
    qw = weight(shape=(130, 258))
    x, dy = torch.randn(40, 258), torch.randn(40, 130)

    def gradient(rows: slice) -> Tensor:
        part = x[rows].clone().requires_grad_()
        with qkern.batch_invariant():
            y = qkern.linear_4bit(part, qw)
        y.backward(dy[rows])
        return part.grad

    whole = gradient(slice(None))
    for start, stop in ((0, 1), (3, 5), (7, 24), (39, 40)):
        testing.assert_bitwise(gradient(slice(start, stop)), whole[start:stop], f"{start}:{stop}")


def lora_problem(
    dtype: torch.dtype,
) -> tuple[Tensor, QuantizedTensor, Tensor, Tensor, Tensor]:
    x, bias = leaf(2, 6, 130, dtype=dtype), leaf(37, dtype=dtype)
    lora_a, lora_b = leaf(8, 130, dtype=dtype, scale=0.1), leaf(37, 8, dtype=dtype, scale=0.1)
    return x, weight(), lora_a, lora_b, bias


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@dtypes
def test_lora_gradients(dtype: torch.dtype, dropout_p: float) -> None:
    """Against the formula in float64, with the same elements dropped."""
    x, qw, lora_a, lora_b, bias = lora_problem(dtype)
    torch.manual_seed(5)
    y = qkern.lora_linear(x, qw, lora_a, lora_b, 0.5, bias, dropout_p=dropout_p)
    dy = torch.randn_like(y)
    y.backward(dy)

    torch.manual_seed(5)
    kept = dropout(torch.ones_like(x), dropout_p).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, lora_a, lora_b, bias)]
    x64, a64, b64, bias64 = leaves
    y64 = linear(x64, qw.dequantize(torch.float32).double(), bias64)
    y64 = y64 + 0.5 * (x64 * kept) @ a64.mT @ b64.mT
    y64.backward(dy.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    ours = (y, x.grad, lora_a.grad, lora_b.grad, bias.grad)
    exact = (y64, *(leaf64.grad for leaf64 in leaves))
    for name, actual, expected in zip(("y", "x", "a", "b", "bias"), ours, exact, strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_lora_saves_only_the_low_rank_activation() -> None:
    x, qw, lora_a, lora_b, bias = lora_problem(torch.float32)
    with recorded_saves() as saved:
        qkern.lora_linear(x, qw, lora_a, lora_b, 0.5, bias)
    existing = storages(x, lora_a, lora_b, bias, *qw.tensors().values())
    new = {t.untyped_storage().data_ptr(): t for t in saved}
    added = [t for pointer, t in new.items() if pointer not in existing]
    assert [t.numel() for t in added] == [2 * 6 * 8]


def test_lora_adapter_keeps_its_dtype() -> None:
    x, qw, lora_a, lora_b, _ = lora_problem(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    y = qkern.lora_linear(low, qw, lora_a, lora_b, 0.5)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16


def test_lora_gradients_on_meta() -> None:
    """A device type without autocast: shapes for planning, no numbers."""
    x = torch.empty(3, 64, device="meta", requires_grad=True)
    qw = qkern.quantize_4bit(torch.empty(6, 64, device="meta"))
    a, b = (torch.empty(*s, device="meta", requires_grad=True) for s in ((2, 64), (6, 2)))
    qkern.lora_linear(x, qw, a, b, 0.5).sum().backward()
    for tensor in (x, a, b):
        assert tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("dropped", [False, True])
def test_lora_double_backward(dropped: bool) -> None:
    x, qw, lora_a, lora_b, bias = lora_problem(torch.float32)
    w64 = qw.dequantize(torch.float32).double()

    def ours(*leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return qkern.lora_linear(
            leaves[0], qw, leaves[1], leaves[2], 0.5, leaves[3], dropout_p=0.3 if dropped else 0.0
        )

    def exact(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        mask = dropout(torch.ones(12, 130), 0.3) if dropped else torch.ones(12, 130)
        return linear(x, w64, bias) + 0.5 * (x * mask.view_as(x)) @ a.mT @ b.mT

    def penalty(forward: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        loss = forward(*leaves).tanh().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    leaves = (x, lora_a, lora_b, bias)
    doubles = (t.detach().double().requires_grad_() for t in leaves)
    for actual, expected in zip(penalty(ours, *leaves), penalty(exact, *doubles), strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("wanted", ["x", "a", "b", "bias"])
def test_lora_gradient_of_one_alone(wanted: str) -> None:
    x, qw, *rest = lora_problem(torch.float32)
    leaves = dict(zip(("x", "a", "b", "bias"), (x, *rest), strict=True))

    def gradient(names: tuple[str, ...]) -> Tensor:
        part = {name: t.detach().requires_grad_(name in names) for name, t in leaves.items()}
        y = qkern.lora_linear(part["x"], qw, part["a"], part["b"], 0.5, part["bias"])
        (found,) = torch.autograd.grad(y.square().sum(), part[wanted])
        return found

    testing.assert_bitwise(gradient((wanted,)), gradient(tuple(leaves)))


def test_bias_gradient_of_one_vector() -> None:
    qw, bias = weight(), leaf(37)
    dy = torch.randn(37)
    qkern.linear_4bit(torch.randn(130), qw, bias).backward(dy)
    testing.assert_bitwise(bias.grad, dy)


@pytest.mark.parametrize(("a", "b", "scaling"), [(40.0, 40.0, 0.1), (1e-4, 1e-6, 1e4)])
def test_lora_scales_before_it_rounds(a: float, b: float, scaling: float) -> None:
    """The unscaled product leaves float16's range, the result does not."""
    qw = qkern.quantize_4bit(torch.zeros(4, 64))
    lora_a, lora_b = torch.full((1, 64), a), torch.full((4, 1), b)
    y = qkern.lora_linear(torch.ones(2, 64, dtype=torch.float16), qw, lora_a, lora_b, scaling)
    torch.testing.assert_close(
        y.float(), torch.full((2, 4), 64 * a * b * scaling), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_backward_alone_under_autocast(dtype: torch.dtype) -> None:
    def gradients(enabled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        x, qw, lora_a, lora_b, _ = lora_problem(torch.float32)
        low = x.detach().to(dtype).requires_grad_()
        y = qkern.lora_linear(low, qw, lora_a, lora_b, 0.5)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y.sum().backward()
        return [low.grad, lora_a.grad, lora_b.grad]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        testing.assert_bitwise(actual, expected)


def test_a_frozen_adapter_keeps_no_activation() -> None:
    x, qw, lora_a, lora_b, _ = lora_problem(torch.float32)
    frozen = (lora_a.detach(), lora_b.detach())
    with recorded_saves() as saved:
        qkern.lora_linear(x, qw, *frozen, 0.5).sum().backward()
    existing = storages(*frozen, *qw.tensors().values())
    assert {t.untyped_storage().data_ptr() for t in saved} <= existing
