"""Every CUDA op on the emulated kernels, by the op table: see tools/lab/cuda/emulator/README.md.

Quick tests take every third case, each under one of the schedules; slow ones the whole table, every
schedule, and the builds with sanitizers.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from lab.cuda import ways
from lab.cuda.emulator import backend, build
from lab.processes import environment
from qkern import backends, testing
from qkern.testing import OPS, Case, OpSpec
from tests.cuda import test_ways

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

QUICK_STRIDE = 3
TABLE = [
    (spec, case)
    for spec in OPS.values()
    if backends.has_kernel("cuda", spec.name)
    for case in spec.cases
]


def params(stride: int) -> list[object]:
    found = []
    for i, (spec, case) in enumerate(TABLE[::stride]):
        schedule = backend.SCHEDULES[i % len(backend.SCHEDULES)]
        name = f"{spec.name}-{backend.NAME}.{schedule}-{case}"
        found.append(pytest.param(spec, case, schedule, id=name))
    return found


@pytest.mark.parametrize(("spec", "case", "schedule"), params(QUICK_STRIDE))
def test_op(spec: OpSpec, case: Case, schedule: backend.Schedule, library: ModuleType) -> None:
    testing.check(spec, case, backend.EmulatedTarget(library, schedule), "cpu")


def run_table(variant: str, schedule: int, stride: int, largest: int, first: int = 0) -> None:
    """`run_table.py` on a build, in a process of its own that has the sanitizer's runtime."""
    variables = environment(**build.environment(variant), OMP_NUM_THREADS="1")
    command = build.command_prefix(variant)
    command += [sys.executable, "-m", "lab.cuda.emulator.run_table", str(build.build(variant))]
    command += [str(schedule), str(stride), str(largest), str(first)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env=variables
    )
    last = (done.stdout.splitlines() or ["(before the first case)"])[-1]
    assert done.returncode == 0, f"{variant}: {last}: {done.stderr}"
    assert last.endswith("cases")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5 * 1024 + 96, 9 * 1024])
def test_shares_of_a_contraction_do_not_follow_the_rows(
    dtype: torch.dtype, columns: int, library: ModuleType
) -> None:
    """So few rows of W that a block's warps share its columns, as many groups of them as fit."""
    spec = OPS["linear_4bit"]
    case = Case((9, 5, columns), dtype, double_quant=True)
    inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(1))
    with backend.EmulatedTarget(library, backend.SCHEDULES[0]).activate(), ways.forced("vector"):
        (whole,) = spec.run(inputs)
        for count in (1, 2, 3, 5, 8):
            (part,) = spec.run(spec.rows(inputs, slice(0, count)))
            testing.assert_bitwise(part, whole[:count], f"{count} rows")


@pytest.mark.parametrize("spec", [OPS["linear_4bit"], OPS["linear_4bit_dx"]], ids=lambda s: s.name)
def test_rows_by_hopper_do_not_depend_on_others_where_they_must_not(
    spec: OpSpec, library: ModuleType
) -> None:
    case = Case((140, 264, 1120), torch.bfloat16, double_quant=True, batch_invariant=True)
    inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(1))
    hopper = replace(backend.SCHEDULES[1], capability=90)
    with backend.EmulatedTarget(library, hopper).activate(), ways.forced("wgmma"):
        (whole,) = spec.run(inputs)
        for count in (1, 9, 129):
            (part,) = spec.run(spec.rows(inputs, slice(0, count)))
            testing.assert_bitwise(part, whole[:count], f"{count} rows")


def test_the_select_form_of_the_tables_decodes_the_same() -> None:
    """It exists for provers of race-freedom; what they prove must be what runs."""
    run_table("select", 0, 29, 70_000)


every_schedule = pytest.mark.parametrize(
    "schedule", range(len(backend.SCHEDULES)), ids=map(str, backend.SCHEDULES)
)


@pytest.mark.slow
@every_schedule
def test_whole_table(schedule: int) -> None:
    run_table("plain", schedule, 1, 1 << 30)


@pytest.mark.slow
@every_schedule
@pytest.mark.parametrize("variant", ["address", "thread", "select"])
def test_every_small_case_on_another_build(variant: str, schedule: int) -> None:
    """With a sanitizer, or the select form: the schedules share the cases out among them."""
    run_table(variant, schedule, len(backend.SCHEDULES), 70_000, first=schedule)


MATMULS = [(spec, case) for spec, case in TABLE if spec.comparison in ("matmul", "grouped")]


def hopper_ways(spec: OpSpec, case: Case) -> list[str]:
    """What only a device of compute capability 9.0 has; it must be given as the schedule's."""
    return [way for way in ways.ways_of(spec, case, 90) if way == "wgmma"]


def forced_params() -> list[object]:
    found = []
    for i, (spec, case) in enumerate(MATMULS):
        by_turns = backend.SCHEDULES[i % len(backend.SCHEDULES)]
        for way in (*ways.ways_of(spec, case, by_turns.capability), *hopper_ways(spec, case)):
            schedule = replace(by_turns, capability=90) if way == "wgmma" else by_turns
            quick = i % 23 == ways.WAYS.index(way) and case.numel <= 1 << 18
            marks = [] if quick else [pytest.mark.slow]
            name = f"{spec.name}-{way}-{schedule}-{case}"
            found.append(pytest.param(spec, case, way, schedule, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("spec", "case", "way", "schedule"), forced_params())
def test_matmul_by_a_forced_way(
    spec: OpSpec, case: Case, way: str, schedule: backend.Schedule, library: ModuleType
) -> None:
    with ways.forced(way):
        testing.check(spec, case, backend.EmulatedTarget(library, schedule), "cpu")


@pytest.mark.parametrize("spec", [OPS["linear_4bit"], OPS["linear_4bit_dx"]], ids=lambda s: s.name)
def test_the_devices_test_of_every_way(spec: OpSpec, library: ModuleType) -> None:
    """It runs as written, on the emulator in a device's place, and takes each way."""
    hopper = replace(backend.SCHEDULES[0], capability=90)
    target, taken = backend.EmulatedTarget(library, hopper), set()
    case = Case((9, 160, 192), torch.bfloat16, bias=spec.name == "linear_4bit")
    for way in test_ways.check_every_way(spec, case, target, 90, torch.device("cpu")):
        taken.add(way)
    assert taken == set(ways.WAYS) - ({"vector"} if spec.input_gradient else set())
