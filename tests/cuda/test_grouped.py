"""Products by experts on the emulated CUDA kernels, beyond the op table: bits, offsets, paths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.cuda import experts, ways
from lab.cuda.emulator import backend, build
from lab.cuda.experts import FORWARD, GRADIENT, inputs_of, main_of
from qkern import reference, testing
from qkern.backends import _cuda_matmul, _cuda_paths
from qkern.backends._backend import Product
from qkern.backends._compiled import product_numbers
from qkern.backends._cuda_paths import PATHS, Limits, Matmul
from qkern.testing import OPS, Case, Inputs, OpSpec, Target
from qkern.weight import Weight

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
PLAIN = backend.SCHEDULES[0]
specs = pytest.mark.parametrize("spec", [FORWARD, GRADIENT], ids=lambda spec: spec.name)
# Tiles of every size: from one row on average to many, on either side of what a tile holds.
GROUPS = (
    *((1, 0, 0, 1, 0, 0, 0, 0), (2, 0, 1, 3), (0, 5, 9, 16, 17, 0), (40, 3, 0, 1), (33, 65)),
    (130,),
)


@pytest.fixture
def emulated(library: ModuleType) -> Target:
    return backend.EmulatedTarget(library, PLAIN)


def one_by_one(spec: OpSpec, inputs: Inputs) -> Tensor:
    """The result by the op of one weight, an expert at a time."""
    single = OPS[spec.name.removeprefix("grouped_")]
    main = main_of(spec)
    (size,) = (value for name, value in inputs.items() if name.endswith("_features"))
    x = inputs[main]
    y = x.new_zeros(len(x), size)
    for expert, rows in enumerate(reference.groups(inputs["offsets"], len(x))):
        weight = inputs["weight"].of_expert(expert, size * x.shape[1])
        own = dict(inputs) | {main: x[rows], "weight": weight}
        del own["offsets"]
        if own.get("bias") is not None:
            own["bias"] = own["bias"][expert]
        if rows.start < rows.stop:
            (y[rows],) = single.run(own)
    return y


def invariant_params() -> list[object]:
    """Every seventh is a quick test, so that each path comes with all groups."""
    found: list[object] = []
    # The last but one has so few rows of W that a block's warps share its columns.
    shapes = ((0, 40, 160), (0, 37, 131), (0, 24, 5 * 1024 + 96), (0, 136, 288))
    for spec, dtype, shape in itertools.product((FORWARD, GRADIENT), (FLOAT, BFLOAT, HALF), shapes):
        bias = not spec.input_gradient
        case = Case(shape, dtype, 32, double_quant=True, bias=bias, batch_invariant=True)
        for way in (None, *ways.expected_paths(ways.call_of(spec, case), PLAIN.capability)):
            for groups in GROUPS if shape[2] < 1000 else GROUPS[:3]:
                marks = [] if len(found) % 7 == 0 else [pytest.mark.slow]
                name = f"{spec.name}-{way or 'chosen'}-{case}-{'+'.join(map(str, groups))}"
                found.append(pytest.param(spec, case, way, groups, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("spec", "case", "way", "groups"), invariant_params())
def test_bits_are_those_of_each_expert_alone(
    spec: OpSpec, case: Case, way: str | None, groups: tuple[int, ...], emulated: Target
) -> None:
    inputs = inputs_of(spec, case, groups, none=3)
    with emulated.activate(), ways.forced(way or ""), testing.poisoned_outputs():
        (found,) = spec.run(inputs)
        expected = one_by_one(spec, inputs)
    testing.assert_bitwise(found, expected)


@specs
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_offsets_of_either_type_mean_the_same(spec: OpSpec, dtype: torch.dtype, emulated: Target):
    inputs = inputs_of(spec, Case((0, 40, 96), dtype, 32), (3, 0, 9), none=1)
    with emulated.activate():
        (narrow,) = spec.run(inputs | {"offsets": inputs["offsets"].int()})
        (wide,) = spec.run(inputs | {"offsets": inputs["offsets"].long()})
    testing.assert_bitwise(narrow, wide)


@specs
@pytest.mark.parametrize(
    "case",
    [
        Case((0, 40, 96), BFLOAT, 32, double_quant=True),
        Case((0, 35, 99), FLOAT, 64, double_quant=True),
        Case((0, 40, 96), HALF, 32, batch_invariant=True),
    ],
    ids=str,
)
def test_wrong_offsets_touch_nothing_outside(spec: OpSpec, case: Case, emulated: Target) -> None:
    for way in (None, *ways.expected_paths(ways.call_of(spec, case), PLAIN.capability)):
        with ways.forced(way or ""):
            experts.check_wrong_offsets(spec, case, emulated, experts.guarded)


@specs
@pytest.mark.parametrize(
    ("groups", "none"),
    [
        ((19,), 0),
        # As many experts as lanes of a warp, one more, and runs of several for each lane.
        (tuple(i % 2 for i in range(32)), 1),
        (tuple(i % 3 == 1 for i in range(33)), 0),
        (tuple((i % 7 == 0) * (i % 5) for i in range(300)), 2),
        ((0,) * 299 + (70,), 0),
        ((70,) + (0,) * 299, 3),
        # The most tiles that there can be: all are rounded up.
        ((65, 129, 65, 1), 1),
        ((1, 1, 1, 1, 1), 1),
    ],
    ids=lambda value: f"{len(value)}experts" if isinstance(value, tuple) else f"{value}none",
)
def test_experts_in_any_number(
    spec: OpSpec, groups: Sequence[int], none: int, emulated: Target
) -> None:
    case = Case((0, 16, 32), BFLOAT, 32, double_quant=True, bias=not spec.input_gradient)
    inputs = inputs_of(spec, case, groups, none)
    weights = spec.exact_weight(inputs, case)
    for way in (None, *ways.expected_paths(ways.call_of(spec, case), PLAIN.capability)):
        with emulated.activate(), ways.forced(way or ""), testing.poisoned_outputs():
            (y,) = spec.run(inputs)
        assert spec.judge is not None
        spec.judge(y, inputs, weights)


@specs
def test_without_rows(spec: OpSpec, emulated: Target) -> None:
    inputs = inputs_of(spec, Case((0, 40, 96), BFLOAT), (0, 0, 0))
    with emulated.activate():
        (y,) = spec.run(inputs)
    assert y.shape == (0, 96 if spec.input_gradient else 40)


@specs
@pytest.mark.parametrize("way", ["vector", "mma", "tiled"])
def test_a_captured_call_follows_the_offsets(
    spec: OpSpec, way: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph replays what was started: the same numbers, with whatever is in memory by then."""
    if spec.input_gradient and way == "vector":
        return
    started: list[tuple[str, tuple[Any, ...]]] = []

    class Recorded:
        """The library, with notes of what is started."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(library, name)
            if not name.startswith("cuda_grouped"):
                return found

            def start(*arguments: Any) -> Any:
                started.append((name, arguments))
                return found(*arguments)

            return start

    monkeypatch.setenv("QKERN_CUDA_PATH", way)
    recorded: Any = Recorded()
    case = Case((0, 40, 96), BFLOAT, 32, double_quant=True)
    inputs = inputs_of(spec, case, (3, 0, 9, 2), none=1)
    # Through the backend itself: the op table's `run` copies what it passes.
    names = [name for name in inputs if name != "batch_invariant"]
    method = getattr(backend.backend(recorded), spec.name)
    order = [main_of(spec), "weight", *(n for n in names if n.endswith("_features")), "offsets"]
    with backend.EmulatedTarget(library, PLAIN).activate():
        y = method(*(inputs[name] for name in order))
        inputs["offsets"].copy_(torch.tensor([1, 8, 8, 13]))
        expected = method(*(inputs[name] for name in order))
        (name, arguments), _ = started
        assert not torch.equal(y, expected)
        getattr(library, name)(*arguments)
    testing.assert_bitwise(y, expected)


@specs
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_the_host_reads_no_offsets(
    spec: OpSpec, dtype: torch.dtype, emulated: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(spec, Case((0, 40, 96), dtype), (3, 0, 9), none=1)
    names = ("tolist", "item", "cpu", "numpy", "to", "__int__", "__index__", "__bool__", "max")
    with emulated.activate():
        for name in names:
            original = getattr(Tensor, name)

            def read(self: Tensor, *args: Any, original: Any = original, **others: Any) -> Any:
                assert not self.dtype.is_signed or self.dtype.is_floating_point, "reads integers"
                return original(self, *args, **others)

            monkeypatch.setattr(Tensor, name, read)
        (y,) = spec.run(inputs)
        monkeypatch.undo()
    assert len(y) == 13


def chosen(library: ModuleType, call: Matmul, limits: Limits) -> str:
    return _cuda_matmul.choose(library, call, limits).path


def test_the_path_of_a_product_by_experts(library: ModuleType, emulated: Target) -> None:
    """Dot products for few rows of each, tensor cores for many; never one that no kernel has."""
    call = Matmul(False, BFLOAT, 64, 1536, 2048, experts=128)
    hopper = replace(PLAIN, capability=90)
    for schedule in (PLAIN, hopper):
        with backend.EmulatedTarget(library, schedule).activate():
            limits = _cuda_matmul.device_limits(library)
            order = [
                chosen(library, replace(call, rows=rows), limits)
                for rows in (8, 64, 128, 256, 4096, 1 << 16)
            ]
            assert order[:4] == ["vector"] * 4
            assert order[4:] == ["mma"] * 2
            assert chosen(library, replace(call, dx=True), limits) == "mma"
            assert chosen(library, replace(call, dx=True, dtype=FLOAT), limits) == "tiled"
            many = replace(call, rows=1 << 16)
            assert chosen(library, replace(many, dtype=FLOAT), limits) in ("vector", "tiled")
            assert chosen(library, replace(many, in_features=2050), limits) in ("vector", "tiled")
            invariant = replace(many, batch_invariant=True)
            assert chosen(library, invariant, limits) == "vector"
            for each in (call, many, invariant, replace(many, dx=True)):
                found, _ = _cuda_matmul._ranked(library, each, limits)
                names = tuple(way.path for way in found)
                assert names == ways.expected_paths(each, schedule.capability)
                assert all(way == _cuda_paths.Way(way.path) for way in found)


@pytest.mark.parametrize("way", ["wgmma", "gemm"])
def test_a_path_for_one_weight_is_refused(
    way: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QKERN_CUDA_PATH", way)
    inputs = inputs_of(FORWARD, Case((0, 40, 96), BFLOAT), (3, 4))
    hopper = backend.EmulatedTarget(library, replace(PLAIN, capability=90))
    with (
        hopper.activate(),
        pytest.raises(ValueError, match=f"got '{way}'; takes vector, mma, tiled"),
    ):
        FORWARD.run(inputs)


def product(rows: int, depth: int, experts_: int) -> Product:
    """A call of which only the numbers are looked at, before anything is read."""
    empty = torch.zeros(16, dtype=torch.uint8)
    weight = Weight(empty, torch.ones(1), None, None, None, "nf4", 64)
    x = torch.zeros(1, 8, dtype=BFLOAT)
    offsets = torch.zeros(1, dtype=torch.int32).expand(experts_)
    return Product(False, x, rows, depth, weight, 8, depth, None, x, False, offsets=offsets)


@pytest.mark.parametrize(
    ("call", "way", "message"),
    [
        (product(3, 96, 2), "wgmma", "takes vector, mma or tiled by experts"),
        (product(3, 1 << 17, 2), "mma", "a contraction that needs no split"),
        (product(3, 1 << 31, 2), "vector", "a contraction that needs no split"),
        (product(2**31 - 1, 96, 2), "tiled", "fewer than 2\\^31 rows"),
        (product(3, 96, 1 << 24), "tiled", "128 for each expert"),
    ],
)
def test_what_the_kernels_refuse(call: Product, way: str, message: str, library: ModuleType):
    hopper = backend.EmulatedTarget(library, replace(PLAIN, capability=90))
    with hopper.activate(), pytest.raises(RuntimeError, match=message):
        library.cuda_grouped_linear_4bit(*product_numbers(call), PATHS.index(way), None, 0)


def test_terms_too_many_for_a_sum_of_tensor_cores_go_elsewhere(library: ModuleType) -> None:
    call = Matmul(True, BFLOAT, 4096, 1 << 17, 64, experts=4)
    with backend.EmulatedTarget(library, PLAIN).activate():
        limits = _cuda_matmul.device_limits(library)
        assert chosen(library, call, limits) == "tiled"
        assert chosen(library, replace(call, out_features=1 << 16), limits) == "mma"
