"""sentryward proves every CUDA kernel free of races, for one small launch each.

What it is asked about is the skeleton of a kernel's PTX (`skeleton`): its accesses, barriers
and asynchronous copies, and what those depend on. So that the proofs are worth something, each
kernel is also compiled with a mistake in it, which must be found in the same way.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from lab.cuda.mutants.races import RACES
from lab.cuda.proofs import prover, skeleton
from lab.cuda.proofs.launches import PROOFS, Proof
from lab.cuda.proofs.ptx import SkeletonError
from lab.cuda.static import toolchain
from lab.mutants import Mutant, plant
from lab.ptx_prover import verify

if importlib.util.find_spec("sentryward") is None:
    pytest.skip("sentryward is not installed", allow_module_level=True)
needs_nvcc = pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc not found")

ARCHITECTURES = (80, 90, 100)
QUICK = (
    *("sum_splits_kernel<BFloat16>", "linear_4bit_mma_kernel<BFloat16, 16, 3>"),
    "grouped_linear_4bit_mma_kernel<BFloat16, 16, 3>",
    "linear_4bit_wgmma_kernel<BFloat16, 128, false>",
)
"""Proved in the quick tests, for the oldest architecture that has them."""


def params(proofs: Iterable[Proof]) -> list[object]:
    found = []
    for architecture in ARCHITECTURES:
        for proof in proofs:
            if architecture not in proof.architectures:
                continue
            quick = architecture == proof.architectures[0] and str(proof) in QUICK
            marks = [] if quick else [pytest.mark.slow]
            found.append(
                pytest.param(proof, architecture, id=f"{proof}-sm_{architecture}", marks=marks)
            )
    return found


@needs_nvcc
@pytest.mark.parametrize(("proof", "architecture"), params(PROOFS))
def test_race_free(proof: Proof, architecture: int) -> None:
    verdict = prover.prove(proof, architecture)
    assert verdict.result == "race_free", verdict


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_asked_about(architecture: int) -> None:
    asked = {proof.kernel for proof in PROOFS if architecture in proof.architectures}
    assert asked == prover.compiled_kernels(architecture)


def mistake_params() -> list[object]:
    found = []
    for mistake in RACES:
        marks = [] if mistake.quick else [pytest.mark.slow]
        found.append(pytest.param(mistake, id=f"{mistake.scope}-{mistake.name}", marks=marks))
    return found


@needs_nvcc
@pytest.mark.parametrize("mistake", mistake_params())
def test_a_mistake_is_found(mistake: Mutant, tmp_path: Path) -> None:
    proof = next(proof for proof in PROOFS if proof.kernel == mistake.scope)
    kernels = plant(mistake, toolchain.KERNELS, tmp_path)
    verdict = prover.prove(proof, proof.architectures[0], kernels)
    assert verdict.result == "potential_race", verdict


def test_each_kernel_has_a_mistake() -> None:
    def name(kernel: str) -> str:
        return kernel.partition("<")[0]

    assert {name(m.scope) for m in RACES} == {name(proof.kernel) for proof in PROOFS}


HEAD = """.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
  .reg .pred %p<9>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<9>;
  .shared .align 4 .b8 buffer[256];
"""
START = """  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd1, %r1, 4;
  ld.param.u64 %rd2, [kernel_param_0];
  cvta.to.global.u64 %rd3, %rd2;
  add.s64 %rd4, %rd3, %rd1;
  ld.global.u32 %r2, [%rd4];
  mov.u32 %r3, buffer;
"""
OBJECTS = {(0, 0): "in", (1, 0): "out"}


def answer(body: str, folder: Path) -> str:
    """Sentryward's result for the skeleton of a kernel with 64 threads."""
    ptx, asked = folder / "kernel.ptx", folder / "input.json"
    ptx.write_text(skeleton.skeleton(f"{HEAD}{START}{body}  ret;\n}}\n", OBJECTS))
    declarations = [
        {"parameter": index, "type": "pointer", "space": "global", "object": name}
        for (index, _), name in OBJECTS.items()
    ]
    launch = {"grid_dim": [1, 1, 1], "block_dim": [64, 1, 1]}
    question = {"schema": "spverify.kernel-input/v1", "entry": "kernel", "launch": launch}
    asked.write_text(json.dumps(question | {"declarations": declarations, "arguments": []}))
    return str(verify(ptx, asked, 60, memory_limit_mib=4000)["result"])


OWN = "  shl.b32 %r4, %r1, 2;\n  add.s32 %r4, %r3, %r4;\n"
AT_DATA = "  and.b32 %r5, %r2, 63;\n  shl.b32 %r5, %r5, 2;\n  add.s32 %r5, %r3, %r5;\n"
IF_DATA = "  setp.eq.s32 %p1, %r2, 0;\n  @%p1 bra $L1;\n"


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (f"{OWN}  st.shared.u32 [%r4], %r2;\n", "race_free"),
        ("  st.shared.u32 [%r3], %r2;\n", "potential_race"),
        # Through a pointer that a parameter is, without its space.
        ("  st.u32 [%rd4], %r2;\n", "race_free"),
        ("  st.u32 [%rd3], %r2;\n", "potential_race"),
        # Where data say: with a barrier, without one, and a store.
        (
            f"{OWN}{AT_DATA}  st.shared.u32 [%r4], %r2;\n  bar.sync 0;\n"
            "  ld.shared.u32 %r6, [%r5];\n",
            "race_free",
        ),
        (
            f"{OWN}{AT_DATA}  st.shared.u32 [%r4], %r2;\n  ld.shared.u32 %r6, [%r5];\n",
            "potential_race",
        ),
        (f"{AT_DATA}  st.shared.u32 [%r5], %r2;\n", "potential_race"),
        # If data say so.
        (f"{OWN}{IF_DATA}  st.shared.u32 [%r4], %r2;\n$L1:\n", "race_free"),
        (f"{IF_DATA}  st.shared.u32 [%r3], %r2;\n$L1:\n", "potential_race"),
        # Atomic operations: with one another, and with a store or a load.
        (f"{AT_DATA}  atom.shared.add.u32 %r6, [%r5], 1;\n", "race_free"),
        (
            f"{OWN}{AT_DATA}  st.shared.u32 [%r4], %r2;\n  atom.shared.add.u32 %r6, [%r5], 1;\n",
            "potential_race",
        ),
        (
            f"{OWN}{AT_DATA}  atom.shared.add.u32 %r6, [%r5], 1;\n  ld.shared.u32 %r7, [%r4];\n",
            "potential_race",
        ),
        (
            f"{OWN}{AT_DATA}  atom.shared.add.u32 %r6, [%r5], 1;\n  bar.sync 0;\n"
            "  ld.shared.u32 %r7, [%r4];\n",
            "race_free",
        ),
    ],
)
def test_what_is_said_of_small_kernels(body: str, result: str, tmp_path: Path) -> None:
    assert answer(body, tmp_path) == result


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (f"{IF_DATA}  bar.sync 0;\n$L1:\n", "bar.sync 0; under a branch on data"),
        # How often, data say.
        (
            "  mov.u32 %r6, 0;\n$L1:\n  bar.sync 0;\n  add.s32 %r6, %r6, 1;\n"
            "  setp.lt.s32 %p1, %r6, %r2;\n  @%p1 bra $L1;\n",
            "bar.sync 0; under a branch on data",
        ),
        (
            "  ld.param.u64 %rd5, [kernel_param_1];\n  mul.wide.u32 %rd6, %r2, 4;\n"
            "  add.s64 %rd7, %rd5, %rd6;\n  st.global.u32 [%rd7], %r2;\n",
            "an address that is data, in out",
        ),
        # Which memory, the instruction does not say.
        ("  st.u32 [%rd9], %r2;\n", "st.u32 [%rd9], %r2;: in an unknown space"),
        ("  st.volatile.u32 [%rd4], %r2;\n", "[%rd4], %r2;: in an unknown space"),
        # Which address, a branch on data says.
        (
            f"  mov.u32 %r6, 0;\n{IF_DATA}  mov.u32 %r6, 4;\n$L1:\n  cvt.u64.u32 %rd6, %r6;\n"
            "  ld.param.u64 %rd5, [kernel_param_1];\n"
            "  add.s64 %rd7, %rd5, %rd6;\n  st.global.u32 [%rd7], %r2;\n",
            "an address that is data, in out",
        ),
    ],
)
def test_of_what_there_is_no_skeleton(body: str, says: str) -> None:
    with pytest.raises(SkeletonError) as caught:
        skeleton.skeleton(f"{HEAD}{START}{body}  ret;\n}}\n", OBJECTS)
    assert says in str(caught.value)


def test_tensors_are_aligned_or_not() -> None:
    body = (
        "  and.b64 %rd5, %rd2, 15;\n  setp.ne.s64 %p1, %rd5, 0;\n  @%p1 bra $L1;\n"
        "  st.shared.u32 [%r3], %r2;\n$L1:\n"
    )
    text = f"{HEAD}{START}{body}  ret;\n}}\n"
    assert skeleton.tested_for_alignment(text, OBJECTS) == {frozenset({"in"})}
    assert "mov.b64 %rd5, 0;" in skeleton.skeleton(text, OBJECTS)
    assert "mov.b64 %rd5, 8;" in skeleton.skeleton(text, OBJECTS, {"in"})


@pytest.mark.parametrize(
    ("added", "tested"),
    [
        # Of the block: where its rows begin. Of the thread, or of memory: not followed.
        ("  mov.u32 %r4, %ctaid.x;\n  mul.wide.u32 %rd6, %r4, 32;\n", {frozenset({"in"})}),
        ("  mul.wide.u32 %rd6, %r1, 32;\n", set()),
        ("  mul.wide.u32 %rd6, %r2, 32;\n", set()),
    ],
)
def test_places_in_tensors_are_aligned_as_these_are(
    added: str, tested: set[frozenset[str]]
) -> None:
    body = (
        f"{added}  add.s64 %rd7, %rd2, %rd6;\n  and.b64 %rd5, %rd7, 15;\n"
        "  setp.ne.s64 %p1, %rd5, 0;\n  @%p1 bra $L1;\n  st.shared.u32 [%r3], %r2;\n$L1:\n"
    )
    assert skeleton.tested_for_alignment(f"{HEAD}{START}{body}  ret;\n}}\n", OBJECTS) == tested
