"""The committed table of figures, ``budget.csv``.

``PYTHONPATH=tools python -m lab.triton.static.budget [--write] [--only CALL] [ARCH ...]`` prints
the table, with each target that is missed; ``--write`` replaces the committed rows of these
architectures and calls.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, fields
from pathlib import Path

from . import compile as compiler
from . import figures
from .figures import Figures

TABLE = Path(__file__).with_name("budget.csv")
FIELDS = tuple(field.name for field in fields(Figures))
Key = tuple[str, str, str]
_MORE_IS_BETTER = ("matrix_instructions", "load_bits", "store_bits")
_SLACK = {"instructions": 1.02, "registers": 1.05}
"""Allowed growth: the compilers' schedules are not the same on every machine's threads."""


def key_of(f: Figures) -> Key:
    """What a row of the table is found by."""
    return f.architecture, f.call, f.kernel


def read_table() -> dict[Key, Figures]:
    """The committed rows."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    text = ("call", "kernel", "architecture")
    found = [Figures(**{k: v if k in text else int(v) for k, v in row.items()}) for row in rows]
    return {key_of(f): f for f in found}


def table_compiler() -> str:
    """The Triton that the committed rows are of."""
    return TABLE.read_text().splitlines()[0].removeprefix("# ")


def regressions(now: Figures, committed: Figures) -> list[str]:
    """What is worse than the committed row, in words."""
    found = []
    for name in FIELDS[3:]:
        new, old = getattr(now, name), getattr(committed, name)
        worse = new < old if name in _MORE_IS_BETTER else new > old * _SLACK.get(name, 1)
        if worse:
            found.append(f"{name}: {new}, was {old}")
    return found


def faults(f: Figures) -> list[str]:
    """Where a kernel misses what every one of them is held to."""
    from qkern.triton_kernels import launch

    found = []
    if f.spills or f.stack_bytes:
        found.append(f"{f.spills} accesses to local memory, {f.stack_bytes} bytes of stack")
    if f.load_bits < 128 and f.kernel != "mean_kernel":
        found.append(f"loads of {f.load_bits} bits")
    name = f.kernel.removesuffix("_kernel").removeprefix("grouped_")
    if name in ("linear_4bit", "linear_4bit_dx", "matmul_into"):
        arch = int(f.architecture) if f.architecture.isdigit() else f.architecture
        target = launch.Target("cuda" if isinstance(arch, int) else "hip", arch, 1)
        # Dense products are float32, whatever is multiplied.
        operands = "fp32" if name == "matmul_into" else f.call.split("-")[1]
        dtype = compiler.DTYPES[operands]
        if target.multiplies(dtype) != (f.matrix_instructions > 0):
            found.append(f"{f.matrix_instructions} matrix instructions")
    return found


def write_table(rows: dict[Key, Figures]) -> None:
    """Replace the committed table."""
    order = [str(architecture) for architecture in compiler.ARCHITECTURES]
    with TABLE.open("w", newline="") as file:
        file.write(f"# {figures.triton_version()}\n")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows, key=lambda key: (order.index(key[0]), *key[1:])):
            writer.writerow(asdict(rows[key]))


def architecture(text: str) -> int | str:
    """An argument such as ``90`` or ``gfx942``."""
    return int(text) if text.isdigit() else text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.triton.static.budget", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed rows")
    parser.add_argument("--only", default="", help="calls with this in their id")
    parser.add_argument("architectures", nargs="*", type=architecture)
    args = parser.parse_args()
    rows = read_table() if args.write and TABLE.exists() else {}
    print("  ".join(FIELDS))
    for arch in args.architectures or compiler.ARCHITECTURES:
        stale = [key for key in rows if key[0] == str(arch) and args.only in key[1]]
        rows = {key: row for key, row in rows.items() if key not in stale}
        for f in figures.kernel_figures(arch, args.only):
            rows[key_of(f)] = f
            print("  ".join(str(value) for value in asdict(f).values()))
            for fault in faults(f):
                print(f"    MISSED {fault}", flush=True)
    if args.write:
        write_table(rows)


if __name__ == "__main__":
    main()
