"""The table of what runs where, from the tests' own records; tests/docs/test_support.py compares.

``python tools/support.py --write`` puts it into README.md and docs/support.md. The records:

    tests/docs/support.json            cases of the op table that passed: `pytest --record-support`
    tests/docs/support_triton.json     the same on the Triton kernels, of which every case was run
    tools/lab/cuda/static/budget.csv   the CUDA kernels as compiled for each architecture
    tools/lab/triton/static/budget.csv the Triton kernels as compiled for each architecture
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = (ROOT / "tests/docs/support.json", ROOT / "tests/docs/support_triton.json")
README, PAGE = ROOT / "README.md", ROOT / "docs" / "support.md"
BEGIN, END = "<!-- from tools/support.py -->", "<!-- end -->"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CUDA_TYPES = {"float": "fp32", "BFloat16": "bf16", "Float16": "fp16"}

Passed = dict[tuple[str, str, str], int]
"""Cases by op, backend with its instruction set or device, and dtype."""
Compiled = dict[tuple[str, str], set[str]]
"""Architectures by op and dtype."""


def passed() -> Passed:
    """What `pytest --record-support` wrote."""
    rows = [row for file in RECORDS for row in json.loads(file.read_text("utf-8"))["passed"]]
    return {(op, target, dtype): count for op, target, dtype, count in sorted(rows)}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


ALL = frozenset(row["architecture"] for row in _rows(ROOT / "tools/lab/triton/static/budget.csv"))
"""Every architecture that tests compile for."""


def triton_compiled() -> Compiled:
    """Of the Triton kernels."""
    found: Compiled = defaultdict(set)
    for row in _rows(ROOT / "tools/lab/triton/static/budget.csv"):
        op, dtype = row["call"].split("-")[:2]
        found[op, dtype].add(row["architecture"])
    return found


def cuda_compiled() -> Compiled:
    """Of the CUDA kernels; one without a type in its name is of float32."""
    found: Compiled = defaultdict(set)
    for row in _rows(ROOT / "tools/lab/cuda/static/budget.csv"):
        name, _, arguments = row["kernel"].partition("<")
        op = re.sub(r"(_mma|_vector|_tiled)?_kernel$", "", name)
        first = arguments.rstrip(">").split(",")[0].strip()
        found[op, _CUDA_TYPES.get(first, "fp32")].add(row["architecture"])
    for dtype in DTYPES:
        # One tiled kernel serves both.
        for forward in ("linear_4bit", "grouped_linear_4bit"):
            found[f"{forward}_dx", dtype] |= found[forward, dtype]
        # One kernel takes all of them.
        found["grouped_matmul_into", dtype] |= found["grouped_matmul_into", "fp32"]
    return found


def _ops(record: Passed) -> list[str]:
    return list(dict.fromkeys(op for op, _, _ in record))


def _backend(target: str) -> str:
    return {"cuda_emulated": "cuda"}.get(target, target.partition(".")[0])


def _dtypes(names: Iterable[str]) -> str:
    found = frozenset(names)
    return ", ".join(DTYPES[name] for name in DTYPES if name in found)


def _architectures(names: Iterable[str]) -> str:
    """NVIDIA's as compute capabilities, a run of those that tests compile for by its ends."""
    known = sorted({int(n) for n in ALL if n.isdigit()})
    nvidia = sorted(int(n) for n in names if n.isdigit())
    texts = [f"{n // 10}.{n % 10}" for n in nvidia]
    if len(nvidia) > 2 and nvidia == known[known.index(nvidia[0]) :][: len(nvidia)]:
        texts = [f"{texts[0]} to {texts[-1]}"]
    return ", ".join([*texts, *sorted((n for n in names if not n.isdigit()), key=_by_number)])


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name


def summary() -> str:
    """README's table: op, backends and dtypes that passed, architectures compiled for."""
    record, cuda, triton = passed(), cuda_compiled(), triton_compiled()
    lines = ["| op | backends | dtypes | `cuda` for | `triton` for |", "|---|---|---|---|---|"]
    for op in _ops(record):
        here = [(target, dtype) for name, target, dtype in record if name == op]
        backends = sorted({_backend(target) for target, _ in here})
        kinds = [
            _architectures(frozenset.intersection(*map(frozenset, sets)))
            for sets in (
                [found[op, dtype] for dtype in {d for _, d in here}] for found in (cuda, triton)
            )
        ]
        dtypes = _dtypes(dtype for _, dtype in here)
        lines.append(f"| `{op}` | {', '.join(backends)} | {dtypes} | {kinds[0]} | {kinds[1]} |")
    return "\n".join(lines)


def details() -> str:
    """The page's tables: cases passed by op, backend and dtype; architectures by op and dtype."""
    record = passed()
    lines = [f"| op | backend | {' | '.join(DTYPES.values())} |", "|---|---|---|---|---|"]
    for op in _ops(record):
        for target in dict.fromkeys(target for name, target, _ in record if name == op):
            counts = [str(record.get((op, target, dtype), "")) for dtype in DTYPES]
            lines.append(f"| `{op}` | {target} | {' | '.join(counts)} |")
    lines += [
        "",
        "| op | dtype | `cuda` compiled for | `triton` compiled for |",
        "|---|---|---|---|",
    ]
    cuda, triton = cuda_compiled(), triton_compiled()
    for op in _ops(record):
        for dtype, name in DTYPES.items():
            if triton[op, dtype]:
                kinds = [_architectures(found[op, dtype]) for found in (cuda, triton)]
                lines.append(f"| `{op}` | {name} | {kinds[0]} | {kinds[1]} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """A document's text with the table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def documents() -> dict[Path, str]:
    """Both documents as they should be."""
    return {
        README: with_table(README.read_text("utf-8"), summary()),
        PAGE: with_table(PAGE.read_text("utf-8"), details()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/support.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the documents")
    if parser.parse_args().write:
        for path, text in documents().items():
            path.write_text(text, "utf-8")
    else:
        print(summary(), details(), sep="\n\n")


if __name__ == "__main__":
    main()
