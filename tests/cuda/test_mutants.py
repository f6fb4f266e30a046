"""The checks of the CUDA kernels notice bugs.

Each of `lab.cuda.mutants` is planted in a copy of csrc/cuda and must be caught by the check that it
names.

Quick tests plant a handful, slow ones all. A replacement that no longer applies is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab.cuda import judge
from lab.cuda.emulator import build
from lab.cuda.emulator.backend import SCHEDULES
from lab.cuda.mutants import MUTANTS, Mutant
from lab.cuda.static import figures, toolchain
from lab.processes import environment

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

ALL_SCHEDULES = (judge.ORDERLY, *(i for i in range(len(SCHEDULES)) if i != judge.ORDERLY))
SANITIZERS = {"address": "AddressSanitizer|runtime error:", "thread": "ThreadSanitizer: data race"}


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc/cuda with the bug in it."""
    kernels = folder / "cuda"
    shutil.copytree(toolchain.KERNELS, kernels)
    file = kernels / mutant.file
    text = file.read_text()
    count = text.count(mutant.old)
    assert count == 1, f"{mutant.name}: what it replaces occurs {count} times in {mutant.file}"
    file.write_text(text.replace(mutant.old, mutant.new))
    return kernels


def build_mutant(variant: str, mutant: Mutant, kernels: Path, folder: Path) -> None:
    """The emulated module with the files of the bug compiled anew, the others as they are."""
    base = build.build(variant)
    commands = build.commands(base)
    module = next(base.glob("_cuda_emulated*.so"))
    link = next(c for c in commands if f"-o {module.name}" in c)
    link = re.sub(r"^: && (.*) && :$", r"\1", link).replace(
        f"-o {module.name}", f"-o {folder / module.name}"
    )
    for source in mutant.sources:
        original = toolchain.KERNELS / source
        (compile_,) = (c for c in commands if c.endswith(f"-c {original}"))
        (found,) = re.findall(r" -o (\S+)", compile_)
        changed = folder / f"{source}.o"
        compile_ = re.sub(r" -M[DTF]( \S+\.o(\.d)?)?", "", compile_)
        compile_ = compile_.replace(f" -o {found}", f" -o {changed}")
        compile_ = compile_.replace(str(toolchain.KERNELS), str(kernels))
        # A bug may leave a variable unused.
        shell(f"{compile_} -w", base)
        assert found in link
        link = link.replace(f" {found}", f" {changed}")
    shell(link, base)


def shell(command: str, folder: Path) -> None:
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def run_cases(variant: str, folder: Path, op: str, schedules: tuple[int, ...]) -> str:
    """What noticed the bug: a name of `mutants`, or ``survived``."""
    done = subprocess.run(
        [*build.command_prefix(variant), sys.executable, "-m", judge.__name__, str(folder), op]
        + [str(index) for index in schedules],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment(**build.environment(variant), OMP_NUM_THREADS="1"),
    )
    if variant in SANITIZERS and re.search(SANITIZERS[variant], done.stderr):
        return variant
    if done.returncode == judge.CAUGHT:
        return done.stdout.split("caught by ")[1].split(":")[0]
    if done.returncode == 0 and done.stdout.endswith("survived\n"):
        return "survived"
    if done.returncode < 0:
        return "numbers"  # a crash
    raise RuntimeError(f"{op}: {done.stdout}{done.stderr}")


def machine_code(mutant: Mutant, kernels: Path) -> str:
    """``code`` if a bug shows in the machine code of sm_80."""
    for source in mutant.sources:
        for kernel, found in figures.file_figures(kernels / source, 80).items():
            narrow = found.hot is not None and not (
                found.hot.accesses.get("LDG.128") or found.hot.accesses.get("LDGSTS.128")
            )
            if found.local_accesses or (narrow and ", false>" not in kernel):
                return "code"
    return "survived"


def layout(mutant: Mutant, kernels: Path, folder: Path) -> str:
    """``layout`` if the bug makes accesses to shared memory conflict."""
    done = build.run_layouts(Path(mutant.file).stem, kernels, folder)
    assert "conflict-free" in done.stdout
    return "layout" if done.returncode else "survived"


def caught_by(mutant: Mutant, folder: Path) -> str:
    kernels = plant(mutant, folder)
    if mutant.caught_by == "code":
        if reason := toolchain.missing():
            pytest.skip(reason)
        return machine_code(mutant, kernels)
    if mutant.caught_by == "layout":
        return layout(mutant, kernels, folder)
    variant = mutant.caught_by if mutant.caught_by in SANITIZERS else "plain"
    build_mutant(variant, mutant, kernels, folder)
    return run_cases(variant, folder, mutant.op, ALL_SCHEDULES)


def params(quick: bool) -> list[object]:
    chosen = [mutant for mutant in MUTANTS if mutant.quick == quick]
    return [pytest.param(mutant, id=f"{mutant.name}-{mutant.caught_by}") for mutant in chosen]


@pytest.mark.parametrize("mutant", params(quick=True))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    assert caught_by(mutant, tmp_path) == mutant.caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutant", params(quick=False))
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
    assert run_cases(variant, build.build(variant), op, ALL_SCHEDULES) == "survived"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    assert mutant.op in judge.CASES
    assert all((toolchain.KERNELS / source).suffix == ".cu" for source in mutant.sources)


def test_every_kind_of_check_has_bugs_of_its_own() -> None:
    kinds = Counter(mutant.caught_by for mutant in MUTANTS)
    assert len(MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert kinds.keys() == {
        *("numbers", "launch", "schedule", "poison", "address", "thread", "layout", "code")
    }
