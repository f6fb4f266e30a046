"""A LoRA adapter's narrow products on a CPU.

Its input's by the op ``matmul_into``, those that are added to the base's by ``linear_4bit_add`` and
``linear_4bit_dx_add``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import qkern
from qkern import autograd, testing
from qkern.testing import DTYPES, Case

ROWS = autograd._OWN_PRODUCT_ROWS
OPS = {
    False: [*["matmul_into"] * 4, "linear_4bit_add", "linear_4bit_dx_add"],
    # A dropped x has a gradient of its own.
    True: [*["matmul_into"] * 5, "linear_4bit_add", "linear_4bit_dx"],
}
"""What a step of a layer calls, without dropout and with it."""
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that autograd's functions call."""
    names = []
    call = autograd.call

    def record(name: str, *args: Any) -> Any:
        names.append(name)
        return call(name, *args)

    monkeypatch.setattr(autograd, "call", record)
    # Whatever instructions this processor has, adapters are in float32.
    monkeypatch.setattr(qkern.functional, "_cpu_matmul_dtype", lambda dtype: torch.float32)
    return names


def problem(rows: int, dtype: torch.dtype) -> tuple[Tensor, qkern.QuantizedTensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 130, generator=generator).to(dtype).requires_grad_()
    a = (torch.randn(5, 130, generator=generator) * 0.1).requires_grad_()
    b = (torch.randn(37, 5, generator=generator) * 0.1).requires_grad_()
    return x, qkern.quantize_4bit(torch.randn(37, 130, generator=generator)), a, b


@dtypes
@pytest.mark.parametrize("dropped", [False, True])
def test_values_and_gradients(dtype: torch.dtype, dropped: bool, calls: list[str]) -> None:
    """Against float64, in dtypes that differ: results in 16 bits are rounded, factors are not."""
    x, qw, a, b = problem(ROWS + 3, dtype)
    scaling, p = 0.5, 0.25 if dropped else 0.0
    torch.manual_seed(3)
    y = qkern.lora_linear(x, qw, a, b, scaling, dropout_p=p)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    assert sorted(calls) == sorted(OPS[dropped])
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), p).double()
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    base = x64 @ qw.dequantize(torch.float32).double().mT
    y64 = base + scaling * (x64 * mask) @ a64.mT @ b64.mT
    y64.backward(dy.double())
    rounded = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    pairs = {"y": (y, y64), "x": (x.grad, x64.grad)}
    pairs |= {"a": (a.grad, a64.grad), "b": (b.grad, b64.grad)}
    for name, (actual, exact) in pairs.items():
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        # A dropped x is rounded where it is scaled.
        tolerance = 1e-6 if name in "ab" and not dropped else rounded
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_few_rows_go_another_way(calls: list[str]) -> None:
    x, qw, a, b = problem(ROWS - 1, torch.float32)
    qkern.lora_linear(x, qw, a, b, 0.5).sum().backward()
    assert calls == ["linear_4bit_dx"]
    calls.clear()
    with qkern.batch_invariant():
        qkern.lora_linear(x, qw, a, b, 0.5).sum().backward()
    assert sorted(calls) == sorted(OPS[False])


@dtypes
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, calls: list[str]) -> None:
    x, qw, a, b = problem(3 * ROWS, dtype)
    with qkern.batch_invariant():
        y = qkern.lora_linear(x, qw, a, b, 0.5)
        dx = torch.autograd.grad(y.float().square().sum(), x)[0]
        for rows in (1, 7, ROWS + 1):
            part = x.detach()[-rows:].requires_grad_()
            again = qkern.lora_linear(part, qw, a, b, 0.5)
            testing.assert_bitwise(again, y[-rows:])
            again = torch.autograd.grad(again.float().square().sum(), part)[0]
            testing.assert_bitwise(again, dx[-rows:])


def test_a_profile_shows_the_op(calls: list[str]) -> None:
    """What is measured is what runs without a profiler."""
    x, qw, a, b = problem(ROWS, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        qkern.lora_linear(x, qw, a, b, 0.5).sum().backward()
    counts = {e.key: e.count for e in seen.key_averages()}
    for op in set(OPS[False]):
        assert counts[f"qkern::{op}"] == OPS[False].count(op)


def test_hooks_on_the_base_change_no_more_than_a_rounding() -> None:
    """What a hook may change is the base's own result, so the adapter's is added afterwards."""
    layer = qkern.nn.LoRALinear(qkern.nn.Linear4bit.from_linear(torch.nn.Linear(130, 37)), 4, 8)
    torch.nn.init.normal_(layer.lora_b)
    results = []
    for hooked in (False, True):
        if hooked:
            layer.base_layer.register_forward_hook(lambda *_: None)
        x = torch.randn(2 * ROWS, 130, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.lora_a.grad, layer.lora_b.grad))
    weight = layer.base_layer.quantized.dequantize(torch.float32).double()
    exact = [t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b)]
    y64 = exact[0] @ weight.mT + layer.base_layer.bias.double()
    y64 = y64 + layer.scaling * exact[0] @ exact[1].mT @ exact[2].mT
    y64.square().sum().backward()
    for found in results:
        for actual, right in zip(found, (y64, *(t.grad for t in exact)), strict=True):
            assert (actual.double() - right).norm() < 3e-7 * right.norm()


def adapted(hook: Any = None, compute_dtype: torch.dtype | None = None) -> qkern.nn.LoRALinear:
    base = qkern.nn.Linear4bit.from_linear(torch.nn.Linear(64, 48), compute_dtype=compute_dtype)
    layer = qkern.nn.LoRALinear(base, 4, 8)
    torch.nn.init.normal_(layer.lora_b)
    if hook is not None:
        base.register_forward_hook(hook)
    return layer


HOOKS = {"none": None, "one": lambda *_: None}


@pytest.mark.parametrize("hook", HOOKS)
def test_many_gradients_at_once(hook: str) -> None:
    """`torch.autograd.grad` maps over them by a vmap of its own."""
    layer = adapted(HOOKS[hook])
    x = torch.randn(2 * ROWS, 64, requires_grad=True)
    y, dy = layer(x), torch.randn(3, 2 * ROWS, 48)
    (found,) = torch.autograd.grad(y, x, dy, retain_graph=True, is_grads_batched=True)
    for each, expected in zip(dy, found, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, each, retain_graph=True)[0], expected)


@pytest.mark.parametrize("rows", [4, 2 * ROWS])
def test_a_hook_may_change_layout_and_dtype(rows: int) -> None:
    x = torch.randn(rows, 64)
    layer = adapted(lambda *_: None)
    expected = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda m, a, y: y.t().contiguous().t())
    testing.assert_bitwise(layer(x), expected)
    handle.remove()
    layer.base_layer.register_forward_hook(lambda m, a, y: y.double())
    wide = layer(x)
    assert wide.dtype is torch.float64
    torch.testing.assert_close(wide.float(), expected)


@pytest.mark.parametrize("rows", [4, 2 * ROWS])
def test_a_wider_compute_dtype_under_autocast(rows: int) -> None:
    """With a hook on the base and without: the same bits, forward and back."""
    layer = adapted(compute_dtype=torch.float32)
    x = torch.randn(rows, 64, requires_grad=True)
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        results.append((y, x.grad))
        x.grad = None
        layer.base_layer.register_forward_hook(lambda *_: None)
    for plain, hooked in zip(*results, strict=True):
        assert hooked.dtype == plain.dtype
        torch.testing.assert_close(hooked, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_frozen_adapter_keeps_no_activation(hook: str) -> None:
    layer = adapted(HOOKS[hook]).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        layer(torch.randn(2 * ROWS, 64, requires_grad=True))
    assert kept
    assert not {(2 * ROWS, 64), (2 * ROWS, 4)} & {tuple(shape) for shape in kept}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_backend_of_the_forward_holds_in_backward(hook: str) -> None:
    used = []

    class Noting(qkern.backends.Backend):
        def matmul_into(self, *args: Any) -> None:
            used.append("matmul_into")
            qkern.reference.matmul_into(*args)

        def linear_4bit_dx_add(self, *args: Any) -> Tensor:
            used.append("linear_4bit_dx_add")
            return qkern.reference.linear_4bit_dx_add(*args)

    x = torch.randn(2 * ROWS, 64, requires_grad=True)
    with qkern.backends.use(Noting("noting")):
        y = adapted(HOOKS[hook])(x)
    forward = used.count("matmul_into")
    assert forward == (1 if hook == "none" else 2)
    y.sum().backward()
    back = used[forward:]
    assert back.count("matmul_into") == (3 if hook == "none" else 4)
    assert back.count("linear_4bit_dx_add") == (hook == "none")


@dtypes
@pytest.mark.parametrize("op", ["linear_4bit_add", "linear_4bit_dx_add"])
def test_a_backend_with_the_matmul_alone_computes_that(op: str, dtype: torch.dtype) -> None:
    """Not the reference, which takes far longer; the term is added to its result."""
    used = []

    class Plain(qkern.backends.Backend):
        def linear_4bit(self, *args: Any) -> Tensor:
            used.append("linear_4bit_add")
            return qkern.reference.linear_4bit(*args)

        def linear_4bit_dx(self, *args: Any) -> Tensor:
            used.append("linear_4bit_dx_add")
            return qkern.reference.linear_4bit_dx(*args)

    spec = testing.OPS[op]
    case = Case((9, 37, 130), dtype, bias=True, rank=5)
    inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    with qkern.backends.use(Plain("plain")):
        (y,) = spec.run(inputs)
        with pytest.raises(ValueError, match=r"^left: got shape"):
            spec.run(inputs | {"left": inputs["left"][1:]})
        with pytest.raises(TypeError, match=r"^right: got torch.float64; takes torch.float32"):
            spec.run(inputs | {"right": inputs["right"].double()})
    assert used == [op]
    # Rounded before the term is added and after.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, spec.reference(inputs)[0], rtol=tolerance, atol=tolerance * 10)
