"""The steps of a first run, in their order.

Numbers come before times, and times before tools that slow everything down. The optimizer comes
last, since managed memory can hang a GPU for whatever runs next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.cuda.first_run import build, counters, tools
from lab.cuda.first_run.steps import Step

_PACKAGE = "lab.cuda.first_run"
_MOST_PROCESSES = 8  # each has a CUDA context of half a gigabyte
_STALL, _STALL_TRITON = 30, 90  # seconds that one check may take; Triton compiles in its first
_TRITON_STRIDE, _TRITON_LARGEST = 40, 1 << 20
_SANITIZED_STRIDE, _SANITIZED_LARGEST = 11, 60_000
_DRY_STRIDE, _DRY_LARGEST = 97, 3000
_CLEARED = ("QKERN_BACKEND", "QKERN_CUDA_PATH", "QKERN_CPU_ISA", "QKERN_TRITON_TUNE")
_SANITIZER_FAULT = r"=+ (Invalid|Error|Warning: .*hazard|Race|Program hit|Address|Uninitialized)"
_NO_PROFILER = {
    counters.NO_PERMISSION: f"no permission to read counters ({counters.NO_PERMISSION}): root may",
    "LibraryNotLoaded": "the profiler finds no driver to ask",
}
_NO_SANITIZER = {"Device not supported": "compute-sanitizer takes no device of this machine"}


@dataclass(frozen=True)
class Folders:
    """Where results go, and what is only needed to make them."""

    out: Path
    work: Path

    @property
    def machine(self) -> Path:
        return self.out / "machine.json"

    @property
    def times(self) -> Path:
        return self.out / "times.json"

    @property
    def counters(self) -> Path:
        return self.out / "counters.csv"

    @property
    def steps(self) -> Path:
        return self.out / "steps.json"

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    @property
    def summary(self) -> Path:
        return self.out / "summary.md"

    @property
    def results(self) -> tuple[Path, ...]:
        """All files of a run; those of an older one are removed before."""
        trying = self.times.with_suffix(".trying")
        own = self.machine, self.times, trying, self.counters
        return *own, self.steps, self.log, self.summary


def processes(dry: bool) -> int:
    """How many run checks side by side."""
    cores = len(os.sched_getaffinity(0))
    return 1 if dry else max(1, min(_MOST_PROCESSES, cores // 2))


def environment(folders: Folders, dry: bool) -> dict[str, str]:
    """What all programs get: no choices of the caller's, and caches where one can write."""
    caches = folders.work / "cache"
    found = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "XDG_CACHE_HOME": str(caches),
    }
    home = os.environ.get("HOME", "")
    if not os.access(home, os.W_OK):
        (caches / "home").mkdir(parents=True, exist_ok=True)
        found["HOME"] = str(caches / "home")
    if not dry and (library := build.module(folders.work)):
        found["QKERN_NATIVE_LIBRARY"] = str(library)
    return found


def clear_choices() -> None:
    """Forget what would force a backend or a path."""
    for name in _CLEARED:
        os.environ.pop(name, None)


def _program(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"{_PACKAGE}.{name}", *map(str, arguments)]


def _sanitized(tool: str, *options: str) -> Step:
    program = tools.find("compute-sanitizer")
    command = [program or "", "--tool", tool, "--kernel-regex", "kns=qkern", *options]
    command += ["--error-exitcode", "9", *_program("checks", "table", "--shuffle")]
    command += ["--stride", str(_SANITIZED_STRIDE), "--largest", str(_SANITIZED_LARGEST)]
    return Step(
        tool,
        45,
        [command],
        needs=("build", "env"),
        absent="" if program else "compute-sanitizer is not found",
        # Else an access beyond a tensor falls into its neighbour in torch's pool.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        excuses=_NO_SANITIZER,
        faults=_SANITIZER_FAULT,
    )


def _of_time(folders: Folders, option: Sequence[str]) -> Step:
    # One process, and nothing else beside it; not deterministic, which makes cuBLAS slower.
    command = _program("shards", 1, 2 * _STALL, "times", *option, "--file", folders.times)
    return Step("times", 110, [command], needs=("build", "env"))


def _counted(folders: Folders) -> Step:
    ncu = tools.find("ncu")
    program = [ncu or "", folders.counters, *_program("launches")]
    return Step(
        "counters",
        45,
        [_program("counters", *program)],
        needs=("build", "env"),
        absent="" if ncu else "ncu is not found",
        excuses=_NO_PROFILER,
    )


def _optimizer() -> Step:
    # Without the tests' fixtures, which want packages that such a machine may lack.
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "tests/optim/test_gpu.py"]
    return Step(
        "optimizer",
        45,
        [[sys.executable, "-m", "pytest", *options]],
        needs=("machine", "env"),
        absent="" if tools.has("pytest") else "pytest is not installed",
        faults=r"(FAILED|ERROR) ",
    )


def steps(folders: Folders, dry: bool) -> list[Step]:
    """A dry run has the emulator in a GPU's place, tiny sizes, and what needs a GPU left out."""
    count = processes(dry)
    option = ["--dry"] if dry else []
    threads: Mapping[str, str] = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic, as poisoned outputs ask for
    }
    ready = ("build", "env")
    small = ["--stride", _DRY_STRIDE, "--largest", _DRY_LARGEST] if dry else []
    part = ["--stride", _TRITON_STRIDE, "--largest", _TRITON_LARGEST]

    def checked(name: str, seconds: float, shards: int, stall: float, *arguments: object) -> Step:
        command = _program("shards", shards, stall, name, *option, *arguments)
        return Step(name, seconds, [command], needs=ready, environment=threads)

    if dry:
        emulator = [sys.executable, "-m", "lab.cuda.emulator.build"]
        missing = "" if tools.compiler() else "no C++ compiler for the emulator (CXX names it)"
        made = Step("build", 300, [emulator], needs=("machine",), missing=missing)
    else:
        program = _program("build", folders.work, folders.machine)
        made = Step("build", 160, [program], needs=("machine",), missing=tools.lacking())
    no_gpu = "a dry run has no GPU for it" if dry else ""
    triton = Step(
        "triton",
        75,
        [_program("shards", count, _STALL_TRITON, "triton", *part)],
        needs=("machine",),
        absent="" if tools.has("triton") else "triton is not installed",
        left_out=no_gpu and "Triton's kernels need a GPU, or hours",
        environment=threads,
    )
    found = [
        Step("machine", 45, [_program("machine", folders.machine, *option)]),
        made,
        Step("env", 45, [_program("environment", *option)], needs=("build",)),
        checked("table", 110, count, _STALL, *small),
        checked("sizes", 60, max(1, count // 2), 2 * _STALL),
        checked("streams", 45, 1, _STALL),
        _of_time(folders, option),
    ]
    if dry:
        found.append(Step("launches", 45, [_program("launches", "--dry")], needs=ready))
        found += [Step(name, 0, left_out=no_gpu) for name in ("counters", "memcheck", "racecheck")]
    else:
        memcheck = _sanitized("memcheck", "--report-api-errors", "no")
        found += [_counted(folders), memcheck, _sanitized("racecheck")]
    return [*found, triton, _optimizer()]
