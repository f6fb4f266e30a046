"""The checks of the CUDA kernels notice bugs.

Each of `lab.cuda.mutants` is planted in a copy of csrc/cuda and must be caught by the check that it
names.

Quick tests plant a handful, slow ones all. A replacement that no longer applies is an error.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lab.cuda import judge, verdicts
from lab.cuda.emulator import build
from lab.cuda.mutants import MUTANTS
from lab.cuda.static import toolchain
from lab.mutants import Mutant, chosen, plant

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)


def caught_by(mutant: Mutant, folder: Path) -> str:
    kernels = plant(mutant, toolchain.KERNELS, folder)
    if mutant.caught_by == "code" and (reason := toolchain.missing()):
        pytest.skip(reason)
    return verdicts.caught_by(mutant, kernels, folder)


@pytest.mark.parametrize("mutant", chosen(MUTANTS, quick=True), ids=str)
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert caught_by(mutant, tmp_path) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutant", chosen(MUTANTS, quick=False), ids=str)
def test_every_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert caught_by(mutant, tmp_path) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(judge.CASES))
@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
def test_nothing_is_caught_where_nothing_is_planted(op: str, variant: str) -> None:
    if op == "huge_stride" and variant != "plain":
        pytest.skip("sanitizers have no room for the memory that it reserves")
    if op == "several_rounds" and variant != "plain":
        pytest.skip("takes many minutes under a sanitizer, and its accesses are those of the table")
    assert verdicts.run_cases(variant, build.build(variant), op) == "survived"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, toolchain.KERNELS, tmp_path)
    assert mutant.scope in judge.CASES
    assert all((toolchain.KERNELS / source).suffix == ".cu" for source in mutant.sources)


def test_every_kind_of_check_has_bugs_of_its_own() -> None:
    kinds = Counter(mutant.caught_by for mutant in MUTANTS)
    assert len(MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert kinds.keys() == {
        *("numbers", "launch", "schedule", "poison", "address", "thread", "layout", "code")
    }
