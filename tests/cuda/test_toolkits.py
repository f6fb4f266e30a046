"""The CUDA kernels compile with the headers of other CUDA toolkits than the one that is here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab import ROOT
from lab.cuda.static import toolchain

VERSIONS = ("12.1.105", "12.6.77")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc not found"),
]


USUAL = toolchain.sources(80)
COMPILED = [
    *((target, source) for target in ("compute_75", "compute_80") for source in USUAL),
    *(("compute_90a", source) for source in toolchain.sources(90) if source not in USUAL),
]


@pytest.mark.parametrize(
    ("virtual", "source"),
    [pytest.param(*pair, id=f"{pair[1].stem}-{pair[0]}") for pair in COMPILED],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_16_bit_types(version: str, virtual: str, source: Path, tmp_path: Path) -> None:
    """Of those that `make cuda-versions` has put into build/cuda_headers.

    Their headers of 16-bit numbers stand before nvcc's own: which functions these have for which
    architecture has changed. The rest of a toolkit goes with its compiler.
    """
    headers = ROOT / "build" / "cuda_headers" / version / "nvidia" / "cuda_runtime" / "include"
    if not headers.is_dir():
        pytest.skip(f"CUDA {version} is not in build/cuda_headers: run `make cuda-versions`")
    found = [*headers.glob("cuda_bf16.h*"), *headers.glob("cuda_fp16.h*")]
    assert len(found) == 4
    for header in found:
        shutil.copy(header, tmp_path)
    compiler = toolchain.nvcc()
    assert compiler is not None
    include = [f"-I{tmp_path}", f"-I{ROOT / 'csrc' / 'include'}"]
    command = [compiler, *toolchain.FLAGS, *include, f"-arch={virtual}", "-ptx"]
    toolchain.run([*command, "-o", tmp_path / "kernels.ptx", source])
