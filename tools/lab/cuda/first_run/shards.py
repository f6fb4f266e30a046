"""Checks in several processes side by side, each begun again after the check at which it ended.

``python -m lab.cuda.first_run.shards SHARDS STALL KIND [OPTION ...]``: `checks` of a kind. A check
that ends its process, or leaves it without a usable device, fails. So does one that takes longer
than STALL seconds: a kernel hangs, and its process is killed. A way to which that happens again
and again is checked no more. Prints the failures, and last what was done on which way.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from lab.cuda.first_run import checks
from lab.cuda.first_run.steps import FAILURE, SECONDS

PROGRAM = "lab.cuda.first_run.checks"
TIMES = "times"
"""No way: each such check is of all ways, and notes itself which of them ended a process."""

_PROCESSES = 12  # of a shard; each costs the seconds that torch takes to start
_PROCESSES_OF_A_WAY = 2  # that it may end, if it is one of several
_KILL_SECONDS = 5.0
_BEGIN_SECONDS = 90.0  # to import torch and list the checks, beside as many others


@dataclass
class Shard:
    """One process at a time."""

    program: str
    command: Sequence[str]
    number: int
    shards: int
    stall: float
    first: int = 0
    label: str = ""
    done: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    left: bool = False
    ended: Counter[str] = field(default_factory=Counter)
    """How many processes each way has ended."""

    def work(self, end: float) -> None:
        """All checks of the shard; what is to be said is printed."""
        for _ in range(_PROCESSES):
            self.label, before = "", self.failed
            status = self._process(end)
            if status == 0 or self.left:
                return
            if self.failed == before:
                self._fail(f"{self.label or 'before the first check'}: exit status {status}")
            if status == 1 or not self.label:
                return
            self.ended[self._way()] += 1
            if self.ended[self._way()] == _PROCESSES_OF_A_WAY and self._way() != TIMES:
                text = f"{self._way()} is left out of shard {self.number} from here on"
                print(f"{FAILURE}{text}", flush=True)
        self._fail(f"shard {self.number}: given up after {_PROCESSES} processes, at {self.label}")

    def _process(self, end: float) -> int | None:
        """The exit status of a process that begins at ``first``; None where it was killed."""
        place = [str(self.number), str(self.shards), str(self.first)]
        without = [w for w, n in self.ended.items() if n >= _PROCESSES_OF_A_WAY and w != TIMES]
        command = [*self.command[:1], *place, *self.command[1:], "--without", *without]
        seconds = max(0.1, end - time.monotonic())
        process = subprocess.Popen(
            [sys.executable, "-m", self.program, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {SECONDS: f"{seconds:.1f}"},
        )
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        other = ""
        failed_here = False
        while True:
            patience = self.stall if self.label else max(self.stall, _BEGIN_SECONDS)
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                _kill(process)
                self._fail(f"{self.label or 'start'}: it hangs, nothing for {patience:.0f} s")
                return None
            if line is None:
                break
            if line.startswith(checks.AT):
                index, _, self.label = line.removeprefix(checks.AT).partition(" ")
                self.first, failed_here = int(index) + self.shards, False
            elif line.startswith(checks.LEFT):
                self.left = True
            elif line == checks.OK:
                self.done[self._way()] += 1
            elif line.startswith(FAILURE):
                failed_here = True
                self._fail(line.removeprefix(FAILURE))
            elif not line.startswith(checks.RAN):
                other = line or other
                print(line, flush=True)
        status = process.wait()
        if status not in (0, 1, checks.AGAIN) and self.label and not failed_here:
            self._fail(f"{self.label}: the process ended with status {status} {other}".rstrip())
        return status

    def _way(self) -> str:
        return self.label.partition(" ")[0]

    def _fail(self, text: str) -> None:
        self.failed += 1
        if self.label:
            self.done[self._way()] += 1
        print(f"{FAILURE}{text}", flush=True)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    try:
        process.wait(timeout=_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} cannot be killed: the GPU may hang", flush=True)


def main(count: int, stall: float, command: Sequence[str], program: str = PROGRAM) -> int:
    """The exit status."""
    end = time.monotonic() + float(os.environ.get(SECONDS, "inf"))
    shards = [Shard(program, command, number, count, stall) for number in range(count)]
    threads = [threading.Thread(target=shard.work, args=(end,), daemon=True) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = sum((shard.done for shard in shards), Counter[str]())
    failed = sum(shard.failed for shard in shards)
    ways = ", ".join(f"{way} {count}" for way, count in sorted(done.items()))
    left = " (not all: the time was over)" if any(shard.left for shard in shards) else ""
    print(f"{done.total()} checks{left}, {failed} failed: {ways}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
