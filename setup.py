"""Builds the native kernels by CMake; everything else is in pyproject.toml.

Environment variables:
    QKERN_NATIVE      OFF leaves the native kernels out (the PyTorch reference does all work).
    QKERN_BUILD_TYPE  CMake's build type (default: Release).
    QKERN_CPU_ISAS, QKERN_CUDA, QKERN_CUDA_ARCHS, QKERN_SANITIZE, QKERN_WERROR
                      CMake's options of the same name; see CMakeLists.txt.
    CMAKE_ARGS        further arguments for CMake.
    CXX               the C++ compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FORWARDED_OPTIONS = (
    *("QKERN_CPU_ISAS", "QKERN_CUDA", "QKERN_CUDA_ARCHS"),
    *("QKERN_SANITIZE", "QKERN_WERROR"),
)
HINT = "\n\nTo install qkern without its native kernels (slow), set QKERN_NATIVE=OFF."


class CMakeBuild(build_ext):
    """Configures and builds one CMake target into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, starting afresh when the configuration changed."""
        require_toolchain()
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        arguments = cmake_arguments(output_dir)
        # Of a build whose CUDA kernels did not compile, so that the next one does not try again.
        failed = build_dir / "failed-with-cuda.txt"
        description = surroundings(arguments)
        if failed.exists() and failed.read_text() == description:
            arguments += WITHOUT_CUDA
        try:
            self.run_cmake(build_dir, arguments)
        except subprocess.CalledProcessError:
            if not has_unasked_cuda(build_dir):
                sys.exit(f"\nqkern: building the native kernels failed; see above.{HINT}")
            # Without them the CPU kernels are as good.
            print("\nqkern: the build with CUDA kernels failed, see above: again without them\n")
            try:
                self.run_cmake(build_dir, [*arguments, *WITHOUT_CUDA])
            except subprocess.CalledProcessError:
                sys.exit(f"\nqkern: building the native kernels failed; see above.{HINT}")
            failed.write_text(description)

    def run_cmake(self, build_dir: Path, arguments: list[str]) -> None:
        """Configure and build in ``build_dir``; raises ``CalledProcessError``."""
        # CMake's cache keeps paths of pip's throw-away build environments and old compilers.
        stamp = build_dir / "configured-with.txt"
        description = surroundings(arguments)
        if build_dir.exists() and (not stamp.exists() or stamp.read_text() != description):
            shutil.rmtree(build_dir)

        cmake = find_program("cmake") or sys.exit("cmake not found: pip install cmake")
        jobs = str(self.parallel or os.cpu_count() or 1)
        if not stamp.exists():
            configure = [*arguments, "-S", str(ROOT), "-B", str(build_dir)]
            subprocess.run([cmake, *configure], check=True)
            stamp.write_text(description)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)


WITHOUT_CUDA = ("-DQKERN_CUDA=OFF", "-DQKERN_CUDA_LEFT_OUT=their build failed")


def surroundings(arguments: Sequence[str]) -> str:
    """All that a configuration follows from, to notice that it is another one."""
    variables = ("CXX", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH", "NVCC_APPEND_FLAGS")
    found = [f"{name}={os.environ.get(name, '')}" for name in variables]
    found.append(f"nvcc={shutil.which('nvcc')}")
    if smi := shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run([smi, "-L"], capture_output=True, check=False, timeout=20)
            found.append(listed.stdout.decode(errors="replace"))
        except (OSError, subprocess.TimeoutExpired):
            found.append("GPUs: unknown")
    return "\n".join([*arguments, *found, ""])


def has_unasked_cuda(build_dir: Path) -> bool:
    """Whether the build there has CUDA kernels that nobody asked for."""
    cache = build_dir / "CMakeCache.txt"
    lines = cache.read_text().splitlines() if cache.exists() else []
    return {"QKERN_HAS_CUDA:INTERNAL=TRUE", "QKERN_CUDA:STRING=AUTO"} <= set(lines)


def cmake_arguments(output_dir: Path) -> list[str]:
    """Arguments that configure the build for the running Python interpreter."""
    import pybind11

    arguments = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DQKERN_OUTPUT_DIR={output_dir}",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('QKERN_BUILD_TYPE', 'Release')}",
    ]
    if ninja := find_program("ninja"):
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for name in FORWARDED_OPTIONS:
        if value := os.environ.get(name):
            arguments.append(f"-D{name}={value}")
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def find_program(name: str) -> str | None:
    """Path of `name` from this Python's scripts or PATH, in this order."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def require_toolchain() -> None:
    """Exit with the packages to install if there is no C++ compiler or no Python.h."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers):
        sys.exit(
            f"\nqkern: no C++ compiler found (looked for {', '.join(compilers)}). "
            f"Install one: g++ on Debian and Ubuntu, gcc-c++ on Fedora.{HINT}"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        sys.exit(
            f"\nqkern: {header} not found. Install Python's headers: "
            f"python3-dev on Debian and Ubuntu, python3-devel on Fedora.{HINT}"
        )


native = os.environ.get("QKERN_NATIVE", "ON").upper()
if native not in ("ON", "OFF"):
    sys.exit(f"QKERN_NATIVE: got {native!r}; takes ON or OFF")

setup(
    ext_modules=[Extension("qkern._C", sources=[])] if native == "ON" else [],
    cmdclass={"build_ext": CMakeBuild},
)
