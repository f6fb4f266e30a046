"""Builds the emulated CUDA kernels and the emulator's test program, once per state of the code.

As a program: ``python -m lab.cuda.emulator.build [VARIANT ...]``. A build lies in
``build/cuda_emulator/<variant>``; a file beside it holds the hash of everything it was made from.

Variants:
    plain      no instrumentation
    select     plain, with the select form of the tables (`QKERN_CODEC_SELECT`)
    address    AddressSanitizer and UndefinedBehaviorSanitizer
    thread     ThreadSanitizer; every CUDA thread is one of its threads
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from lab import ROOT

HERE = Path(__file__).resolve().parent
VARIANTS = ("plain", "select", "address", "thread")
_SOURCES = ("tools/lab/cuda/emulator", "csrc/cuda", "csrc/include", "csrc/binding")
_SUFFIXES = (".cu", ".cuh", ".h", ".cpp", ".txt")


class BuildError(RuntimeError):
    """What the compiler said."""


def compiler() -> str | None:
    """The C++ compiler: ``CXX`` or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def _hash(variant: str, kernels: Path) -> str:
    digest = hashlib.sha256()
    digest.update(f"{variant} {sys.version} {_version(compiler() or 'g++')}".encode())
    folders = [ROOT / folder for folder in _SOURCES] + [kernels]
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in _SUFFIXES):
        digest.update(str(path).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tool(name: str) -> str:
    """A program of this Python environment, or of the system."""
    own = Path(sysconfig.get_path("scripts")) / name
    return str(own) if own.exists() else name


def build(variant: str = "plain", kernels: Path | None = None, into: Path | None = None) -> Path:
    """The folder of an up-to-date build of ``variant``; raises `BuildError`.

    ``kernels`` is built instead of csrc/cuda, ``into`` is the folder for it.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; takes one of {', '.join(VARIANTS)}")
    kernels = kernels or ROOT / "csrc" / "cuda"
    folder = into or ROOT / "build" / "cuda_emulator" / variant
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "sources.sha256"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expected = _hash(variant, kernels)
        if stamp.exists() and stamp.read_text() == expected:
            return folder
        configure = [
            *(_tool("cmake"), "-G", "Ninja", "-S", str(HERE), "-B", str(folder)),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which(_tool('ninja'))}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DQKERN_EMULATOR_VARIANT={variant}",
            f"-DQKERN_CUDA_DIR={kernels}",
        ]
        for command in (configure, [_tool("cmake"), "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        stamp.write_text(expected)
    return folder


def commands(folder: Path) -> list[str]:
    """The commands that made a build, to be run in its folder."""
    done = subprocess.run(
        [_tool("ninja"), "-C", str(folder), "-t", "commands"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def environment(variant: str) -> dict[str, str]:
    """What a Python that loads a build with a sanitizer needs in its environment."""
    libraries = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
    paths = [
        subprocess.run(
            [compiler() or "g++", f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in libraries.get(variant, ())
    ]
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        # Only what the kernels do is of interest, not torch's threads.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def command_prefix(variant: str) -> list[str]:
    """What goes before a program: ThreadSanitizer wants the address space it was made for."""
    return ["setarch", "-R"] if variant == "thread" else []


def run_layouts(kernel: str, kernels: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Builds and runs the program of ``lab/cuda/layouts`` for a kernel file of ``kernels``."""
    layouts = HERE.parent / "layouts"
    program = folder / f"layouts_{kernel}"
    include = [layouts, HERE / "include", kernels, ROOT / "csrc" / "include"]
    command = [compiler() or "g++", "-std=c++17", "-w", "-DQKERN_CUDA_EMULATED=1"]
    command += ["-fno-strict-aliasing", *(f"-I{path}" for path in include), "-o", str(program)]
    command += ["-x", "c++", str(layouts / f"{kernel}.cpp")]
    # The launchers in the file call functions of the others.
    base = build("plain")
    others = [p for p in base.rglob("*.cu.o") if p.name != f"{kernel}.cu.o"]
    command += ["-x", "none", *map(str, others), str(base / "libcuda_emulator.a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    return subprocess.run([program], capture_output=True, text=True, timeout=600, check=False)


def load(folder: Path) -> ModuleType:
    """The module ``_cuda_emulated`` of a build."""
    path = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS[:1]:
        print(build(name))
