"""What notices a bug in a copy of csrc/cuda: the emulator under a judge, layouts, machine code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lab.cuda import judge
from lab.cuda.emulator import build
from lab.cuda.emulator.backend import SCHEDULES
from lab.cuda.static import figures, toolchain
from lab.mutants import Mutant, run_judge

ALL_SCHEDULES = (judge.ORDERLY, *(i for i in range(len(SCHEDULES)) if i != judge.ORDERLY))
SANITIZERS = {"address": "AddressSanitizer|runtime error:", "thread": "ThreadSanitizer: data race"}


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
        _shell(f"{compile_} -w", base)
        assert found in link
        link = link.replace(f" {found}", f" {changed}")
    _shell(link, base)


def _shell(command: str, folder: Path) -> None:
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def run_cases(
    variant: str, folder: Path, scope: str, schedules: tuple[int, ...] = ALL_SCHEDULES
) -> str:
    """What notices a bug in the module in ``folder``: a kind of check, or ``survived``."""
    command = [*build.command_prefix(variant), sys.executable, "-m", judge.__name__]
    command += [str(folder), scope, *map(str, schedules)]
    found, done = run_judge(command, **build.environment(variant))
    if variant in SANITIZERS and re.search(SANITIZERS[variant], done.stderr):
        return variant
    if found is None and done.returncode < 0:
        return "numbers"  # a crash
    if found is None:
        raise RuntimeError(f"{scope}: {done.stdout}{done.stderr}")
    return found


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


def caught_by(mutant: Mutant, kernels: Path, folder: Path) -> str:
    """What notices a bug in ``kernels``, looked at in the way in which it must be noticed."""
    if mutant.caught_by == "code":
        return machine_code(mutant, kernels)
    if mutant.caught_by == "layout":
        return layout(mutant, kernels, folder)
    variant = mutant.caught_by if mutant.caught_by in SANITIZERS else "plain"
    build_mutant(variant, mutant, kernels, folder)
    return run_cases(variant, folder, mutant.scope)
