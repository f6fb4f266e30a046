"""``tools/first_gpu_run.sh``: does the steps of `plan`, and writes the page after each of them.

The exit status is 0 where nothing is wrong, 1 where a step failed, ran over its limit or had no
time left, 2 for wrong arguments. Tools that are absent but not needed leave it at 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.cuda.first_run import counters, plan, steps, summary, tools
from lab.cuda.first_run.plan import Folders
from lab.cuda.first_run.steps import Outcome

_FAILURES_SHOWN = 5
_LOG_BYTES = 2 << 20  # of one step, its end: the whole file may have to be sent


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/first_gpu_run.sh",
        description="Build qkern for the GPU here, check it, time it, and write a page about it. "
        "Variables: PY (the Python), OUT (results, runs/gpu), WORK (build, build/gpu), PEERS "
        "(a folder with bitsandbytes and whatever this Python lacks).",
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, the emulator as the device")
    parser.add_argument("--seconds", type=float, default=470, help="for everything (470)")
    parser.add_argument("--only", default="", help="names of steps, say machine,build,env")
    args = parser.parse_args(arguments)
    if args.seconds <= 0:
        parser.error(f"--seconds: got {args.seconds}; takes a positive number")
    return args


def folders(dry: bool) -> Folders:
    """By the variables OUT and WORK, of which the first may be relative to where one stands."""
    out = Path(os.environ.get("OUT") or tools.ROOT / "runs" / ("gpu-dry" if dry else "gpu"))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    default = tools.ROOT / "build" / ("gpu-dry" if dry else "gpu")
    work = Path(os.environ.get("WORK") or default).resolve()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError:
        work = out / "build"
    if not os.access(work, os.W_OK):
        work = out / "build"
    work.mkdir(parents=True, exist_ok=True)
    return Folders(out, work)


def read(file: Path) -> dict[str, Any]:
    """A step's JSON; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


class Report:
    """Prints an outcome when it comes, and keeps the files up to date."""

    def __init__(self, where: Folders, logs: Path, total: int) -> None:
        self.where, self.logs, self.total = where, logs, total
        self.begin = time.monotonic()

    def __call__(self, outcomes: list[Outcome]) -> None:
        seconds = time.monotonic() - self.begin
        if outcomes:
            self._print(outcomes[-1], seconds)
            self._log(outcomes[-1])
        where = self.where
        content = {"seconds": seconds, "steps": [asdict(outcome) for outcome in outcomes]}
        where.steps.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        page = summary.page(
            read(where.machine),
            outcomes,
            read(where.times),
            counters.read(where.counters),
            seconds,
            left=self.total - len(outcomes),
        )
        where.summary.write_text(page, encoding="utf-8")

    def _print(self, outcome: Outcome, seconds: float) -> None:
        said = outcome.reason or outcome.said
        line = f"{outcome.name}: {outcome.status} in {outcome.seconds:.0f} s, {seconds:.0f} in all"
        print(f"{line}. {said}".rstrip(), flush=True)
        for failure in outcome.failures[:_FAILURES_SHOWN]:
            print(f"  {failure}", flush=True)

    def _log(self, outcome: Outcome) -> None:
        own = self.logs / f"{outcome.name}.log"
        text = own.read_bytes()[-_LOG_BYTES:] if own.exists() else b""
        with self.where.log.open("ab") as log:
            log.write(f"==== {outcome.name}: {outcome.status}\n".encode() + text + b"\n")


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    try:
        where = folders(args.dry)
    except OSError as error:
        print(f"OUT: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    logs = where.work / "logs"
    for file in (*where.results, *logs.glob("*.log")):
        file.unlink(missing_ok=True)
    os.chdir(tools.ROOT)
    # So that a program at work is ended with the run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan.clear_choices()
    found = plan.steps(where, args.dry)
    names = args.only.split(",") if args.only else [step.name for step in found]
    if unknown := set(names) - {step.name for step in found}:
        known = ", ".join(step.name for step in found)
        print(f"--only: got {', '.join(sorted(unknown))}; takes {known}", file=sys.stderr)
        return 2
    found = [step for step in found if step.name in names]
    outcomes = steps.run(
        found,
        logs,
        args.seconds,
        Report(where, logs, len(found)),
        lambda: plan.environment(where, args.dry),
    )
    print(f"{where.summary}")
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
