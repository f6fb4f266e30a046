"""The pager of GPU memory, on a simulated GPU: order and bounds.

Its numbers are tested with those of the other pagers.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from lab.fake_gpu import FakeGpu
from qkern.optim import PagedAdamW, _chunks
from qkern.optim._chunks import MomentSpec
from tests.optim.schedules import BUDGET, KIB, SCHEDULES, Use
from tests.optim.simulated import expected, make_params, set_grads, trained


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
    assert PagedAdamW(make_params(), pager="unified").paging == {"cpu": "managed memory"}
    use(FakeGpu(managed=False))
    optimizer = PagedAdamW(make_params(), pager="unified")
    assert optimizer.pager == "unified"
    assert optimizer.paging == {"cpu": "pinned memory (no concurrent managed access)"}
    assert PagedAdamW(make_params(), pager="none").paging == {}


def test_few_moments_stay_on_the_device(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeGpu())
    params = make_params()
    assert PagedAdamW(params).pager == "none"
    assert PagedAdamW(params, budget_bytes=1 << 20).pager == "unified"
    for bits in (32, 8):
        optimizer = PagedAdamW(params, bits=bits, pager="none")
        trained(optimizer, params, 1)
        moments = [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
        least, most = sum(t.nbytes for t in moments), 64 * len(moments)  # each begins aligned
        monkeypatch.setattr(_chunks, "DEFAULT_BUDGET_BYTES", least + most)
        assert PagedAdamW(params, bits=bits).pager == "none"
        monkeypatch.setattr(_chunks, "DEFAULT_BUDGET_BYTES", least - 1)
        assert PagedAdamW(params, bits=bits).pager == "unified"


def test_managed_memory_has_no_bound_by_default(use: Use) -> None:
    gpu = use(FakeGpu())
    params = make_params()
    trained(PagedAdamW(params, pager="unified"), params, 3)
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
    pager.add(0, [MomentSpec(d, tuple(p.shape), 32) for d, p in zip(devices, params, strict=True)])
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
