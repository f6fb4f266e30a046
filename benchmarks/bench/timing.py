"""Contests: candidates that do the same work, checked first, then timed call by call in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import memory

Call = Callable[[], Any]


class Times(NamedTuple):
    """Seconds of a call: of the device that did the work, and of the host that asked for it."""

    device: float
    host: float


Clock = Callable[[Call], "float | Times"]
"""Makes a call, and says how long it took: one figure where host and device are the same."""

_ONCE_SECONDS = 1.0  # a call that takes longer, and as long as a contest may, is not repeated
_MIN_ROUNDS = 5
_MAX_COPIES = 256  # of a small weight, which in a real model would share the cache with others too
_MEMORY_SHARE = 0.25  # of what is free, that one candidate's copies may take


class WrongResultError(Exception):
    """A candidate's result is not what it must be, so its time means nothing."""


class SkippedError(Exception):
    """A candidate that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What is computed: the columns of the table that say so.

    `shape` is the weight's ``[out_features, in_features]``, `m` the rows of activations, `threads`
    what torch is set to when this is made.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    m: int | None = None
    flops: int = 0
    work: float = 0.0
    unit: str = ""
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.dtype_name]
        return " ".join(part for part in parts if part) + ("" if self.m is None else f" M={self.m}")


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    `prepare` makes a fresh copy of the large tensors that a call reads or writes, `footprint`
    bytes of them, and returns the call. `bytes` is the least a call must move. `check` raises
    AssertionError on a wrong result. `before` runs untimed before every timed call. With `integers`
    it multiplies in 8 bits, which the limit of floating-point arithmetic does not bind.
    """

    name: str
    prepare: Callable[[], Call]
    check: Callable[[Any], None]
    bytes: int = 0
    footprint: int = 0
    before: Callable[[], None] | None = None
    integers: bool = False


@dataclass(frozen=True)
class Settings:
    """How long and how cold: `cache_bytes` is the size of the last-level cache.

    A candidate that takes all the time of a contest alone is called `fewest_calls` times; one whose
    first call does, which is checked, no more than that.
    With `cold`, a candidate goes through copies of its memory, of twice the cache together.
    """

    repeat: int = 50
    max_seconds: float = 20.0
    min_rounds: int = _MIN_ROUNDS
    fewest_calls: int = 2
    cold: bool = True
    cache_bytes: int = 0


@dataclass
class Sample:
    """A candidate's times in seconds, with the copies of its memory they went through.

    It holds no more of the candidate, whose tensors may be large.
    """

    name: str
    bytes: int
    footprint: int
    integers: bool
    copies: int
    cache: str
    checked_in: float  # seconds of the call whose result was checked
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)  # of a device's calls

    def add(self, found: float | Times) -> None:
        if isinstance(found, Times):
            self.host_seconds.append(found.host)
            found = found.device
        self.seconds.append(found)

    def percentile(self, percent: float) -> float:
        return percentile(self.seconds, percent)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of `values`."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def copies_needed(candidate: Candidate, settings: Settings) -> tuple[int, str]:
    """How many copies to go through, and in which state that leaves the cache.

    ``cold``: every line was evicted since its last use, as in a model larger than the cache.
    ``partly cold``: there were not so many copies. ``warm``: one copy, which a large cache holds.
    """
    if not settings.cold or not candidate.footprint:
        return 1, "warm"
    wanted = max(1, math.ceil(2 * settings.cache_bytes / candidate.footprint))
    affordable = int(_MEMORY_SHARE * memory.available() / candidate.footprint)
    copies = max(1, min(wanted, affordable, _MAX_COPIES))
    return copies, "cold" if copies == wanted else "partly cold"


def wall_clock(call: Call) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


Prepared = tuple[Candidate, Sample, list[Call]]
"""A candidate, its times to come, and a call on each copy of its memory."""


def prepare(
    problem: Problem, candidates: Sequence[Candidate], settings: Settings
) -> list[Prepared]:
    """Make the copies and check every candidate; raises `WrongResultError`."""
    prepared: list[Prepared] = []
    for candidate in candidates:
        copies, cache = copies_needed(candidate, settings)
        calls = [candidate.prepare() for _ in range(copies)]
        seconds = _check(problem, candidate, calls[0])
        sample = Sample(
            candidate.name,
            candidate.bytes,
            candidate.footprint,
            candidate.integers,
            copies,
            cache,
            seconds,
        )
        prepared.append((candidate, sample, calls))
    return prepared


def run_contest(
    problem: Problem,
    candidates: Sequence[Candidate],
    settings: Settings,
    clock: Clock = wall_clock,
) -> list[Sample]:
    """Check every candidate, then time them in turn, the first one changing from round to round.

    Who has taken the time of the whole contest alone is called no more, so that the others go on.
    Raises `WrongResultError` before anything is timed
    when a check fails.
    """
    prepared = prepare(problem, candidates, settings)
    quick = []
    for contestant in prepared:
        sample = contestant[1]
        if sample.checked_in > max(settings.max_seconds, _ONCE_SECONDS):
            sample.seconds.append(sample.checked_in)
        else:
            quick.append(contestant)
    start = time.perf_counter()
    for number in range(settings.repeat):
        enough = number >= settings.min_rounds
        if enough and time.perf_counter() - start > settings.max_seconds:
            break
        first = number % max(1, len(quick))
        for candidate, sample, calls in quick[first:] + quick[:first]:
            enough = len(sample.seconds) >= settings.fewest_calls
            if enough and sum(sample.seconds) > settings.max_seconds:
                continue
            call = calls[number % len(calls)]
            if candidate.before is not None:
                candidate.before()
            sample.add(clock(call))
    return [sample for _, sample, _ in prepared]


def _check(problem: Problem, candidate: Candidate, call: Call) -> float:
    """The seconds that the call took; raises `WrongResultError`."""
    if candidate.before is not None:
        candidate.before()
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    try:
        candidate.check(result)
    except AssertionError as error:
        raise WrongResultError(f"{candidate.name}, {problem}: {error}") from error
    return seconds
