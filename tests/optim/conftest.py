"""Fixtures of the optimizer's tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.fake_gpu import FakeGpu
from qkern.optim import _driver
from tests.optim.pagers import Made
from tests.optim.schedules import Use


@pytest.fixture(params=["none", "mmap", "managed", "pinned"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    if request.param in ("none", "mmap"):
        return Made(request.param, tmp_path)
    gpu = FakeGpu(managed=request.param == "managed", eagerness=1.0)
    monkeypatch.setattr(_driver, "current", gpu)
    return Made("unified", tmp_path)


@pytest.fixture(params=["direct", "page cache"])
def _direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "page cache":
        monkeypatch.delattr(os, "O_DIRECT")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put a simulated GPU in the place of the real one."""

    def use(gpu: FakeGpu) -> FakeGpu:
        monkeypatch.setattr(_driver, "current", gpu)
        return gpu

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield use
