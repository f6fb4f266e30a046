"""Every tensor argument of every op: its memory, its device, and what of it an op writes.

By the table of ops, so that a new op is tested as soon as it is declared; by every way to an op:
through the dispatcher to each backend, around it, and by the public functions.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedExperts, QuantizedTensor, backends, ops, reference, testing
from qkern.backends import CpuBackend, CudaBackend, TritonBackend, _args, cpu
from qkern.testing import Case
from qkern.weight import Weight

Inputs = dict[str, Any]
needs_native = pytest.mark.skipif(cpu.missing_reason() is not None, reason="qkern._C is not built")


def inputs_of(op: str, bits: int = 32, dtype: torch.dtype = torch.float32) -> Inputs:
    """Arguments by name, the weight as one, with every tensor that may be absent."""
    table = testing.OPS
    spec = table["dequantize_4bit" if op == "dequantize_4bit_out" else op]
    shape = (3, 40, 130) if spec.multiplies else (13, 100)
    weight = {"format": "custom", "codebook": "unsorted", "double_quant": True}
    case = Case(shape, dtype, **weight, bias=True, bits=bits, rank=5)
    found = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    if op == "dequantize_4bit_out":
        found = {"weight": found["weight"], "out": torch.zeros(13, 100)}
    return found


@dataclass(frozen=True)
class Place:
    """One tensor among an op's arguments."""

    op: str
    argument: str
    field: str | int | None = None
    bits: int = 32

    def __str__(self) -> str:
        parts = [self.op, self.argument, self.field, "8bit" if self.bits == 8 else None]
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def name(self) -> str:
        """What an error may call it."""
        if isinstance(self.field, str):
            return self.field
        singular = self.argument.removesuffix("s").removesuffix("e")
        return rf"(?:{self.argument}\[{self.field}\]|{singular}e?|{self.argument})"

    def inputs(self) -> Inputs:
        return inputs_of(self.op, self.bits)

    def of(self, inputs: Inputs) -> Tensor:
        value = inputs[self.argument]
        if isinstance(self.field, str):
            return getattr(value, self.field)
        return value if self.field is None else value[self.field]

    def replaced(self, inputs: Inputs, tensor: Any) -> Inputs:
        value = inputs[self.argument]
        if isinstance(self.field, str):
            value = value._replace(**{self.field: tensor})
        elif self.field is None:
            value = tensor
        else:
            value = [*value[: self.field], tensor, *value[self.field + 1 :]]
        return inputs | {self.argument: value}


def places() -> Iterator[Place]:
    for op, entry in ops.OPS.items():
        for bits in (32, 8) if op == "adamw_step" else (32,):
            for name, value in inputs_of(op, bits).items():
                assert name in entry.parameters
                if isinstance(value, Weight):
                    yield from (Place(op, name, field) for field in Weight._fields[:5])
                elif isinstance(value, Tensor):
                    yield Place(op, name, None, bits)
                elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                    yield from (Place(op, name, k, bits) for k in sorted({0, len(value) - 1}))


class LaunchedError(Exception):
    """A kernel would have started."""


PLACES = list(places())
all_ops = pytest.mark.parametrize("op", ops.OPS)


def places_of(op: str, only: bool = True) -> list[Place]:
    """The op's; none where it has one tensor and ``only`` is False."""
    found = [place for place in PLACES if place.op == op]
    return found if only or len(found) > 1 else []


def error_of(call: Callable[[Inputs], Any], inputs: Inputs) -> str:
    try:
        call(inputs)
    except (ValueError, LaunchedError) as error:
        return str(error)
    return "no error"


def test_the_table_has_every_tensor_of_every_op() -> None:
    """Those of torch's schema, a list counted once."""
    for name, op in ops.OPS.items():
        expected = {
            argument.name
            for argument in op.overload._schema.arguments
            if "Tensor" in str(argument.type)
        }
        found = {
            p.field if isinstance(p.field, str) else p.argument for p in PLACES if p.op == name
        }
        assert found == expected


def arguments(op: str, inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs[name] for name in ops.OPS[op].parameters)


def through_the_dispatcher(op: str, inputs: Inputs) -> Any:
    entry = ops.OPS[op]
    return entry.overload(*entry.spread(arguments(op, inputs)))


def around_the_dispatcher(op: str, inputs: Inputs) -> Any:
    return ops.call(op, *arguments(op, inputs))


@contextlib.contextmanager
def without_the_fast_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "fast", {})
        yield


WAYS: dict[str, tuple[str, Callable[[str, Inputs], Any], Any]] = {
    "cpu": ("cpu", through_the_dispatcher, contextlib.nullcontext),
    "cpu_read_in_python": ("cpu", through_the_dispatcher, without_the_fast_way),
    "cpu_around_the_dispatcher": ("cpu", around_the_dispatcher, contextlib.nullcontext),
    "reference": ("reference", through_the_dispatcher, contextlib.nullcontext),
    "reference_around_the_dispatcher": (
        "reference",
        around_the_dispatcher,
        contextlib.nullcontext,
    ),
}
ways = pytest.mark.parametrize("way", WAYS)


@contextlib.contextmanager
def on(way: str) -> Iterator[Callable[[str, Inputs], Any]]:
    backend, run, also = WAYS[way]
    if backend == "cpu" and cpu.missing_reason():
        pytest.skip("qkern._C is not built")
    with backends.use(backend), also():
        # It chooses the backend; until then nothing goes around the dispatcher.
        qkern.quantize_4bit(torch.ones(64))
        yield run


def in_storage_of(tensor: Tensor, nbytes: int) -> Tensor:
    """A copy at an odd place of a storage, of which ``nbytes`` are left in the end."""
    behind = torch.zeros(tensor.numel() + 7, dtype=tensor.dtype)
    copy = behind[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert copy.storage_offset() == 3
    copy.untyped_storage().resize_(nbytes)
    return copy


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    assert tensor.data_ptr() == 0
    return tensor


def a_byte_short(tensor: Tensor) -> Tensor:
    return in_storage_of(tensor, (3 + tensor.numel()) * tensor.itemsize - 1)


def exactly_whole(tensor: Tensor) -> Tensor:
    return in_storage_of(tensor, (3 + tensor.numel()) * tensor.itemsize)


def wrongly_refused(op: str, call: Callable[[Inputs], Any]) -> list[str]:
    """The errors that are not the right ones, of each tensor of the op without its memory."""
    wrong = []
    for place in places_of(op):
        inputs = place.inputs()
        for change in (freed, a_byte_short):
            error = error_of(call, place.replaced(inputs, change(place.of(inputs))))
            expected = rf"{place.name}: got a tensor whose storage has \d+ bytes, .*; takes one of"
            if not re.match(expected, error):
                wrong.append(f"{place}, {change.__name__}: {error}")
    return wrong


@ways
@all_ops
def test_a_tensor_without_its_memory_is_refused(op: str, way: str) -> None:
    with on(way) as run:
        wrong = wrongly_refused(op, lambda bad: run(op, bad))
    assert not wrong


@ways
@all_ops
def test_a_tensor_that_just_has_its_memory_is_read(op: str, way: str) -> None:
    entry = ops.OPS[op]

    def results(inputs: Inputs) -> list[Tensor]:
        inputs = copied_inputs(inputs)
        found = run(op, inputs)
        written = [flat(inputs[name]) for name in entry.writes]
        return [*flat(found), *(t for tensors in written for t in tensors)]

    with on(way) as run:
        for place in places_of(op):
            inputs = place.inputs()
            expected = results(inputs)
            actual = results(place.replaced(inputs, exactly_whole(place.of(inputs))))
            for a, e in zip(actual, expected, strict=True):
                if way.startswith("reference") and entry.name in PRODUCTS:
                    # torch's matmul chooses its code by the address's alignment.
                    torch.testing.assert_close(a, e, msg=lambda text, p=place: f"{p}: {text}")
                else:
                    testing.assert_bitwise(a, e, str(place))


PRODUCTS = [name for name, spec in testing.OPS.items() if spec.comparison in ("matmul", "grouped")]


def copied_inputs(inputs: Inputs) -> Inputs:
    def copied(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().clone()
        twin = torch.empty(0, dtype=tensor.dtype)
        return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return {name: testing.map_tensors(value, copied) for name, value in inputs.items()}


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in flat(item)]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every_other"])
@ways
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx", "quantize_4bit", "quantize_8bit"])
def test_activations_of_any_strides_need_the_memory_that_they_reach(
    op: str, way: str, layout: str
) -> None:
    inputs = inputs_of(op)
    main = testing.OPS[op].main or "x"
    rows, width = inputs[main].shape
    x = {
        "transposed": lambda: torch.randn(width, rows).t(),
        "expanded": lambda: torch.randn(1, width).expand(rows, width),
        "every_other": lambda: torch.randn(rows, 2 * width)[:, ::2],
    }[layout]()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    with on(way) as run:
        x.untyped_storage().resize_((last + 1) * x.itemsize)
        run(op, inputs | {main: x})
        x.untyped_storage().resize_((last + 1) * x.itemsize - 1)
        with pytest.raises(ValueError, match=f"^{main}: got a tensor whose storage has"):
            run(op, inputs | {main: x})
        x.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"^{main}: got a tensor whose storage has 0 bytes"):
            run(op, inputs | {main: x})


READERS = {"cpu": CpuBackend, "cuda": CudaBackend, "triton": TritonBackend}


def reader(kind: str) -> Any:
    """A backend up to where a kernel starts; one for a GPU takes CPU tensors for its own."""
    stub = READERS[kind](kind)

    def stop(*_: Any) -> Any:
        raise LaunchedError

    stub._launch = stub._multiply = stop
    return stub


def kernel_of(kind: str, op: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(reader(kind), op, None)
    if function is None:
        pytest.skip(f"{kind} leaves {op} to the reference")
    return function


gpu_readers = pytest.mark.parametrize("kind", ["cuda", "triton"])


@gpu_readers
@all_ops
def test_readers_for_a_gpu_refuse_a_tensor_without_its_memory(op: str, kind: str) -> None:
    function = kernel_of(kind, op)
    with pytest.raises(LaunchedError):
        function(*arguments(op, inputs_of(op)))
    assert not wrongly_refused(op, lambda bad: function(*arguments(op, bad)))


@gpu_readers
@all_ops
def test_readers_for_a_gpu_refuse_a_tensor_elsewhere(
    op: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the CPU has an address that a GPU cannot read; meta stands for the GPU."""
    function = kernel_of(kind, op)
    # Tensors on meta have no memory to ask for.
    monkeypatch.setattr(_args, "check_memory", lambda *_: None)
    monkeypatch.setattr(Tensor, "untyped_storage", lambda self: _Ample())
    wrong = []
    for place in places_of(op, only=False):
        inputs = place.inputs()
        on_gpu = {name: on_meta(value) for name, value in inputs.items()}
        with pytest.raises(LaunchedError):
            function(*arguments(op, on_gpu))
        bad = place.replaced(on_gpu, place.of(inputs))
        error = error_of(lambda inputs: function(*arguments(op, inputs)), bad)
        # Where the first is, the others must be; of products into a matrix that is the matrix.
        expected = rf"{place.name}: got a tensor on cpu; takes one on meta"
        is_first = [p.argument == "out" for p in places_of(op)] if op.endswith("_into") else [True]
        first = places_of(op)[is_first.index(True)]
        if (place.argument, place.field) == (first.argument, first.field):
            expected = r"\w+: got a tensor on meta; takes one on cpu"
        if not re.match(expected, error):
            wrong.append(f"{place}: {error}")
    assert not wrong


@all_ops
def test_the_reader_for_a_cpu_refuses_a_tensor_elsewhere(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on a GPU has an address that no kernel here can read; meta stands for the GPU."""
    function = getattr(reader("cpu"), op)
    with pytest.raises(LaunchedError):
        function(*arguments(op, inputs_of(op)))
    monkeypatch.setattr(_args, "check_memory", lambda *_: None)
    monkeypatch.setattr(Tensor, "untyped_storage", lambda self: _Ample())
    wrong = []
    for place in places_of(op):
        inputs = place.inputs()
        bad = place.replaced(inputs, on_meta(place.of(inputs)))
        error = error_of(lambda inputs: function(*arguments(op, inputs)), bad)
        if not re.match(rf"{place.name}: got a tensor on meta; takes one on cpu", error):
            wrong.append(f"{place}: {error}")
    assert not wrong


@needs_native
def test_kernels_that_read_tensors_leave_those_elsewhere_to_others() -> None:
    for op, kernel in cpu.fast.items():
        for place in places_of(op):
            inputs = place.inputs()
            bad = place.replaced(inputs, on_meta(place.of(inputs)))
            assert kernel(*arguments(op, bad), 1) is None, place
            assert kernel(*arguments(op, inputs), 1) is not None, place


def on_meta(value: Any) -> Any:
    return testing.map_tensors(value, lambda tensor: tensor.to("meta"))


class _Ample:
    def nbytes(self) -> int:
        return 1 << 62


@ways
@all_ops
def test_tensors_partly_on_meta_are_refused(op: str, way: str) -> None:
    """torch takes an op with any tensor on meta for one on meta: nobody would fill its results."""
    wrong = []
    with on(way) as run:
        for place in places_of(op, only=False):
            inputs = place.inputs()
            for bad in (
                place.replaced(inputs, on_meta(place.of(inputs))),
                place.replaced({n: on_meta(v) for n, v in inputs.items()}, place.of(inputs)),
            ):
                error = error_of(lambda inputs: run(op, inputs), bad)
                if not re.match(r"\S+: got a tensor on (meta|cpu); takes", error):
                    wrong.append(f"{place}: {error}")
    assert not wrong


@all_ops
def test_tensors_all_on_meta_give_results_on_meta(op: str) -> None:
    inputs = {name: on_meta(value) for name, value in inputs_of(op).items()}
    for tensor in flat(through_the_dispatcher(op, inputs)):
        assert tensor.is_meta


@pytest.mark.parametrize("field", ["nested_absmax", "nested_offset"])
@ways
@pytest.mark.parametrize("op", [op for op in ops.OPS if ops.OPS[op].weight_at is not None])
def test_one_of_the_nested_tensors_alone_is_refused(op: str, way: str, field: str) -> None:
    place = Place(op, "weight", field)
    bad = place.replaced(place.inputs(), None)
    message = "nested_absmax, nested_offset: got only one; takes both or neither"
    with on(way) as run, pytest.raises(ValueError, match=f"^{message}$"):
        run(op, bad)
    for kind in ("cuda", "triton"):
        if hasattr(reader(kind), op):
            with pytest.raises(ValueError, match=f"^{message}$"):
                getattr(reader(kind), op)(*arguments(op, bad))


@ways
@pytest.mark.parametrize(("op", "bits"), [*((op, 32) for op in ops.OPS), ("adamw_step", 8)])
def test_what_is_written_has_its_version_counted_and_nothing_else(
    op: str, bits: int, way: str
) -> None:
    """Autograd trusts a version: one too few hides a change, one too many refuses a right graph."""
    inputs = inputs_of(op, bits)
    before = {name: [t.clone() for t in flat(value)] for name, value in inputs.items()}
    versions = {name: [t._version for t in flat(value)] for name, value in inputs.items()}
    with on(way) as run:
        run(op, inputs)
    for name, value in inputs.items():
        written = name in ops.OPS[op].writes
        for tensor, old, version in zip(flat(value), before[name], versions[name], strict=True):
            assert (tensor._version > version) is written, name
            if not written:
                testing.assert_bitwise(tensor, old, name)
        # Nor does the schema say so of what stays as it is, such as gradients.
        pairs = list(zip(flat(value), before[name], strict=True))
        changed = any(not bits_of(tensor).equal(bits_of(old)) for tensor, old in pairs)
        assert changed is written or not pairs, name


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def functions() -> dict[str, tuple[Callable[..., Any], Inputs]]:
    """The public functions that take tensors, with arguments by name."""
    custom = {"format": "custom", "double_quant": True}
    qw = qkern.quantize_4bit(torch.randn(13, 100), codebook=torch.linspace(-1, 1, 16), **custom)
    codes, absmax = qkern.quantize_8bit(torch.randn(13, 100))
    x, bias = torch.randn(3, 100), torch.randn(13)
    lora = {"lora_a": torch.randn(4, 100), "lora_b": torch.randn(13, 4), "scaling": 0.5}
    ramp = torch.linspace(-1, 1, 256)
    w, book = torch.randn(3, 13, 100), torch.linspace(-1, 1, 16)
    experts = qkern.quantize_experts(w, codebook=book, **custom)
    grouped = {"x": x, "qw": experts, "offsets": torch.tensor([1, 1, 3])}
    of_format = {
        f"{name}_linear": (
            getattr(qkern, f"{name}_linear"),
            {"x": x, "qw": qkern.quantize_4bit(torch.randn(13, 100), format=name), "bias": bias},
        )
        for name in ("nf4", "fp4")
    }
    return of_format | {
        "quantize_4bit": (
            qkern.quantize_4bit,
            {"w": torch.randn(13, 100), "codebook": torch.linspace(-1, 1, 16), **custom},
        ),
        "dequantize_4bit": (qkern.dequantize_4bit, {"qw": qw, "out": torch.zeros(13, 100)}),
        "quantize_8bit": (qkern.quantize_8bit, {"x": torch.randn(13, 100), "map": ramp}),
        "dequantize_8bit": (
            qkern.dequantize_8bit,
            {"codes": codes, "absmax": absmax, "map": ramp},
        ),
        "linear_4bit": (qkern.linear_4bit, {"x": x, "qw": qw, "bias": bias}),
        "linears_4bit": (qkern.linears_4bit, {"x": x, "qws": [qw, qw], "biases": [None, bias]}),
        "linear_cross_entropy": (
            qkern.linear_cross_entropy,
            {"hidden": x, "weight": qw, "labels": torch.tensor([5, -100, 12]), "bias": bias},
        ),
        "lora_linear": (qkern.lora_linear, {"x": x, "qw": qw, **lora, "bias": bias}),
        "quantize_experts": (qkern.quantize_experts, {"w": w, "codebook": book, **custom}),
        "grouped_lora_linear": (
            qkern.grouped_lora_linear,
            grouped
            | {"bias": torch.randn(3, 13), "scaling": 0.5}
            | {"lora_a": torch.randn(3, 4, 100), "lora_b": torch.randn(3, 13, 4)},
        ),
        "grouped_linear_4bit": (
            qkern.grouped_linear_4bit,
            grouped | {"bias": torch.randn(3, 13)},
        ),
    }


all_functions = pytest.mark.parametrize("name", functions())


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Inputs]]:
    """The inputs with one tensor changed, for each; and its name."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, inputs | {name: change(value)}
        elif isinstance(value, list):
            for index, item in enumerate(value):
                for place, one in changed({name.removesuffix("es"): item}, change):
                    new = [*value[:index], *one.values(), *value[index + 1 :]]
                    yield place, inputs | {name: new}
        elif isinstance(value, QuantizedTensor | QuantizedExperts):
            for field, tensor in value.tensors().items():
                # Past the checks of a new one, which could not lack memory either.
                weight = copy.copy(value)
                object.__setattr__(weight, field, change(tensor))
                weight.__dict__["_weight"] = value.weight._replace(**{field: change(tensor)})
                yield field, inputs | {name: weight}


def test_every_public_function_is_in_the_table() -> None:
    names = {n for n in qkern.__all__ if callable(getattr(qkern, n))}
    others = {"QuantizedTensor", "QuantizedExperts", "batch_invariant", "precision"}
    assert names - others == functions().keys()


@pytest.mark.parametrize("mode", ["plain", "autocast", "grad"])
@all_functions
def test_a_public_function_refuses_a_tensor_without_its_memory(name: str, mode: str) -> None:
    function, inputs = functions()[name]
    if mode == "grad" and "out" not in inputs:
        inputs = {n: _trained(value) for n, value in inputs.items()}
    wrong = []
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for change in (freed, a_byte_short):
            for place, bad in changed(inputs, change):
                error = error_of(lambda bad: function(**bad), bad)
                if not re.match(rf"{place}: got a tensor whose storage has \d+ bytes", error):
                    wrong.append(f"{place}, {change.__name__}: {error}")
    assert not wrong


def _trained(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() != 1:
        return value.clone().requires_grad_()
    return value


@all_functions
def test_a_public_function_refuses_tensors_partly_on_meta(name: str) -> None:
    function, inputs = functions()[name]
    wrong = []
    for place, bad in changed(inputs, on_meta):
        if place == "w":  # the codebook is brought to it
            assert {t.device.type for t in function(**bad).tensors().values()} == {"meta"}
            continue
        error = error_of(lambda bad: function(**bad), bad)
        if not re.match(r"\S+: got a tensor on (meta|cpu); takes", error):
            wrong.append(f"{place}: {error}")
    assert not wrong


DENSE: dict[str, Callable[[Inputs], Tensor]] = {
    "quantize_4bit": lambda a: a["w"],
    "dequantize_4bit": lambda a: reference.dequantize_4bit(
        a["qw"].weight, a["qw"].shape, torch.float32
    ),
    "quantize_8bit": lambda a: a["x"],
    "dequantize_8bit": lambda a: reference.dequantize_8bit(
        a["codes"], a["absmax"], a["map"], 256, torch.float32
    ),
    "nf4_linear": lambda a: a["x"] @ a["qw"].dequantize().t() + a["bias"],
    "fp4_linear": lambda a: a["x"] @ a["qw"].dequantize().t() + a["bias"],
    "linear_4bit": lambda a: a["x"] @ a["qw"].dequantize().t() + a["bias"],
    "linears_4bit": lambda a: torch.cat(
        [
            a["x"] @ qw.dequantize().t() + (0 if bias is None else bias)
            for qw, bias in zip(a["qws"], a["biases"], strict=True)
        ]
    ),
    "linear_cross_entropy": lambda a: torch.nn.functional.cross_entropy(
        a["hidden"] @ a["weight"].dequantize().t() + a["bias"], a["labels"]
    ),
    "quantize_experts": lambda a: a["w"],
    "grouped_linear_4bit": lambda a: torch.stack(
        [
            row @ a["qw"].dequantize()[expert].t() + a["bias"][expert]
            for row, expert in zip(a["x"], (0, 2, 2), strict=True)
        ]
    ),
    "grouped_lora_linear": lambda a: torch.stack(
        [
            row @ (dense + 0.5 * b @ f).t() + bias
            for row, dense, f, b, bias in (
                (row, a["qw"].dequantize()[e], a["lora_a"][e], a["lora_b"][e], a["bias"][e])
                for row, e in zip(a["x"], (0, 2, 2), strict=True)
            )
        ]
    ),
    "lora_linear": lambda a: (
        a["x"] @ (a["qw"].dequantize() + 0.5 * a["lora_b"] @ a["lora_a"]).t() + a["bias"]
    ),
}
"""What each function's result stands for, by dense arithmetic."""


@all_functions
def test_a_public_function_gives_what_dense_arithmetic_gives(name: str) -> None:
    """Called successfully, each one, and its result looked at: an error alone tests no result."""
    function, inputs = functions()[name]
    result = function(**inputs)
    tolerance = 1e-4
    if name in ("quantize_4bit", "quantize_experts"):
        result, tolerance = result.dequantize(), 0.5
    elif name == "quantize_8bit":
        result, tolerance = qkern.dequantize_8bit(*result, map=inputs["map"]), 0.05
    elif name == "linears_4bit":
        result = torch.cat(result)
    expected = DENSE[name](inputs)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    assert (result - expected).norm() <= tolerance / 2 * expected.norm()
