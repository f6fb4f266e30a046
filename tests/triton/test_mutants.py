"""The checks of the Triton kernels notice bugs: each of `mutants` by the one that it names.

Quick tests plant a handful, slow ones all. A replacement that no longer applies is an error.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab import ROOT
from lab.cuda.static import toolchain
from lab.mutants import Mutant, chosen, plant, run_judge
from lab.triton.mutants import MUTANTS
from qkern.backends import triton

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if importlib.util.find_spec("ttsem") is None or toolchain.disassembler_folder() is None:
    pytest.skip("ttsem or NVIDIA's disassemblers are not installed", allow_module_level=True)

KERNELS = ROOT / "triton_kernels"


def verdict(kernels: Path, scope: str) -> str:
    """What noticed a bug in a copy of the kernels, or ``survived``."""
    command = [sys.executable, "-W", "ignore", "-m", "lab.triton.judge", str(kernels)]
    found, done = run_judge([*command, *scope.split()])
    if found is None:
        raise RuntimeError(f"{scope}: {done.stdout}{done.stderr}")
    return found


@pytest.mark.parametrize("mutant", chosen(MUTANTS, quick=True), ids=str)
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert verdict(plant(mutant, KERNELS, tmp_path), mutant.scope) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutant", chosen(MUTANTS, quick=False), ids=str)
def test_every_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert verdict(plant(mutant, KERNELS, tmp_path), mutant.scope) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("scope", sorted({mutant.scope for mutant in MUTANTS}))
def test_nothing_is_caught_where_nothing_is_planted(scope: str) -> None:
    assert verdict(KERNELS, scope) == "survived"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, KERNELS, tmp_path)


def test_every_kind_of_check_has_bugs_of_its_own() -> None:
    kinds = Counter(mutant.caught_by for mutant in MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert kinds.keys() == {
        *("numbers", "bounds", "race", "undefined", "rounding", "offsets", "figures")
    }
