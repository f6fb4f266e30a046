"""The Triton kernels of the matmuls by experts: whose bits they have, which offsets they take."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.triton import semantics
from lab.triton.on_cpu import backend_for
from qkern import testing
from qkern.backends import triton
from qkern.testing import DTYPES, OPS, Case, OpSpec
from qkern.weight import Weight
from tests.ops.test_conformance import inputs_of, run

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if importlib.util.find_spec("ttsem") is None:
    pytest.skip("ttsem is not installed", allow_module_level=True)

CPU = torch.device("cpu")
TARGETS = [semantics.SemanticsTarget(device) for device in semantics.DEVICES]
SPECS = [OPS["grouped_linear_4bit"], OPS["grouped_linear_4bit_dx"]]
specs = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
one_target = pytest.mark.parametrize("on", TARGETS[:1], ids=["sm_90"])


def alone(spec: OpSpec, inputs: testing.Inputs, expert: int, rows: slice) -> testing.Inputs:
    """The inputs of the ungrouped op for one expert's rows."""
    outer = inputs["out_features" if spec.main == "x" else "in_features"]
    numel = outer * inputs[spec.main].shape[1]
    others = {name: value for name, value in inputs.items() if name != "offsets"}
    others |= {
        spec.main: inputs[spec.main][rows],
        "weight": inputs["weight"].of_expert(expert, numel),
    }
    if inputs.get("bias") is not None:
        others["bias"] = inputs["bias"][expert]
    return others


def depths() -> list[object]:
    """For every target and dtype a product in parts and one that is whole; a few are quick."""
    found = []
    for i, (on, dtype) in enumerate(itertools.product(TARGETS, DTYPES)):
        for depth in (1056, 99):
            quick = i % 4 == 0 and (depth == 99 or i < 8)
            name = f"{on.isa}-{testing.DTYPE_NAMES[dtype]}-{depth}"
            marks = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(on, dtype, depth, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("on", "dtype", "depth"), depths())
@specs
@semantics.in_own_process
def test_an_experts_bits_are_those_of_its_rows_alone(
    spec: OpSpec, on: semantics.SemanticsTarget, dtype: torch.dtype, depth: int
) -> None:
    from qkern.triton_kernels import launch

    groups = (17, 0, 2)
    shape = (20, 20, depth) if spec.main == "x" else (20, depth, 20)
    case = Case(shape, dtype, 32, batch_invariant=True, bias=True, groups=groups, double_quant=True)
    device = next(device for device in semantics.DEVICES if str(device) == on.isa)
    target = launch.Target(device.kind, device.arch, device.processors)
    config = launch.grouped(target, dtype, sum(groups), len(groups), 20, depth, True)
    assert (config.parts > 1) == (depth > 99)
    inputs = inputs_of(spec, case, CPU)
    (whole,) = run(spec, inputs, on)
    ungrouped = OPS[spec.name.removeprefix("grouped_")]
    begin = 0
    for expert, count in enumerate(groups):
        rows = slice(begin, begin + count)
        (expected,) = run(ungrouped, alone(spec, inputs, expert, rows), on)
        testing.assert_bitwise(whole[rows], expected, f"expert {expert}")
        begin += count
    testing.assert_bitwise(whole[begin:], torch.zeros_like(whole[begin:]))


CLAMPED = {
    # Offsets of seven rows, and what they count as.
    (5, 3, 6): (5, 5, 6),
    (7, 2, 0): (7, 7, 7),
    (-3, 2, -1): (0, 2, 2),
    (3, 9, 12): (3, 7, 7),
    (100_000, -100_000, 5): (7, 7, 7),
    (-(2**31), 4, 2**31 - 1): (0, 4, 7),
}
WIDE = {
    (2**40, 1, 2): (7, 7, 7),
    (-(2**63), 4, 2**63 - 1): (0, 4, 7),
    (2**32 + 1, 2**32 + 2, 2**32 + 3): (7, 7, 7),
}
"""Those of int64."""


@specs
@one_target
@semantics.in_own_process
def test_wrong_offsets_stay_inside_memory(spec: OpSpec, on: semantics.SemanticsTarget) -> None:
    """The emulator ends a launch that leaves its tensors; every row is written once."""
    for dtype, table in ((torch.int32, CLAMPED), (torch.int64, CLAMPED | WIDE)):
        for wrong, clamped in table.items():
            case = Case((7, 20, 64), bias=True, double_quant=True, groups=(0, 0, 7))
            inputs = inputs_of(spec, case, CPU)
            weight = spec.exact_weight(inputs, case)
            with testing.poisoned_outputs():
                (found,) = run(spec, inputs | {"offsets": torch.tensor(wrong, dtype=dtype)}, on)
            spec.judge(found, inputs | {"offsets": torch.tensor(clamped)}, weight)


@specs
@one_target
@semantics.in_own_process
def test_offsets_of_both_widths(spec: OpSpec, on: semantics.SemanticsTarget) -> None:
    inputs = inputs_of(spec, Case((21, 20, 64), groups=(3, 0, 17)), CPU)
    narrow, wide = (
        run(spec, inputs | {"offsets": inputs["offsets"].to(dtype)}, on)[0]
        for dtype in (torch.int32, torch.int64)
    )
    testing.assert_bitwise(narrow, wide)


FEW_AND_MANY = (
    Case((19, 20, 64), bias=True, groups=(19,)),
    Case((19, 20, 64), bias=True, groups=(18,)),
    Case((40, 20, 64), bias=True, groups=(0, 0, 40, 0, 0)),
    # Two chunks of experts and a part of one: rows at the ends of each, and two tiles across them.
    Case(
        (90, 5, 32),
        bias=True,
        double_quant=True,
        groups=tuple(
            {0: 1, 3: 2, 127: 20, 128: 3, 200: 1, 255: 4, 256: 35, 299: 5}.get(e, 0)
            for e in range(300)
        ),
    ),
    # Rows of no expert after the whole chunks that there are, and none of the first of them.
    Case((30, 5, 32), groups=(0,) * 128 + (3,) * 4 + (0,) * 124),
)


@pytest.mark.parametrize(
    "case", FEW_AND_MANY, ids=lambda case: f"{len(case.groups)}-{case.shape[0]}"
)
@specs
@one_target
@semantics.in_own_process
def test_few_and_many_experts(spec: OpSpec, case: Case, on: semantics.SemanticsTarget) -> None:
    testing.check(spec, case, on, CPU)


@specs
@one_target
@semantics.in_own_process
def test_no_rows(spec: OpSpec, on: semantics.SemanticsTarget) -> None:
    (found,) = run(spec, inputs_of(spec, Case((0, 20, 64), groups=(0, 0)), CPU), on)
    assert found.shape == (0, 20 if spec.main == "x" else 64)


def test_there_are_programs_for_every_tile_and_no_more() -> None:
    """For all ways to share a few rows among experts, and to leave some."""
    from qkern.triton_kernels import launch

    for experts, rows, block in itertools.product((1, 2, 3), range(1, 11), (1, 2, 4)):
        shares = itertools.product(range(rows + 1), repeat=experts)
        most = max(
            sum(-(-count // block) for count in (*counts, rows - sum(counts)))
            for counts in shares
            if sum(counts) <= rows
        )
        assert launch.most_tiles(rows, experts, block) == most


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", [spec.name for spec in SPECS])
def test_nothing_is_read_on_the_host(
    name: str, batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph can capture the call: it launches for tensors that have no values at all."""
    from triton.runtime.jit import JITFunction

    grids: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **_: grids.append(grid))
    module = backend_for("cuda", 90, 132)
    meta = torch.device("meta")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    experts, rows, n, k = 6, 50, 128, 1024
    blocks = experts * n * k // 64
    weight = Weight(
        *(empty(experts * n * k // 2, dtype=torch.uint8), empty(blocks, dtype=torch.uint8)),
        *(empty(blocks // 256), empty(experts), None, "nf4", 64),
    )
    offsets = empty(experts, dtype=torch.int32)
    with pytest.raises((NotImplementedError, RuntimeError)):
        offsets.tolist()
    inner, outer = (k, n) if name == "grouped_linear_4bit" else (n, k)
    result = getattr(module, name)(
        empty(rows, inner), weight, outer, offsets, batch_invariant=batch_invariant
    )
    assert result.shape == (rows, outer)
    assert len(grids) == 1
