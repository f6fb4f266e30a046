"""Every CUDA op on the emulated kernels, by the op table: see cuda_emulator/README.md.

Quick tests take every third case, each under one of the schedules; slow ones the whole table, every
schedule, and the builds with sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cuda_emulator import backend, build

from qkern import testing
from qkern.testing import OPS, Case, OpSpec

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

QUICK_STRIDE = 3
TABLE = [(spec, case) for spec in OPS.values() for case in spec.cases]


@pytest.fixture(scope="session")
def library() -> ModuleType:
    """The module of the plain build."""
    return build.load(build.build("plain"))


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


def run_table(variant: str, schedule: int, stride: int, largest: int) -> None:
    """`run_table.py` on a build, in a process of its own that has the sanitizer's runtime."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | build.environment(variant)
    command = build.command_prefix(variant)
    command += [sys.executable, str(build.HERE / "run_table.py"), str(build.build(variant))]
    command += [str(schedule), str(stride), str(largest)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env=environment
    )
    last = (done.stdout.splitlines() or ["(before the first case)"])[-1]
    assert done.returncode == 0, f"{variant}: {last}: {done.stderr}"
    assert last.endswith("cases")


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
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_table_under_a_sanitizer(variant: str, schedule: int) -> None:
    # Strides without a common factor: the schedules share the table out.
    run_table(variant, schedule, (19, 23, 29, 31, 37, 41, 43)[schedule], 70_000)
