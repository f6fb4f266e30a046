"""Builds the server, a program with the CPU kernels, once per state of the code.

As a program: ``python -m lab.emulated_cpu.build FLAVOUR``. A build lies in ``build/FLAVOUR``; a
file beside it holds the hash of everything it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lab import ROOT

HERE = Path(__file__).resolve().parent

# CMakeLists.txt has the same; libgomp, which the kernels look up by name, is torch's part there.
_FLAGS = ("-std=c++17", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno")
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_INCLUDE = ("csrc/include", "csrc/binding")


@dataclass(frozen=True, slots=True)
class Flavour:
    """How the kernels of another processor are built and run here."""

    name: str
    """Of the backend, and of the folder under ``build/``."""
    compiler: str
    isas: tuple[str, ...]
    """Instruction sets that are compiled, slowest first."""
    flags: tuple[str, ...]
    stand_ins: tuple[str, ...] = ()
    """Instruction sets whose tables are those of plain C++, so that less is compiled."""
    include: Path | None = None
    """A folder of headers before the compiler's own."""
    emulator: str | None = None
    install: str = ""
    """What installs the compiler and the emulator."""

    def missing(self) -> str | None:
        """What this machine lacks, or None."""
        wanted = [p for p in (self.compiler, self.emulator) if p is not None]
        lacking = [program for program in wanted if shutil.which(program) is None]
        if lacking:
            return f"{' and '.join(lacking)} not found: {self.install}"
        if self.include is not None and not _runs_avx2():
            return "the twins of AVX-512 need a processor with AVX2"
        return None

    def sources(self, kernels: Path) -> list[Path]:
        """The files of ``kernels`` (csrc/cpu) that are compiled, and the server's."""
        compiled = {f"isa_{isa}" for isa in self.isas}
        files = sorted(kernels.glob("*.cpp"))
        chosen = [p for p in files if p.stem in compiled or not p.stem.startswith("isa_")]
        return [*chosen, HERE / "server.cpp", HERE / "stand_ins.cpp"]

    def command(self, kernels: Path) -> list[str]:
        """The compiler and its flags for every source."""
        have = [*self.isas, *self.stand_ins]
        return [
            *(self.compiler, *_FLAGS, *self.flags, *_WARNINGS),
            *(f"-DQKERN_HAVE_{isa.upper()}=1" for isa in have),
            *(f"-DQKERN_STAND_IN_{isa.upper()}=1" for isa in self.stand_ins),
            *([] if self.include is None else [f"-I{self.include}"]),
            *(f"-I{ROOT / folder}" for folder in _INCLUDE),
            f"-I{kernels}",
        ]


NEON = Flavour(
    "neon_emulated",
    "aarch64-linux-gnu-g++",
    ("scalar", "neon"),
    ("-O3",),
    emulator="qemu-aarch64",
    install="apt-get install g++-aarch64-linux-gnu qemu-user",
)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = Flavour(
    "avx512_emulated",
    "g++",
    ("scalar", "avx512", "avx512vnni", "avx512bf16", "amx"),
    # Registers of 512 bits are passed in memory, which the compiler mentions.
    ("-O1", *_AVX2, "-Wno-psabi", "-D__builtin_cpu_supports(name)=1"),
    stand_ins=("avx2",),
    include=HERE / "avx512",
    install="apt-get install g++",
)
BFLOAT16 = replace(
    AVX512,
    name="avx512bf16_emulated",
    isas=("scalar", "avx512bf16"),
    flags=("-O0", *AVX512.flags[1:]),  # compiles in seconds
    stand_ins=("avx2", "avx512", "avx512vnni"),
)
"""Only what this instruction set has of its own: quick to build."""
AMX = replace(BFLOAT16, name="amx_emulated", isas=("scalar", "amx"), flags=AVX512.flags)
"""The same of this one, optimised: its tiles are many lines of C++ each."""
FLAVOURS = {flavour.name: flavour for flavour in (NEON, AVX512, BFLOAT16, AMX)}


class BuildError(RuntimeError):
    """What the compiler said."""


def _runs_avx2() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        return False
    return {"avx2", "fma", "f16c"} <= flags


def _hash(flavour: Flavour, kernels: Path) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([flavour.compiler, "--version"], capture_output=True, check=True)
    digest.update(version.stdout + repr(flavour.command(kernels)).encode())
    folders = [kernels, *(ROOT / folder for folder in _INCLUDE), HERE]
    headers = {path for folder in folders for path in folder.rglob("*.h")}
    for path in [*sorted(headers), *flavour.sources(kernels)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _own_flags(source: Path) -> list[str]:
    """What the compiler defines itself where it is asked for the instructions."""
    with_vnni = {"isa_avx512vnni", "isa_avx512bf16", "isa_amx"}
    return ["-D__AVX512VNNI__=1"] if source.stem in with_vnni else []


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(
    flavour: Flavour,
    kernels: Path | None = None,
    into: Path | None = None,
    only: Collection[str] = (),
) -> Path:
    """The path of an up-to-date server; raises `BuildError`.

    ``kernels`` is built instead of csrc/cpu, ``into`` is the folder for it. Where ``only`` names
    files, the others are those of the flavour's own build.
    """
    if only:
        own = build(flavour).parent
    kernels = kernels or ROOT / "csrc" / "cpu"
    folder = into or ROOT / "build" / flavour.name
    folder.mkdir(parents=True, exist_ok=True)
    program, stamp = folder / "server", folder / "sources.sha256"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expected = _hash(flavour, kernels)
        if stamp.exists() and stamp.read_text() == expected:
            return program
        stamp.unlink(missing_ok=True)
        common = flavour.command(kernels)
        objects = {
            source: (own if only and source.name not in only else folder) / f"{source.stem}.o"
            for source in flavour.sources(kernels)
        }
        compilations = [
            [*common, *_own_flags(s), "-c", str(s), "-o", str(o)]
            for s, o in objects.items()
            if o.parent == folder
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compilations))
        link = [flavour.compiler, *flavour.flags, *map(str, objects.values()), "-o", str(program)]
        _run([*link, "-Wl,--no-as-needed", "-lgomp", "-ldl", "-lpthread"])
        stamp.write_text(expected)
    return program


def command(flavour: Flavour, program: Path) -> list[str]:
    """How the program is run here: an emulator finds its libraries beside the compiler's."""
    if flavour.emulator is None:
        return [str(program)]
    libc = subprocess.run(
        [flavour.compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return [flavour.emulator, "-L", str(Path(libc).resolve().parents[1]), str(program)]


if __name__ == "__main__":
    print(build(FLAVOURS[sys.argv[1]]))
