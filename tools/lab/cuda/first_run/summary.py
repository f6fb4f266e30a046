"""The page about a first run: what went wrong first, then what differs from the model.

It is made of the files of a run alone, so that it can be made of any that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lab.cuda.first_run import differences
from lab.cuda.first_run.counters import Launch, short_name
from lab.cuda.first_run.differences import table
from lab.cuda.first_run.steps import Outcome

_FAILURES = 6  # of a step; log.txt has all
_LONG = 240  # characters of a line


def page(
    machine: dict[str, Any],
    outcomes: Sequence[Outcome],
    times: dict[str, Any],
    launches: Sequence[Launch],
    seconds: float,
    left: int = 0,
) -> str:
    """Markdown. ``left`` is how many steps are still to come."""
    parts = [_title(machine), _verdict(outcomes, seconds, left), _machine(machine)]
    parts += [_wrong(outcomes), _steps(outcomes)]
    if times.get("results"):
        parts += differences.sections(times)
    elif outcomes and not left:
        parts.append("No times were measured.")
    parts.append(_counted(launches))
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(machine: dict[str, Any]) -> str:
    devices = Counter(device["name"] for device in machine.get("devices", ()))
    names = ", ".join(f"{count} x {name}" for name, count in devices.items()) or "an unknown device"
    dry = ", dry: the figures of times mean nothing" if machine.get("dry") else ""
    return f"# First run on {names}{dry}"


def _verdict(outcomes: Sequence[Outcome], seconds: float, left: int) -> str:
    wrong = sum(outcome.wrong for outcome in outcomes)
    done = f"{wrong} of {len(outcomes)} steps went wrong" if wrong else "Nothing went wrong"
    more = f"; **{left} steps are still to come, or the run was ended**" if left else ""
    return f"{done} in {seconds:.0f} s{more}."


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    lines = [f"Python {machine['python']}, {machine['cores']} cores, {machine['platform']}"]
    for key in ("packages", "programs"):
        found = (f"{name} {version}" for name, version in machine[key].items())
        lines.append(", ".join(found))
    driver = "; ".join(machine["driver"].splitlines())
    lines.append(f"Driver, clocks, power, MIG: {driver}")
    for device in machine["devices"]:
        if "processors" in device:
            major, minor = device["capability"]
            lines.append(
                f"{device['name']}: compute capability {major}.{minor}, {device['processors']} "
                f"processors, {device['l2_bytes'] / 1e6:.0f} MB of L2, "
                f"{device['memory_bytes'] / 1e9:.0f} GB"
            )
    return "\n".join(f"- {line}" for line in lines)


def _cut(text: str) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."


def _wrong(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for outcome in outcomes:
        if not outcome.wrong:
            continue
        head = f"- **{outcome.name}: {outcome.status}** {outcome.reason}".rstrip()
        if outcome.failures:
            # A failure begins with the way, or the kernel's error, that it is of.
            kinds = Counter(failure.partition(" ")[0] for failure in outcome.failures)
            by = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(_FAILURES))
            head += f"; {len(outcome.failures)} failures: {by}"
        elif outcome.said:
            head += f"; last said: {_cut(outcome.said)}"
        lines.append(head)
        lines += [f"  - {_cut(failure)}" for failure in outcome.failures[:_FAILURES]]
    return "\n".join(["## What went wrong", "", *lines]) if lines else ""


def _steps(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return ""
    rows = [
        (outcome.name, outcome.status, f"{outcome.seconds:.0f}", _cut(_said(outcome)))
        for outcome in outcomes
    ]
    return "## Steps\n\n" + table(("step", "", "s", ""), rows)


def _said(outcome: Outcome) -> str:
    return outcome.reason if outcome.reason or outcome.wrong else outcome.said


def _counted(launches: Sequence[Launch]) -> str:
    if not launches:
        return ""
    names = list(dict.fromkeys(name for launch in launches for name in launch.counts))
    rows = [
        (short_name(launch.kernel), launch.grid, *(launch.counts.get(n, "") for n in names))
        for launch in launches
    ]
    return "## Counters\n\n" + table(("kernel", "grid", *names), rows)
