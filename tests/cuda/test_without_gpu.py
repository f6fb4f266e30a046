"""The CUDA backend where there is no GPU: with kernels but no driver, and without kernels."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lab import ROOT
from lab.cuda import run_on_gpu
from lab.processes import environment
from qkern import backends
from qkern.backends import CudaBackend, _library, cpu, cuda

has_driver = ctypes.util.find_library("cuda") is not None
needs_kernels = pytest.mark.skipif(
    cuda.missing_reason() is not None,
    reason=f"the CUDA kernels are missing: {cuda.missing_reason()}",
)
needs_no_driver = pytest.mark.skipif(has_driver, reason="there is a driver")

KERNEL_CALLS = {
    "cuda_adamw_step": ([(64, 64, 64, 64, None, None, 64, 0, 64, 0, 0)], None, 0),
    "cuda_quantize_4bit": (64, 0, 64, None, 0, 64, 64, 64, 0),
    "cuda_dequantize_4bit": (64, 64, None, None, None, 0, 64, 64, 0, 64, 0),
    "cuda_quantize_8bit": (64, 0, 64, 64, 256, 64, 64, 0),
    "cuda_dequantize_8bit": (64, 64, 64, 256, 64, 0, 64, 0),
    "cuda_quantize_absmax": (64, 0, 64, 64, 64, 64, 0),
}
"""Arguments that a launch is attempted with; nothing is read before there is a device."""


@needs_kernels
@needs_no_driver
@pytest.mark.parametrize("function", KERNEL_CALLS)
def test_a_launch_without_a_driver_is_an_exception_with_the_kernels_name(function):
    with pytest.raises(RuntimeError) as caught:
        getattr(cpu.library(), function)(*KERNEL_CALLS[function])
    message = str(caught.value)
    assert function.removeprefix("cuda_") in message
    assert "driver" in message.lower(), message


@needs_kernels
@needs_no_driver
def test_importing_kernels_without_a_driver_is_quiet():
    code = (
        "import torch, qkern;"
        "from qkern import backends;"
        "assert backends.available('cuda')['cuda'] is None;"
        "assert not torch.cuda.is_initialized();"
        "qkern.quantize_4bit(torch.randn(64))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_cuda_tensor_without_a_device_is_torchs_error():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.empty(1, device="cuda")


def test_a_module_without_cuda_kernels_says_so(monkeypatch):
    without = CudaBackend(library=types.ModuleType("_C"))
    assert without.missing_reason() == "qkern._C was built without CUDA kernels"
    with pytest.raises(RuntimeError, match=r"the cuda kernels are missing: qkern\._C was built"):
        without.library()
    monkeypatch.setitem(backends.BACKENDS, "cuda", without)
    forced = backends.use("cuda")
    with pytest.raises(RuntimeError, match=r"'cuda' is missing: qkern\._C was built"), forced:
        pass


def test_no_native_module_at_all(monkeypatch):
    monkeypatch.setattr(_library, "library", None)
    monkeypatch.setattr(_library, "missing_reason", "qkern._C cannot be imported")
    assert CudaBackend().missing_reason() == "qkern._C cannot be imported"


@pytest.mark.slow
@needs_no_driver
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_a_build_with_nvcc_passes_these_tests_where_there_is_no_driver(tmp_path):
    """All of this file again, on a module that has the kernels, for one architecture."""
    environment = os.environ | {"QKERN_CUDA": "ON", "QKERN_CUDA_ARCHS": "80"}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "qkern: CUDA kernels for 80-real;80-virtual" in said
    (library,) = (tmp_path / "lib").glob("**/_C*.so")
    environment = os.environ | {"QKERN_NATIVE_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*command, __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for name in ("a_launch_without_a_driver", "importing_kernels_without_a_driver"):
        lines = [line for line in done.stdout.splitlines() if f"test_{name}" in line]
        assert lines
        assert all("PASSED" in line for line in lines), done.stdout


def configure(folder: Path, cuda_option: str) -> subprocess.CompletedProcess[str]:
    """CMake's configuration where no nvcc is to be found."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if cmake is None:
        pytest.skip("no cmake")
    # Links to all programs but nvcc, for it may share a directory with the compiler.
    programs = folder / "bin"
    programs.mkdir()
    for directory in (
        Path(sys.executable).parent,
        *map(Path, os.environ["PATH"].split(os.pathsep)),
    ):
        for program in directory.glob("*") if directory.is_dir() else ():
            link = programs / program.name
            if program.name != "nvcc" and not link.exists() and not link.is_symlink():
                link.symlink_to(program)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CXX"))}
    return subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder / "build"), f"-DQKERN_CUDA={cuda_option}"]
        + [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment | {"PATH": str(programs)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", ["AUTO", "ON"])
def test_a_build_without_nvcc_leaves_the_kernels_out_or_fails(tmp_path, option):
    done = configure(tmp_path, option)
    said = done.stdout + done.stderr
    if option == "AUTO":
        assert done.returncode == 0, said
        assert "CUDA kernels left out: nvcc not found" in said
    else:
        assert done.returncode != 0
        assert "QKERN_CUDA=ON: nvcc not found" in said


def test_the_program_for_compute_sanitizer_runs_its_cases():
    if reason := cpu.missing_reason():
        pytest.skip(reason)
    assert run_on_gpu.main(stride=97, largest=5000, device="cpu") > 10


def test_the_program_for_compute_sanitizer_wants_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    program = [sys.executable, "-m", run_on_gpu.__name__]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1
    assert "torch finds no CUDA device" in done.stderr
