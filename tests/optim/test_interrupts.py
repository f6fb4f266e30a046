"""An exception anywhere in the optimizer loses nothing: Ctrl-C, or what a signal handler raises."""

from __future__ import annotations

import _thread
import copy
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lab.fake_gpu import FakeGpu
from qkern.optim import ChunkFileError, PagedAdamW, _driver
from qkern.optim._chunk_file import ChunkFile
from qkern.optim._crew import Crew
from qkern.optim._locked_file import LockedFile
from qkern.optim._stream import ChunkStream
from tests.optim.chunk_files import create, reopened, take_step
from tests.optim.compare import assert_same, assert_same_state
from tests.optim.interrupts import Interrupter, in_a_thread
from tests.optim.pagers import LEAST_BUDGET
from tests.optim.params import make_params, set_grads
from tests.optim.versions import SIZES, contents, payload, version

PARAMS = ((12_000,), (3,), (90, 90))  # three chunks
OPTIONS = {"bits": 32, "max_grad_norm": 1.0}


@pytest.fixture
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that go on while the main thread is interrupted, and afterwards."""
    real = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.001)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)


class Whole:
    """Parameters and states after any number of steps that nothing interrupts."""

    def __init__(self) -> None:
        self._params = make_params(PARAMS)
        self._optimizer = PagedAdamW(self._params, **OPTIONS)
        self.params: list[list[Tensor]] = []
        self.states: list[dict[str, Any]] = []
        self._keep()

    def _keep(self) -> None:
        self.params.append([param.detach().clone() for param in self._params])
        self.states.append(copy.deepcopy(self._optimizer.state_dict()))

    def after(self, steps: int) -> tuple[list[Tensor], dict[str, Any]]:
        while len(self.states) <= steps:
            set_grads(self._params, len(self.states) - 1)
            self._optimizer.step()
            self._keep()
        return self.params[steps], self.states[steps]


def threads_end(count: int) -> bool:
    """Whether there are ``count`` threads again, once those that are ending have ended."""
    deadline = time.monotonic() + 60
    while _thread._count() > count and time.monotonic() < deadline:
        time.sleep(0.001)
    return _thread._count() == count


def interrupted(call: Callable[[], object], interrupter: Interrupter) -> bool:
    try:
        with interrupter:
            call()
    except BaseException as error:
        if not interrupter.raised_in:
            raise
        interrupter.text = str(error)
        return True
    return False


class Steps:
    """An optimizer with a file whose steps are interrupted, and what it should hold."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.options, self.whole = path, options, Whole()
        self.params = make_params(PARAMS)
        self.optimizer = PagedAdamW(self.params, path=path, **OPTIONS, **options)
        self.at = 0
        self.threads = _thread._count()
        self.prepare()
        self.optimizer.step()
        self.check()

    def prepare(self) -> None:
        """Parameters as they should be before the next step, and its gradients."""
        self.whole.after(self.at + 1)
        for param, value in zip(self.params, self.whole.params[self.at], strict=True):
            param.data.copy_(value)
        set_grads(self.params, self.at)

    def check(self) -> None:
        """All is as before the step or as after it; the parameters too if the step counts."""
        state = self.optimizer.state_dict()
        steps = int(state["state"][0]["step"]) if state["state"] else 0
        assert steps in (self.at, self.at + 1)
        params, expected = self.whole.after(steps)
        assert_same_state(state, expected)
        if steps > self.at:
            assert_same(self.params, params)
        self.at = steps

    def check_file(self) -> None:
        """The file holds the same, for whoever opens it next."""
        self.optimizer.close()
        self.optimizer = PagedAdamW(
            self.params, path=self.path, resume=True, **OPTIONS, **self.options
        )
        self.optimizer._pager._file.verify()
        self.check()


def check_steps(
    steps: Steps,
    places: Iterable[int],
    opcodes: bool,
    error: type[BaseException] = KeyboardInterrupt,
) -> set[str]:
    """Interrupt a step at each place until it ends before; gives the functions that were."""
    seen = set()
    for number, place in enumerate(places):
        interrupter = Interrupter(place, opcodes, error)
        steps.prepare()
        ended = not interrupted(steps.optimizer.step, interrupter)
        before = steps.at
        steps.check()
        assert steps.at > before or not ended
        assert threads_end(steps.threads), interrupter.raised_in
        if ended:
            break
        seen.add(interrupter.raised_in.split(":")[0])
        if number % 50 == 0:
            steps.check_file()
    steps.check_file()
    steps.prepare()
    steps.optimizer.step()
    steps.check()
    assert steps.optimizer._pager.steps == [steps.at] * len(PARAMS)
    return seen


@pytest.mark.usefixtures("_slow_disk")
@pytest.mark.parametrize("budget", [LEAST_BUDGET, 4 * LEAST_BUDGET])
@in_a_thread
def test_an_interrupt_at_any_line_of_a_step(tmp_path: Path, budget: int) -> None:
    steps = Steps(tmp_path / "state", budget_bytes=budget)
    seen = check_steps(steps, itertools.count(budget > LEAST_BUDGET, 7), opcodes=False)
    assert len(seen) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "error", "stride"),
    [(LEAST_BUDGET, KeyboardInterrupt, 1), (4 * LEAST_BUDGET, MemoryError, 5)],
)
@in_a_thread
def test_an_exception_at_any_bytecode_of_a_step(
    tmp_path: Path, budget: int, error: type[BaseException], stride: int
) -> None:
    steps = Steps(tmp_path / "state", budget_bytes=budget)
    seen = check_steps(steps, itertools.count(0, stride), opcodes=True, error=error)
    assert len(seen) > 20


CLEANING = [
    (ChunkStream, "recover"),
    (ChunkStream, "stop"),
    (ChunkStream, "drop"),
    (ChunkFile, "rollback"),
    (LockedFile, "wait_idle"),
    (Crew, "stop"),
]


@pytest.mark.usefixtures("_slow_disk")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"), CLEANING, ids=lambda value: getattr(value, "__name__", value)
)
@in_a_thread
def test_a_second_interrupt_while_the_first_is_dealt_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: str
) -> None:
    """What it keeps from being done, the next call does."""
    real = getattr(owner, name)
    first: list[Interrupter] = []

    def interrupted_again(self: Any) -> Any:
        again = bool(first and first[0].raised_in)
        if again:
            first.clear()
        if again and when == "before":
            raise KeyboardInterrupt
        real(self)
        if again:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted_again)
    steps = Steps(tmp_path / "state", budget_bytes=LEAST_BUDGET)
    seconds = 0
    for place in itertools.count(0, 41):
        first[:] = [Interrupter(place)]
        steps.prepare()
        if not interrupted(steps.optimizer.step, first[0]):
            break
        seconds += not first
        first.clear()
        steps.check()
        assert threads_end(steps.threads)
    first.clear()
    assert seconds > 3
    steps.check_file()


@in_a_thread
def test_an_interrupt_at_any_line_of_saving_and_loading(tmp_path: Path) -> None:
    """``state_dict`` changes nothing; ``load_state_dict`` does all, options too, or nothing."""
    steps = Steps(tmp_path / "state", budget_bytes=LEAST_BUDGET)
    for place in itertools.count(0, 5):
        if not interrupted(steps.optimizer.state_dict, Interrupter(place)):
            break
        steps.check()
        assert threads_end(steps.threads)
    assert place > 100
    states = [copy.deepcopy(steps.whole.after(count)[1]) for count in (1, 5)]
    for number, state in enumerate(states):
        state["param_groups"][0]["lr"] = float(number)
    now = 0
    steps.optimizer.load_state_dict(states[0])
    for place in itertools.count(0, 5):
        load = partial(steps.optimizer.load_state_dict, states[1 - now])
        if not interrupted(load, Interrupter(place)):
            break
        found = steps.optimizer.state_dict()
        now = int(found["param_groups"][0]["lr"])
        assert_same_state(found, states[now])
        assert threads_end(steps.threads)
        assert steps.optimizer._pager._file.uncommitted == frozenset()
    assert place > 200
    steps.at = 5 if now == 0 else 1
    steps.check_file()


@in_a_thread
def test_an_interrupt_at_any_line_of_opening_and_closing(tmp_path: Path) -> None:
    """What is interrupted can be called again; no file is left that keeps the next from it."""
    steps = Steps(tmp_path / "state", budget_bytes=LEAST_BUDGET)
    path = tmp_path / "new"

    def create() -> None:
        made.append(PagedAdamW(steps.params, path=path, budget_bytes=LEAST_BUDGET))

    for place in itertools.count(0, 4):
        made: list[PagedAdamW] = []
        ended = not interrupted(create, Interrupter(place))
        files = {file.name for file in tmp_path.iterdir()} - {"state"}
        assert files <= {"new.partial", "new"}
        if ended:
            break
        if "new" in files:  # whole, and not in use
            PagedAdamW(steps.params, path=path, resume=True).close()
            path.unlink()
    assert place > 50
    made[0].close()
    for place in itertools.count(0, 4):
        if not interrupted(steps.optimizer.close, Interrupter(place)):
            break
        steps.check_file()
    for place in itertools.count(0, 4):
        steps.optimizer.close()
        ended = not interrupted(
            lambda: PagedAdamW(steps.params, path=steps.path, resume=True), Interrupter(place)
        )
        steps.check_file()  # it is not in use either
        if ended:
            break
    assert place > 50


@in_a_thread
def test_an_interrupt_at_any_line_of_verifying(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "state")
    for place in itertools.count():
        if not interrupted(steps.optimizer._pager._file.verify, Interrupter(place)):
            break
        steps.check()
    steps.check_file()


@pytest.mark.parametrize("started", range(5))
def test_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """It shows before anything is written."""
    steps = Steps(tmp_path / "state", budget_bytes=LEAST_BUDGET)
    real, count = _thread.start_new_thread, 0

    def start(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > started:
            raise RuntimeError("can't start new thread")
        return real(*args)

    steps.prepare()
    written = steps.optimizer._pager.stats.written_bytes
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start)
        with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
            steps.optimizer.step()
    assert steps.optimizer._pager.stats.written_bytes == written
    assert_same(steps.params, steps.whole.params[steps.at])
    assert threads_end(steps.threads)
    steps.check()
    steps.prepare()
    steps.optimizer.step()
    steps.check()


def test_a_late_write_is_refused(tmp_path: Path) -> None:
    """Of a thread that begins it when its run has been taken back, however late that is."""
    with create(tmp_path / "state") as file:
        take_step(file, 1)
        late = file.draft
        file.write(0, payload(0, 2, SIZES[0]), late)
        file.rollback()
        for _ in range(2):
            with pytest.raises(ChunkFileError, match="got a write after its rollback"):
                file.write(0, payload(0, 2, SIZES[0]), late)
            assert contents(file) == version(1)
            file.commit({"step": 1})
        assert file.uncommitted == frozenset()


@pytest.mark.parametrize("call", ["rollback", "close"])
def test_a_write_under_way_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Else it might reach the chunk's next version; or, after a close, another file."""
    real, begun, goes_on = os.pwritev, threading.Event(), threading.Event()
    order: list[str] = []

    def pwritev(*args: Any) -> int:
        begun.set()
        assert goes_on.wait(60)
        order.append("written")
        return real(*args)

    file = create(tmp_path / "state")
    take_step(file, 1)
    monkeypatch.setattr(os, "pwritev", pwritev)
    with ThreadPoolExecutor(2) as threads:
        write = threads.submit(file.write, 0, payload(0, 2, SIZES[0]))
        assert begun.wait(60)
        ends = threads.submit(lambda: (getattr(file, call)(), order.append(call)))
        while not (file.draft.dropped or file.is_closed):
            time.sleep(0.001)
        goes_on.set()
        write.result()
        ends.result()
    monkeypatch.undo()
    assert order == ["written", call]
    file.close()
    assert reopened(tmp_path / "state") == (1, version(1))


# Without a file.


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "pinned"])
@in_a_thread
def test_an_interrupt_at_any_line_with_moments_in_host_memory(managed: bool) -> None:
    """The step may be half done; a state loaded afterwards makes all right, in every chunk."""
    gpu = FakeGpu(managed, eagerness=0.3, seed=1)
    with mock.patch.object(_driver, "current", gpu):
        whole, params = Whole(), make_params(PARAMS)
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=2 * LEAST_BUDGET, **OPTIONS)
    told = 0
    for place in itertools.count():
        interrupter = Interrupter(place, within=("qkern.optim._gpu",))
        set_params(params, whole.after(0)[0])
        optimizer.load_state_dict(whole.after(0)[1])
        for step in range(4):
            set_grads(params, step)
            if step != 2:
                optimizer.step()
                continue
            kept = [param.detach().clone() for param in params]
            if not interrupted(optimizer.step, interrupter):
                continue
            gpu.finish()
            changed = not all(map(torch.equal, params, kept))
            told += "a step broke off" in interrupter.text
            if not changed:  # then nothing has, and nothing need be loaded
                assert_same_state(optimizer.state_dict(), whole.after(2)[1])
                assert optimizer.state_dict()["state"][0]["step"] == 2
            set_params(params, whole.after(2)[0])
            optimizer.load_state_dict(whole.after(2)[1])
            optimizer.step()
        gpu.finish()
        assert_same(params, whole.after(4)[0])
        assert_same_state(optimizer.state_dict(), whole.after(4)[1])
        assert optimizer.held_bytes <= 2 * LEAST_BUDGET
        if not interrupter.raised_in:
            break
    assert place > 100
    assert told


def set_params(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "pinned"])
@in_a_thread
def test_an_interrupt_at_any_line_of_adding_a_group(managed: bool) -> None:
    """The group is there or it is not; either way each parameter takes one step at a time."""
    for place in itertools.count(0, 3):
        gpu = FakeGpu(managed, eagerness=0.3, seed=place)
        whole = Whole()
        params = make_params(PARAMS)
        with mock.patch.object(_driver, "current", gpu):
            optimizer = PagedAdamW(
                params[:1], pager="unified", budget_bytes=2 * LEAST_BUDGET, **OPTIONS
            )
            optimizer.max_grad_norm = None
            interrupter = Interrupter(place)
            add = partial(optimizer.add_param_group, {"params": params[1:]})
            if interrupted(add, interrupter):
                assert len(optimizer.param_groups) == 1
                set_grads(params[:1], 9)
                optimizer.zero_grad()
                optimizer.step()
                add()
        whole = [param.detach().clone().requires_grad_() for param in params]
        other = PagedAdamW(whole)
        for step in range(2):
            for optimizer_, of_it in ((optimizer, params), (other, whole)):
                set_grads(of_it, step)
                optimizer_.step()
        gpu.finish()
        assert_same(params, whole)
        if not interrupter.raised_in:
            break
    assert place > 20


@in_a_thread
def test_an_interrupt_at_any_line_in_memory() -> None:
    """Each parameter has as many steps as its counter says, but where the update itself breaks."""
    whole = Whole()
    params = make_params(PARAMS)
    optimizer = PagedAdamW(params, **OPTIONS)
    for place in itertools.count():
        set_params(params, whole.after(0)[0])
        optimizer.load_state_dict(whole.after(0)[1])
        set_grads(params, 0)
        interrupter = Interrupter(place)
        ended = not interrupted(optimizer.step, interrupter)
        state = optimizer.state_dict()["state"]
        for index, param in enumerate(params):
            counted = int(state[index]["step"]) if index in state else 0
            if counted:
                assert_same([param], whole.after(1)[0][index : index + 1])
            for key in ("exp_avg", "exp_avg_sq") if counted else ():
                assert torch.equal(state[index][key], whole.after(1)[1]["state"][index][key])
        # It can be loaded over, and goes on.
        set_params(params, whole.after(1)[0])
        optimizer.load_state_dict(whole.after(1)[1])
        set_grads(params, 1)
        optimizer.step()
        assert_same(params, whole.after(2)[0])
        assert_same_state(optimizer.state_dict(), whole.after(2)[1])
        if ended:
            break
    assert place > 50
