"""Dense products by experts on the emulated CUDA kernels, beyond the op table."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.cuda import experts
from lab.cuda.emulator import backend, build
from lab.cuda.experts import INTO, inputs_of
from qkern import reference, testing
from qkern.testing import DTYPES, OPS, Case, Inputs, Target

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
PLAIN = backend.SCHEDULES[0]
# One for each kernel: few columns or rows, and many.
shapes = pytest.mark.parametrize("shape", [experts.NARROW, experts.WIDE], ids=["narrow", "wide"])
own_results = pytest.mark.parametrize("own", [False, True], ids=["rows", "results"])


@pytest.fixture
def emulated(library: ModuleType) -> Target:
    return backend.EmulatedTarget(library, PLAIN)


def run(inputs: Inputs, target: Target) -> Tensor:
    with target.activate(), testing.poisoned_outputs():
        (out,) = INTO.run(inputs)
    return out


def test_wrong_offsets_touch_nothing_outside(emulated: Target) -> None:
    experts.check_wrong_offsets_into(emulated, experts.guarded)


@shapes
@own_results
def test_offsets_of_either_type_mean_the_same(
    shape: tuple[int, ...], own: bool, emulated: Target
) -> None:
    inputs = inputs_of(INTO, Case(shape, BFLOAT, mixed=True, own_results=own), (3, 0, 9), none=1)
    narrow = run(inputs | {"offsets": inputs["offsets"].int()}, emulated)
    wide = run(inputs | {"offsets": inputs["offsets"].long()}, emulated)
    testing.assert_bitwise(narrow, wide)


@shapes
@own_results
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_an_experts_bits_are_those_of_its_rows_alone(
    dtype: torch.dtype, own: bool, shape: tuple[int, ...], emulated: Target
) -> None:
    """However many rows come before and after."""
    inputs = inputs_of(INTO, Case(shape, dtype, own_results=own), (17, 0, 140, 2), none=3)
    whole = run(inputs, emulated)
    for expert, rows in enumerate(reference.groups(inputs["offsets"], len(inputs["a"]))):
        part = slice(expert, expert + 1)
        alone = inputs | {"a": inputs["a"][rows], "b": inputs["b"][rows if own else part]}
        alone |= {"out": inputs["out"][part if own else rows]}
        alone["offsets"] = torch.tensor([len(alone["a"])])
        found = run(alone, emulated)
        testing.assert_bitwise(found, whole[part if own else rows], f"expert {expert}")


@shapes
@own_results
@pytest.mark.parametrize("accumulate", [False, True])
def test_without_terms(
    shape: tuple[int, ...], own: bool, accumulate: bool, emulated: Target
) -> None:
    """Zeros whatever alpha is, or what was there to the last bit."""
    case = Case(shape, BFLOAT, own_results=own, accumulate=accumulate)
    inputs = inputs_of(INTO, case, (0, 0), none=3) | {"alpha": float("inf")}
    inputs["out"].fill_(-0.0)
    inputs["a"].fill_(float("nan"))
    found = run(inputs, emulated)
    testing.assert_bitwise(found, inputs["out"] if accumulate else torch.zeros_like(found))


@own_results
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("experts_", "rows", "k"), [(3, 0, 5), (3, 4, 0), (0, 4, 5)], ids=["rows", "terms", "experts"]
)
def test_empty_matrices(
    experts_: int, rows: int, k: int, accumulate: bool, own: bool, emulated: Target
) -> None:
    a, offsets = torch.ones(rows, k), torch.zeros(experts_, dtype=torch.int64)
    b = torch.ones(rows, 7) if own else torch.ones(experts_, k, 7)
    out = torch.full((experts_, k, 7) if own else (rows, 7), 2.0)
    inputs: Inputs = {"out": out, "a": a, "b": b, "offsets": offsets, "alpha": 1.0}
    found = run(inputs | {"accumulate": accumulate}, emulated)
    testing.assert_bitwise(found, out if accumulate else torch.zeros_like(out))


@own_results
@pytest.mark.parametrize(
    ("groups", "none"),
    [
        ((19,), 0),
        # As many experts as lanes of a warp, one more, and several for each lane.
        (tuple(i % 2 for i in range(32)), 1),
        (tuple(i % 3 == 1 for i in range(33)), 0),
        (tuple((i % 7 == 0) * (i % 5) for i in range(300)), 2),
        ((0,) * 299 + (70,), 0),
        ((17, 33, 17, 1), 1),  # the most tiles that there can be
    ],
    ids=lambda value: f"{len(value)}experts" if isinstance(value, tuple) else f"{value}none",
)
def test_experts_in_any_number(
    groups: Sequence[int], none: int, own: bool, emulated: Target
) -> None:
    inputs = inputs_of(INTO, Case((0, 5, 9), BFLOAT, mixed=True, own_results=own), groups, none)
    assert INTO.judge is not None
    INTO.judge(run(inputs, emulated), inputs)


@shapes
@own_results
def test_long_sums(shape: tuple[int, ...], own: bool, emulated: Target) -> None:
    """Their error does not grow with their length, as that of one chain of additions would."""
    terms = 40_000
    groups, width = ((terms,), shape[2]) if own else ((5,), terms)
    inputs = inputs_of(INTO, Case((0, shape[1], width), FLOAT, own_results=own), groups)
    inputs = inputs | {"a": inputs["a"].abs(), "b": inputs["b"].abs()}
    a, b = inputs["a"].double(), inputs["b"].double()
    exact = inputs["alpha"] * (a.mT @ b if own else a @ b[0])
    found = run(inputs, emulated).double().view(exact.shape)
    assert ((found - exact).abs() / exact).max() < 5e-6


@shapes
@own_results
def test_a_captured_call_follows_the_offsets(
    own: bool, shape: tuple[int, ...], library: ModuleType
) -> None:
    """A graph replays what was started: the same numbers, with whatever is in memory by then."""
    started: list[tuple[Any, ...]] = []

    class Recorded:
        """The library, with notes of what is started."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(library, name)
            if name != "cuda_grouped_matmul_into":
                return found

            def start(*arguments: Any) -> Any:
                started.append(arguments)
                return found(*arguments)

            return start

    recorded: Any = Recorded()
    inputs = inputs_of(INTO, Case(shape, BFLOAT, own_results=own), (3, 0, 9, 2), none=1)
    method = backend.backend(recorded).grouped_matmul_into
    order = [inputs[name] for name in ("a", "b", "offsets", "alpha", "accumulate")]
    out, expected = inputs["out"].clone(), inputs["out"].clone()
    with backend.EmulatedTarget(library, PLAIN).activate():
        method(out, *order)
        inputs["offsets"].copy_(torch.tensor([1, 8, 8, 13]))
        method(expected, *order)
        assert not torch.equal(out, expected)
        library.cuda_grouped_matmul_into(*started[0])
    testing.assert_bitwise(out, expected)


@own_results
@pytest.mark.parametrize("k", [0, 20])
def test_the_host_reads_no_offsets(
    k: int, own: bool, emulated: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(INTO, Case((0, 9, k), BFLOAT, own_results=own), (3, 0, 9), none=1)
    names = ("tolist", "item", "cpu", "numpy", "to", "__int__", "__index__", "__bool__", "max")
    with emulated.activate():
        for name in names:
            original = getattr(Tensor, name)

            def read(self: Tensor, *args: Any, original: Any = original, **others: Any) -> Any:
                assert not self.dtype.is_signed or self.dtype.is_floating_point, "reads integers"
                return original(self, *args, **others)

            monkeypatch.setattr(Tensor, name, read)
        (out,) = INTO.run(inputs)
        monkeypatch.undo()
    assert out.shape == inputs["out"].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
@pytest.mark.parametrize("name", ["grouped_linear_4bit_add", "grouped_linear_4bit_dx_add"])
def test_a_term_is_added_to_the_rounded_product(
    name: str, dtype: torch.dtype, emulated: Target
) -> None:
    spec = OPS[name]
    case = Case((0, 40, 96), dtype, double_quant=True, rank=5, batch_invariant=True)
    inputs = inputs_of(spec, case, (3, 0, 17), none=2)
    with emulated.activate(), testing.poisoned_outputs():
        (found,) = spec.run(inputs)
    testing.assert_bitwise(found, experts.in_two_steps(spec, inputs, emulated))
    if dtype is FLOAT:
        assert spec.judge is not None
        spec.judge(found, inputs, spec.exact_weight(inputs, case))


@pytest.mark.parametrize("own", [False, True])
def test_what_the_kernels_refuse(own: bool, library: ModuleType) -> None:
    """Before anything is read."""
    message = r"fewer than 2\^31 rows, with 64 for each expert"
    tensor = torch.zeros(1).data_ptr()
    # Many results have many tiles, and a long sum does not.
    for rows, k, count in ((2**31 - 1, 5, 2), (5, 5, 2**26), *([(5, 2**26, 2**12)] if own else [])):
        numbers = [tensor, 0, rows, 9, k, tensor, 0, k, 1, tensor, 0, 9, 1]
        with pytest.raises(RuntimeError, match=message):
            library.cuda_grouped_matmul_into(
                *(*numbers, 0, False, count, tensor, False, not own, 9, 0)
            )
