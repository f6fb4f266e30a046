"""Builds ``qkern._C`` for the GPUs of this machine: no venv, no setuptools, one instruction set.

``python -m lab.cuda.first_run.build FOLDER MACHINE``: into a folder, by what `machine` wrote to a
file. A build that is there is brought up to date, unless it was configured otherwise.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lab.cuda.first_run import tools
from lab.cuda.first_run.steps import FAILURE

_ERROR = re.compile(r"\berror\b|fatal|CMake Error", re.IGNORECASE)
_CONTEXT = 2  # lines after one of CMake's, which says what is wrong in the next
_MOST = 3


def module_folder(folder: Path) -> Path:
    """Where the module of a build lies, and nothing else."""
    return folder / "module"


def module(folder: Path) -> Path | None:
    """The module of a build; None where there is none."""
    return next(iter(sorted(module_folder(folder).glob("_C*.so"))), None)


def architectures(machine: Path) -> str:
    """The compute capabilities of the machine's devices, as CMake takes them."""
    found = json.loads(machine.read_text(encoding="utf-8"))["devices"]
    numbers = {10 * d["capability"][0] + d["capability"][1] for d in found}
    return ";".join(str(number) for number in sorted(numbers))


def configuration(folder: Path, archs: str, isas: str) -> list[str]:
    """CMake's arguments."""
    arguments = ["-S", str(tools.ROOT), "-B", str(folder)]
    if ninja := tools.find("ninja"):
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [
        *arguments,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
        f"-DQKERN_OUTPUT_DIR={module_folder(folder)}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DQKERN_CUDA=ON",
        f"-DQKERN_CUDA_ARCHS={archs}",
        f"-DQKERN_CPU_ISAS={isas}",
    ]


def _run(command: list[str], variables: dict[str, str]) -> bool:
    """Whether it succeeded; its output is printed, and after a failure its errors once more."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=variables,
    ) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode == 0:
        return True
    for line in errors(lines) or [f"{Path(command[0]).name}: exit status {process.returncode}"]:
        print(f"{FAILURE}{line}")
    return False


def errors(lines: list[str]) -> list[str]:
    """The first errors in a build's output; those of CMake with what it says of them."""
    found = []
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            after = lines[number + 1 : number + 1 + _CONTEXT] if "CMake Error" in line else []
            found.append(" ".join(part for part in (line, *after) if part))
    return found[:_MOST]


def main(folder: Path, machine: Path) -> int:
    """The exit status."""
    cmake = tools.find("cmake")
    assert cmake is not None, "the plan does not build without CMake"
    variables = dict(os.environ)
    if nvcc := tools.nvcc():
        variables["CUDACXX"] = nvcc
    isas = os.environ.get("QKERN_CPU_ISAS", "scalar")
    configure = configuration(folder, architectures(machine), isas)
    stamp = folder / "configured-with.txt"
    description = "\n".join([cmake, variables.get("CUDACXX", ""), *configure])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != description:
        shutil.rmtree(folder, ignore_errors=True)
        if not _run([cmake, *configure], variables):
            return 1
        stamp.write_text(description, encoding="utf-8")
    jobs = str(len(os.sched_getaffinity(0)))
    if not _run([cmake, "--build", str(folder), "--parallel", jobs], variables):
        return 1
    print(module(folder))
    print(f"built for {architectures(machine)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
