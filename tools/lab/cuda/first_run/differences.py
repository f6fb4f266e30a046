"""What measured times say of the model that chooses paths: for whoever corrects its constants."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

OURS = "qkern"
"""Who takes the path that is chosen; on another, this and the path."""
PEERS = ("dense", "bitsandbytes")
OPS = ("forward", "dx")
FEW, MANY = 16, 256
"""Rows up to which, and beyond which, a ratio is told apart."""
_WORTH = 1.03  # times as fast, from which on a choice counts as wrong
_DEFAULT_SHARE = 0.2  # of the problems, from which on a path that is never chosen should be


@dataclass
class Problem:
    """A product: milliseconds by path and by peer, the model's by path, the path it chooses."""

    op: str
    shape: tuple[int, int]
    m: int
    chosen: str = ""
    paths: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)
    modelled: dict[str, float] = field(default_factory=dict)
    host_us: float | None = None

    @property
    def fastest(self) -> str:
        return min(self.paths, key=self.paths.__getitem__)

    @property
    def best_modelled(self) -> str:
        return min(self.modelled, key=self.modelled.__getitem__)

    @property
    def loss(self) -> float:
        """How many times as long as the fastest path the chosen one takes; 1 if that failed."""
        best = self.paths[self.fastest]
        return self.paths[self.chosen] / best if self.chosen in self.paths else 1.0

    @property
    def ours(self) -> float:
        """Milliseconds of the path that is chosen, or of the fastest if that failed."""
        return self.paths.get(self.chosen, self.paths[self.fastest])

    def __str__(self) -> str:
        return f"{self.op} {size(self.shape)} M={self.m}"


def size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def problems(results: Iterable[dict[str, Any]]) -> list[Problem]:
    """Those that a path of ours was timed on."""
    found: dict[tuple[Any, ...], Problem] = {}
    for row in results:
        if row["op"] not in OPS:
            continue
        key = row["op"], tuple(row["shape"]), row["m"]
        problem = found.setdefault(key, Problem(*key))
        if row["name"] == OURS:
            problem.chosen, problem.host_us = row["chosen"], row.get("host_us")
        elif "path" in row:
            problem.chosen = row["chosen"]
            problem.paths[row["path"]] = row["ms"]
            problem.modelled[row["path"]] = row["modelled_ms"]
        else:
            problem.peers[row["name"]] = row["ms"]
    return [problem for problem in found.values() if problem.paths]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def mean(ratios: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def sections(times: dict[str, Any]) -> list[str]:
    """Of the page, each with its heading."""
    found = problems(times["results"])
    parts = [_limits(times)]
    if found:
        parts += [_choices(found), _ratios(found), _crossovers(found), _fastest(found)]
        parts.append(_beside(found))
    parts += [_dequantized(times["results"]), _notes(times["notes"])]
    return [part for part in parts if part]


def _limits(times: dict[str, Any]) -> str:
    limits, about = times["limits"], times["machine"]
    rate = limits["matmul_gflops"].get("bfloat16", 0.0) / 1e3
    return (
        f"Measured limits: copies {limits['copy_gb_s']:.0f} GB/s, bfloat16 products of torch "
        f"{rate:.1f} TFLOP/s; processors ran at {about.get('megahertz', 0):.0f} MHz."
    )


def _choices(found: Sequence[Problem]) -> str:
    losses = [problem.loss for problem in found]
    wrong = [problem for problem in found if problem.loss > _WORTH]
    lines = [
        f"- The chosen path was the fastest, or within {_WORTH - 1:.0%} of it, in "
        f"{len(found) - len(wrong)} of {len(found)} products; the choices cost {mean(losses):.2f} "
        "times the fastest on average.",
    ]
    worst = sorted(wrong, key=lambda problem: -problem.loss)[:5]
    lines += [
        f"- {problem}: `{problem.chosen}` is chosen and takes {problem.ours * 1e3:.1f} us, "
        f"`{problem.fastest}` {problem.paths[problem.fastest] * 1e3:.1f}: "
        f"{problem.loss:.2f} times."
        for problem in worst
    ]
    lines += [f"- {line}" for line in _never_chosen(found)]
    return "## Choices\n\n" + "\n".join(lines)


def _never_chosen(found: Sequence[Problem]) -> Iterator[str]:
    """Of each path that is chosen nowhere: whether it should be."""
    chosen = {problem.chosen for problem in found}
    fastest = Counter(problem.fastest for problem in found)
    for path in dict.fromkeys(path for problem in found for path in problem.paths):
        if path in chosen:
            continue
        able = [problem for problem in found if path in problem.paths]
        gains = [problem.loss for problem in able if problem.fastest == path]
        if not gains:
            yield f"`{path}` is chosen nowhere, and was the fastest nowhere: leave it so."
            continue
        least = min(p.m for p in able if p.fastest == path)
        if fastest[path] >= _DEFAULT_SHARE * len(able):
            advice = "make it a default there"
        else:
            advice = "hardly worth being a default"
        yield (
            f"`{path}` is chosen nowhere, and was the fastest in {fastest[path]} of "
            f"{len(able)} products, from M={least} on, {mean(gains):.2f} times as fast as what is "
            f"chosen: {advice}."
        )


def _ratios(found: Sequence[Problem]) -> str:
    """Measured over modelled, by op and path: a constant that is right gives 1 in all columns."""
    groups: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in found:
        for path in problem.paths:
            groups[problem.op, path].append(problem)
    rows = []
    for (op, path), members in sorted(groups.items()):
        columns: list[list[float]] = [[], [], []]
        for p in members:
            column = 0 if p.m <= FEW else 1 if p.m <= MANY else 2
            columns[column].append(p.paths[path] / p.modelled[path])
        us, factor = line([(p.modelled[path] * 1e3, p.paths[path] * 1e3) for p in members])
        rows.append((op, path, *map(_spread, columns), f"{us:.1f} us + {factor:.2f} x"))
    header = ("op", "path", f"M <= {FEW}", f"M <= {MANY}", f"M > {MANY}", "line")
    text = (
        "Median, and least to most, of the measured over the modelled time. The line is what fits "
        "best to all of a path: the constant part is of launches, the factor of rates."
    )
    return f"## Measured over modelled\n\n{text}\n\n" + table(header, rows)


def line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """``(a, b)`` of the ``y = a + b x`` with the least relative errors of y, squared and summed.

    A single x gives the ``b`` of ``y = b x``.
    """
    weights = [1 / y**2 for _, y in pairs]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, pairs, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, pairs, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, pairs, strict=True))
    if spread <= 1e-12 * total * mean_x**2:
        return 0.0, mean_y / mean_x
    both = sum(w * (x - mean_x) * y for w, (x, y) in zip(weights, pairs, strict=True))
    return mean_y - both / spread * mean_x, both / spread


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _crossovers(found: Sequence[Problem]) -> str:
    """Which path from how many rows on, as measured and as modelled."""
    groups: dict[tuple[str, tuple[int, int]], list[Problem]] = defaultdict(list)
    for problem in found:
        groups[problem.op, problem.shape].append(problem)
    rows = []
    for (op, shape), members in groups.items():
        members.sort(key=lambda problem: problem.m)
        measured = _runs((problem.m, problem.fastest) for problem in members)
        modelled = _runs((problem.m, problem.best_modelled) for problem in members)
        chosen = _runs((problem.m, problem.chosen) for problem in members)
        same = "" if measured == chosen else "**differs**"
        rows.append((op, size(shape), measured, modelled, chosen, same))
    header = ("op", "shape", "fastest", "by the model", "chosen", "")
    return "## Crossovers\n\n" + table(header, rows)


def _runs(paths: Iterable[tuple[int, str]]) -> str:
    found = []
    for path, group in itertools.groupby(paths, key=lambda pair: pair[1]):
        found.append(f"{path} from {next(group)[0]}")
    return ", ".join(found)


def _fastest(found: Sequence[Problem]) -> str:
    """Microseconds of the chosen path, and of the fastest where that is another."""
    shapes = list(dict.fromkeys(problem.shape for problem in found))
    cells: dict[tuple[str, int], dict[tuple[int, int], str]] = defaultdict(dict)
    for problem in found:
        cells[problem.op, problem.m][problem.shape] = _cell(problem)
    rows = [
        (op, str(m), *(row.get(shape, "") for shape in shapes))
        for (op, m), row in sorted(cells.items(), key=lambda item: (item[0][0] != "forward", item))
    ]
    text = (
        "Microseconds of the chosen path, bold the fastest where that is another; in brackets, "
        "measured over modelled."
    )
    return f"## Times\n\n{text}\n\n" + table(("op", "M", *map(size, shapes)), rows)


def _cell(problem: Problem) -> str:
    chosen, fastest = problem.chosen, problem.fastest
    best = f"**{fastest} {problem.paths[fastest] * 1e3:.1f}**"
    if chosen not in problem.paths:
        return f"{chosen} failed, {best}"
    ratio = f"({problem.ours / problem.modelled[chosen]:.2f})"
    others = f", {best}" if problem.loss > _WORTH else ""
    return f"{chosen} {problem.ours * 1e3:.1f}{others} {ratio}"


def _beside(found: Sequence[Problem]) -> str:
    """How many times as fast as its peers the chosen path is, over all shapes."""
    numbers = sorted({problem.m for problem in found})
    rows = []
    for op in OPS:
        by_rows = [[p for p in found if p.op == op and p.m == m] for m in numbers]
        for peer in PEERS:
            ratios = [[p.peers[peer] / p.ours for p in ps if peer in p.peers] for ps in by_rows]
            if any(ratios):
                rows.append((op, f"x {peer}", *(f"{mean(r):.2f}" if r else "" for r in ratios)))
        hosts = [[p.host_us for p in ps if p.host_us is not None] for ps in by_rows]
        if any(hosts):
            rows.append((op, "host us", *(f"{median(h):.0f}" if h else "" for h in hosts)))
    text = (
        "How many times as fast as each the chosen path is: the geometric mean over the shapes; "
        "and the host's microseconds a call, of which nothing is in the times."
    )
    return f"## Beside others\n\n{text}\n\n" + table(("op", "M", *map(str, numbers)), rows)


def _dequantized(results: Iterable[dict[str, Any]]) -> str:
    rows = [
        (size(row["shape"]), row["name"], f"{row['ms'] * 1e3:.1f}", f"{row.get('share', 0):.0%}")
        for row in results
        if row["op"] == "dequantize"
    ]
    if not rows:
        return ""
    return "## Dequantise\n\n" + table(("shape", "", "us", "of a copy's rate"), rows)


def _notes(notes: Iterable[str]) -> str:
    lines = [f"- {note}" for note in dict.fromkeys(notes)]
    return "## Notes\n\n" + "\n".join(lines) if lines else ""
