"""Every header of csrc compiles when it is included alone: it includes what it uses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

from lab.cuda.emulator import build

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
NEON_COMPILER = "aarch64-linux-gnu-g++" if X86 else os.environ.get("CXX", "g++")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
BFLOAT16 = (*AVX512, "-mavx512vbmi", "-mavx512bf16")
FLAGS = {
    "simd_x86.h": ("-mavx2",),
    "simd_avx2.h": ("-mavx2", "-mfma", "-mf16c"),
    "simd_avx512.h": AVX512,
    "dot_avx2.h": ("-mavx2", "-mfma", "-mf16c"),
    "dot_avx512.h": AVX512,
    "kernels_dot.h": AVX512,
    "kernels_pairs.h": BFLOAT16,
    "kernels_bf16.h": BFLOAT16,
    "kernels_amx.h": (*BFLOAT16, "-mamx-tile", "-mamx-bf16"),
}
HEADERS = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))


def parameter(header: Path) -> object:
    """Of the test below; pybind11 alone takes seconds to read."""
    slow = "pybind11" in header.read_text()
    name = f"{header.parent.name}/{header.name}"
    return pytest.param(header, id=name, marks=[pytest.mark.slow] if slow else [])


def command(header: Path) -> list[str]:
    """The compiler and its flags; skips where they are not for this machine."""
    compiler = os.environ.get("CXX", "g++")
    if header.name in FLAGS and not X86:
        pytest.skip("instructions of x86-64")
    if header.name == "simd_neon.h":
        compiler = NEON_COMPILER
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} not found")
    include = [CSRC / "include", header.parent]
    defines = []
    if header.parent.name == "cuda":
        include.append(build.HERE / "include")
        defines.append("-DQKERN_CUDA_EMULATED=1")
    if header.parent.name == "binding":
        include += [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
    return [
        *(compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-", *defines),
        *(f"-I{folder}" for folder in include),
        *FLAGS.get(header.name, ()),
    ]


@pytest.mark.parametrize("header", [parameter(header) for header in HEADERS])
def test_a_header_compiles_alone(header: Path) -> None:
    text = f'#include "{header}"\n'
    done = subprocess.run(
        command(header), input=text, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]


def test_there_are_headers() -> None:
    """So that a moved folder does not leave the test above with nothing to do."""
    folders = {p.parent.name for p in HEADERS}
    assert folders >= {"binding", "cpu", "cuda", "qkern"}
    assert {p.name for p in HEADERS} >= FLAGS.keys()
