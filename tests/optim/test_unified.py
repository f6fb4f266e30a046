"""The pager of GPU memory, on a simulated GPU: order, bounds, failures.

Its numbers are tested with those of the other pagers, in test_optim.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import shutil
import subprocess
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.fake_gpu import FakeGpu, failing
from qkern.optim import PagedAdamW, _driver
from qkern.optim._driver import DriverError

KIB = 1 << 10
BUDGET = 256 * KIB  # four chunks
SHAPES = ((50_000,), (30, 70), (9_000,), (40_000,), (1,))  # 791 KiB of moments in 32 bits
Use = Callable[[FakeGpu], FakeGpu]

SCHEDULES = [(0.0, 0), (1.0, 0), (0.5, 1), (0.7, 2), (0.3, 3), (0.6, 4)]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put a simulated GPU in the place of the real one."""

    def use(gpu: FakeGpu) -> FakeGpu:
        monkeypatch.setattr(_driver, "current", gpu)
        return gpu

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield use


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def trained(optimizer: PagedAdamW, params: list[nn.Parameter], steps: int) -> list[Tensor]:
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return [param.detach() for param in params]


def expected(steps: int, **options: Any) -> list[Tensor]:
    params = make_params()
    return trained(PagedAdamW(params, pager="none", **options), params, steps)


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "pinned"])
@pytest.mark.parametrize("budget", [64 * KIB, 128 * KIB, BUDGET, 1 << 20])
@pytest.mark.parametrize("bits", [32, 8])
def test_same_bits_in_any_order_of_the_streams(
    use: Use, managed: bool, budget: int, bits: int
) -> None:
    wanted = expected(4, bits=bits)
    for eagerness, seed in SCHEDULES:
        gpu = use(FakeGpu(managed, eagerness, seed))
        params = make_params()
        optimizer = PagedAdamW(params, bits=bits, pager="unified", budget_bytes=budget)
        found = trained(optimizer, params, 4)
        gpu.finish()
        assert all(map(torch.equal, found, wanted))
        assert 0 < gpu.most_resident <= budget
        assert 0 < optimizer.held_bytes <= budget


class Careless(FakeGpu):
    """Forgets every wait between two kinds of streams."""

    def __init__(self, forgotten: tuple[str, str], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forgotten = forgotten
        self._recorded_in: dict[int, str] = {}
        self._events: list[Any] = []

    def record(self, stream: Any) -> Any:
        event = super().record(stream)
        self._events.append(event)
        self._recorded_in[id(event)] = stream.name
        return event

    def wait(self, stream: Any, event: Any) -> None:
        if (stream.name, self._recorded_in[id(event)]) != self._forgotten:
            super().wait(stream, event)


@pytest.mark.parametrize(
    ("forgotten", "managed"),
    [
        # main is where updates go, side1 brings chunks, side2 takes them away.
        (("main", "side1"), True),
        (("main", "side1"), False),
        (("side2", "main"), False),
        (("side1", "side2"), True),
        (("side1", "side2"), False),
    ],
    ids=[
        "launch before prefetch",
        "launch before copy",
        "copy back before launch",
        "prefetch before eviction",
        "copy before copy back",
    ],
)
def test_every_wait_is_needed(use: Use, forgotten: tuple[str, str], managed: bool) -> None:
    """The simulation finds a missing wait: wrong numbers, or more on the GPU than the budget."""
    wanted = expected(4)
    wrong = 0
    for eagerness, seed in SCHEDULES:
        gpu = use(Careless(forgotten, managed, eagerness, seed))
        params = make_params()
        try:
            found = trained(PagedAdamW(params, pager="unified", budget_bytes=128 * KIB), params, 4)
            gpu.finish()
        except (AssertionError, RuntimeError):
            wrong += 1
            continue
        wrong += not all(map(torch.equal, found, wanted)) or gpu.most_resident > 128 * KIB
    assert wrong


def test_prefetch_runs_ahead_and_eviction_behind(use: Use) -> None:
    gpu = use(FakeGpu())
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    trained(optimizer, params, 1)
    start = len(gpu.calls)
    trained(optimizer, params, 1)
    calls = gpu.calls[start:]
    launches = [index for index, call in enumerate(calls) if call.name == "launch"]
    assert len({calls[index].address for index in launches}) == len(launches) == 13
    for number, index in enumerate(launches):
        address = calls[index].address
        brought = [i for i, c in enumerate(calls) if c.name == "prefetch" and c.address == address]
        assert len(brought) == 1
        # Two chunks are under way before the first launch, and one more at each of the others.
        if number:
            assert brought[0] < launches[number - 1]
    evictions = [index for index, call in enumerate(calls) if call.name == "evict"]
    assert evictions
    for index in evictions:
        # The one that is evicted now was updated in this step or stayed from the last one.
        later = [i for i in launches if i > index and calls[i].address == calls[index].address]
        assert not later
    assert {c.stream for c in calls if c.name == "launch"} == {"main"}
    assert {c.stream for c in calls if c.name == "prefetch"} == {"side1"}
    assert {c.stream for c in calls if c.name == "evict"} == {"side2"}
    assert "synchronize" not in gpu.names()


def test_all_memory_is_advised_once(use: Use) -> None:
    gpu = use(FakeGpu())
    params = make_params()
    trained(PagedAdamW(params, pager="unified", budget_bytes=BUDGET), params, 3)
    advised = [call.address for call in gpu.calls if call.name == "advise"]
    allocated = [call.address for call in gpu.calls if call.name == "managed"]
    assert advised == allocated
    assert len(set(advised)) == 13


def test_what_fits_the_budget_is_not_copied_again(use: Use) -> None:
    gpu = use(FakeGpu(managed=False))
    params = make_params()
    trained(PagedAdamW(params, pager="unified", budget_bytes=1 << 20), params, 3)
    assert gpu.names("copy") == []

    gpu = use(FakeGpu(managed=False))
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    trained(optimizer, params, 2)
    start = len(gpu.calls)
    trained(optimizer, params, 1)
    calls = gpu.calls[start:]
    # Of 13 chunks four were there; they left for others, all but the last four of which did too.
    assert sum(call.name == "launch" for call in calls) == 13
    assert sum(call.name == "copy" and call.stream == "side1" for call in calls) == 9
    assert sum(call.name == "copy" and call.stream == "side2" for call in calls) == 9


def test_pinned_and_managed_by_capability(use: Use) -> None:
    use(FakeGpu(managed=True))
    assert PagedAdamW(make_params()).paging == {"cpu": "managed memory"}
    use(FakeGpu(managed=False))
    optimizer = PagedAdamW(make_params())
    assert optimizer.pager == "unified"
    assert optimizer.paging == {"cpu": "pinned memory (no concurrent managed access)"}
    assert PagedAdamW(make_params(), pager="none").paging == {}


def test_managed_memory_has_no_bound_by_default(use: Use) -> None:
    gpu = use(FakeGpu())
    params = make_params()
    trained(PagedAdamW(params), params, 3)
    assert gpu.names("evict") == []
    assert len(gpu.names("prefetch")) == 3  # again each step: the driver may have moved it away


@pytest.mark.parametrize("managed", [True, False])
def test_nothing_is_allocated_before_the_first_step(use: Use, managed: bool) -> None:
    gpu = use(FakeGpu(managed))
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    assert gpu.calls == []
    assert optimizer.state_dict()["state"] == {}
    set_grads(params, 0)
    for param in params[1:]:
        param.grad = None
    optimizer.step()
    assert len(gpu.names("managed", "pinned")) == 7  # the chunks of the first parameter


# Failures.


def test_without_hints_it_goes_on(use: Use) -> None:
    wanted = expected(3)
    for name in ("advise", "prefetch", "evict"):
        gpu = use(FakeGpu(eagerness=0.5))
        gpu.failures = failing(name, 1, "CUDA_ERROR_INVALID_DEVICE")
        gpu.expects_prefetch = name == "advise"
        params = make_params()
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
        hint = "prefetch" if name == "evict" else name
        text = f"cpu: goes on without {hint} of managed memory: {name}: CUDA_ERROR_INVALID_DEVICE"
        with pytest.warns(UserWarning, match=text) as told:
            found = trained(optimizer, params, 3)
        gpu.finish()
        assert len(told) == 1
        assert all(map(torch.equal, found, wanted))


FAILURES = [
    ("managed", True, 0),
    ("managed", True, 5),
    ("pinned", False, 0),
    ("pinned", False, 5),
    ("on_device", False, 0),
    ("copy", False, 0),
    ("copy", False, 7),
    ("launch", True, 0),
    ("launch", False, 9),
    ("launch", True, 12),
    ("record", True, 0),
    ("record", False, 8),
    ("wait", True, 0),
    ("wait", False, 8),
]


@pytest.mark.parametrize(("name", "managed", "count"), FAILURES)
def test_a_failure_says_what_is_half_done_and_a_checkpoint_mends_it(
    use: Use, name: str, managed: bool, count: int
) -> None:
    gpu = use(FakeGpu(managed, 0.5))
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    trained(optimizer, params, 1)
    saved = [param.detach().clone() for param in params], optimizer.state_dict()
    gpu.finish()
    saved[0][:] = [param.detach().clone() for param in params]
    steps = [float(optimizer.state[param]["step"]) for param in params]
    fresh = name in ("managed", "pinned", "on_device")
    if fresh:  # all memory is there after the first step
        gpu = use(FakeGpu(managed, 0.5))
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    gpu.failures = failing(name, gpu._counts[name] + count)
    set_grads(params, 1)
    with pytest.raises((DriverError, RuntimeError), match=f"{name}: CUDA_ERROR_UNKNOWN") as caught:
        optimizer.step()
    if name in ("managed", "pinned"):
        assert "bytes of host memory for moments of cpu: " in str(caught.value)
    gpu.failures = {}
    gpu.finish()
    broke_off = "a step broke off" in str(caught.value)
    changed = not all(map(torch.equal, [p.detach() for p in params], saved[0]))
    assert changed <= broke_off
    if not fresh:
        assert [float(optimizer.state[param]["step"]) for param in params] == steps
    # The same optimizer goes on from a checkpoint as if nothing had happened.
    for param, before in zip(params, saved[0], strict=True):
        param.data.copy_(before)
    optimizer.load_state_dict(saved[1])
    for step in (1, 2):
        set_grads(params, step)
        optimizer.step()
    gpu.finish()
    assert all(map(torch.equal, [param.detach() for param in params], expected(3)))
    assert gpu.most_resident <= BUDGET


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("name", ["launch", "wait", "record"])
def test_what_a_failed_step_had_brought_leaves_whole(use: Use, managed: bool, name: str) -> None:
    """The first update fails; the chunks on their way for it make room for others unused."""

    def steps_after(optimizer: PagedAdamW, params: list[nn.Parameter]) -> list[Tensor]:
        for step in (2, 3):
            set_grads(params, step)
            if step == 2:
                params[0].grad = None
            optimizer.step()
        return [param.detach() for param in params]

    whole = make_params()
    other = PagedAdamW(whole, pager="none")
    trained(other, whole, 2)
    wanted = steps_after(other, whole)
    for (eagerness, seed), budget in itertools.product(SCHEDULES, (64 * KIB, 128 * KIB, BUDGET)):
        gpu = use(FakeGpu(managed, eagerness, seed))
        params = make_params()
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=budget)
        trained(optimizer, params, 2)
        for param in params[1:]:
            param.grad = None
        gpu.failures = failing(name, gpu._counts[name])
        with pytest.raises(DriverError):
            optimizer.step()
        gpu.failures = {}
        found = steps_after(optimizer, params)
        gpu.finish()
        assert all(map(torch.equal, found, wanted))


def test_a_full_device_gets_fewer_slots(use: Use) -> None:
    gpu = use(FakeGpu(managed=False, eagerness=0.5, memory=200 * KIB))
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=512 * KIB)
    found = trained(optimizer, params, 3)
    gpu.finish()
    assert all(map(torch.equal, found, expected(3)))
    assert len(gpu.names("on_device")) == 3
    assert optimizer.held_bytes <= 200 * KIB


def test_a_device_without_any_room(use: Use) -> None:
    use(FakeGpu(managed=False, memory=10 * KIB))
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=512 * KIB)
    before = [param.detach().clone() for param in params]
    set_grads(params, 0)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.state_dict()["state"] == {}


def test_capture_is_refused(use: Use) -> None:
    gpu = use(FakeGpu())
    params = make_params()
    optimizer = PagedAdamW(params)
    set_grads(params, 0)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match='pager: got "unified" while a CUDA graph is captured'):
        optimizer.step()


# Several devices, and parameters that come later.


def test_each_device_has_its_own_budget(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parameters told apart by hand, because here all are on one device."""
    gpu = use(FakeGpu(eagerness=0.5))
    devices = [torch.device("cpu", number) for number in (0, 1, 0, 1, 0)]
    params = make_params()
    optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
    pager = optimizer._pager
    pager.close()
    pager._numels.clear()
    pager.add(devices, [tuple(param.shape) for param in params], [32] * len(params))
    pools = list(pager._pools.values())
    found = trained(optimizer, params, 3)
    gpu.finish()
    assert all(map(torch.equal, found, expected(3)))
    of_pools = [{p.param for c in pool.chunks for p in c.pieces} for pool in pools]
    assert of_pools == [{0, 2, 4}, {1, 3}]
    assert all(0 < pool.resident_bytes <= BUDGET for pool in pools)
    state = optimizer.state_dict()["state"]
    assert all(torch.isfinite(state[index]["exp_avg"]).all() for index in range(len(params)))


@pytest.mark.parametrize("managed", [True, False])
def test_parameters_may_come_later(use: Use, managed: bool) -> None:
    gpu = use(FakeGpu(managed, eagerness=0.5))
    results = []
    for pager in ("none", "unified"):
        params = make_params()
        options = {} if pager == "none" else {"budget_bytes": BUDGET}
        optimizer = PagedAdamW(params[1:3], pager=pager, **options)
        trained(optimizer, params[1:3], 2)
        optimizer.add_param_group({"params": [params[0], *params[3:]], "lr": 0.01})
        results.append(trained(optimizer, params, 3))
    gpu.finish()
    assert all(map(torch.equal, *results))
    assert gpu.most_resident <= BUDGET


def test_memory_goes_with_the_optimizer(use: Use) -> None:
    for managed in (True, False):
        gpu = use(FakeGpu(managed, eagerness=1.0))
        params = make_params()
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=BUDGET)
        trained(optimizer, params, 2)
        memories = [weakref.ref(memory) for memory in gpu._memories]
        assert len(memories) > 10
        gpu._memories.clear()
        del optimizer
        gc.collect()
        assert not any(memory() is not None for memory in memories)


def test_a_parameter_elsewhere_is_refused(use: Use) -> None:
    params = make_params()
    with pytest.raises(ValueError, match='pager: got "unified" with a parameter on cpu; takes'):
        PagedAdamW(params, pager="unified")  # the real driver
    use(FakeGpu())
    with pytest.raises(ValueError, match="budget_bytes: got 1024; takes 65536 and up"):
        PagedAdamW(params, pager="unified", budget_bytes=1024)


# How the real driver's functions are called, on a library that writes down what it is given.

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
