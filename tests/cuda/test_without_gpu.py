"""The CUDA backend where there is no GPU: with kernels but no driver, and without kernels."""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import qkern
from lab import ROOT
from lab.cuda import run_on_gpu
from lab.cuda.pretended import Devices, pretended
from lab.processes import environment, fresh_python
from qkern import backends, env
from qkern.backends import CudaBackend, _compiled, _library, cpu, cuda
from qkern.backends._cuda import has_code

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


@needs_kernels
@needs_no_driver
def test_the_library_tells_its_versions():
    driver, runtime, architectures = cpu.library().cuda_versions()
    assert driver == 0
    built = cpu.library().build_info()["cuda"]  # nvcc 13.0.88: 75-real ...
    assert built.startswith(f"nvcc {runtime // 1000}.{runtime % 1000 // 10}.")
    assert built.endswith(f": {architectures}")
    assert "-real" in architectures


@needs_kernels
@needs_no_driver
def test_the_library_reads_tensors_itself_and_starts_nothing_without_a_device():
    if not _compiled.reads_tensors(cpu.library()):
        pytest.skip("a torch without DLPack's C exchange interface")
    assert set(cuda.fast) == {"linear_4bit", "linear_4bit_dx"}
    x, qw = torch.randn(3, 64), qkern.quantize_4bit(torch.randn(8, 64))
    arguments = x, qw.weight, 8, None, False, 1
    assert cuda.fast["linear_4bit"](*arguments) is None  # for they are on the CPU
    with pretended(cpu.library(), Devices(streams={0: 0})):
        assert cuda.fast["linear_4bit"](*arguments) is None
        assert cuda.fast["linear_4bit_dx"](torch.randn(3, 8), qw.weight, 64, False, 1) is None
    torch.testing.assert_close(qkern.nf4_linear(x, qw), x @ qw.dequantize().T)


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


def build(folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The native module, built into ``folder``."""
    folders = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@needs_no_driver
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_a_build_with_nvcc_passes_these_tests_where_there_is_no_driver(tmp_path):
    """All of this file again, on a module that has the kernels, for one architecture."""
    built = build(tmp_path, {"QKERN_CUDA_ARCHS": "80", "QKERN_CPU_ISAS": "scalar"})
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
    for name in ("a_launch_without_a_driver", "importing_kernels_without", "the_library_tells"):
        lines = [line for line in done.stdout.splitlines() if f"test_{name}" in line]
        assert lines
        assert all("PASSED" in line for line in lines), done.stdout


def configure(
    folder: Path,
    *options: str,
    programs: Mapping[str, str] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """CMake's configuration where no nvcc is to be found, nor another program of NVIDIA's.

    But ``programs``: names, and lines of shell.
    """
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if cmake is None:
        pytest.skip("no cmake")
    # Links to all programs but nvcc, for it may share a directory with the compiler.
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (programs or {}).items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (bin_folder / name).chmod(0o755)
    for directory in (
        Path(sys.executable).parent,
        *map(Path, os.environ["PATH"].split(os.pathsep)),
    ):
        for program in directory.glob("*") if directory.is_dir() else ():
            link = bin_folder / program.name
            hidden = program.name in ("nvcc", "nvidia-smi")
            if not hidden and not link.exists() and not link.is_symlink():
                link.symlink_to(program)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CXX"))}
    return subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder / "build")]
        + [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
        + ["-DQKERN_NVCC_FOLDERS=", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment | {"PATH": str(bin_folder)} | variables,
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", ["AUTO", "ON"])
def test_a_build_without_nvcc_leaves_the_kernels_out_or_fails(tmp_path, option):
    done = configure(tmp_path, f"-DQKERN_CUDA={option}", "-DQKERN_CUDA_ARCHS=80")
    said = done.stdout + done.stderr
    if option == "AUTO":
        assert done.returncode == 0, said
        assert "CUDA kernels left out: nvcc not found" in said
    else:
        assert done.returncode != 0
        assert "QKERN_CUDA=ON: nvcc not found" in said


NVCC = shutil.which("nvcc")
TWO_GPUS = {"nvidia-smi": r'[ "$1" = -L ] || printf "9.0\n8.6\n9.0\n"'}
OLD_DRIVER = {"nvidia-smi": 'if [ "$1" = -L ]; then echo "GPU 0: Tesla T4"; else exit 6; fi'}
LISTED = (
    re.findall(
        r"compute_(\d+)",
        subprocess.run(
            [NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=False
        ).stdout,
    )
    if NVCC
    else ["0"]
)
ALL = "75-real;80-real;86-real;89-real;90-real;100-real;120-real;90-virtual;100-virtual;120-virtual"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
@pytest.mark.parametrize(
    ("options", "programs", "built"),
    [
        ([], {}, "left out: no NVIDIA GPU here"),
        ([], TWO_GPUS, "for 86-real;90-real;90-virtual"),
        ([], OLD_DRIVER, f"for {ALL}"),
        (["-DQKERN_CUDA=ON"], {}, f"for {ALL}"),
        (["-DQKERN_CUDA=ON"], TWO_GPUS, f"for {ALL}"),
        (["-DQKERN_CUDA_ARCHS=89"], TWO_GPUS, "for 89-real;89-virtual"),
        (["-DQKERN_CUDA_ARCHS=80;90;100"], {}, "for 80-real;90-real;100-real;90-virtual;100-virt"),
        (["-DQKERN_CUDA_ARCHS=20;9999"], {}, f"for {LISTED[-1]}-real;{LISTED[-1]}-virtual"),
    ],
    ids=["none", "two", "old-driver", "on", "on-two", "one", "some", "other"],
)
def test_what_is_built_for_which_gpus(tmp_path, options, programs, built):
    assert NVCC is not None
    # By a folder that CUDA_HOME names, off PATH.
    home = tmp_path / "toolkit"
    home.mkdir()
    (home / "bin").symlink_to(Path(NVCC).resolve().parent)
    done = configure(tmp_path, *options, programs=programs, CUDA_HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"qkern: CUDA kernels {built}" in done.stdout


@pytest.mark.slow
def test_a_host_compiler_that_nvcc_refuses_is_named(tmp_path):
    said = "#error -- unsupported GNU version! gcc versions later than 13 are not supported!"
    program = {"nvcc": f'echo "{said}" >&2; exit 1'}
    for _ in range(2):  # configured again, it says the same
        done = configure(tmp_path, "-DQKERN_CUDA_ARCHS=80", programs=program)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"nvcc does not compile here: {said} (CUDAHOSTCXX" in done.stdout
        assert "dropping" not in done.stderr
    if NVCC is None:
        return
    # What was found to do is not lost when the variable that named it is.
    for variables in ({"CUDACXX": NVCC}, {}):
        done = configure(tmp_path, "-DQKERN_CUDA_ARCHS=80", programs=program, **variables)
        assert "CUDA kernels for 80-real;80-virtual" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
@pytest.mark.parametrize("asked", [False, True])
def test_cuda_kernels_that_do_not_compile_leave_those_for_the_cpu(tmp_path, asked):
    """Unless they were asked for. Also a build of few instruction sets."""
    variables = {
        "QKERN_CUDA_ARCHS": "80",
        "QKERN_CPU_ISAS": "scalar",
        "NVCC_APPEND_FLAGS": "-DBFloat16=3",  # compiles what CMake tries, and no kernel
    }
    if asked:
        variables["QKERN_CUDA"] = "ON"
    done = build(tmp_path, variables)
    libraries = list((tmp_path / "lib").glob("**/_C*.so"))
    if asked:
        assert done.returncode != 0
        assert "building the native kernels failed" in done.stderr
        assert libraries == []
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the build with CUDA kernels failed, see above: again without them" in done.stdout
    again = build(tmp_path, variables)
    assert again.returncode == 0
    assert "CUDA kernels failed" not in again.stdout  # nor is it tried a second time
    code = (
        "from qkern.backends import available, cpu;"
        "print(cpu.available_isas(), available('cuda')['cuda'], cpu.library().build_info()['cuda'])"
    )
    found = fresh_python("-c", code, QKERN_NATIVE_LIBRARY=str(libraries[0]))
    said = "qkern._C was built without CUDA kernels left out: their build failed"
    assert found.stdout == f"['scalar'] {said}\n", found.stderr


H100, T4 = 90, 75


@pytest.mark.parametrize(
    ("capability", "architectures", "jit", "runs"),
    [
        (H100, "90-real 90-virtual", False, True),
        (H100, "80-real 80-virtual", False, False),
        (H100, "80-real 80-virtual", True, True),
        (89, "80-real", False, True),  # the same major version, a later minor one
        (80, "86-real 86-virtual", True, False),
        (T4, "80-real 120-virtual", True, False),
        (110, "100-real 120-real 100-virtual 120-virtual", True, True),
        (110, "100-real 120-real 120-virtual", True, False),
        (103, "100-real", False, True),
        (H100, "", True, False),
    ],
)
def test_which_devices_a_build_runs_on(capability, architectures, jit, runs):
    assert has_code(capability, architectures, jit) == runs


class Built(types.ModuleType):
    """A library with CUDA kernels of these versions."""

    def __init__(self, driver: int, runtime: int, architectures: str = "80-real 80-virtual"):
        super().__init__("_C")
        self.cuda_linear_4bit = None
        self.cuda_versions = lambda: (driver, runtime, architectures)


def test_a_driver_older_than_the_runtime_leaves_the_tensors_to_triton(monkeypatch):
    assert CudaBackend(library=Built(0, 13000)).missing_reason() is None  # no driver, no tensors
    assert CudaBackend(library=Built(12010, 12080)).missing_reason() is None
    assert CudaBackend(library=Built(13010, 12080)).missing_reason() is None
    old = CudaBackend(library=Built(12080, 13000))
    reason = "the driver is for CUDA 12.8; qkern._C needs one for CUDA 13.0 or newer"
    assert old.missing_reason() == reason
    monkeypatch.setitem(backends.BACKENDS, "cuda", old)
    found = env.report()["devices"]["cuda"]
    assert found["backends"]["cuda"] == reason
    assert found["selected"] != "cuda"
    with pytest.raises(RuntimeError, match=r"'cuda' is missing: the driver is for CUDA 12\.8"):
        backends.use("cuda").__enter__()


def test_a_driver_that_does_not_tell_its_version_is_a_reason():
    def versions():
        raise RuntimeError("versions: stub library")

    library = Built(0, 13000)
    library.cuda_versions = versions
    assert str(CudaBackend(library=library).missing_reason()).endswith("versions: stub library")


def test_a_device_without_code_leaves_its_tensors_to_triton(monkeypatch):
    devices = [(8, 6), (7, 5)]
    asked = []

    def capability(index):
        asked.append(index)
        return devices[index]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    first, second = (torch.device("cuda", i) for i in range(2))
    found = CudaBackend(library=Built(13000, 13000))
    assert found.missing_reason() is found.unfit_reason(second) is None
    assert asked == []  # before torch has initialised CUDA
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for _ in range(2):
        assert found.missing_reason() is found.unfit_reason(first) is None
        assert found.unfit_reason(torch.device("cuda")) is None
        assert found.unfit_reason(second) == (
            "qkern._C has no code for cuda:1, compute capability 7.5: "
            "it was built for 80-real 80-virtual"
        )
    assert sorted(asked) == [0, 1]  # once each
    monkeypatch.setitem(backends.BACKENDS, "cuda", found)
    monkeypatch.setattr(backends, "selected", {})
    assert backends.select(first) is found
    assert backends.select(second) is not found
    with backends.use("cuda"), pytest.raises(RuntimeError, match=r"missing: .* no code for cuda:1"):
        backends.select(second)


@pytest.mark.parametrize(
    ("capability", "driver", "runtime", "runs"),
    [((7, 5), 13000, 13000, False), ((9, 0), 12080, 12080, True), ((9, 0), 12010, 12080, False)],
)
def test_without_any_device_that_it_runs_on_it_is_missing(
    monkeypatch, capability, driver, runtime, runs
):
    """PTX counts where the driver is as new as the toolkit."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    reason = CudaBackend(library=Built(driver, runtime)).missing_reason()
    assert (reason is None) == runs
    assert runs or "no code for cuda:0" in reason


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
