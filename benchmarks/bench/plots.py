"""Plots of a run's records, each as PNG and SVG."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import mixed, optimizer, overhead
from .report import Record, count_of_threads

COLOURS = {
    "qkern": "tab:blue",
    "qkern, 4-bit head": "tab:cyan",
    "qkern (fresh output)": "tab:cyan",
    "qkern (in memory)": "tab:cyan",
    "disk": "tab:gray",
    "bitsandbytes": "tab:red",
    "bitsandbytes (eval)": "tab:orange",
    "dense": "tab:gray",
    "dense (a copy)": "tab:gray",
    "torchao int4": "tab:green",
    "llama.cpp Q4_0": "tab:purple",
    "llama.cpp Q4_K": "tab:pink",
}
_PACKED_BITS = 4


def plot_all(directory: Path, content: dict[str, Any]) -> list[Path]:
    """Every plot that the records of one JSON allow; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[Record] = content["results"]
    written = roofline(directory, rows, content["limits"])
    kernels = [row for row in rows if row.get("bytes") and row["op"] != optimizer.OP]
    for (op, shape, dtype), group in _grouped(kernels, "op", "shape", "dtype").items():
        if len({row["m"] for row in group}) > 1:
            written += time_over_m(directory, op, shape, dtype, group)
    for (op, m, dtype), group in _grouped(kernels, "op", "m", "dtype").items():
        if len({tuple(row["shape"]) for row in group}) > 1:
            written += time_over_size(directory, op, m, dtype, group)
    for op, label in (("train_step", "tokens/s"), ("generate", "tokens/s"), ("memory", "MiB")):
        if group := [row for row in rows if row["op"] == op]:
            # Other sizes of a step have a plot of their own.
            first = [row for row in group if row["shape"] == group[0]["shape"]]
            written += bars(directory, op, label, first)
    for op, draw in ((mixed.OP, mixed_loops), (overhead.OP, overheads)):
        of_op = [row for row in rows if row["op"] == op]
        for (m, dtype), group in _grouped(of_op, "m", "dtype").items():
            written += draw(directory, m, dtype, group)
    in_file = [row for row in rows if row["op"] == optimizer.IN_FILE]
    for (dtype,), group in _grouped(in_file, "dtype").items():
        if len({tuple(row["shape"]) for row in group}) > 1:
            written += step_over_state(directory, dtype, group)
    steps = [row for row in rows if row["op"] == "train_step"]
    for (dtype,), group in _grouped(steps, "dtype").items():
        if len({row["shape"][1] for row in group}) > 1:
            written += speed_over_sequence(directory, dtype, group)
    return written


def _grouped(rows: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in rows:
        groups[tuple(_hashable(row[key]) for key in keys)].append(row)
    return groups


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots()
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def save(figure: Figure, directory: Path, stem: str) -> list[Path]:
    paths = [directory / f"{stem}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def roofline(directory: Path, rows: Sequence[Record], limits: dict[str, Any]) -> list[Path]:
    """Rate over operations a byte, one plot a dtype, below what bandwidth and arithmetic allow."""
    written = []
    matmuls = [row for row in rows if row.get("flops") and row.get("bytes")]
    for (dtype,), group in _grouped(matmuls, "dtype").items():
        figure, axes = _figure()
        peak = group[0]["peak_gflops"]
        for (name,), points in _grouped(group, "name").items():
            axes.plot(
                [row["flops"] / row["bytes"] for row in points],
                [row["flops"] / row["ms"] / 1e6 for row in points],
                "o",
                label=f"{name} (8-bit integers)" if points[0].get("integers") else name,
                color=COLOURS.get(name),
                alpha=0.8,
            )
        intensities = [row["flops"] / row["bytes"] for row in group]
        xs = [min(intensities) / 2 * 1.1**i for i in range(200)]
        xs = [x for x in xs if x <= 2 * max(intensities)]
        roof = [min(x * limits["read_gb_s"], peak) for x in xs]
        axes.plot(xs, roof, "k-", linewidth=1, label="measured limit")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="floating-point operations a byte moved",
            ylabel="GFLOP/s",
            title=f"Roofline, {dtype}",
        )
        axes.legend(fontsize=8)
        written += save(figure, directory, f"roofline-{dtype}")
    return written


def time_over_m(
    directory: Path, op: str, shape: Sequence[int], dtype: str, rows: Sequence[Record]
) -> list[Path]:
    """Time over rows of activations, with p20 to p80, and where qkern and dense cross."""
    figure, axes = _figure()
    _lines(axes, rows, lambda row: row["m"])
    size = "x".join(map(str, shape))
    for m in crossovers(rows):
        axes.axvline(m, color="tab:gray", linestyle=":", linewidth=1)
        text = f" dense crosses at M = {m:.0f}"
        axes.annotate(text, (m, axes.get_ylim()[0]), fontsize=8, rotation=90, ha="right")
    ms = sorted({row["m"] for row in rows})
    axes.set_xticks(ms, labels=map(str, ms), minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="rows of activations, M", title=f"{op}, {size}, {dtype}")
    return save(figure, directory, f"{op}-{size}-{dtype}-over-m")


def time_over_size(
    directory: Path, op: str, m: int | None, dtype: str, rows: Sequence[Record]
) -> list[Path]:
    """Time over the size of the packed weight; not everyone's tensors fit the memory at the end."""
    figure, axes = _figure()
    _lines(axes, rows, lambda row: math.prod(row["shape"]) * _PACKED_BITS / 8e6)
    largest = max((row["shape"] for row in rows), key=math.prod)
    present = {row["name"] for row in rows if row["shape"] == largest}
    label = "packed weight, MB"
    if present != {row["name"] for row in rows}:
        label += "\n(where a line ends early, the notes in the JSON say why)"
    suffix = "" if m is None else f", M = {m}"
    axes.set(xlabel=label, title=f"{op}, {dtype}{suffix}")
    stem = f"{op}-{dtype}-over-size" if m is None else f"{op}-m{m}-{dtype}-over-size"
    return save(figure, directory, stem)


def speed_over_sequence(directory: Path, dtype: str, rows: Sequence[Record]) -> list[Path]:
    figure, axes = _figure()
    for (name,), points in _grouped(rows, "name").items():
        ordered = sorted(points, key=lambda row: row["shape"][1])
        axes.plot(
            [row["shape"][1] for row in ordered],
            [row["rate"] for row in ordered],
            "o-",
            label=name,
            color=COLOURS.get(name),
        )
    axes.set(xlabel="sequence length", ylabel="tokens/s", ylim=(0, None))
    axes.set_title(f"LoRA training step, {dtype}")
    axes.legend(fontsize=8)
    return save(figure, directory, f"train_step-{dtype}-over-sequence")


def step_over_state(directory: Path, dtype: str, rows: Sequence[Record]) -> list[Path]:
    """The time of an optimizer's step over the size of its state, past the memory it may take."""
    figure, axes = _figure()
    _lines(axes, rows, lambda row: 8 * math.prod(row["shape"]) / 1e9)
    axes.axvline(optimizer.BUDGET_BYTES / 1e9, color="tab:gray", linestyle=":", linewidth=1)
    axes.annotate(
        " budget", (optimizer.BUDGET_BYTES / 1e9, axes.get_ylim()[0]), fontsize=8, rotation=90
    )
    sizes = sorted({8 * math.prod(row["shape"]) / 1e9 for row in rows})
    axes.set_xticks(sizes, labels=[f"{size:.2g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="moments, GB", title=f"AdamW step with its moments in a file, {dtype}")
    return save(figure, directory, f"{optimizer.IN_FILE}-{dtype}-over-state")


def _lines(axes: Axes, rows: Sequence[Record], x_of: Any) -> None:
    for (name,), points in _grouped(rows, "name").items():
        ordered = sorted(points, key=x_of)
        xs = [x_of(row) for row in ordered]
        colour = COLOURS.get(name)
        (line,) = axes.plot(xs, [row["ms"] for row in ordered], "o-", label=name, color=colour)
        low, high = ([row[key] for row in ordered] for key in ("p20_ms", "p80_ms"))
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xscale="log", yscale="log", ylabel="ms")
    axes.legend(fontsize=8)


def crossovers(rows: Sequence[Record]) -> list[float]:
    """Each M, between two measured ones, where dense becomes faster than qkern or slower.

    Interpolated on the logarithms of M and of the ratio.
    """
    ratios = sorted((row["m"], row["ratio"]) for row in rows if row["name"] == "dense")
    found = []
    for (m0, r0), (m1, r1) in itertools.pairwise(ratios):
        if (r0 > 1) != (r1 > 1):
            part = math.log(r0) / (math.log(r0) - math.log(r1))
            found.append(m0 * (m1 / m0) ** part)
    return found


def bars(directory: Path, op: str, label: str, rows: Sequence[Record]) -> list[Path]:
    """One bar for each candidate and dtype."""
    figure, axes = _figure()
    value = (lambda r: r["peak_bytes"] / 2**20) if op == "memory" else (lambda r: r["rate"])
    names = [f"{row['name']}\n{row['dtype']}\n{'x'.join(map(str, row['shape']))}" for row in rows]
    heights = [value(row) for row in rows]
    drawn = axes.bar(names, heights, color=[COLOURS.get(r["name"], "tab:blue") for r in rows])
    axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(ylabel=label, title=op)
    return save(figure, directory, op)


def mixed_loops(directory: Path, m: int, dtype: str, rows: Sequence[Record]) -> list[Path]:
    """The time of each loop in units of its parts run alone, on each number of threads."""
    figure, axes = _figure()
    rows = sorted(rows, key=lambda row: row["threads"])
    places = range(len(rows))
    colours = [COLOURS.get(row["name"], "tab:blue") for row in rows]
    linear = [row["linear_ms"] / (row["linear_ms"] + row["others_ms"]) for row in rows]
    axes.barh(places, linear, 0.7, color=colours, alpha=0.55)
    others = [1 - share for share in linear]
    axes.barh(places, others, 0.7, left=linear, color="k", alpha=0.2)
    for place, colour, row in zip(places, colours, rows, strict=True):
        ratio = row["of_parts"]
        axes.plot([ratio, ratio], [place - 0.42, place + 0.42], color=colour, linewidth=4)
        text = f"  {ratio:.2f} ({row['ms']:.3g} ms)"
        axes.annotate(text, (max(ratio, 1), place), fontsize=8, va="center")
    names = [f"{row['name']}, {count_of_threads(row['threads'])}" for row in rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(1.0, *(row["of_parts"] for row in rows)))
    axes.set(
        xlabel=f"time of {mixed.LAYERS} layers mixed (the mark), in units of the parts alone:\n"
        "linear layers (coloured) and torch's ops (grey)",
        title=f"4-bit linear layers among torch's own ops, {dtype}, M = {m}",
    )
    return save(figure, directory, f"mixed-m{m}-{dtype}")


def overheads(directory: Path, m: int, dtype: str, rows: Sequence[Record]) -> list[Path]:
    """Microseconds a call of tiny layers."""
    figure, axes = _figure()
    groups = _grouped(rows, "shape")
    names = list(dict.fromkeys(row["name"] for row in rows))
    height = 0.8 / len(groups)
    for index, (shape, group) in enumerate(groups.items()):
        offset = (index - (len(groups) - 1) / 2) * height
        places = [names.index(row["name"]) + offset for row in group]
        label = "x".join(map(str, shape[0]))
        drawn = axes.barh(places, [row["ms"] * 1e3 for row in group], height, label=label)
        axes.bar_label(drawn, fmt=" %.1f", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    axes.margins(x=0.12)
    axes.set(
        xscale="log",
        xlabel="microseconds a call",
        title=f"Calls of tiny layers, warm, {dtype}, M = {m}",
    )
    return save(figure, directory, f"overhead-m{m}-{dtype}")
