"""Matmuls on CUDA tensors read by the library itself: what it takes, where, and what it leaves.

The kernels are the emulator's, on CPU tensors; in some tests DLPack says that these are on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from lab.cuda.emulator import backend, build
from lab.cuda.pretended import CPU, CUDA, Devices, pretended
from lab.cuda.ways import call_of
from qkern import QuantizedTensor, backends, formats, ops, testing
from qkern.backends import CudaBackend, _compiled, _cuda_matmul
from qkern.testing import OPS, Case
from tests.observers import Ops
from tests.references import assert_none_kept, assert_not_held

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

MATMULS = ("linear_4bit", "linear_4bit_dx")
GROUPED = ("grouped_linear_4bit", "grouped_linear_4bit_dx")
STREAM = 0x5EED


@pytest.fixture(scope="module")
def library() -> ModuleType:
    """The module of the plain build."""
    found = build.load(build.build("plain"))
    if not _compiled.reads_tensors(found):
        pytest.skip("a torch without DLPack's C exchange interface")
    return found


class Answers:
    """What the functions on tensors of a backend answered."""

    def __init__(self, found: CudaBackend) -> None:
        self.given: list[object] = []
        found.fast = {op: self._noted(function) for op, function in found.fast.items()}

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.given.append(function(*arguments))
            return self.given[-1]

        return call

    def take(self) -> list[bool]:
        """Of the calls since the last time, whether the library took them."""
        taken = [answer is not None for answer in self.given]
        self.given.clear()
        return taken


@pytest.fixture
def by_library(library: ModuleType) -> tuple[CudaBackend, Answers]:
    """The emulated backend, whose library reads CPU tensors itself."""
    library.set_schedule("forward", 0, True, 80)
    found = backend.backend(library, CPU)
    return found, Answers(found)


@pytest.fixture
def by_python(library: ModuleType) -> CudaBackend:
    """The same where all goes through Python."""
    return backend.backend(library)


@contextmanager
def selected(found: backends.Backend) -> Iterator[None]:
    """CPU tensors on a backend without a block of `use`, which a call would notice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.selected, torch.device("cpu"), found)
        yield


def small_cases() -> list[object]:
    return [
        pytest.param(name, case, id=f"{name}-{case}")
        for name in MATMULS + GROUPED
        for case in [c for c in OPS[name].cases if c.numel <= 40_000][::4]
    ]


@pytest.mark.parametrize(("name", "case"), small_cases())
def test_the_bits_are_those_of_pythons_way(
    name: str, case: Case, by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    inputs = OPS[name].make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    with selected(by_python):
        expected = OPS[name].run(inputs)
    found, answers = by_library
    with selected(found):
        results = OPS[name].run(inputs)
    for result, wanted in zip(results, expected, strict=True):
        testing.assert_bitwise(result, wanted)
        assert result.shape == wanted.shape
    taken = any(answers.take())
    if case.numel and case.layout == "contiguous":
        limits = _cuda_matmul.device_limits(found.library())
        best = _cuda_matmul._ranked(found.library(), call_of(OPS[name], case), limits)[1]
        assert taken == (best.path != "gemm")


X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def weight(rows: int = 8, cols: int = 64, **options: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(1)
    return qkern.quantize_4bit(torch.randn(rows, cols, generator=generator), **options)


def test_a_split_contraction_has_its_workspace(
    by_library: tuple[CudaBackend, Answers], by_python: CudaBackend, library: ModuleType
) -> None:
    qw, x = weight(16, 2048, double_quant=True), torch.randn(16, 2048).bfloat16()
    with selected(by_python):
        expected = qkern.nf4_linear(x, qw)
    found, answers = by_library
    library.launches()
    with selected(found):
        testing.assert_bitwise(qkern.nf4_linear(x, qw), expected)
    assert answers.take() == [True]
    assert library.launches()[0] == 2  # the parts, and their sum


def test_forward_and_backward(
    by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    qw, bias = weight(), torch.randn(8, requires_grad=True)
    dy = torch.randn(3, 8)

    def step() -> tuple[Tensor, ...]:
        x = X.clone().requires_grad_()
        y = qkern.nf4_linear(x, qw, bias)
        assert y.requires_grad
        return y, *torch.autograd.grad(y, (x, bias), dy)

    with selected(by_python):
        expected = step()
    found, answers = by_library
    with selected(found):
        for result, wanted in zip(step(), expected, strict=True):
            testing.assert_bitwise(result, wanted)
        assert answers.take() == [True, True]
        layer = qkern.nn.Linear4bit.from_linear(nn.Linear(64, 8))
        lora = qkern.nn.LoRALinear(layer, r=4, alpha=8)
        for module in (layer, lora):
            module(X.clone().requires_grad_()).sum().backward()
            assert answers.take()[0]
    with backends.use(found), torch.inference_mode():
        testing.assert_bitwise(qkern.nf4_linear(X, qw), qkern.nf4_linear(X, qw, None))
        assert answers.take() == [True, True]


ENDS = torch.tensor([1, 1, 3])


def experts() -> qkern.QuantizedExperts:
    generator = torch.Generator().manual_seed(1)
    return qkern.quantize_experts(torch.randn(3, 8, 64, generator=generator))


def test_experts_forward_and_backward(
    by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    qw = experts()

    def step() -> tuple[Tensor, ...]:
        x = X.clone().requires_grad_()
        y = qkern.grouped_linear_4bit(x, qw, ENDS)
        return y, *torch.autograd.grad(y, x, torch.ones(3, 8))

    with selected(by_python):
        expected = step()
    found, answers = by_library
    with selected(found):
        for result, wanted in zip(step(), expected, strict=True):
            testing.assert_bitwise(result, wanted)
        assert answers.take() == [True, True]
        testing.assert_bitwise(qkern.grouped_linear_4bit(X, qw, ENDS.int()), expected[0])
        assert answers.take() == [True]


def test_experts_of_unusual_arguments_go_through_python(
    by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    found, answers = by_library
    op = torch.ops.qkern.grouped_linear_4bit.default
    qw = experts()
    wrong: list[tuple[Tensor, Tensor, str]] = [
        (X, ENDS[:2], r"offsets: got shape \[2\]; takes \[3\]|packed: "),
        (X, ENDS.short(), "offsets: got torch.int16"),
        (X, ENDS.to("meta"), "offsets: got .* on meta"),
        (X[None], ENDS, "x: got shape"),
    ]
    for backend_ in (by_python, found):
        with selected(backend_):
            for x, offsets, message in wrong:
                with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
                    op(x, *qw.weight, 8, offsets)
    assert not any(answers.take())
    with selected(found):
        qkern.grouped_linear_4bit(X, qw, ENDS, check_offsets=True)
        assert answers.take()  # the op, which is sure of what was read
        with pytest.raises(ValueError, match="offsets: got 4 for expert 2 after 1"):
            qkern.grouped_linear_4bit(X, qw, torch.tensor([1, 1, 4]), check_offsets=True)


def test_a_shape_is_asked_for_once(
    by_library: tuple[CudaBackend, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, answers = by_library
    asked = []
    ranked = _cuda_matmul._ranked
    monkeypatch.setattr(
        _cuda_matmul, "_ranked", lambda *given: asked.append(given) or ranked(*given)
    )
    with selected(found):
        for rows in (1, 3, 3, 1):
            qkern.nf4_linear(X[:rows], weight())
    assert answers.take() == [True] * 4
    assert [call.rows for _, call, _ in asked] == [1, 3]


# What is left to Python


def left_to_python() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Calls that Python makes: inputs, and options of the weight."""
    shifted = torch.empty(3 * 64 + 1)[1:].view(3, 64).copy_(X)
    return {
        "misaligned": (shifted, {}),
        "strided": (X.T.contiguous().T, {}),
        "no rows": (X[:0], {}),
        "negated": (torch._neg_view(X), {}),
        "subclass": (X.as_subclass(type("Mine", (Tensor,), {})), {}),
    }


@pytest.mark.parametrize("reason", left_to_python())
def test_what_is_unusual_goes_through_python(
    reason: str, by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    (x, options), (found, answers) = left_to_python()[reason], by_library
    with selected(by_python):
        expected = qkern.nf4_linear(x, weight(**options))
    with selected(found):
        testing.assert_bitwise(qkern.nf4_linear(x, weight(**options)), expected)
    assert not answers.take()[0]


def test_a_forced_path_and_gemm_go_through_python(
    by_library: tuple[CudaBackend, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, answers = by_library
    with selected(found):
        monkeypatch.setenv("QKERN_CUDA_PATH", "tiled")
        qkern.nf4_linear(X, weight())
        assert not any(answers.take())
        monkeypatch.setenv("QKERN_CUDA_PATH", "mma")
        with pytest.raises(ValueError, match="QKERN_CUDA_PATH: got 'mma'"):
            qkern.nf4_linear(X, weight())
        monkeypatch.setenv("QKERN_CUDA_PATH", "")
        answers.take()
        qkern.nf4_linear(X, weight())
        assert answers.take() == [True]
        monkeypatch.setattr(_cuda_matmul._cuda_paths, "best", lambda call, limits, ways: ways[-1])
        _cuda_matmul._ranked.cache_clear()
        qkern.nf4_linear(X[:2], weight())
        _cuda_matmul._ranked.cache_clear()
        assert not any(answers.take())


def test_an_observer_gets_the_op(by_library: tuple[CudaBackend, Answers]) -> None:
    found, _ = by_library
    with selected(found), Ops() as log:
        qkern.nf4_linear(X, weight())
    assert "qkern.linear_4bit.default" in log.seen


def wrong_calls() -> dict[str, Callable[[], object]]:
    """Calls that raise, by what is wrong with them."""
    qw, freed = weight(), weight()
    freed.packed.untyped_storage().resize_(0)
    op = torch.ops.qkern.linear_4bit_dx.default
    return {
        "width": lambda: qkern.nf4_linear(X[:, :32], qw),
        "dtype": lambda: qkern.nf4_linear(X.double(), qw),
        "device": lambda: qkern.nf4_linear(X.to("meta"), qw),
        "bias": lambda: qkern.nf4_linear(X, qw, torch.zeros(9)),
        "bias's dtype": lambda: qkern.nf4_linear(X, qw, torch.zeros(8).bfloat16()),
        "no tensor": lambda: qkern.nf4_linear([1.0], qw),  # type: ignore[arg-type]
        "freed": lambda: qkern.nf4_linear(X, freed),
        "sizes": lambda: op(torch.zeros(3, 8), *qw.weight, 63),
        "block size": lambda: op(torch.zeros(3, 8), *qw.weight[:6], 48, 64),
    }


@pytest.mark.parametrize("wrong", wrong_calls())
def test_errors_are_those_of_pythons_way(
    wrong: str, by_library: tuple[CudaBackend, Answers], by_python: CudaBackend
) -> None:
    found, _ = by_library
    messages = []
    for each in (by_python, found):
        with selected(each), pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            wrong_calls()[wrong]()
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


def test_a_kernels_failure_is_an_exception(
    library: ModuleType, by_python: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python's, and the device from before is current again."""
    mma = replace_way(library, (1, 0))
    message = "linear_4bit: path mma: takes float16 from sm_75 and bfloat16 from sm_80 on"
    with selected(mma), pytest.raises(RuntimeError, match=message):
        qkern.nf4_linear(X, weight())
    monkeypatch.setattr(_cuda_matmul, "choose", lambda *_: _cuda_matmul._cuda_paths.Way("mma"))
    with selected(by_python), pytest.raises(RuntimeError, match=message):
        qkern.nf4_linear(X, weight())
    devices = Devices(1, streams={1: STREAM})
    function = library.cuda_on_tensors(lambda *_: (1, 0), CUDA)["linear_4bit"]
    arguments = X, tuple(weight().weight), 8, None, False, 1
    with pretended(library, devices), pytest.raises(RuntimeError, match=message):
        function(*arguments)
    assert library.current_device() == 0


def replace_way(library: ModuleType, way: object) -> CudaBackend:
    """The emulated backend on a way that is always the same."""
    found = backend.backend(library, CPU)
    found.fast = library.cuda_on_tensors(lambda *_: way, CPU)
    return found


@pytest.mark.parametrize("way", [(9, 0), (0, -1), (0,), [0, 0], "vector", (0, 1.0)])
def test_a_way_that_is_none_is_an_error(library: ModuleType, way: object) -> None:
    with (
        selected(replace_way(library, way)),
        pytest.raises(RuntimeError, match=r"choose: takes None or \(path, workspace_bytes\)"),
    ):
        qkern.nf4_linear(X, weight())


def test_an_exception_of_who_chooses_comes_out(library: ModuleType) -> None:
    def choose(*given: object) -> None:
        raise ZeroDivisionError

    found = library.cuda_on_tensors(choose, CPU)
    with pytest.raises(ZeroDivisionError):
        found["linear_4bit"](X, tuple(weight().weight), 8, None, False, 1)
    for op, wanted in (
        *(("linear_4bit", "6 or 7"), ("linear_4bit_dx", "5")),
        *(("grouped_linear_4bit", "7 or 8"), ("grouped_linear_4bit_dx", "6")),
    ):
        with pytest.raises(TypeError, match=f"{op}: takes {wanted} arguments"):
            found[op](X)


def test_no_reference_is_kept(library: ModuleType) -> None:
    """Where it launches, and where it leaves the call to Python."""
    qw, x, way = weight(16, 2048, double_quant=True), torch.randn(2, 2048), (0, 4096)
    function = library.cuda_on_tensors(lambda *_: way, CPU)["linear_4bit"]
    given = [x, tuple(qw.weight), 16, torch.zeros(16), False, 1]
    library.set_computed(False)
    try:

        def run() -> None:
            assert function(*given) is not None
            assert function(x.t(), *given[1:]) is None

        assert_none_kept(run, (*given, *qw.weight.tensors, way, function.__self__))
        assert_not_held(lambda: function(*given))
    finally:
        library.set_computed(True)


# Where DLPack says that tensors are on GPUs


def on_device(
    library: ModuleType, devices: Devices, *tensors: Tensor, device_type: int = CUDA
) -> Tensor | None:
    """The forward by the library's function, of x, then perhaps a weight and a bias."""
    x, qw, bias = (*tensors, *(None,) * 3)[:3]
    given = tuple(weight().weight) if qw is None else qw
    choose = CudaBackend("cuda", library, device_type=None)
    way = _cuda_matmul.way_of_its_own
    functions = library.cuda_on_tensors(lambda *call: way(choose.library(), *call), device_type)
    with pretended(library, devices):
        result: Tensor | None = functions["linear_4bit"](x, given, 8, bias, False, 1, 64)
    return result


def test_a_launch_is_on_the_tensors_device_and_torchs_stream(
    library: ModuleType, by_python: CudaBackend
) -> None:
    with selected(by_python):
        expected = qkern.nf4_linear(X, weight())
    for device in (0, 3):
        devices = Devices(device, streams={0: 7, 3: STREAM})
        y = on_device(library, devices, X)
        assert y is not None
        testing.assert_bitwise(y, expected)
        _, launched_on, stream = library.launches()
        assert (launched_on, stream) == (device, devices.streams[device])
        assert library.current_device() == 0


def test_the_device_is_known_to_who_chooses(library: ModuleType) -> None:
    """Devices may differ, and so may their best ways."""
    asked = []

    def choose(*call: Any) -> tuple[int, int]:
        asked.append((call, library.current_device()))
        return 2, 0

    functions = library.cuda_on_tensors(choose, CUDA)
    dy = torch.randn(5, 8).bfloat16()
    with pretended(library, Devices(3, streams={3: STREAM})):
        functions["linear_4bit_dx"](dy, tuple(weight().weight), 64, True, 1)
        functions["linear_4bit"](X, tuple(weight().weight), 8, None, False, 1)
        qw = tuple(experts().weight)
        functions["grouped_linear_4bit"](X, qw, 8, ENDS, None, False, 1)
    bfloat16, float32 = (formats.DTYPES.index(name) for name in ("bfloat16", "float32"))
    assert asked == [
        ((3, 1, bfloat16, 5, 8, 64, 0, True, True), 3),
        ((3, 0, float32, 3, 8, 64, 0, False, True), 3),
        ((3, 0, float32, 3, 8, 64, 3, False, True), 3),
    ]


def test_whether_all_is_aligned_is_known_to_who_chooses(library: ModuleType) -> None:
    """x and W at multiples of 16 bytes, and x's rows such multiples apart."""
    aligned = []

    def choose(*call: Any) -> tuple[int, int]:
        aligned.append(call[-1])
        return 2, 0

    def shifted(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)

    functions = library.cuda_on_tensors(choose, CPU)
    qw = weight().weight
    for packed in (qw.packed, shifted(qw.packed)):
        given = (packed, *qw[1:])
        assert functions["linear_4bit"](X, given, 8, None, False, 1) is not None
    for rows, cols in ((8, 64), (6, 64)):  # 24 bytes a row of the gradient
        dy, given = torch.ones(3, rows), tuple(weight(rows, cols).weight)
        assert functions["linear_4bit_dx"](dy, given, cols, False, 1) is not None
    odd, narrow = tuple(weight(8, 48).weight), torch.ones(3, 48)  # rows that nobody copies
    assert functions["linear_4bit"](shifted(narrow), odd, 8, None, False, 1) is not None
    assert functions["linear_4bit"](shifted(X), tuple(qw), 8, None, False, 1) is None
    assert aligned == [True, False, True, False, False]


def test_tensors_of_different_devices_are_left_alone(library: ModuleType) -> None:
    qw, bias = weight(double_quant=True), torch.zeros(8)
    streams = {0: 7, 1: STREAM}
    assert on_device(library, Devices(1, streams=streams), X, tuple(qw.weight), bias) is not None
    library.launches()
    for tensor in (X, bias, *(t for t in qw.weight.tensors if t is not None)):
        for place in ((CUDA, 0), (CPU, 0), (CUDA, -1), (10, 1)):
            devices = Devices(1, streams=streams)
            devices.place(tensor, *place)
            assert on_device(library, devices, X, tuple(qw.weight), bias) is None
    assert library.launches()[0] == 0


def test_no_stream_is_no_launch(library: ModuleType) -> None:
    for devices in (Devices(1), Devices(1, streams={1: 7}, tells_streams=False)):
        assert on_device(library, devices, X) is None
        assert library.current_device() == 0
    assert on_device(library, Devices(1, streams={1: 7}), X, device_type=CPU) is None


# Which backend's functions are called


def test_the_first_tensors_device_says_whose_functions_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere, there = torch.device("meta"), backends.Backend("there")
    there.fast = {"linear_4bit": lambda x, *others: x}
    x = torch.empty(3, 64, device=elsewhere)
    monkeypatch.setattr(backends, "selected", {torch.device("cpu"): backends.reference})
    assert ops.undispatched(X) is backends.reference
    assert ops.undispatched(x) is None  # before the first op, whose errors are the right ones
    backends.selected[elsewhere] = there
    assert ops.undispatched(x) is there
    assert ops.undispatched(nn.Parameter(x)) is there
    assert ops.call("linear_4bit", x, weight().weight, 8, None, False) is x
    for nothing_to_ask in ([x], None, x.as_subclass(type("Mine", (Tensor,), {}))):
        assert ops.undispatched(nothing_to_ask) is backends.reference
    with backends.use("reference"):
        assert ops.undispatched(x) is None
        backends.select(elsewhere)
        assert ops.undispatched(x) is backends.reference


def test_a_subclass_of_the_backend_has_its_own_methods_called(library: ModuleType) -> None:
    class Mine(CudaBackend):
        def linear_4bit(self, x: Tensor, *args: Any) -> Tensor:
            return super().linear_4bit(x, *args) + 1

    assert set(backend.backend(library, CPU).fast) == {*MATMULS, *GROUPED}
    assert set(Mine("mine", library, device_type=CPU).fast) == {"linear_4bit_dx", *GROUPED}
    assert backend.backend(library).fast == {}
