"""The checks of the Triton kernels notice bugs: each of `mutants` by the one that it names.

Quick tests plant a handful, slow ones all. A replacement that no longer applies is an error.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab import ROOT
from lab.cuda.static import toolchain
from lab.processes import environment
from lab.triton.mutants import MUTANTS, Mutant
from qkern.backends import triton

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if importlib.util.find_spec("ttsem") is None or toolchain.disassembler_folder() is None:
    pytest.skip("ttsem or NVIDIA's disassemblers are not installed", allow_module_level=True)

KERNELS = ROOT / "triton_kernels"


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of triton_kernels with the bug in it."""
    kernels = folder / "triton_kernels"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    file = kernels / mutant.file
    text = file.read_text()
    count = text.count(mutant.old)
    assert count == 1, f"{mutant.name}: what it replaces occurs {count} times in {mutant.file}"
    file.write_text(text.replace(mutant.old, mutant.new))
    return kernels


def verdict(kernels: Path, scope: str) -> str:
    """What noticed a bug in a copy of the kernels, or ``survived``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lab.triton.judge", str(kernels), *scope.split()],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment(OMP_NUM_THREADS="1"),
    )
    if done.returncode == 3:
        return done.stdout.split("caught by ")[1].split(":")[0]
    if done.returncode == 0 and done.stdout.endswith("survived\n"):
        return "survived"
    raise RuntimeError(f"{scope}: {done.stdout}{done.stderr}")


def params(quick: bool) -> list[object]:
    chosen = [mutant for mutant in MUTANTS if mutant.quick == quick]
    return [pytest.param(mutant, id=f"{mutant.name}-{mutant.caught_by}") for mutant in chosen]


@pytest.mark.parametrize("mutant", params(quick=True))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert verdict(plant(mutant, tmp_path), mutant.scope) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutant", params(quick=False))
def test_every_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert verdict(plant(mutant, tmp_path), mutant.scope) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("scope", sorted({mutant.scope for mutant in MUTANTS}))
def test_nothing_is_caught_where_nothing_is_planted(scope: str) -> None:
    assert verdict(KERNELS, scope) == "survived"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)


def test_every_kind_of_check_has_bugs_of_its_own() -> None:
    kinds = Counter(mutant.caught_by for mutant in MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert kinds.keys() == {
        *("numbers", "bounds", "race", "undefined", "rounding", "offsets", "figures")
    }
