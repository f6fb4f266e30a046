"""Builds the server, an AArch64 program with the CPU kernels, once per state of the code.

As a program: ``python -m lab.neon.build``. The build lies in ``build/neon_emulator``; a
file beside it holds the hash of everything it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import ROOT

HERE = Path(__file__).resolve().parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
INSTALL = "apt-get install g++-aarch64-linux-gnu qemu-user"

# CMakeLists.txt has the same; libgomp, which the kernels look up by name, is torch's part there.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
_ISAS = ("isa_scalar", "isa_neon")
_INCLUDE = ("csrc/include", "csrc/binding")


class BuildError(RuntimeError):
    """What the compiler said."""


def missing() -> str | None:
    """What this machine lacks, or None."""
    lacking = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]
    return f"{' and '.join(lacking)} not found: {INSTALL}" if lacking else None


def sources(kernels: Path) -> list[Path]:
    """The files of `kernels` (csrc/cpu) that are compiled for AArch64, and the server."""
    files = sorted(kernels.glob("*.cpp"))
    compiled = [p for p in files if p.stem in _ISAS or not p.stem.startswith("isa_")]
    return [*compiled, HERE / "server.cpp"]


def _hash(kernels: Path) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest.update(version + repr((FLAGS, WARNINGS, str(kernels))).encode())
    headers = [*kernels.glob("*.h"), *(p for f in _INCLUDE for p in (ROOT / f).rglob("*.h"))]
    for path in sorted(headers) + sources(kernels):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(kernels: Path | None = None, into: Path | None = None) -> Path:
    """The path of an up-to-date server; raises `BuildError`.

    ``kernels`` is built instead of csrc/cpu, ``into`` is the folder for it.
    """
    kernels = kernels or ROOT / "csrc" / "cpu"
    folder = into or ROOT / "build" / "neon_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    program, stamp = folder / "server", folder / "sources.sha256"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expected = _hash(kernels)
        if stamp.exists() and stamp.read_text() == expected:
            return program
        stamp.unlink(missing_ok=True)
        common = [COMPILER, *FLAGS, *WARNINGS, "-DQKERN_HAVE_NEON=1"]
        common += [*(f"-I{ROOT / folder}" for folder in _INCLUDE), f"-I{kernels}"]
        objects = {source: folder / f"{source.stem}.o" for source in sources(kernels)}
        compilations = [[*common, "-c", str(s), "-o", str(o)] for s, o in objects.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compilations))
        link = [COMPILER, *map(str, objects.values()), "-o", str(program)]
        _run([*link, "-Wl,--no-as-needed", "-lgomp", "-ldl", "-lpthread"])
        stamp.write_text(expected)
    return program


def command(program: Path) -> list[str]:
    """How the program is run here: the emulator finds AArch64's libraries beside the compiler's."""
    libc = subprocess.run(
        [COMPILER, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return [EMULATOR, "-L", str(Path(libc).resolve().parents[1]), str(program)]


if __name__ == "__main__":
    print(build())
