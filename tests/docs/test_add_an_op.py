"""docs/add_an_op.md, followed to the letter in a copy of the tree, makes an op that passes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import ROOT
from lab.cuda.emulator import build
from lab.processes import environment
from qkern.backends import triton
from tests.docs.recipes import Block, blocks, copy_tree

DOCUMENT = ROOT / "docs" / "add_an_op.md"
BLOCKS = [block for block in blocks(DOCUMENT) if not block.instead]
INSTEAD = [block for block in blocks(DOCUMENT) if block.instead]
PYTHON = [block for block in BLOCKS if block.path.endswith(".py")]
CPU = [
    *(block for block in BLOCKS if "/cpu" in block.path or "arguments.h" in block.path),
    *(block for block in BLOCKS if "qkern/ops.h" in block.path and "stream" not in block.code),
]
OP = "swap_nibbles"

needs_triton = pytest.mark.skipif(
    triton.missing_reason() is not None or importlib.util.find_spec("ttsem") is None,
    reason="Triton or ttsem is not installed",
)
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs g++ or CXX")

ON_TRITON = f"""
import torch
from lab.triton import semantics
from qkern import backends, testing

spec = testing.OPS["{OP}"]
target = semantics.SemanticsTarget(semantics.DEVICES[0])
assert target.module.has(spec.name), "the backend has no such op"
inputs = {{"codes": torch.arange(256, dtype=torch.uint8)}}
with backends.use("reference"):
    (swapped,) = spec.run(inputs)
    torch.library.opcheck(spec.op.overload, spec.arguments(inputs))
assert swapped.tolist() == [(i % 16) * 16 + i // 16 for i in range(256)]
for case in spec.cases:
    testing.check(spec, case, target, "cpu")
"""
"""The quick check: every Python part of the recipe, and Triton's kernel under ttsem."""

TABLE_TESTS = ("tests/ops/test_conformance.py", "tests/triton/test_on_cpu.py")

ON_CPU = f"""
from qkern import backends, testing

spec = testing.OPS["{OP}"]
assert backends.cpu.available_isas() == ["scalar"]
for case in spec.cases:
    testing.check(spec, case, testing.Target("cpu", "scalar"))
"""

ON_EMULATED_CUDA = f"""
from lab.cuda.emulator import backend, build
from qkern import testing

spec = testing.OPS["{OP}"]
target = backend.EmulatedTarget(build.load(build.build("plain")), backend.SCHEDULES[2])
for case in spec.cases:
    testing.check(spec, case, target, "cpu")
"""

ONE_ISA = " ".join(
    f"-DQKERN_COMPILER_TAKES_{isa}=OFF"
    for isa in ("AVX2", "AVX512", "AVX512VNNI", "AVX512BF16", "AMX")
)
"""CMake's answers to what it would ask the compiler: scalar kernels alone, which build fast."""


def run(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in the tree, whose own packages are imported."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=tree,
        env=environment(PYTHONPATH=os.pathsep.join([str(tree), str(tree / "tools")]), **variables),
    )


def run_python(tree: Path, code: str) -> subprocess.CompletedProcess[str]:
    return run(tree, sys.executable, "-c", code)


def follow(tree: Path, recipe: list[Block]) -> Path:
    """A copy of the tree in which each block is where the document puts it."""
    tree.mkdir()
    copy_tree(tree)
    for block in recipe:
        block.apply(tree)
    return tree


def assert_done(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_every_step_of_the_document_is_a_block() -> None:
    folders = {"qkern", "triton_kernels", "csrc"}
    assert {block.path.split("/")[0] for block in BLOCKS} == folders
    assert (len(PYTHON), len(CPU), len(BLOCKS), len(INSTEAD)) == (6, 5, 14, 4)


@needs_triton
def test_the_python_part(tmp_path: Path) -> None:
    assert_done(run_python(follow(tmp_path / "tree", BLOCKS), ON_TRITON))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("left_out", PYTHON, ids=str)
def test_without_any_one_block_the_check_fails(tmp_path: Path, left_out: Block) -> None:
    tree = follow(tmp_path / "tree", [block for block in BLOCKS if block is not left_out])
    done = run_python(tree, ON_TRITON)
    assert done.returncode == 1
    assert any(word in done.stderr for word in (OP, "_like_codes_fake", "has no such op"))


def build_for_the_cpu(tree: Path) -> subprocess.CompletedProcess[str]:
    """Build qkern._C in the tree, without optimisation, which takes long."""
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    return run(
        tree,
        *command,
        QKERN_CUDA="OFF",
        QKERN_BUILD_TYPE="Debug",
        QKERN_WERROR="1",
        CMAKE_ARGS=ONE_ISA,
    )


@needs_compiler
@pytest.mark.slow
def test_the_kernel_for_the_cpu(tmp_path: Path) -> None:
    """In a file of its own, then as a kernel of each instruction set, in the same build."""
    tree = follow(tmp_path / "tree", BLOCKS)
    assert_done(build_for_the_cpu(tree))
    assert_done(run_python(tree, ON_CPU))
    (tree / "csrc/cpu/swap_nibbles.cpp").unlink()
    for block in INSTEAD:
        block.apply(tree)
    assert_done(build_for_the_cpu(tree))
    assert_done(run_python(tree, ON_CPU))
    # Everything that the table's own tests do with an op.
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", "-k", OP)
    done = run(tree, sys.executable, "-m", "pytest", *options, *TABLE_TESTS, OMP_NUM_THREADS="2")
    assert_done(done)
    assert (
        f"test_op[{OP}-cpu.scalar"
        in run(
            tree, sys.executable, "-m", "pytest", "--collect-only", *options, TABLE_TESTS[0]
        ).stdout
    )


@needs_compiler
@pytest.mark.slow
def test_the_kernel_for_cuda(tmp_path: Path) -> None:
    """On the emulator, which the copy builds for itself."""
    tree = follow(tmp_path / "tree", BLOCKS)
    assert_done(run_python(tree, ON_EMULATED_CUDA))
    for left_out in (block for block in BLOCKS if block.path.endswith((".cu", "cuda.cpp"))):
        path = tree / left_out.path
        whole = path.read_text("utf-8")
        path.write_text(whole.replace(left_out.code, ""), "utf-8")
        done = run_python(tree, ON_EMULATED_CUDA)
        assert done.returncode != 0
        assert OP in done.stderr
        path.write_text(whole, "utf-8")


CALL = r"""
#include <cstring>

#include "cpu_ops.h"

extern "C" int run_op(const char* name) {
  using namespace qkern::binding;
  static std::uint8_t codes[200000], out[200000];
  for (int i = 0; i < 200000; ++i) codes[i] = static_cast<std::uint8_t>(i);
  const std::vector<Size> values = {reinterpret_cast<Size>(codes), 200000,
                                    reinterpret_cast<Size>(out), 2};
  for (const Op& op : kCpuOps) {
    if (std::strcmp(op.name, name) != 0) continue;
    Arguments from(values);
    if (!op.run(from).ok()) return 1;
    for (int i = 0; i < 200000; ++i) {
      if (out[i] != codes[i] % 16 * 16 + codes[i] / 16) return 2;
    }
    return 0;
  }
  return 3;
}
"""
MAIN = f'extern "C" int run_op(const char*); int main() {{ return run_op("{OP}"); }}'


def call_on_the_cpu(tree: Path) -> subprocess.CompletedProcess[str]:
    """The op's line of the binding and its kernel, without any other op: in seconds.

    The other ops' kernels are missing in the library, which is no error before one is called.
    """
    (tree / "call.cpp").write_text(CALL)
    (tree / "main.cpp").write_text(MAIN)
    kernel = [str(path) for path in (tree / "csrc/cpu").glob(f"{OP}.cpp")]
    include = ["-Icsrc/include", "-Icsrc/binding", "-Icsrc/cpu"]
    library = ["-std=c++17", "-shared", "-fPIC", "-Wl,-z,lazy", *include, "call.cpp", *kernel]
    program = ["main.cpp", "./call.so", "-Wl,--allow-shlib-undefined", "-Wl,-z,lazy", "-o", "call"]
    compiler = build.compiler() or "g++"
    for command in ([*library, "csrc/cpu/parallel.cpp", "-ldl", "-o", "call.so"], program):
        done = run(tree, compiler, *command)
        if done.returncode:
            return done
    return run(tree, "./call")


@needs_compiler
def test_the_kernel_for_the_cpu_alone(tmp_path: Path) -> None:
    assert_done(call_on_the_cpu(follow(tmp_path / "tree", BLOCKS)))


@needs_compiler
@pytest.mark.parametrize("left_out", CPU, ids=str)
def test_without_any_one_block_there_is_no_kernel_for_the_cpu(
    tmp_path: Path, left_out: Block
) -> None:
    tree = follow(tmp_path / "tree", [block for block in BLOCKS if block is not left_out])
    done = call_on_the_cpu(tree)
    # Without its line in the binding, the library has no such op: status 3.
    assert done.returncode == 3 or (done.returncode != 0 and "wap" in done.stderr)
