"""Programs run one after the other, each within its own limit and all within one.

A program that hangs on a GPU may not even end when it is killed. So nothing here waits for one: its
output goes to a file, and what does not end is left behind and said.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, CUT = "passed", "FAILED", "OVER ITS LIMIT"
NOT_RUN, ABSENT, LEFT_OUT = "NOT RUN", "absent", "left out"
WRONG = (FAILED, CUT, NOT_RUN)
"""What makes the run's exit status 1. A tool that is absent does not."""

SECONDS = "QKERN_FIRST_RUN_SECONDS"
"""The variable that tells a program its limit, so that it can stop by itself before."""
FAILURE = "FAIL "
"""What a line of a program begins with that reports a failure."""

_KILL_SECONDS = 5.0
_SHORTEST = 3.0  # seconds: with less left, a step is not begun
_LAST_LINES = 3


@dataclass(frozen=True)
class Step:
    """Something to do: commands one after the other, until one fails.

    ``needs`` names steps that must have passed. ``absent`` says which tool is missing that the step
    could do without, ``missing`` one that the run cannot, and ``left_out`` why a run leaves it out.
    ``excuses`` are pieces of output, each with what it means, that make a failure an absence;
    ``faults`` matches lines that report a failure beside those with `FAILURE`.
    """

    name: str
    seconds: float
    commands: Sequence[Sequence[str]] = ()
    needs: tuple[str, ...] = ()
    absent: str = ""
    missing: str = ""
    left_out: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    excuses: Mapping[str, str] = field(default_factory=dict)
    faults: str = ""


@dataclass
class Outcome:
    """What became of a step: one of the words above, the reason, and what it printed."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    said: str = ""
    """Its last line."""

    @property
    def wrong(self) -> bool:
        return self.status in WRONG


def run(
    steps: Sequence[Step],
    logs: Path,
    seconds: float,
    after: Callable[[list[Outcome]], None],
    environment: Callable[[], Mapping[str, str]] = dict,
) -> list[Outcome]:
    """Does the steps in order and calls ``after`` with all outcomes so far, also before the first.

    ``environment`` gives variables for all programs; it is asked before each step.
    """
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    after(outcomes)
    for step in steps:
        left = end - time.monotonic()
        reason = _reason_not_to(step, outcomes, left)
        if reason is None:
            variables = os.environ | environment() | dict(step.environment)
            reason = _do(step, logs / f"{step.name}.log", min(step.seconds, left), variables)
        outcomes.append(reason)
        after(outcomes)
    return outcomes


def _reason_not_to(step: Step, outcomes: Sequence[Outcome], left: float) -> Outcome | None:
    failed = [o.name for o in outcomes if o.name in step.needs and o.status != PASSED]
    if step.left_out:
        return Outcome(step.name, LEFT_OUT, step.left_out)
    if failed:
        return Outcome(step.name, NOT_RUN, f"it needs {', '.join(failed)}")
    if step.missing:
        return Outcome(step.name, FAILED, step.missing)
    if step.absent:
        return Outcome(step.name, ABSENT, step.absent)
    if left < _SHORTEST:
        return Outcome(step.name, NOT_RUN, "no time was left")
    return None


def _do(step: Step, log: Path, limit: float, variables: Mapping[str, str]) -> Outcome:
    begin = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    status: int | None = 0
    reason = ""
    for command in step.commands:
        left = limit - (time.monotonic() - begin)
        status, reason = _run(command, log, left, {**variables, SECONDS: f"{left:.1f}"})
        if status != 0:
            break
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    failures = [
        line.removeprefix(FAILURE).strip(" =")
        for line in lines
        if line.startswith(FAILURE) or (step.faults and re.match(step.faults, line))
    ]
    said = " / ".join(lines[-_LAST_LINES:] if status else lines[-1:])[-400:]
    outcome = Outcome(step.name, PASSED, reason, time.monotonic() - begin, failures, said)
    if status is None:
        outcome.status = CUT
        outcome.reason = f"after {limit:.0f} s{reason}"
    elif status or failures:
        outcome.status = FAILED
        excuse = next((why for piece, why in step.excuses.items() if piece in text), "")
        if excuse and not failures:
            outcome.status, outcome.reason = ABSENT, excuse
        elif not reason:
            outcome.reason = _in_words(status or 0)
    return outcome


def _in_words(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _run(
    command: Sequence[str], log: Path, seconds: float, variables: Mapping[str, str]
) -> tuple[int | None, str]:
    """The exit status, None where the limit came first, and what there is to say."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                preexec_fn=os.setpgrp,  # no new session, so that whoever ends the run ends this too
            )
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}"
    try:
        return process.wait(timeout=max(0.1, seconds)), ""
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> str:
    """Kills a program and all that it started; what there is to say of that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return "; it could not be ended, so the GPU may hang"
    return ""
