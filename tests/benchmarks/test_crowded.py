"""The contest on a crowded machine: its busy processes, what it compares, and the loss's report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from bench import crowded, kernels, peers, ratios, report, timing

import qkern
from lab.processes import environment
from tests.benchmarks.contests import QUICK, candidate

pytestmark = pytest.mark.unpoisoned


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all end within that time; one that nobody has asked about counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive):
            return True
        time.sleep(0.05)
    return False


def test_busy_processes_work_and_end_with_the_block():
    with crowded.busy_processes(2) as processes:
        pids = [process.pid for process in processes]
        before = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]
        time.sleep(0.5)
        after = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]
        assert all(b > a for a, b in zip(before, after, strict=True))
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_busy_processes_end_when_the_block_raises():
    with pytest.raises(KeyError), crowded.busy_processes(1) as (process,):
        raise KeyError
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="an orphan has another parent there")
def test_busy_processes_end_when_the_benchmark_is_killed():
    code = """
import os, signal
from bench import crowded
with crowded.busy_processes(2) as processes:
    print(*(process.pid for process in processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert gone([int(pid) for pid in done.stdout.split()])


def test_a_busy_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(crowded, "_BUSY", "pass")
    with pytest.raises(OSError, match="did not start"), crowded.busy_processes(1):
        pass


def test_contest_records_both_states():
    problem, candidates, _ = crowded.forward_contest(
        (96, 128), 3, torch.float32, kernels.Choice(peers=("dense",))
    )
    found = crowded.play(problem, candidates, QUICK, seconds=0.01, processes=1)
    assert [(row["op"], row["name"]) for row in found] == [
        ("crowded_forward", "qkern"),
        ("crowded_forward", "dense"),
    ]
    assert all(row["ms"] > 0 and row["quiet_ms"] > 0 for row in found)
    assert all(row["times_slower"] == row["ms"] / row["quiet_ms"] for row in found)
    assert "x its quiet time" in report.table(found)
    compared = ratios.rows({"machine": {"qkern_isa": "avx2"}, "results": found})
    assert {row["of"] for row in compared} == {"", "loss of speed"}


def test_loss_of_speed_is_compared_with_the_least_of_the_peers():
    same = {"op": "crowded_forward", "shape": [64, 64], "m": 1, "dtype": "float32", "threads": 2}
    rows = [
        same | {"name": name, "ms": ms, "times_slower": slower}
        for name, ms, slower in (("qkern", 1.0, 3.0), ("dense", 4.0, 4.0), ("peer", 9.0, 1.5))
    ]
    found = ratios.rows({"machine": {}, "results": rows})
    assert [(row["of"], row["peer"], row["ratio"]) for row in found] == [
        ("loss of speed", "peer", 0.5),
        ("", "dense", 4.0),
    ]


def test_means_are_of_all_calls(monkeypatch):
    """A few calls that wait long count as much as they take."""
    times = iter([1.0, 1.0, 4.0] * 3)
    monkeypatch.setattr(timing, "wall_clock", lambda call: next(times))
    now = iter(range(100))
    monkeypatch.setattr(crowded.time, "perf_counter", lambda: float(next(now)))
    contestants = timing.prepare(
        timing.Problem("op", torch.float32), [candidate("x", lambda: None)], QUICK
    )
    (found,) = crowded._in_turns(contestants, 3 * crowded._TURNS - 0.5)
    sample = contestants[0][1]
    row = crowded._record(timing.Problem("op", torch.float32), sample, [1.0], found)
    assert row["times_slower"] == pytest.approx(2.0)


def test_wrong_result_on_a_crowded_machine_is_detected(monkeypatch):
    problem, candidates, _ = crowded.forward_contest(
        (96, 128), 3, torch.float32, peers.Choice(peers=())
    )
    right = qkern.linear_4bit
    monkeypatch.setattr(qkern, "linear_4bit", lambda x, qw: right(x, qw) * 1.01)
    with pytest.raises(timing.WrongResultError, match="qkern, crowded_forward"):
        crowded.play(problem, candidates, QUICK, seconds=0.01, processes=0)
