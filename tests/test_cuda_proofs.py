"""sentryward proves the kernels' PTX free of races, each for one small launch.

`RACE_FREE` is what it proves, `UNSUPPORTED` what it cannot follow and why; either list fails when
it no longer says what sentryward answers. `OPEN` are the kernels of which nothing is proved.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parent))

import cuda_proofs
from cuda_proofs import PROOFS, Proof
from cuda_static import toolchain

if importlib.util.find_spec("sentryward") is None:
    pytest.skip("sentryward is not installed", allow_module_level=True)
if toolchain.nvcc() is None:
    pytest.skip("nvcc not found", allow_module_level=True)

RACE_FREE = {
    "dequantize_4bit_kernel<BFloat16>": (80, 90, 100),
    "linear_4bit_tiled_kernel<float, false>": (80, 90, 100),
    "quantize_4bit_kernel<BFloat16, true>": (80, 90, 100),
    "sum_splits_kernel<BFloat16>": (80, 90, 100),
}
"""What it has proved, by architecture."""
UNSUPPORTED = {
    "absmax_mean_kernel": "which bins a sum goes to depends on data",
    "quantize_8bit_kernel<float>": "rounding a threshold down is a branch on data",
    "quantize_absmax_kernel": "rounding a threshold down is a branch on data",
}
"""What it cannot follow on sm_80. The emulator's orders and ThreadSanitizer are all there is."""
OPEN = {
    "dequantize_8bit_kernel<BFloat16>": "a branch on data where a tensor is not aligned",
    "linear_4bit_dx_mma_kernel<BFloat16, 64, 3>": "not asked",
    "linear_4bit_mma_kernel<BFloat16, 16, 4>": "no answer within minutes",
    "linear_4bit_mma_kernel<BFloat16, 64, 2>": "not asked to the end",
    "linear_4bit_vector_kernel<BFloat16, 1, 4, true>": "an earlier form of it was unsupported",
    "quantize_4bit_kernel<float, false>": "sorts a codebook: its values are addresses",
}
"""What is not known: nothing is proved of these kernels, and no test asks."""
QUICK = ("sum_splits_kernel<BFloat16>", 80)
BY_KERNEL = {proof.kernel: proof for proof in PROOFS}


def params() -> list[object]:
    found = []
    for kernel, architectures in RACE_FREE.items():
        for architecture in architectures:
            marks = [] if (kernel, architecture) == QUICK else [pytest.mark.slow]
            name = f"{kernel}-sm_{architecture}"
            found.append(pytest.param(BY_KERNEL[kernel], architecture, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("proof", "architecture"), params())
def test_race_free(proof: Proof, architecture: int) -> None:
    verdict = cuda_proofs.prove(proof, architecture)
    assert verdict.result == "race_free", verdict


@pytest.mark.slow
@pytest.mark.parametrize("kernel", UNSUPPORTED)
def test_unsupported(kernel: str) -> None:
    verdict = cuda_proofs.prove(BY_KERNEL[kernel], 80)
    assert verdict.result == "unsupported", f"it is supported now: {verdict}"


def test_every_kernel_is_asked_about() -> None:
    from cuda_static import figures

    asked = {proof.kernel.partition("<")[0] for proof in PROOFS}
    assert asked == set(figures.LAUNCHES)
    lists = (RACE_FREE, UNSUPPORTED, OPEN)
    assert sorted(kernel for one in lists for kernel in one) == sorted(BY_KERNEL)


RACY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry racy(.param .u64 racy_param_0)
{
  .reg .b32 %r<4>;
  .reg .b64 %rd<5>;
  .shared .align 4 .b8 buffer[256];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd1, %r1, 4;
  mov.u64 %rd2, buffer;
  add.s64 %rd2, %rd2, %rd1;
  st.shared.u32 [%rd2], %r1;
  BARRIER
  xor.b32 %r2, %r1, 63;
  mul.wide.u32 %rd3, %r2, 4;
  mov.u64 %rd4, buffer;
  add.s64 %rd4, %rd4, %rd3;
  ld.shared.u32 %r3, [%rd4];
  ld.param.u64 %rd3, [racy_param_0];
  add.s64 %rd3, %rd3, %rd1;
  st.global.u32 [%rd3], %r3;
  ret;
}
"""


@pytest.mark.parametrize(("barrier", "free"), [("bar.sync 0;", True), ("", False)])
def test_sentryward_finds_a_missing_barrier(tmp_path: Path, barrier: str, free: bool) -> None:
    import json

    from sentryward import verify

    ptx, asked = tmp_path / "racy.ptx", tmp_path / "input.json"
    ptx.write_text(RACY.replace("BARRIER", barrier))
    out = {"parameter": 0, "type": "pointer", "space": "global", "object": "out"}
    launch = {"grid_dim": [1, 1, 1], "block_dim": [64, 1, 1]}
    question = {"schema": "spverify.kernel-input/v1", "entry": "racy", "launch": launch}
    asked.write_text(json.dumps(question | {"declarations": [out], "arguments": []}))
    result = verify(str(ptx), input=str(asked), timeout_seconds=60)["result"]
    assert (result == "race_free") == free, result


@pytest.mark.parametrize(
    ("loads", "depends"),
    [
        ("ld.param.u64 %rd1, [p];", False),
        ("ld.param.u64 %rd2, [p];\nld.global.u64 %rd1, [%rd2];", True),
        ("mov.u32 %r1, %tid.x;\ncvt.u64.u32 %rd1, %r1;", False),
        ("ld.shared.v2.u64 {%rd3, %rd1}, [buffer];", True),
    ],
)
def test_branches_on_data_are_told_from_branches_on_arguments(loads: str, depends: bool) -> None:
    text = f"{loads}\nand.b64 %rd5, %rd1, 15;\nsetp.ne.s64 %p1, %rd5, 0;\n@%p1 bra $L1;"
    assert cuda_proofs.depends_on_data(text, len(text.splitlines())) == depends
