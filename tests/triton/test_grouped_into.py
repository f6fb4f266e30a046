"""The Triton kernel of the dense products by experts: which rows and offsets it takes, its bits."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.cuda import experts
from lab.triton import semantics
from lab.triton.on_cpu import backend_for
from qkern import reference, testing
from qkern.backends import triton
from qkern.testing import DTYPES, OPS, Case
from tests.ops.test_conformance import inputs_of, run

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if importlib.util.find_spec("ttsem") is None:
    pytest.skip("ttsem is not installed", allow_module_level=True)

CPU = torch.device("cpu")
INTO = OPS["grouped_matmul_into"]
TARGETS = [semantics.SemanticsTarget(device) for device in semantics.DEVICES]
one_target = pytest.mark.parametrize("on", TARGETS[:1], ids=["sm_90"])
# A tile with few columns, or few rows, and a whole one.
shapes = pytest.mark.parametrize("shape", [experts.NARROW, experts.WIDE], ids=["narrow", "wide"])
own_results = pytest.mark.parametrize("own", [False, True], ids=["rows", "results"])


@one_target
@semantics.in_own_process
def test_wrong_offsets_stay_inside_memory(on: semantics.SemanticsTarget) -> None:
    """The emulator ends a launch that leaves its tensors; every result is written once."""
    experts.check_wrong_offsets_into(on)


@own_results
@one_target
@semantics.in_own_process
def test_offsets_of_both_widths(own: bool, on: semantics.SemanticsTarget) -> None:
    inputs = experts.inputs_of(INTO, Case((0, 20, 40), own_results=own), (3, 0, 17), none=1)
    narrow, wide = (
        run(INTO, inputs | {"offsets": inputs["offsets"].to(dtype)}, on)[0]
        for dtype in (torch.int32, torch.int64)
    )
    testing.assert_bitwise(narrow, wide)


@shapes
@own_results
@one_target
@semantics.in_own_process
def test_an_experts_bits_are_those_of_its_rows_alone(
    own: bool, shape: tuple[int, ...], on: semantics.SemanticsTarget
) -> None:
    inputs = experts.inputs_of(INTO, Case(shape, torch.bfloat16, own_results=own), (17, 0, 40, 2))
    (whole,) = run(INTO, inputs, on)
    for expert, rows in enumerate(reference.groups(inputs["offsets"], 59)):
        part = slice(expert, expert + 1)
        alone = inputs | {"a": inputs["a"][rows], "b": inputs["b"][rows if own else part]}
        alone |= {"out": inputs["out"][part if own else rows]}
        alone["offsets"] = torch.tensor([len(alone["a"])])
        (found,) = run(INTO, alone, on)
        testing.assert_bitwise(found, whole[part if own else rows], f"expert {expert}")


@own_results
@pytest.mark.parametrize("accumulate", [False, True])
@one_target
@semantics.in_own_process
def test_without_terms(own: bool, accumulate: bool, on: semantics.SemanticsTarget) -> None:
    """Zeros whatever alpha is, or what was there to the last bit."""
    case = Case((0, 9, 20), own_results=own, accumulate=accumulate)
    inputs = experts.inputs_of(INTO, case, (0, 0), none=3) | {"alpha": float("inf")}
    inputs["out"].fill_(-0.0)
    (found,) = run(INTO, inputs, on)
    testing.assert_bitwise(found, inputs["out"] if accumulate else torch.zeros_like(found))


@pytest.mark.parametrize("groups", [(19,), (18,), (0,) * 128 + (3,) * 4 + (0,) * 124])
@own_results
@one_target
@semantics.in_own_process
def test_few_and_many_experts(
    own: bool, groups: tuple[int, ...], on: semantics.SemanticsTarget
) -> None:
    testing.check(INTO, Case((19, 5, 7), own_results=own, groups=groups), on, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
@pytest.mark.parametrize("name", ["grouped_linear_4bit_add", "grouped_linear_4bit_dx_add"])
@one_target
@semantics.in_own_process
def test_a_term_is_added_to_the_rounded_product(
    name: str, dtype: torch.dtype, on: semantics.SemanticsTarget
) -> None:
    spec = OPS[name]
    case = Case((21, 20, 64), dtype, rank=5, groups=(3, 0, 17), batch_invariant=True)
    inputs = inputs_of(spec, case, CPU)
    (found,) = run(spec, inputs, on)
    testing.assert_bitwise(found, experts.in_two_steps(spec, inputs, on))


@pytest.mark.parametrize(
    ("k", "n", "own"), [*itertools.product((0, 40), (16, 4096), (False, True))]
)
def test_nothing_is_read_on_the_host(
    k: int, n: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph can capture the call: it launches for tensors that have no values at all."""
    from triton.runtime.jit import JITFunction

    grids: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **_: grids.append(grid))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    experts, rows = 6, 50
    offsets = empty(experts, dtype=torch.int32)
    of_b, of_out = ((rows, n), (experts, k, n)) if own else ((experts, k, n), (rows, n))
    backend = backend_for("cuda", 90, 132)
    for accumulate in (False, True):
        backend.grouped_matmul_into(
            *(empty(*of_out), empty(rows, k), empty(*of_b), offsets), 0.5, accumulate
        )
    assert len(grids) == (2 if k else 0)
