"""How the real driver's functions are called, on a library that writes down what it is given."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from qkern.optim import _driver
from qkern.optim._driver import DriverError

LIBRARY = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
char told[4096];
int fails;
#define TELL(...) snprintf(told + strlen(told), sizeof told - strlen(told), __VA_ARGS__)
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  TELL("attribute %d of %d;", attribute, device);
  *value = attribute == 83 ? 1 : !fails;
  return 0;
}
int cuMemAllocManaged(uint64_t *address, size_t bytes, unsigned flags) {
  TELL("managed %zu flags %u;", bytes, flags);
  if (fails) return 2;
  *address = 0x7f0000000000u;
  return 0;
}
int cuMemFree_v2(uint64_t address) { TELL("free %lx;", address); return 0; }
int cuMemAdvise(uint64_t address, size_t bytes, int advice, int device) {
  TELL("advise %lx %zu: %d for %d;", address, bytes, advice, device);
  return fails ? 101 : 0;
}
int cuMemPrefetchAsync(uint64_t address, size_t bytes, int device, void *stream) {
  TELL("prefetch %lx %zu to %d in %lx;", address, bytes, device, (long)stream);
  return 0;
}
int cuGetErrorName(int error, const char **name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_DEVICE";
  return 0;
}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "cuda.c").write_text(LIBRARY)
    path = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, tmp_path / "cuda.c"], check=True)
    found = ctypes.CDLL(str(path))
    _driver._declare(found)
    monkeypatch.setattr(_driver, "_library", lambda: found)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def told(library: ctypes.CDLL) -> list[str]:
    """What was called since the last time."""
    text = ctypes.c_char.in_dll(library, "told")
    calls = ctypes.string_at(ctypes.addressof(text)).decode()
    text.value = b"\0"
    return calls.split(";")[:-1]


def set_failing(library: ctypes.CDLL) -> None:
    ctypes.c_int.in_dll(library, "fails").value = 1


GPU = torch.device("cuda", 3)


def test_capability_is_asked_of_the_driver(library: ctypes.CDLL) -> None:
    assert _driver.CudaDriver().why_not_managed(GPU) is None
    assert told(library) == ["attribute 83 of 3", "attribute 89 of 3"]
    set_failing(library)
    assert _driver.CudaDriver().why_not_managed(GPU) == "no concurrent managed access"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_driver, "_library", lambda: None)
    assert _driver.CudaDriver().why_not_managed(GPU) == "no libcuda.so.1"


def test_managed_memory_is_freed_once(library: ctypes.CDLL) -> None:
    memory = _driver._ManagedMemory(5 << 30, GPU)
    interface = memory.__cuda_array_interface__
    assert interface["shape"] == (5 << 30,)
    assert interface["data"] == (0x7F0000000000, False)
    assert told(library) == [f"managed {5 << 30} flags 1"]
    memory.__del__()
    del memory
    assert told(library) == ["free 7f0000000000"]
    set_failing(library)
    with pytest.raises(DriverError, match="cuMemAllocManaged: CUDA_ERROR_OUT_OF_MEMORY"):
        _driver._ManagedMemory(1 << 20, GPU)
    assert told(library) == ["managed 1048576 flags 1"]


def test_hints_reach_the_driver(library: ctypes.CDLL) -> None:
    memory = types.SimpleNamespace(
        data_ptr=lambda: 0x7F1234567000, numel=lambda: 5 << 30, device=GPU
    )
    driver = _driver.CudaDriver()
    driver.advise(memory)  # belongs on the host, and the device uses it there
    size = 5 << 30
    assert told(library) == [
        f"advise 7f1234567000 {size}: 3 for -1",
        f"advise 7f1234567000 {size}: 5 for 3",
    ]
    stream = types.SimpleNamespace(cuda_stream=0x7FFFAABBCCDD)
    driver.prefetch(memory, False, stream)
    driver.prefetch(memory, True, stream)
    assert told(library) == [
        f"prefetch 7f1234567000 {size} to 3 in 7fffaabbccdd",
        f"prefetch 7f1234567000 {size} to -1 in 7fffaabbccdd",
    ]
    set_failing(library)
    with pytest.raises(DriverError, match="cuMemAdvise: CUDA_ERROR_INVALID_DEVICE"):
        driver.advise(memory)
