"""Contests on a crowded machine: what each candidate loses to busy processes, one a core.

A call that waits for all of its threads waits for the one that the system has put aside. How long
that takes on the average, over the time of the same call on the quiet machine, is the loss.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from . import matmul, models, peers, timing
from .report import Record
from .timing import Candidate, Problem, Settings

OP = "crowded"
ROWS = (1, 512)
SECONDS = 3.0
"""Of each candidate on the quiet machine, and twice that beside the busy processes."""
_TURNS = 3
_NEW_TOKENS = 4

_BUSY = """
import os, sys
print("ready", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1 << 18):
        pass
"""
"""Works until it is killed, or until who started it is gone, however that ended."""

Contest = tuple[Problem, list[Candidate], list[str]]


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` processes that do nothing but work; gone at the end of the block."""
    command = [sys.executable, "-I", "-S", "-c", _BUSY, str(os.getpid())]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_busy_process(command)) for _ in range(count)]
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise OSError("a busy process did not start")
        yield started


@contextlib.contextmanager
def _busy_process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def forward_contest(
    shape: tuple[int, int], m: int, dtype: torch.dtype, choice: peers.Choice
) -> Contest:
    """``x · Wᵀ``, as in the op ``forward``."""
    problem, candidates, missing = matmul.contest(shape, m, dtype, choice, backward=False)
    return replace(problem, op=f"{OP}_forward"), candidates, missing


def generation_contest(
    workload: models.Workload, dtype: torch.dtype, chosen: tuple[str, ...]
) -> Contest:
    """A few tokens of a model, as in the op ``generate``."""
    few = replace(workload, new_tokens=_NEW_TOKENS)
    problem, candidates, missing = models.generation_contest(few, dtype, chosen)
    return replace(problem, op=f"{OP}_generate"), candidates, missing


def play(
    problem: Problem,
    candidates: Sequence[Candidate],
    settings: Settings,
    seconds: float = SECONDS,
    processes: int | None = None,
) -> list[Record]:
    """One record a candidate: mean milliseconds, quiet and crowded, and how they compare.

    Means, for a time over many calls is what counts: of short calls most are not disturbed at all,
    and the few that are wait very long. Raises `timing.WrongResultError`.
    """
    contestants = timing.prepare(problem, candidates, settings)
    quiet = _in_turns(contestants, seconds)
    with busy_processes(cores() if processes is None else processes) as busy:
        crowded = _in_turns(contestants, 2 * seconds)
        if any(process.poll() is not None for process in busy):
            raise RuntimeError("a busy process ended before the contest")
    records = [
        _record(problem, sample, *times)
        for (_, sample, _), *times in zip(contestants, quiet, crowded, strict=True)
    ]
    return [record | {"ratio": record["ms"] / records[0]["ms"]} for record in records]


def _in_turns(contestants: Sequence[timing.Prepared], seconds: float) -> list[list[float]]:
    """Each candidate's times: several turns of many calls, since calls of others wake threads."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(_TURNS):
        for (candidate, _, calls), found in zip(contestants, times, strict=True):
            end = time.perf_counter() + seconds / _TURNS
            while True:
                if candidate.before is not None:
                    candidate.before()
                found.append(timing.wall_clock(calls[len(found) % len(calls)]))
                if time.perf_counter() > end:
                    break
    return times


def _record(
    problem: Problem, sample: timing.Sample, quiet: Sequence[float], crowded: Sequence[float]
) -> Record:
    quiet_ms, ms = (1e3 * sum(times) / len(times) for times in (quiet, crowded))
    return {
        "op": problem.op,
        "shape": list(problem.shape),
        "m": problem.m,
        "dtype": problem.dtype_name,
        "threads": problem.threads,
        "name": sample.name,
        "ms": ms,
        "p20_ms": 1e3 * timing.percentile(crowded, 20),
        "p80_ms": 1e3 * timing.percentile(crowded, 80),
        "calls": len(crowded),
        "cache": sample.cache,
        "quiet_ms": quiet_ms,
        "times_slower": ms / quiet_ms,
    }
