"""The benchmark of the host's time before a launch on a GPU: what it calls, and what it leaves."""

from __future__ import annotations

import gpu_host
import pytest
import torch

from lab.cuda.emulator import build
from qkern.backends import _compiled

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)


def test_every_call_is_timed_by_python_and_on_tensors() -> None:
    library = build.load(build.build())
    if not _compiled.reads_tensors(library):
        pytest.skip("a torch without DLPack's C exchange interface")
    dense = gpu_host.dense_calls((64, 64), 1)
    calls = gpu_host.linear_calls((64, 64), 1, torch.float32)
    lora = gpu_host.lora_calls((64, 64), 1)
    with gpu_host.counted(library):
        rows = [*gpu_host.measure(library, calls, dense, 1)]
        rows += gpu_host.measure(library, lora, dense, 1)
    assert [row["call"] for row in rows] == [*dense, *dense]
    for row in rows:
        for times in (row["median"], row["fastest"]):
            assert set(times) == set(gpu_host.CANDIDATES)
            assert min(times.values()) > 0
    with gpu_host.kernels(library, True):
        assert calls["plain"]().abs().sum() > 0  # type: ignore[attr-defined]
    assert library.launches()[0] > 0
