"""Where the programs of a build and of its examination are; nothing here needs more than Python."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
"""Of the checkout."""

_TOOLKITS = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda")
_ELSEWHERE = {
    "ncu": ("/opt/nvidia/nsight-compute/*",),
    "compute-sanitizer": ("/usr/local/cuda*/compute-sanitizer",),
}


def _matching(pattern: str) -> list[str]:
    """The paths that match an absolute pattern, the newest version first."""
    path = Path(pattern)
    return sorted(
        map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))), reverse=True
    )


def _toolkits() -> Iterator[str]:
    """Folders of CUDA toolkits, the likeliest first; there may be nothing in them."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            yield folder
    yield sys.prefix  # conda's
    for pattern in _TOOLKITS:
        yield from _matching(pattern)
    if spec := importlib.util.find_spec("nvidia"):  # pip's
        for root in spec.submodule_search_locations or ():
            yield from _matching(f"{root}/cu*")
            yield f"{root}/cuda_nvcc"


@functools.cache
def find(name: str) -> str | None:
    """Path of a program: of this Python, on PATH, or of a CUDA toolkit that is not on it."""
    folders = [f"{toolkit}/bin" for toolkit in _toolkits()]
    for pattern in _ELSEWHERE.get(name, ()):
        folders += _matching(pattern)
    own = sysconfig.get_path("scripts")
    path = os.pathsep.join([own, os.environ.get("PATH", os.defpath), *folders])
    return shutil.which(name, path=path)


def nvcc() -> str | None:
    """``CUDACXX``, a toolkit's that a variable names, or one that is found."""
    return shutil.which(os.environ.get("CUDACXX", "")) or find("nvcc")


def compiler() -> str | None:
    """The C++ compiler that CMake would take."""
    named = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next((path for name in named if (path := shutil.which(name))), None)


def has(module: str) -> bool:
    """Whether this Python can import a module, without doing so."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def lacking() -> str:
    """What a build cannot do without and is not here, or nothing."""
    found = {
        "cmake": find("cmake"),
        "nvcc (CUDACXX names it)": nvcc(),
        "a C++ compiler (CXX names it)": compiler(),
        f"pybind11 of {sys.executable} (a folder in PEERS may hold it)": has("pybind11"),
        "Python.h": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    }
    names = [name for name, there in found.items() if not there]
    return f"not found: {', '.join(names)}" if names else ""
