"""Options of pytest that take a part of the tests: a shard of them, and what fits into a time.

`--shard i/n` runs the i-th of n shards. Shards are complete and disjoint, the same in every run on
the same tests, and alike in their time as far as it is known. `--seconds S` starts no test after S
seconds and says how many were left; that is no failure. `--failures FILE` adds each failure to a
file at once, for whoever may have to end the run before it reports. `--record-seconds FILE` writes
how long tests took, for the shards of later runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

SECONDS = Path(__file__).with_name("seconds.json")
"""Of a case of each slow test: the median on two cores of a Xeon, builds left out."""
clock = time.time
UNKNOWN = 5.0
"""Seconds of a test that nobody has measured."""


def function(test_id: str) -> str:
    """A test's id without its parameters."""
    return test_id.partition("[")[0]


def partition(ids: Iterable[str], seconds: Mapping[str, float], count: int) -> list[set[str]]:
    """`count` shards of tests: the longest first, each to the shard that has the least so far."""
    shards: list[set[str]] = [set() for _ in range(count)]
    loads = [0.0] * count
    weights = {test_id: seconds.get(function(test_id), UNKNOWN) for test_id in ids}
    for test_id in sorted(weights, key=lambda test_id: (-weights[test_id], test_id)):
        least = min(range(count), key=lambda i: (loads[i], len(shards[i]), i))
        shards[least].add(test_id)
        loads[least] += weights[test_id]
    return shards


def shard(text: str) -> tuple[int, int]:
    """`i/n` of the command line."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"got {text!r}; takes i/n with i from 1 to n, say 3/12")
    return int(index), int(count)


def limit(text: str) -> float:
    """Seconds of the command line."""
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; takes a number above 0")
    return seconds


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=shard, metavar="i/n", help="run the i-th of n shards")
    parser.addoption("--seconds", type=limit, help="start no test after so many seconds")
    parser.addoption("--failures", type=Path, help="add each failure to this file at once")
    parser.addoption("--record-seconds", type=Path, help="write how long tests took to this file")


class Shards:
    """The plugin; with xdist one is in every worker, and one in the process that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.shard: tuple[int, int] | None = config.getoption("--shard")
        self.end = clock() + (config.getoption("--seconds") or float("inf"))
        self.failures: Path | None = config.getoption("--failures")
        self.record: Path | None = config.getoption("--record-seconds")
        # Workers count from the start of the run, as the process that started them does.
        inputs = getattr(config, "workerinput", None)
        if inputs is not None:
            self.end = inputs["shards_end"]
            self.failures = self.record = None
        self.reports = inputs is None
        self.left: set[str] = set()
        self.done: set[str] = set()
        self.took: dict[str, list[float]] = defaultdict(list)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        node.workerinput["shards_end"] = self.end  # type: ignore[attr-defined]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """After `-m` and `-k`, which are hooks of this kind too."""
        if self.shard is None:
            return
        index, count = self.shard
        known = json.loads(SECONDS.read_text())
        mine = partition((item.nodeid for item in items), known, count)[index - 1]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
        items[:] = [item for item in items if item.nodeid in mine]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True, "it is done", for what is too late."""
        return True if clock() >= self.end else None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left |= {item.nodeid for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.left |= set(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.left.discard(report.nodeid)
        self.done.add(report.nodeid)
        if self.failures and report.failed:
            with self.failures.open("a") as file:
                file.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n\n")
        if report.when == "call" and report.passed:
            self.took[function(report.nodeid)].append(report.duration)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.reports:
            return
        if self.record:
            known = json.loads(self.record.read_text()) if self.record.exists() else {}
            medians = {name: round(statistics.median(all_), 1) for name, all_ in self.took.items()}
            self.record.write_text(json.dumps(known | medians, indent=1, sort_keys=True) + "\n")
        if self.left and self.end < float("inf"):
            terminalreporter.write_line(
                f"out of time: {len(self.done)} tests run, {len(self.left)} not"
            )
