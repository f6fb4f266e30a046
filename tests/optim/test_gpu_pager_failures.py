"""The pager of GPU memory where calls fail and memory is short, on a simulated GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lab.fake_gpu import FakeGpu, failing
from qkern.optim import PagedAdamW
from qkern.optim._driver import DriverError
from tests.optim.schedules import BUDGET, KIB, SCHEDULES, Use
from tests.optim.simulated import expected, make_params, set_grads, trained


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
    optimizer = PagedAdamW(params, pager="unified")
    set_grads(params, 0)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match='pager: got "unified" while a CUDA graph is captured'):
        optimizer.step()
