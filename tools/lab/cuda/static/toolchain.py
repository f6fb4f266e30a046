"""Compiles the kernels for one architecture at a time, and finds NVIDIA's disassemblers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import ROOT
from lab.kept import kept

KERNELS = ROOT / "csrc" / "cuda"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "--fmad=false")
"""As in CMakeLists.txt."""


def sources(architecture: int, kernels: Path = KERNELS) -> list[Path]:
    """The kernel files that are compiled for an architecture."""
    found = sorted(kernels.glob("*.cu"))
    return [path for path in found if architecture == 90 or not _is_hoppers(path)]


def _is_hoppers(source: Path) -> bool:
    """Whether a file is for sm_90a and nothing else, as CMakeLists.txt has it."""
    return source.stem.endswith("_wgmma")


class ToolError(RuntimeError):
    """What a tool said."""


def nvcc() -> str | None:
    """Path of nvcc: ``CUDACXX`` or the one on PATH; None where there is none."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


@functools.cache
def disassembler_folder() -> Path | None:
    """Where cuobjdump and nvdisasm are: their pip packages, or PATH; None where they are not."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    for root in roots:
        for folder in sorted(Path(root).glob("cu*/bin"), reverse=True):
            if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
                return folder
    found = shutil.which("cuobjdump")
    return Path(found).parent if found and shutil.which("nvdisasm") else None


def missing() -> str | None:
    """Why kernels cannot be examined here; None where they can."""
    if nvcc() is None:
        return "nvcc not found"
    if disassembler_folder() is None:
        return "cuobjdump and nvdisasm not found (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)"
    return None


def run(command: Sequence[str | Path]) -> str:
    """Standard output of a command; raises `ToolError` with all that it said if it failed."""
    folder = disassembler_folder()
    path = os.environ["PATH"] if folder is None else f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )
    if done.returncode:
        raise ToolError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def _version(compiler: str) -> str:
    return run([compiler, "--version"])


def compile_kernels(
    source: Path, architecture: int, kind: str = "cubin", defines: Sequence[str] = ()
) -> Path:
    """A ``cubin`` or ``ptx`` of one kernel file, made once per state of the code; `ToolError`."""
    compiler = nvcc()
    if compiler is None:
        raise ToolError("nvcc not found")
    target = f"{'sm' if kind == 'cubin' else 'compute'}_{architecture}"
    target += "a" if _is_hoppers(source) else ""
    flags = [*FLAGS, *(f"-D{name}" for name in defines)]
    digest = hashlib.sha256(f"{_version(compiler)} {target} {flags}".encode())
    headers = [*source.parent.glob("*.cuh"), *source.parent.glob("*.h")]
    headers += (ROOT / "csrc" / "include").rglob("*.h")
    for path in [*sorted(headers), source]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    name = f"{source.stem}.sm_{architecture}.{digest.hexdigest()[:16]}"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    command = [compiler, *flags, include, f"-arch={target}", f"-{kind}"]
    return kept(
        ROOT / "build" / "cuda_static" / f"{name}.{kind}",
        lambda partial: run([*command, "-o", partial, source]),
    )


def extract(library: Path, architecture: int, into: Path) -> list[Path]:
    """The cubins for an architecture inside a shared library."""
    into.mkdir(parents=True, exist_ok=True)
    cuobjdump = disassembler_folder()
    if cuobjdump is None:
        raise ToolError("cuobjdump not found")
    done = subprocess.run(
        [cuobjdump / "cuobjdump", "-xelf", f".sm_{architecture}.", library.resolve()],
        cwd=into,
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(into.glob(f"*sm_{architecture}.cubin"))
    if done.returncode or not found:
        raise ToolError(f"{library}: no code for sm_{architecture}: {done.stdout}{done.stderr}")
    return found
