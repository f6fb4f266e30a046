"""Small calls skip torch's dispatcher: only where nobody can tell, and with the same results."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx

import qkern
from qkern import QuantizedTensor, backends, reference, testing
from qkern.backends import _args, cpu
from qkern.testing import OPS
from qkern.weight import Weight
from tests.observers import Functions, Ops
from tests.references import assert_none_kept, assert_not_held

pytestmark = pytest.mark.skipif(
    not cpu.fast,
    reason="no native kernels, or a torch without DLPack's C exchange interface",
)

WIDTH = 6  # the position of in_features, which only the public functions give


class Calls:
    """What the backend's function on tensors answered to the public functions."""

    def __init__(self, kernel: Callable[..., Tensor | None]) -> None:
        self.kernel = kernel
        self.answers: list[Tensor | None] = []

    def __call__(self, *arguments: Any) -> Tensor | None:
        answer = self.kernel(*arguments)
        if len(arguments) > WIDTH:
            self.answers.append(answer)
        return answer

    @property
    def skipped_the_op(self) -> bool:
        return any(answer is not None for answer in self.answers)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    qkern.linear_4bit(torch.zeros(1, 64), weight())  # so that the backend is chosen
    wrapped = Calls(cpu.fast["linear_4bit"])
    monkeypatch.setitem(cpu.fast, "linear_4bit", wrapped)
    return wrapped


@pytest.fixture
def without_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes every call go the long way."""

    def switch() -> None:
        monkeypatch.setattr(cpu, "fast", {})

    return switch


def weight(rows: int = 6, cols: int = 64, **options: Any) -> QuantizedTensor:
    return qkern.quantize_4bit(torch.randn(rows, cols), **options)


X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
ROWS = X.repeat(1, 2)[:, :64], X[:1].expand(3, 64), X[None].repeat(2, 1, 2)[:1, :, :64]
STRIDED = (
    X.T.contiguous().T,
    X[:, None].expand(3, 2, 64),
    X[0, 0].expand(64),
    X.repeat(2, 2)[::2, ::2],
)


# Where the op is skipped, and that it gives the same


@pytest.mark.parametrize(
    "x",
    [
        *(X, X[0], X[None], X.view(1, 3, 1, 64), X[0].as_strided((1, 1, 64), (5, 7, 1)), *ROWS),
        *STRIDED,
    ],
    ids=[
        *("2d", "1d", "3d", "4d", "strides_of_one", "gaps", "expanded", "3d_gaps"),
        *("transposed", "3d_expanded", "1d_expanded", "skipping"),
    ],
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_plain_tensors_skip_the_op(
    calls: Calls, x: Tensor, context: Callable[[], AbstractContextManager[None]]
) -> None:
    qw, bias = weight(), torch.randn(6)
    with context():
        y = qkern.nf4_linear(x, qw, bias)
        expected = torch.ops.qkern.linear_4bit(x, *qw.weight, 6, bias)
    assert calls.skipped_the_op
    testing.assert_bitwise(y, expected)
    assert y.shape == expected.shape
    assert y.is_inference() == expected.is_inference()
    assert not y._is_view()


@pytest.mark.parametrize(
    "name",
    [
        *("linear_4bit", "linear_4bit_dx", "grouped_linear_4bit", "grouped_linear_4bit_dx"),
        *("grouped_linear_4bit_add", "grouped_linear_4bit_dx_add", "grouped_matmul_into"),
    ],
)
def test_every_case_gives_the_bits_of_the_long_way(
    isa: str, name: str, without_kernels_alone: Callable[[], None]
) -> None:
    spec = OPS[name]
    cases = [case for case in spec.cases if case.values == "normal"]
    inputs = [
        spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
        for case in cases
    ]
    actual = [spec.run(values) for values in inputs]
    without_kernels_alone()
    for case, values, results in zip(cases, inputs, actual, strict=True):
        for a, e in zip(results, spec.run(values), strict=True):
            testing.assert_bitwise(a, e, f"{name}: {case}")


def test_layers_skip_the_op(calls: Calls) -> None:
    layer = qkern.nn.Linear4bit.from_linear(nn.Linear(64, 6))
    lora = qkern.nn.LoRALinear(layer, r=4, alpha=8)
    for module in (layer, lora):
        calls.answers.clear()
        module(X)
        assert calls.skipped_the_op, module


def test_other_threads_see_their_own_modes(calls: Calls) -> None:
    """A mode on this thread does not concern another."""
    qw = weight()
    with Ops():
        thread = threading.Thread(target=qkern.nf4_linear, args=(X, qw))
        thread.start()
        thread.join()
        assert calls.skipped_the_op
        calls.answers.clear()
        qkern.nf4_linear(X, qw)
        assert not calls.skipped_the_op


# Where somebody would notice


Run = Callable[[Tensor, QuantizedTensor], Tensor]


def in_a_mode(mode: type[Any]) -> Callable[[Run, QuantizedTensor], Tensor]:
    def check(run: Run, qw: QuantizedTensor) -> Tensor:
        with mode() as log:
            y = run(X, qw)
        assert "qkern.linear_4bit.default" in log.seen
        return y

    return check


def in_a_profile(run: Run, qw: QuantizedTensor) -> Tensor:
    with torch.profiler.profile() as profile:
        y = run(X, qw)
    assert "qkern::linear_4bit" in {event.key for event in profile.key_averages()}
    return y


def in_a_trace(run: Run, qw: QuantizedTensor) -> Tensor:
    traced = torch.jit.trace(lambda x: run(x, qw), X, check_trace=False)
    assert "qkern::linear_4bit" in str(traced.graph)
    return traced(X)


def in_a_graph(pre_dispatch: bool, mode: str) -> Callable[[Run, QuantizedTensor], Tensor]:
    def check(run: Run, qw: QuantizedTensor) -> Tensor:
        trace = make_fx(
            lambda x: run(x, qw),
            tracing_mode=mode,
            pre_dispatch=pre_dispatch,
            _allow_non_fake_inputs=True,
        )
        graph = trace(X)
        assert "qkern.linear_4bit.default" in graph.code
        return graph(X)

    return check


def compiled(run: Run, qw: QuantizedTensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(lambda x: run(x, qw), fullgraph=True, backend="eager")(X)


def in_vmap(run: Run, qw: QuantizedTensor) -> Tensor:
    return torch.func.vmap(lambda x: run(x, qw))(X[:, None])[:, 0]


def on_the_reference(run: Run, qw: QuantizedTensor) -> Tensor:
    with backends.use("reference"):
        return run(X, qw)


def on_a_backend_of_ones_own(run: Run, qw: QuantizedTensor) -> Tensor:
    with backends.use(backends.Backend("mine")):
        return run(X, qw)


OBSERVERS = {
    "dispatch_mode": in_a_mode(Ops),
    "function_mode": in_a_mode(Functions),
    "profiler": in_a_profile,
    "jit_trace": in_a_trace,
    "make_fx": in_a_graph(False, "real"),
    "make_fx_fake": in_a_graph(False, "fake"),
    "make_fx_pre_dispatch": in_a_graph(True, "real"),
    "compile": compiled,
    "vmap": in_vmap,
    "reference": on_the_reference,
    "own_module": on_a_backend_of_ones_own,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*batching rule")
@pytest.mark.parametrize("observe", OBSERVERS.values(), ids=list(OBSERVERS))
def test_an_observer_gets_the_op(
    calls: Calls, observe: Callable[[Run, QuantizedTensor], Tensor]
) -> None:
    qw = weight()
    expected = qkern.nf4_linear(X, qw)
    assert calls.skipped_the_op
    calls.answers.clear()
    y = observe(qkern.nf4_linear, qw)
    assert not calls.skipped_the_op
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_within_a_transform_constants_take_the_op_too(calls: Calls) -> None:
    qw = weight()
    torch.func.vmap(lambda z: z + qkern.nf4_linear(X, qw).sum())(X)
    assert not calls.skipped_the_op


def test_functorchs_derivatives_are_refused(calls: Calls) -> None:
    qw = weight()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: qkern.nf4_linear(x, qw).sum())(X)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: qkern.nf4_linear(x, qw), (X,), (X,))
    assert not calls.skipped_the_op


def test_autocast_decides_the_dtype(calls: Calls) -> None:
    qw = weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert qkern.nf4_linear(X, qw).dtype == torch.bfloat16
        assert qkern.lora_linear(X, qw, X[:2], torch.ones(6, 2), 1.0).dtype == torch.bfloat16
    assert not calls.skipped_the_op


def test_the_environments_backend_is_obeyed(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    qw = weight()
    monkeypatch.setattr(backends, "selected", {})
    monkeypatch.setenv("QKERN_BACKEND", "reference")
    qkern.nf4_linear(X, qw)
    qkern.nf4_linear(X, qw)
    monkeypatch.setattr(backends, "selected", {})
    monkeypatch.setenv("QKERN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="does not take cpu tensors"):
        qkern.nf4_linear(X, qw)
    assert not calls.skipped_the_op


# Tensors that are not plain


class Tagged(Tensor):
    """A subclass that torch's own functions keep."""


class Halved(Tensor):
    """A subclass whose elements are half of those it holds."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Halved:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.held / 2 if isinstance(arg, Halved) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def functional(x: Tensor) -> Tensor:
    return torch._to_functional_tensor(x)


UNUSUAL: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "tagged": (lambda: X.as_subclass(Tagged), lambda y: y.as_subclass(Tensor)),
    "wrapper": (lambda: Halved(X * 2), lambda y: y),
    "functional": (lambda: functional(X), torch._from_functional_tensor),
    "negated": (lambda: torch._neg_view(-X), lambda y: y),
    "negated_column": (lambda: torch.complex(X, -X).conj().imag, lambda y: y),
    "negated_transposed": (lambda: torch._neg_view(-X.T.contiguous()).T, lambda y: y),
}


@pytest.mark.parametrize(("make", "read"), UNUSUAL.values(), ids=list(UNUSUAL))
def test_other_tensors_take_the_long_way(
    calls: Calls, make: Callable[[], Tensor], read: Callable[[Tensor], Tensor]
) -> None:
    qw = weight()
    expected = qkern.nf4_linear(X, qw)
    calls.answers.clear()
    y = read(qkern.nf4_linear(make(), qw))
    assert calls.answers == [None]
    testing.assert_bitwise(y, expected)


def test_a_negated_bias_is_negated(calls: Calls) -> None:
    qw, bias = weight(), torch.randn(6)
    expected = qkern.nf4_linear(X, qw, -bias)
    calls.answers.clear()
    testing.assert_bitwise(qkern.nf4_linear(X, qw, torch._neg_view(bias)), expected)
    assert calls.answers == [None]


def test_a_negated_part_of_a_weight_is_refused() -> None:
    qw = weight(double_quant=False)
    with pytest.raises(ValueError, match="absmax: got a lazily negated tensor; takes"):
        replace(qw, absmax=torch._neg_view(qw.absmax))


@pytest.mark.parametrize("shape", [(384,), (6, 64, 1), ()], ids=str)
def test_weights_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    qw = qkern.quantize_4bit(torch.randn(shape))
    with pytest.raises(ValueError, match=r"qw: got shape .*; takes two dimensions"):
        qkern.nf4_linear(X, qw)


def test_empty_batches_keep_their_shape(calls: Calls) -> None:
    assert qkern.nf4_linear(X[:0], weight()).shape == (0, 6)
    assert calls.answers == [None]


# Memory that moves


def assert_layer_is_current(layer: qkern.nn.Linear4bit, calls: Calls) -> None:
    calls.answers.clear()
    with torch.no_grad():
        y = layer(X)
    assert calls.skipped_the_op
    qw = layer.quantized
    dense = reference.dequantize_4bit(qw.weight, qw.shape, torch.float32)
    torch.testing.assert_close(y, nn.functional.linear(X, dense, layer.bias), rtol=1e-4, atol=1e-4)


def other_layer() -> qkern.nn.Linear4bit:
    return qkern.nn.Linear4bit.from_linear(nn.Linear(64, 6))


def other_codes() -> list[tuple[str, Tensor]]:
    """The parameters of another layer's 4-bit weight."""
    named = other_layer().named_parameters()
    return [(name, parameter.data) for name, parameter in named if name != "bias"]


def copy_in_place(layer: qkern.nn.Linear4bit) -> None:
    for name, codes in other_codes():
        layer.get_parameter(name).copy_(codes)


def swap_data(layer: qkern.nn.Linear4bit) -> None:
    for name, codes in other_codes():
        layer.get_parameter(name).data = codes.clone()
    gc.collect()


def swap_storage(layer: qkern.nn.Linear4bit) -> None:
    for name, codes in other_codes():
        layer.get_parameter(name).set_(codes.clone())


def refill_storage(layer: qkern.nn.Linear4bit) -> None:
    """As FSDP2 does: the parameter stays the same object, and its memory comes and goes."""
    for name, codes in other_codes():
        parameter = layer.get_parameter(name)
        storage, size = parameter.untyped_storage(), parameter.untyped_storage().nbytes()
        storage.resize_(0)
        gc.collect()
        storage.resize_(size)
        parameter.copy_(codes)


def replace_parameters(layer: qkern.nn.Linear4bit) -> None:
    for name, codes in other_codes():
        setattr(layer, name, nn.Parameter(codes, requires_grad=False))


def load(assign: bool) -> Callable[[qkern.nn.Linear4bit], None]:
    def change(layer: qkern.nn.Linear4bit) -> None:
        layer.load_state_dict(other_layer().state_dict(), assign=assign)

    return change


def cast_bias(layer: qkern.nn.Linear4bit) -> None:
    layer.bfloat16().float()


def share_memory(layer: qkern.nn.Linear4bit) -> None:
    layer.share_memory()


@pytest.mark.parametrize(
    "change",
    [
        *(copy_in_place, swap_data, swap_storage, refill_storage, replace_parameters),
        *(cast_bias, share_memory),
        *(load(False), load(True)),
    ],
)
def test_a_changed_weight_is_read_anew(
    calls: Calls, change: Callable[[qkern.nn.Linear4bit], None]
) -> None:
    layer = qkern.nn.Linear4bit.from_linear(nn.Linear(64, 6)).requires_grad_(False)
    assert_layer_is_current(layer, calls)
    before = layer(X)
    with torch.no_grad():
        change(layer)
    assert_layer_is_current(layer, calls)
    if change not in (cast_bias, share_memory):
        assert not torch.equal(layer(X), before)


def test_each_parameter_that_is_replaced_is_noticed() -> None:
    codebook = torch.linspace(-1, 1, 16)
    layer, other = (
        qkern.nn.Linear4bit.from_linear(
            nn.Linear(64, 6), format="custom", codebook=codebook * scale
        )
        for scale in (1, 2)
    )
    for name in ("weight", "absmax", "nested_absmax", "nested_offset", "codebook"):
        setattr(layer, name, getattr(other, name))
        seen = getattr(layer.quantized, "packed" if name == "weight" else name)
        assert seen.data_ptr() == getattr(other, name).data_ptr()
    assert torch.equal(layer.quantized.dequantize(), other.quantized.dequantize())
    assert layer.bfloat16().quantized.dtype == torch.bfloat16


def test_a_weight_whose_memory_shrank_is_refused(calls: Calls) -> None:
    qw = weight()
    qw.packed.data = qw.packed[:-1].clone()
    with pytest.raises(ValueError, match="packed: got 191 elements; takes 192"):
        qkern.nf4_linear(X, qw)
    assert calls.answers == [None]


def test_a_parametrised_bias_and_adapter_are_found() -> None:
    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    layer = qkern.nn.LoRALinear(qkern.nn.Linear4bit.from_linear(nn.Linear(64, 6)), r=4, alpha=8)
    nn.init.normal_(layer.lora_b)
    plain = layer.base_layer.quantized.dequantize() @ X.T
    with torch.no_grad():
        update = layer(X) - layer.base_layer(X)
    bias = layer.base_layer.bias.detach().clone()
    nn.utils.parametrize.register_parametrization(layer.base_layer, "bias", Doubled())
    nn.utils.parametrize.register_parametrization(layer, "lora_b", Doubled())
    torch.testing.assert_close(layer(X), plain.T + 2 * bias + 2 * update, rtol=1e-4, atol=1e-4)


# Gradients


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["linear", "lora"])
def test_gradients_are_those_of_the_long_way(
    calls: Calls, without_kernels_alone: Callable[[], None], shape: tuple[int, ...], lora: bool
) -> None:
    qw = weight()
    leaves = [torch.randn(shape), torch.randn(6), torch.randn(2, 64), torch.randn(6, 2)]

    def step() -> list[Tensor]:
        x, bias, a, b = (leaf.clone().requires_grad_() for leaf in leaves)
        y = qkern.lora_linear(x, qw, a, b, 0.5, bias) if lora else qkern.nf4_linear(x, qw, bias)
        assert y.requires_grad
        inputs = [x, bias, a, b] if lora else [x, bias]
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    actual = step()
    assert calls.skipped_the_op
    without_kernels_alone()
    for a, e in zip(actual, step(), strict=True):
        testing.assert_bitwise(a.detach(), e.detach())


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["linear", "lora"])
def test_results_can_be_changed_in_place(shape: tuple[int, ...], lora: bool) -> None:
    """A view made inside an autograd Function could not."""
    qw, a, b = weight(), torch.randn(2, 64), torch.randn(6, 2)
    for requires_grad in (False, True):
        x = torch.randn(shape, requires_grad=requires_grad)
        y = qkern.lora_linear(x, qw, a, b, 0.5) if lora else qkern.nf4_linear(x, qw)
        y += 1
        y.relu_()
        if requires_grad:
            y.sum().backward()
            assert x.grad is not None


def test_what_needs_no_gradient_has_no_graph(calls: Calls) -> None:
    qw, bias = weight(), torch.randn(6)
    assert qkern.nf4_linear(X, qw, bias).grad_fn is None
    assert qkern.nf4_linear(X, qw, bias.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert qkern.nf4_linear(X.clone().requires_grad_(), qw).grad_fn is None
    assert None not in calls.answers


def test_a_weight_changed_before_backward_is_noticed(calls: Calls) -> None:
    qw, x = weight(), X.clone().requires_grad_()
    y = qkern.nf4_linear(x, qw)
    assert calls.skipped_the_op
    qw.packed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_pass_the_hooks(calls: Calls) -> None:
    qw, x = weight(), X.clone().requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        qkern.nf4_linear(x, qw)
    assert calls.skipped_the_op
    assert {id(tensor) for tensor in saved} == {id(part) for part in qw.tensors().values()}


def test_tangents_take_the_op(calls: Calls) -> None:
    qw = weight()
    with forward_ad.dual_level():
        qkern.nf4_linear(forward_ad.make_dual(X, X), qw)
    assert not calls.skipped_the_op


# Wrong arguments; the public functions' errors are in test_errors.py


def arguments(name: str, **options: Any) -> list[Any]:
    """Of one of `KERNELS`."""
    qw = weight(**options)
    if name == "linear_4bit_dx_on_tensors":
        return [torch.ones(3, 6), layout(qw), 64, False, 1]
    return [X, layout(qw), 6, torch.ones(6), False, 1, 64]


def layout(qw: QuantizedTensor) -> tuple[Any, ...]:
    return tuple(qw.weight)


KERNELS = [f"{op}_on_tensors" for op in ("linear_4bit", "linear_4bit_int8", "linear_4bit_dx")]
WEIGHTS = [{}, {"double_quant": False}, {"format": "custom", "codebook": torch.linspace(-1, 1, 16)}]
each_weight = pytest.mark.parametrize("options", WEIGHTS, ids=["double_quant", "plain", "custom"])


@each_weight
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_take_nothing_wrong(name: str, options: dict[str, Any]) -> None:
    kernel, right = getattr(cpu.library(), name), arguments(name, **options)
    dx = name == "linear_4bit_dx_on_tensors"
    bias, num_threads, width = (None, 4, None) if dx else (3, 5, WIDTH)
    assert kernel(*right) is not None
    # The arguments, then the items of the weight.
    flat = [*right, *right[1]]
    for position, value in enumerate(flat):
        wrong: list[Any] = ["nf5", 1.0, -1, 0, 1 << 40, 1 << 70, object(), [value]]
        if position != num_threads:
            wrong += [7, 65]
        if value is not None and position not in (bias, width):
            wrong.append(None)
        if isinstance(value, tuple):
            wrong += [list(value), value[:-1], (*value, None)]
        if isinstance(value, Tensor):
            line = value.reshape(-1)
            wrong += [value.double() if value.is_floating_point() else value.int()]
            wrong += [value.to("meta"), value.to_sparse(), value.as_subclass(Tagged)]
            wrong += [line[:0], torch.cat([line, line]), line[:-1], value.to(torch.int64)]
            if line.numel() > 1:
                wrong.append(line.repeat_interleave(2)[::2])
            if position == bias:
                wrong += [value[None], value[:, None]]
            if position == 0:
                wrong.append(value.int())
        for bad in wrong:
            given = [*flat[:position], bad, *flat[position + 1 :]]
            changed = given[: len(right)]
            if position >= len(right):
                changed[1] = tuple(given[len(right) :])
            assert kernel(*changed) is None, (position, bad)
    if not dx:
        assert kernel(*right[:WIDTH], None) is not None
        assert kernel(*right[:WIDTH]) is not None
    for count in {4, 6} if dx else {5, 8}:
        with pytest.raises(TypeError, match=r"takes (5|6 or 7) arguments"):
            kernel(*[*right, None][:count])


@pytest.mark.parametrize("dx", [False, True])
def test_the_kernels_with_a_term_take_no_wrong_term(dx: bool) -> None:
    name = "linear_4bit_dx" if dx else "linear_4bit"
    *base, batch_invariant, threads = arguments(f"{name}_on_tensors")[: 5 if dx else 6]
    left, right, alpha = torch.ones(3, 5), torch.ones(5, 64 if dx else 6), 0.5
    kernel = getattr(cpu.library(), f"{name}_add_on_tensors")

    def result(*term: Any) -> Any:
        return kernel(*base, *term, batch_invariant, threads)

    assert result(left, right, alpha) is not None
    strided = right.t().contiguous().t(), left.repeat(1, 2)[:, :5]
    testing.assert_bitwise(result(left, strided[0], alpha), result(strided[1], right, alpha))
    each: dict[int, list[Any]] = {
        0: [left[:2], left[:, :4], left.t().contiguous().t(), left[None], left[:, :0]],
        1: [right[:4], right[:, 1:], right[None], right[:0]],
        2: [1, None, "1", torch.ones(())],
    }
    for place in (0, 1):
        value = (left, right)[place]
        each[place] += [None, 1.0, [value], value.double(), value.bfloat16(), value.to("meta")]
        each[place] += [value.to_sparse(), value.as_subclass(Tagged), torch._neg_view(value)]
    for place, wrong in each.items():
        for bad in wrong:
            given: list[Any] = [left, right, alpha]
            given[place] = bad
            assert result(*given) is None, (place, bad)
    with pytest.raises(TypeError, match=r"takes [89] arguments"):
        kernel(*base, left, right, alpha, batch_invariant)


@each_weight
@pytest.mark.parametrize("name", KERNELS)
def test_a_weight_is_any_tuple_and_its_floats_may_be_integers(
    name: str, options: dict[str, Any]
) -> None:
    kernel, right = getattr(cpu.library(), name), arguments(name, **options)
    expected = kernel(*right)
    as_integers = [
        part.view(torch.int32) if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in right[1]
    ]
    other_shapes = [part.view(-1, 1) if isinstance(part, Tensor) else part for part in as_integers]
    for weight in (Weight(*right[1]), Weight(*as_integers), tuple(other_shapes)):
        testing.assert_bitwise(kernel(right[0], weight, *right[2:]), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_a_strided_input_is_copied(name: str) -> None:
    kernel, (x, *right) = getattr(cpu.library(), name), arguments(name)
    x = torch.randn_like(x).requires_grad_()
    expected = kernel(x, *right)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0]
    assert wide.stride(1) == 2
    for strided in (wide, x.t().contiguous().t(), wide[:, None]):
        y = kernel(strided, *right)
        assert y.shape == (*strided.shape[:-1], expected.shape[-1])
        assert not y.requires_grad
        testing.assert_bitwise(y.view_as(expected), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_no_reference_is_kept(name: str) -> None:
    kernel = getattr(cpu.library(), name)
    right = arguments(name)
    others = [[x, *right[1:]] for x in (right[0].double(), right[0].repeat(2, 2)[::2, ::2])]

    def run() -> None:
        for given in (right, *others):
            kernel(*given)

    assert_none_kept(run, (*right, *right[1], *(other[0] for other in others)))
    assert_not_held(lambda: kernel(*right))


# Versions of torch


class Header(ctypes.Structure):
    """The stable start of DLPack's table of functions."""


Header._fields_ = [
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("previous", ctypes.POINTER(Header)),
    ("functions", ctypes.c_void_p * 5),
]


def capsule(header: Header) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(header), b"dlpack_exchange_api", None)


def test_a_later_dlpack_or_one_without_reading_is_left_alone() -> None:
    read_with = cpu.library().read_tensors_with
    how = [torch.empty(1), nn.Parameter(torch.empty(1))], 1, 1
    elsewhere = (ctypes.c_void_p * 5)(*[1] * 5)
    nowhere = Header(1, 3)
    for header in (Header(2, 0, None, elsewhere), nowhere):
        assert not read_with(capsule(header), *how)
    later = Header(2, 0, ctypes.pointer(nowhere), elsewhere)
    assert not read_with(capsule(later), *how)
    with pytest.raises(ValueError, match="PyCapsule"):
        read_with(object(), *how)
    assert cpu.library().linear_4bit_on_tensors(*arguments("linear_4bit_on_tensors")) is not None


def test_without_the_interface_all_goes_the_long_way() -> None:
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import qkern
from qkern.backends import cpu
assert not cpu.fast
x = torch.randn(3, 64, requires_grad=True)
qw = qkern.quantize_4bit(torch.randn(6, 64))
for _ in range(2):
    qkern.nf4_linear(x, qw).sum().backward()
torch.testing.assert_close(x.grad, 2 * qw.dequantize().sum(0).expand(3, 64))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torchs_answers_every_op_is_dispatched() -> None:
    code = """
import torch
del torch._C._is_tracing
import qkern, qkern.ops
x, qw = torch.randn(3, 64), qkern.quantize_4bit(torch.randn(6, 64))
for _ in range(2):
    assert qkern.nf4_linear(x, qw).shape == (3, 6)
    assert qkern.ops.undispatched(x) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_that_only_look_plain_are_dispatched() -> None:
    """Lazy zeros have no memory; their type, layout and device are those of any tensor."""
    qkern.quantize_8bit(torch.ones(3))  # so that the backend is chosen
    zeros = torch._efficientzerotensor((4096,))
    codes, absmax = qkern.quantize_8bit(zeros)
    assert not absmax.any()
    testing.assert_bitwise(codes, qkern.quantize_8bit(torch.zeros(4096))[0])
    testing.assert_bitwise(
        qkern.quantize_4bit(torch._neg_view(X)).dequantize(), qkern.quantize_4bit(-X).dequantize()
    )


def test_a_subclass_of_a_backend_has_its_own_methods_called() -> None:
    class Mine(backends.CpuBackend):
        def linear_4bit(self, x: Tensor, *args: Any) -> Tensor:
            return super().linear_4bit(x, *args) + 1

    qw = weight()
    expected = qkern.linear_4bit(X, qw) + 1
    with backends.use(Mine("mine")):
        assert torch.equal(qkern.linear_4bit(X, qw), expected)
        assert torch.equal(torch.ops.qkern.linear_4bit(X, *qw.weight, 6), expected)


@pytest.mark.parametrize("rows", [15, 16])
def test_a_matmul_of_a_subclass_is_that_of_an_adapted_layer_too(rows: int) -> None:
    class Mine(backends.CpuBackend):
        def linear_4bit(self, x: Tensor, *args: Any) -> Tensor:
            return super().linear_4bit(x, *args) + 1

        def linear_4bit_dx(self, dy: Tensor, *args: Any) -> Tensor:
            return super().linear_4bit_dx(dy, *args) + 2

    class Newer(Mine):
        def linear_4bit_add(self, x: Tensor, *args: Any) -> Tensor:
            return super().linear_4bit_add(x, *args) + 4

    qw, a, b = weight(), torch.randn(3, 64), torch.randn(6, 3)
    results = []
    for backend in ("cpu", Mine("mine"), Newer("newer")):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with backends.use(backend):
            y = qkern.lora_linear(x, qw, a, b, 0.5)
            y.sum().backward()
        results.append((y, x.grad))
    (y, dx), mine, newer = results
    torch.testing.assert_close(mine, (y + 1, dx + 2))
    torch.testing.assert_close(newer, (y + (1 if rows < 16 else 4), dx + 2))


def test_a_torch_that_tells_no_dispatch_keys_dispatches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = qkern.quantize_4bit(X).dequantize()
    monkeypatch.setattr(qkern.ops, "_PLAIN_KEYS", frozenset())
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    testing.assert_bitwise(qkern.quantize_4bit(X).dequantize(), expected)


def test_tensors_in_lists_are_looked_at() -> None:
    plain, other = torch.ones(3), torch.ones(3, requires_grad=True)
    assert qkern.ops._are_plain(([plain], weight().weight, 64, None))
    assert not qkern.ops._are_plain(([plain, other], 64))
    assert not qkern.ops._are_plain((weight().weight._replace(absmax=other),))


def shortened(tensor: Tensor, nbytes: int) -> Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


class Subclass(Tensor):
    pass


TOLD: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "whole": (lambda: torch.ones(4, 8), True, True),
    "parameter": (lambda: nn.Parameter(torch.ones(4, 8)), True, True),
    "a_view_at_the_end": (lambda: torch.ones(40)[8:], True, True),
    "short_by_a_byte": (lambda: shortened(torch.ones(4, 8), 127), False, False),
    "a_view_past_the_end": (lambda: shortened(torch.ones(40)[8:], 159), False, False),
    "freed": (lambda: shortened(torch.ones(4, 8), 0), False, False),
    "another_dtype": (lambda: torch.ones(4, 8).int(), False, True),
    "another_size": (lambda: torch.ones(31), False, True),
    "transposed": (lambda: torch.ones(8, 4).t(), False, True),
    "transposed_and_short": (lambda: shortened(torch.ones(8, 4).t(), 127), False, False),
    "subclass": (lambda: torch.ones(4, 8).as_subclass(Subclass), False, False),
    "on_meta": (lambda: torch.ones(4, 8, device="meta"), False, False),
    "sparse": (lambda: torch.ones(4, 8).to_sparse(), False, False),
    "no_tensor": (lambda: None, False, False),
}


@pytest.mark.parametrize(("tensor", "holds", "has_memory"), TOLD.values(), ids=list(TOLD))
def test_what_the_library_tells_of_a_tensor(
    tensor: Callable[[], Any], holds: bool, has_memory: bool
) -> None:
    library, float32 = cpu.library(), _args._KINDS[torch.float32]
    assert library.tensor_holds(tensor(), float32, 32) is holds
    assert library.tensor_has_memory(tensor()) is has_memory


def test_the_library_tells_dtypes_apart() -> None:
    holds = cpu.library().tensor_holds
    for dtype in _args._KINDS:
        tensor = torch.ones(32, dtype=dtype)
        assert [found for found, kind in _args._KINDS.items() if holds(tensor, kind, 32)] == [dtype]
        assert not holds(tensor, None, 32)
    with pytest.raises(TypeError, match="takes 3 arguments"):
        holds(torch.ones(32))
    with pytest.raises(TypeError, match="takes 1 argument"):
        cpu.library().tensor_has_memory()


@pytest.mark.parametrize("told", [True, False])
def test_checks_are_the_same_where_the_library_tells_nothing(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:
        monkeypatch.setattr(_args, "_holds", _args._unknown)
        monkeypatch.setattr(_args, "_has_memory", _args._unknown)
    _args.check("x", torch.ones(4, 8), torch.float32, 32)
    _args.check("x", torch.ones(0), torch.float32, 0)
    _args.check("x", torch.ones(32, dtype=torch.int16), torch.int16, 32)
    _args.check_memory("x", torch.ones(8, 4).t())
    for bad, error in {
        TOLD["another_dtype"][0]: "x: got torch.int32",
        TOLD["another_size"][0]: "x: got 31 elements",
        TOLD["transposed"][0]: "x: got strides",
        TOLD["on_meta"][0]: "x: got a tensor on meta",
        TOLD["short_by_a_byte"][0]: "x: got a tensor whose storage has 127 bytes",
        TOLD["a_view_past_the_end"][0]: "x: got a tensor whose storage has 159 bytes",
    }.items():
        with pytest.raises((TypeError, ValueError), match=error):
            _args.check("x", bad(), torch.float32, 32)
    with pytest.raises(ValueError, match="x: got a tensor whose storage has 127 bytes"):
        _args.check_memory("x", TOLD["transposed_and_short"][0]())
