"""Runs the op table on the emulated kernels of one build; made for a process under a sanitizer.

``python -m lab.cuda.emulator.run_table FOLDER SCHEDULE STRIDE LARGEST [FIRST]``: every STRIDE-th
case, from the FIRST on, of at most LARGEST multiply-adds or elements, under
``backend.SCHEDULES[SCHEDULE]``. Prints the case at work, so that the last line names the one at
which a sanitizer ended the process; at the end, their number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lab.cuda.emulator import backend, build
from qkern import testing


def cases(
    stride: int, largest: int, first: int = 0
) -> Iterator[tuple[testing.OpSpec, testing.Case]]:
    """The part of the table that is run."""
    for spec in testing.OPS.values():
        for case in [c for c in spec.cases if c.numel <= largest][first::stride]:
            yield spec, case


def main(folder: str, schedule: str, stride: str, largest: str, first: str = "0") -> None:
    target = backend.EmulatedTarget(build.load(Path(folder)), backend.SCHEDULES[int(schedule)])
    count = 0
    for spec, case in cases(int(stride), int(largest), int(first)):
        print(spec.id(case, target), flush=True)
        testing.check(spec, case, target)
        count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
