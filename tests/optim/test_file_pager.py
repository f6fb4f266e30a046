"""Moments in a file: the numbers of memory, whatever happens to the process and the disk."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lab.processes import environment
from qkern import testing
from qkern.optim import ChunkFileError, PagedAdamW, _updates
from qkern.optim._moments import Moments
from tests.optim.compare import assert_same, assert_same_state
from tests.optim.pagers import LEAST_BUDGET
from tests.optim.params import SHAPES, make_params, set_grads, train
from tests.optim.system import exit_status, in_child


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 3 * LEAST_BUDGET, 16 << 20])
@pytest.mark.parametrize("bits", [32, 8])
def test_file_equals_memory(tmp_path: Path, bits: int, budget: int) -> None:
    in_file, in_memory = make_params(), make_params()
    options = {"bits": bits, "lr": 1e-2, "max_grad_norm": 0.5}
    optimizer = PagedAdamW(in_file, path=tmp_path / "state", budget_bytes=budget, **options)
    other = PagedAdamW(in_memory, **options)
    for step in range(0, 30, 5):
        train(optimizer, in_file, 5, step)
        train(other, in_memory, 5, step)
        assert_same(in_file, in_memory)
        assert optimizer._pager.held_bytes <= budget
    assert_same_state(optimizer.state_dict(), other.state_dict())


@settings(max_examples=100)
@given(
    shapes=st.lists(st.lists(st.integers(0, 90), max_size=3).map(tuple), min_size=1, max_size=6),
    big=st.integers(0, 60_000),
    bits=st.sampled_from([32, 8]),
    least=st.sampled_from([0, 300, 4096]),
    budget=st.integers(LEAST_BUDGET, 1 << 20),
    dtypes=st.lists(st.sampled_from(testing.DTYPES), min_size=7, max_size=7),
    skipped=st.lists(st.booleans(), min_size=21, max_size=21),
)
def test_file_equals_memory_for_any_shapes(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    big: int,
    bits: int,
    least: int,
    budget: int,
    dtypes: list[torch.dtype],
    skipped: list[bool],
) -> None:
    shapes.append((big,))
    pair = []
    path = tmp_path_factory.mktemp("any") / "state"
    for options in ({}, {"path": path, "budget_bytes": budget}):
        params = [make_params((s,), d)[0] for s, d in zip(shapes, dtypes, strict=False)]
        optimizer = PagedAdamW(
            params, bits=bits, min_8bit_size=least, stochastic_rounding=True, **options
        )
        for step in range(3):
            set_grads(params, step)
            for index, param in enumerate(params):
                if skipped[7 * step + index]:
                    param.grad = None
            optimizer.step()
        pair.append((params, optimizer))
    (in_memory, other), (in_file, optimizer) = pair
    assert_same(in_file, in_memory)
    assert_same_state(optimizer.state_dict(), other.state_dict())
    optimizer.close()
    path.unlink()


def test_chunks_without_a_gradient_stay_on_disk(tmp_path: Path) -> None:
    params = make_params(((300, 100),) * 4)
    optimizer = PagedAdamW(params, path=tmp_path / "state", budget_bytes=LEAST_BUDGET)
    set_grads(params, 0)
    for param in params[1:]:
        param.grad = None
    optimizer.step()
    # A parameter has 240 kB; chunks have 64 KiB, so that its last may hold some of the next.
    assert 240_000 <= optimizer._pager.stats.written_bytes <= 240_000 + 2 * (64 << 10)


def test_moments_on_another_device_are_brought_and_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with parameters on a GPU, for which copies on the CPU stand here."""
    monkeypatch.setattr(Moments, "on", lambda moments, device: moments._replace(**clones(moments)))
    params, whole = make_params(), make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state", budget_bytes=LEAST_BUDGET, bits=8)
    other = PagedAdamW(whole, bits=8)
    train(optimizer, params, 3)
    train(other, whole, 3)
    assert_same(params, whole)
    assert_same_state(optimizer.state_dict(), other.state_dict())


def clones(moments: Moments) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in moments._asdict().items() if t is not None}


def test_resume_after_close(tmp_path: Path) -> None:
    for bits in (32, 8):
        path = tmp_path / f"state{bits}"
        params, whole = make_params(), make_params()
        train(PagedAdamW(whole, bits=bits), whole, 7)
        optimizer = PagedAdamW(params, bits=bits, path=path, budget_bytes=4 * LEAST_BUDGET)
        train(optimizer, params, 3)
        optimizer.close()
        for first, budget in ((3, LEAST_BUDGET), (5, 1 << 20)):
            optimizer = PagedAdamW(params, bits=bits, path=path, resume=True, budget_bytes=budget)
            assert optimizer.state[params[0]]["step"] == first
            train(optimizer, params, 2, first)
            optimizer.close()
        assert_same(params, whole)


def test_no_group_joins_a_file(tmp_path: Path) -> None:
    optimizer = PagedAdamW(make_params(SHAPES[:2]), path=tmp_path / "state")
    with pytest.raises(RuntimeError, match=r'param_group: got one .* with pager "mmap" all are'):
        optimizer.add_param_group({"params": make_params(SHAPES[2:3])})


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match=str(path)):
        PagedAdamW(make_params(), path=path, resume=True)
    optimizer = PagedAdamW(make_params(), path=path)
    with pytest.raises(FileExistsError, match=str(path)):
        PagedAdamW(make_params(), path=path)
    with pytest.raises(BlockingIOError, match="in use"):
        PagedAdamW(make_params(), path=path, resume=True)
    train(optimizer, optimizer.param_groups[0]["params"], 1)
    optimizer.close()
    optimizer.close()
    for shapes, bits, message in (
        (((2,), *SHAPES[1:]), 32, r"layout.params\[0\].shape: got \[\]; takes \[2\]"),
        ((*SHAPES[:6], (257, 130)), 32, r"layout.params\[6\].shape\[0\]: got 130; takes 257"),
        (SHAPES, 8, r"layout.params\[4\].bits: got 32; takes 8"),
        (SHAPES[:6], 32, r"layout.params: got a list of 7; takes one of 6"),
    ):
        with pytest.raises(ChunkFileError, match=message):
            PagedAdamW(make_params(shapes), path=path, resume=True, bits=bits)
    path.write_bytes(b"something else")
    with pytest.raises(ChunkFileError, match="begins with b'somethin'"):
        PagedAdamW(make_params(), path=path, resume=True)


def test_a_step_after_close(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    optimizer.close()
    with pytest.raises(ValueError, match="closed"):
        train(optimizer, params, 1)
    assert_same(params, before)


KILLED = """
import torch
from tests.optim import params as t
from tests.optim.pagers import LEAST_BUDGET
from qkern.optim import PagedAdamW
torch.set_num_threads(1)
params = t.make_params()
optimizer = PagedAdamW(params, path={path!r}, resume={resume}, budget_bytes=LEAST_BUDGET)
first = int(optimizer.state[params[0]].get("step", 0))
if first:
    for param, saved in zip(params, torch.load({saved!r} + str(first)), strict=True):
        param.data.copy_(saved)
for step in range(first, 1000):
    t.set_grads(params, step)
    # Before the step that makes it current: whichever step the file has, its parameters exist.
    trial = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer_state = optimizer.state_dict()
    copy = PagedAdamW(trial)
    copy.load_state_dict(optimizer_state)
    t.train(copy, trial, 1, step)
    torch.save([p.detach() for p in trial], {saved!r} + str(step + 1))
    print(step, flush=True)
    optimizer.step()
"""


@pytest.mark.slow
def test_killed_in_a_step(tmp_path: Path) -> None:
    """Killed at once after it says that a step begins, again and again; it loses at most that."""
    path, saved = str(tmp_path / "state"), str(tmp_path / "params")
    at = 0
    for round in range(4):
        program = KILLED.format(path=path, saved=saved, resume=round > 0)
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment()
        ) as child:
            last = at
            for line in child.stdout:
                last = int(line)
                if last >= at + 3:
                    break
            else:
                raise AssertionError("the child ended by itself")
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        params, whole = make_params(), make_params()
        optimizer = PagedAdamW(params, path=path, resume=True)
        at = int(optimizer.state[params[0]]["step"])
        assert at >= last
        train(PagedAdamW(whole), whole, at)
        assert_same(torch.load(saved + str(at)), [p.detach() for p in whole])
        expected = make_params()
        other = PagedAdamW(expected)
        train(other, expected, at)
        assert_same_state(optimizer.state_dict(), other.state_dict())
        optimizer.close()


@pytest.mark.parametrize(
    ("fails_at", "times"),
    [(0, 1), (3, 1), (-1, 1), (-1, 2)],
    ids=["first chunk", "later chunk", "commit", "commit and taking it back"],
)
def test_a_full_disk_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, times: int
) -> None:
    params = make_params()
    path = tmp_path / "state"
    optimizer = PagedAdamW(params, path=path, budget_bytes=LEAST_BUDGET)
    train(optimizer, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    real, made, failed = os.pwritev, 0, 0

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal made, failed
        made += 1
        of_record = bytes(buffers[0][:8]) == b"QKCOMMIT"
        begins = made > fails_at if fails_at >= 0 else of_record
        if failed < times and (failed or begins):
            failed += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        message = rf"{path}: a step broke off and the file has the one before, but parameters of"
        with pytest.raises(RuntimeError, match=rf"{message} \d+ of \d+ chunks.*No space left"):
            train(optimizer, params, 1, 2)
    assert failed == times
    assert_same_state(optimizer.state_dict(), state)
    # With the parameters from before, it goes on; so does one that is opened anew.
    for again in (False, True):
        for param, value in zip(params, before, strict=True):
            param.data.copy_(value)
        if again:
            optimizer.load_state_dict(state)
            optimizer.close()
            optimizer = PagedAdamW(params, path=path, resume=True)
            assert_same_state(optimizer.state_dict(), state)
        train(optimizer, params, 2, 2)
        whole = make_params()
        train(PagedAdamW(whole), whole, 4)
        assert_same(params, whole)


def test_a_disk_too_full_for_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and not the signal that a mapping without space behind it would give."""
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            optimizer.state_dict()
    assert len(optimizer.state_dict()["state"]) == len(params)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    params = make_params()
    path = tmp_path / "state"
    optimizer = PagedAdamW(params, path=path)
    train(optimizer, params, 1)
    optimizer.close()
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data), 997):
        data[place] ^= 1
    path.write_bytes(data)
    optimizer = PagedAdamW(params, path=path, resume=True)
    with pytest.raises(ChunkFileError, match=rf"{path}: .*damaged: wrong checksum in chunk"):
        train(optimizer, params, 1)


def test_state_dict_with_a_file_leaves_no_moments_behind(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    optimizer.state_dict()
    assert all(state.keys() == {"step"} for state in optimizer.state.values())
    first = optimizer.state_dict()
    kept = copy.deepcopy(first)
    train(optimizer, params, 1, 1)
    for state in first["state"].values():
        del state["step"]  # a tensor that is the optimizer's own, as torch's state_dict has it
    for state in kept["state"].values():
        del state["step"]
    assert_same_state(first, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            optimizer._pager.step((), lambda pieces: None, lambda: None)
        except ValueError:
            status = 42
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    train(optimizer, params, 1, 1)
    whole = make_params()
    train(PagedAdamW(whole), whole, 2)
    assert_same(params, whole)


def test_a_child_forked_while_chunks_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none of the threads, and neither waits for them nor touches the file."""
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state", budget_bytes=4 * LEAST_BUDGET)
    write, run = os.pwritev, _updates.Calls.run
    under_way, goes_on = threading.Event(), threading.Event()
    parent, runs, children = os.getpid(), 0, []

    def close() -> None:
        assert os.getpid() != parent
        with pytest.raises(ValueError, match="closed, or opened by the process this one forked"):
            optimizer.state_dict()
        optimizer.close()

    def pwritev(*args: Any) -> int:
        under_way.set()
        assert goes_on.wait(60)
        return write(*args)

    def run_and_fork(calls: Any) -> None:
        nonlocal runs
        run(calls)
        runs += 1
        if runs == 2:  # of the first chunk the write has been asked for
            assert under_way.wait(60)
            children.append(in_child(close))
            goes_on.set()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        patch.setattr(_updates.Calls, "run", run_and_fork)
        set_grads(params, 0)
        optimizer.step()
    train(optimizer, params, 1, 1)
    assert exit_status(children[0]) == 0
    whole = make_params()
    train(PagedAdamW(whole), whole, 2)
    assert_same(params, whole)


@pytest.mark.parametrize("flat", [False, True])
def test_a_flattened_state_does_not_load(tmp_path: Path, flat: bool) -> None:
    """torch unflattens by the names of the state that is there, and a pager's has none."""
    net = nn.Sequential(nn.Linear(8, 4))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizers = [PagedAdamW(net.parameters(), path=tmp_path / name) for name in "ab"]
    optimizers.append(PagedAdamW(net.parameters()))
    net(torch.ones(2, 8)).sum().backward()
    optimizers[0].step()
    net.zero_grad()
    state = get_optimizer_state_dict(net, optimizers[0], options=options)
    set_optimizer_state_dict(net, optimizers[2], dict(state), options=options)
    if flat:
        with pytest.raises(ValueError, match=r"state\[0.weight\]: got no exp_avg.* not flattened"):
            set_optimizer_state_dict(net, optimizers[1], state, options=options)
        optimizers.pop(1)
    else:
        set_optimizer_state_dict(net, optimizers[1], state, options=options)
    first, *others = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for other in others:
        assert torch.equal(other[0]["exp_avg"], first[0]["exp_avg"])
