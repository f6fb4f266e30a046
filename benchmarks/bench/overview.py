"""What a run ends with: a table of every contestant at every op, and that of ratios; the plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import plots, ratios, report
from .models import CHUNKED_LOSS, COMPILED, FOUR_BIT_HEAD
from .report import Record, digits

STEM = "overview"
REFERENCE = "bitsandbytes"
DTYPES = ("float32", "bfloat16")
COLUMNS = ("qkern", REFERENCE, "dense", "llama.cpp Q4_0", "torchao int4")
_MARKERS = {
    "dense": "s",
    "bitsandbytes (eval)": "o",
    "llama.cpp Q4_0": "D",
    "torchao int4": "^",
}


@dataclass(frozen=True)
class Line:
    """One line of the overview: the records of `op` with these values; `ours` is qkern's there."""

    label: str
    op: str
    m: int | None = None
    ours: str = "qkern"


LINES = (
    Line("quantise", "quantize"),
    Line("dequantise, into out=", "dequantize"),
    Line("dequantise, fresh tensor", "dequantize", ours="qkern (fresh output)"),
    Line("forward, 1 row", "forward", 1),
    Line("forward, 512 rows", "forward", 512),
    Line("forward + backward, 1 row", "forward_backward", 1),
    Line("forward + backward, 512 rows", "forward_backward", 512),
    Line("LoRA training step", "train_step"),
    Line("its peak memory", "memory"),
    Line("training step, chunked loss", "train_step", ours=CHUNKED_LOSS),
    Line("peak memory, chunked loss", "memory", ours=CHUNKED_LOSS),
    Line("generation, batch 1", "generate"),
    Line("generation, 4-bit head", "generate", ours=FOUR_BIT_HEAD),
    Line("generation, compiled, 4-bit head", COMPILED, ours=FOUR_BIT_HEAD),
)


def publish(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Print a run, and write its JSON and plots where the command line asks for them."""
    content["ratios"] = ratios.rows(content)
    print(report.summary(content))
    print(f"\n{tables(content)}")
    if args.json:
        report.write_json(args.json, content)
    if args.plot:
        plots.plot_all(args.plot, content)


def tables(content: dict[str, Any]) -> str:
    """The overview, where `content` has a line of it, and the ratios to the best peers."""
    has_lines = any(lines(content, dtype) for dtype in DTYPES)
    overview = [table(content), ""] if has_lines else []
    return "\n".join([*overview, ratios.table(content)])


def replot(files: Sequence[Path], directory: Path) -> int:
    """Draw everything that `files` allow into `directory`, print the tables; the exit status."""
    content = merged([json.loads(path.read_text("utf-8")) for path in files])
    for path in [*plots.plot_all(directory, content), *plot(directory, content)]:
        print(path)
    print(f"\n{tables(content)}")
    return 0


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One content of several: of a contest that more than one has, the first counts.

    The limits are the higher ones.
    """
    found: dict[tuple[Any, ...], list[Record]] = {}
    for content in contents:
        contests: dict[tuple[Any, ...], list[Record]] = {}
        level = content["machine"].get("qkern_isa")
        for record in content["results"]:
            row = {"level": level, **record}
            threads = row.get("threads", content["machine"]["threads"])
            problem = (row["op"], tuple(row["shape"]), row["m"], row["dtype"], threads)
            contests.setdefault(problem, []).append(row)
        found |= {problem: rows for problem, rows in contests.items() if problem not in found}
    limits: dict[str, Any] = {}
    for content in contents:
        for name, value in content["limits"].items():
            if isinstance(value, (int, float)):
                limits[name] = max(value, limits.get(name) or value)
            else:
                limits.setdefault(name, value)
    rows = [row for contest in found.values() for row in contest]
    return contents[0] | {"results": rows, "limits": limits}


def lines(content: dict[str, Any], dtype: str) -> list[tuple[Line, dict[str, Record]]]:
    """The lines that `content` has in `dtype`, with the records by contestant, qkern's as qkern.

    Of several weights or steps, the first measured counts.
    """
    found = []
    for line in LINES:
        rows = [
            row
            for row in content["results"]
            if (row["op"], row["m"], row["dtype"]) == (line.op, line.m, dtype)
        ]
        by_name = {row["name"]: row for row in rows if row["shape"] == rows[0]["shape"]}
        # Not where each instruction set has its own name, nor before there was such a way.
        if "qkern" in by_name and line.ours in by_name:
            by_name["qkern"] = by_name[line.ours]
            found.append((line, by_name))
    return found


def plot(directory: Path, content: dict[str, Any]) -> list[Path]:
    """How many times as fast as bitsandbytes each is, a panel for each dtype."""
    dtypes = [dtype for dtype in DTYPES if _compared(content, dtype)]
    if not dtypes:
        return []
    figure = Figure(figsize=(9.2, 3.7), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(label for d in dtypes for label, _ in _compared(content, d)))
    for axes, dtype in zip(panels, dtypes, strict=True):
        _panel(axes, labels, _compared(content, dtype))
        axes.set_title(dtype, fontsize=10)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, high * (high / low) ** 0.2)  # the figures stand at the right
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.supxlabel("times as fast as bitsandbytes", fontsize=9)
    drawn = {text: handle for axes in panels for handle, text in _legend(axes)}
    names = [name for name in ("qkern", REFERENCE, *_MARKERS) if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    paths = [directory / f"{STEM}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _legend(axes: Axes) -> Iterable[tuple[Any, str]]:
    return zip(*axes.get_legend_handles_labels(), strict=True)


def _compared(content: dict[str, Any], dtype: str) -> list[tuple[str, dict[str, float]]]:
    """Each line's label and how many times as fast as bitsandbytes each contestant is."""
    return [
        (line.label, {name: rows[REFERENCE]["ms"] / row["ms"] for name, row in rows.items()})
        for line, rows in lines(content, dtype)
        if REFERENCE in rows and line.op != "memory"
    ]


def _panel(
    axes: Axes, labels: Sequence[str], compared: Sequence[tuple[str, dict[str, float]]]
) -> None:
    places = [labels.index(label) for label, _ in compared]
    ours = [speeds["qkern"] for _, speeds in compared]
    left = [min(1.0, speed) for speed in ours]
    widths = [abs(speed - 1.0) for speed in ours]
    axes.barh(places, widths, 0.62, left=left, color=plots.COLOURS["qkern"], label="qkern")
    for place, speed in zip(places, ours, strict=True):
        axes.text(
            0.99,
            place,
            f"{speed:.0f}×" if speed >= 10 else f"{speed:.2f}×",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=plots.COLOURS["qkern"],
        )
    for name, marker in _MARKERS.items():
        points = [(s[name], labels.index(label)) for label, s in compared if name in s]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker,
                color=plots.COLOURS[name],
                markeredgecolor="white",
                markersize=6.5,
                label=name,
            )
    axes.axvline(1, color=plots.COLOURS[REFERENCE], linewidth=1.4, label=REFERENCE)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize=8.5)


def table(content: dict[str, Any]) -> str:
    """Markdown: milliseconds, tokens/s or MiB; what nobody measured has no column."""
    chosen = [(dtype, line, rows) for dtype in DTYPES for line, rows in lines(content, dtype)]
    chosen.sort(key=lambda entry: LINES.index(entry[1]))
    columns = [name for name in COLUMNS if any(name in rows for *_, rows in chosen)]
    cells = [["", "", *columns, f"ratio to {REFERENCE}"]]
    for dtype, line, rows in chosen:
        ratio = digits(_cost(rows[REFERENCE]) / _cost(rows["qkern"])) if REFERENCE in rows else ""
        values = [_value(rows[name]) if name in rows else "" for name in columns]
        cells.append([line.label, dtype, *values, ratio])
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cost(row: Record) -> float:
    return float(row["peak_bytes"] if "peak_bytes" in row else row["ms"])


def _value(row: Record) -> str:
    if "peak_bytes" in row:
        return f"{row['peak_bytes'] / 2**20:,.0f} MiB"
    if row.get("unit") == "tokens/s":
        return f"{digits(row['rate'])} tokens/s"
    return digits(row["ms"])
