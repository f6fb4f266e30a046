"""What ncu counts of a few launches of qkern's kernels.

``python -m lab.cuda.first_run.counters NCU FILE PROGRAM [ARGUMENT ...]`` writes its CSV of raw
values: a row of units, then one for each launch. Counters that this ncu or device lacks are left
out.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LAUNCHES = 40

_NAME, _ARGUMENTS = 40, 24  # characters of a column

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "smsp__inst_executed.sum": "instructions",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared wavefronts",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
    "smsp__cycles_active.avg": "active cycles",
}
NO_PERMISSION = "ERR_NVGPUCTRPERM"


class Launch(NamedTuple):
    """A kernel and its grid, and each of `METRICS` that ncu tells, with the unit."""

    kernel: str
    grid: str
    counts: dict[str, str]


def arguments(ncu: str, file: Path, metrics: Iterable[str]) -> list[str]:
    """Those of ncu before the program's."""
    return [
        ncu,
        *("--clock-control", "none", "--kernel-name-base", "mangled", "-k", "regex:qkern"),
        *("--launch-count", str(LAUNCHES), "--metrics", ",".join(metrics)),
        *("--csv", "--page", "raw", "--log-file", str(file)),
    ]


def count(ncu: str, file: Path, program: Sequence[str]) -> int:
    """The exit status; what ncu says besides its table is printed."""
    metrics = list(METRICS)
    while True:
        file.unlink(missing_ok=True)
        status = subprocess.run([*arguments(ncu, file, metrics), *program], check=False).returncode
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        said = [line for line in text.splitlines() if line.startswith("==")]
        print("\n".join(said), flush=True)
        unknown = {m for m in metrics for line in said if "metric" in line and m in line}
        if status == 0 or not unknown or unknown == set(metrics):
            return status
        metrics = [metric for metric in metrics if metric not in unknown]


def read(file: Path) -> list[Launch]:
    """The launches of a file; none where it is absent or holds no table."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))
    if not rows or "Kernel Name" not in rows[0]:
        return []
    units, *launches = rows
    found = []
    for row in launches:
        counts = {
            name: f"{row[metric]} {units.get(metric) or ''}".strip()
            for metric, name in METRICS.items()
            if row.get(metric)
        }
        found.append(Launch(row["Kernel Name"], row.get("Grid Size") or "", counts))
    return found


def short_name(kernel: str) -> str:
    """The function's name in a mangled one, with the first of its template arguments."""
    rest = kernel.removeprefix("_ZN")
    name = ""
    while found := re.match(r"\d+", rest):
        rest = rest[found.end() :]
        name, rest = rest[: int(found[0])], rest[int(found[0]) :]
    return f"{name} {rest[:_ARGUMENTS]}".strip() if name else kernel[:_NAME]


if __name__ == "__main__":
    sys.exit(count(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
