"""Every matmul of the op table on every way that it can take on a GPU, whatever would be chosen.

The table by itself reaches `gemm` hardly ever, and in slices never: its cases are small, and the
workspace holds their weights whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lab.cuda import ways
from qkern.backends import _cuda_matmul, cuda
from qkern.testing import OPS, Case, OpSpec, Target

PRODUCTS = ("linear_4bit", "linear_4bit_dx")
MATMULS = tuple(OPS[name] for name in (*PRODUCTS, *(f"grouped_{name}" for name in PRODUCTS)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    params = [
        pytest.param(spec, case, id=f"{spec.name}-{case}")
        for spec in MATMULS
        for case in spec.cases
    ]
    if metafunc.config.getoption("--device") != "cuda":
        # Skipped once, not once for each case.
        skip = pytest.mark.skip(reason="on a GPU: --device cuda")
        params = [pytest.param(MATMULS[0], MATMULS[0].cases[0], marks=skip)]
    metafunc.parametrize(("spec", "case"), params)


def check_every_way(
    spec: OpSpec, case: Case, target: Target, capability: int, device: torch.device
) -> Iterator[str]:
    """The ways, each after its check."""
    for way in ways.ways_of(spec, case, capability):
        ways.check_way(spec, case, way, target, device)
        yield way


def test_matmul_by_every_way(spec: OpSpec, case: Case, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("on a GPU: --device cuda")
    if reason := cuda.missing_reason():
        assert not os.environ.get("QKERN_REQUIRE_NATIVE"), reason
        pytest.skip(reason)
    capability = _cuda_matmul.device_limits(cuda.library()).capability
    found = list(check_every_way(spec, case, Target("cuda", None, "cuda"), capability, device))
    assert found
