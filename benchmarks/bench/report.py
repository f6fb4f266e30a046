"""Results as records, as a table, and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import mixed
from .machine import Limits
from .timing import Problem, Sample, percentile

SCHEMA = 1

Record = dict[str, Any]


def records(problem: Problem, samples: Sequence[Sample], limits: Limits) -> list[Record]:
    """One record a candidate, the first of `samples` being the one that ratios are taken to."""
    ours = samples[0].percentile(50)
    found = [_record(problem, sample, ours, limits) for sample in samples]
    return _beside_parts(found) if problem.op == mixed.OP else found


def _beside_parts(found: Sequence[Record]) -> list[Record]:
    """The mixed loops alone, each with the times of its parts and its share of their sum."""
    alone = {row["name"]: row["ms"] for row in found}
    others = alone[mixed.OTHERS]
    loops = []
    for row in found:
        linear = alone.get(row["name"] + mixed.ALONE)
        if linear is not None:
            parts = {"linear_ms": linear, "others_ms": others}
            loops.append(row | parts | {"of_parts": row["ms"] / (linear + others)})
    return loops


def _record(problem: Problem, sample: Sample, ours: float, limits: Limits) -> Record:
    seconds = sample.percentile(50)
    record: Record = {
        "op": problem.op,
        "shape": list(problem.shape),
        "m": problem.m,
        "dtype": problem.dtype_name,
        "threads": problem.threads,
        "name": sample.name,
        "ms": seconds * 1e3,
        "p20_ms": sample.percentile(20) * 1e3,
        "p80_ms": sample.percentile(80) * 1e3,
        "calls": len(sample.seconds),
        "cache": sample.cache,
        "copies": sample.copies,
        "copies_bytes": sample.copies * sample.footprint,
        "bytes": sample.bytes,
        "flops": problem.flops,
        "ratio": seconds / ours,
        "integers": sample.integers,
    }
    if sample.host_seconds:
        record["host_us"] = percentile(sample.host_seconds, 50) * 1e6
    if sample.bytes:
        flops = 0 if sample.integers else problem.flops
        limit, bound = limits.seconds(sample.bytes, flops, problem.dtype)
        record |= {"limit_ms": limit * 1e3, "bound": bound, "share": limit / seconds}
        record["rate"] = (sample.bytes if bound == "memory" else problem.flops) / seconds / 1e9
        record["peak_gflops"] = limits.peak_gflops(problem.dtype)
        record["unit"] = "GB/s" if bound == "memory" else "GFLOP/s"
    elif problem.work:
        record |= {"rate": problem.work / seconds, "unit": problem.unit}
    return record


def memory_record(
    problem: Problem, name: str, found: dict[str, int], ours: dict[str, int]
) -> Record:
    """What a process needs at its peak; `ratio` is to qkern's."""
    return {
        "op": problem.op,
        "shape": list(problem.shape),
        "m": problem.m,
        "dtype": problem.dtype_name,
        "threads": problem.threads,
        "name": name,
        "model_bytes": found["model"],
        "peak_bytes": found["peak"],
        "ratio": found["peak"] / ours["peak"],
    }


HEADER = ("op", "shape", "M", "dtype", "who", "ms", "p20", "p80", "rate", "of limit", "qkern is")


def table(rows: Iterable[Record]) -> str:
    """Markdown, aligned; what qkern's candidates are to themselves is left out.

    With a column of the host's microseconds a call where a device did the work.
    """
    found = list(rows)
    cells = [HEADER, *(_cells(row) for row in found)]
    if any("host_us" in row for row in found):
        host = ("host us", *(digits(row["host_us"]) if "host_us" in row else "" for row in found))
        at = HEADER.index("rate")
        cells = [(*row[:at], one, *row[at:]) for row, one in zip(cells, host, strict=True)]
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A table in markdown, the first of `cells` being its header."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cells(row: Record) -> tuple[str, ...]:
    op = row["op"] + (f", {count_of_threads(row['threads'])}" if "of_parts" in row else "")
    what = (op, "x".join(map(str, row["shape"])), "" if row["m"] is None else str(row["m"]))
    if "peak_bytes" in row:
        rate = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        ratio = "" if row["name"] == "qkern" else f"{1 / row['ratio']:.2f} of it"
        return (*what, row["dtype"], row["name"], "", "", "", rate, "", ratio)
    times = tuple(digits(row[key]) for key in ("ms", "p20_ms", "p80_ms"))
    rate = f"{digits(row['rate'])} {row['unit']}" if "rate" in row else ""
    if "of_parts" in row:
        rate = f"{row['of_parts']:.2f} of its parts"
    if "times_slower" in row:
        rate = f"{row['times_slower']:.2f}x its quiet time"
    share = f"{row['share']:.0%} {row['bound']}" if "share" in row else ""
    ratio = "" if row["name"] == "qkern" else f"{row['ratio']:.2f}x as fast"
    return (*what, row["dtype"], row["name"], *times, rate, share, ratio)


def count_of_threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def digits(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


_PRIVATE = ("memory_of", "json", "plot", "replot")
"""Options that say where output goes: of no use to who reads it."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run's figures depend on."""
    return {name: value for name, value in vars(args).items() if name not in _PRIVATE}


def content(
    machine: dict[str, Any],
    limits: Limits,
    settings: dict[str, Any],
    rows: Sequence[Record],
    notes: Sequence[str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything about a run, as plain values that ``json`` can write.

    `seconds` is how long each op took, and ``all`` of the run.
    """
    return {
        "schema": SCHEMA,
        "machine": machine,
        "limits": asdict(limits),
        "settings": settings,
        "results": list(rows),
        "notes": list(dict.fromkeys(notes)),
        "seconds": seconds,
    }


def summary(content: dict[str, Any]) -> str:
    """What the command prints: machine, limits, table, and notes on how to read it."""
    machine, rows = content["machine"], content["results"]
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    after = ", ".join(f"{value:.2f}" for value in machine["load_average_after"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"qkern on {machine['qkern_isa']}; load average {load}, afterwards {after}",
        versions,
        limits_text(content["limits"]),
        "",
        table(rows),
        "",
        *better_dtype_lines(rows),
        *(f"note: {note}" for note in content["notes"]),
    ]
    took = ", ".join(f"{name} {digits(value)}" for name, value in content["seconds"].items())
    lines.append(f"seconds: {took}")
    caches = {row["cache"] for row in rows if row.get("copies_bytes")}
    size = machine["last_level_cache_bytes"] / 2**20
    if "warm" in caches:
        lines.append(f"note: one copy of each weight, which the {size:.0f} MiB cache may hold")
    if "partly cold" in caches:
        lines.append(
            f"note: some copies are less than twice the {size:.0f} MiB cache (JSON: partly cold)"
        )
    return "\n".join(lines)


def limits_text(limits: dict[str, Any]) -> str:
    """One line: what shares are taken of."""
    parts = [f"read {limits['read_gb_s']:.1f} GB/s", f"copy {limits['copy_gb_s']:.1f} GB/s"]
    peaks = {"FMA": limits["fma_gflops"], "AMX": limits["amx_gflops"]}
    parts += [f"{name} {value:.0f} GFLOP/s" for name, value in peaks.items() if value is not None]
    matmul = sorted(limits["matmul_gflops"].items())
    parts += [f"torch.mm in {name} {value:.0f} GFLOP/s" for name, value in matmul]
    return "measured in this run: " + ", ".join(parts)


def better_dtype_lines(rows: Sequence[Record]) -> list[str]:
    """For work on a model, where a user may choose the dtype: each at its better one."""
    lines = []
    models = [row for row in rows if row.get("unit") == "tokens/s"]
    for op, shape in dict.fromkeys((row["op"], tuple(row["shape"])) for row in models):
        best: dict[str, Record] = {}
        for row in models:
            if (row["op"], tuple(row["shape"])) == (op, shape):
                other = best.setdefault(row["name"], row)
                best[row["name"]] = max(row, other, key=lambda r: float(r["rate"]))
        size = "x".join(map(str, shape))
        ours = best["qkern"]["rate"]
        parts = [
            f"{name} {digits(row['rate'])} tokens/s in {row['dtype']}"
            + ("" if name == "qkern" else f" (qkern is {ours / row['rate']:.2f}x as fast)")
            for name, row in best.items()
        ]
        lines.append(f"{op} {size}, each at its better dtype: {', '.join(parts)}")
    return lines


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
