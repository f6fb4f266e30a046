"""Every row of a run beside the best of its peers, the worst first.

A row is one of qkern's candidates in one contest. So that none below 1.0 can hide, nothing is left
out by its figure, and what had no peer is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import enabled, optimizer
from .report import Record, aligned, digits

HEADER = (
    *("ratio", "op", "dtype", "shape", "rows", "threads", "level"),
    *("who", "", "best peer", ""),
)
BEST_DTYPE = "the best of each"

_NOT_PEERS = {"disk"}  # a limit that was measured beside the others
_OTHER_WORK = {("qkern (fresh output)", "dense (a copy)")}
"""Pairs that do not do the same: a copy into memory that is there meets no page fault."""


def rows(content: dict[str, Any]) -> list[Record]:
    """One record for each of qkern's candidates that had a peer; the lowest ratio first.

    ``ratio`` is the best peer's figure over its own, ``theirs`` over ``ours``, both in ``unit``, of
    which less is better; ``of`` says what they are where it is not the time.
    """
    found = [row for contest in _contests(content).values() for row in _of_contest(contest)]
    found += _at_best_dtypes(content)
    return sorted(found, key=lambda row: float(row["ratio"]))


def without_peer(content: dict[str, Any]) -> list[str]:
    """Contests in which qkern had nobody beside it, in words."""
    alone = (c for c in _contests(content).values() if _ours(c) and not any(_of_contest(c)))
    return list(dict.fromkeys(_words(contest[0]) for contest in alone))


def _words(row: Record) -> str:
    parts = [row["op"], "x".join(map(str, row["shape"])), row["dtype"]]
    return " ".join(parts) + ("" if row["m"] is None else f" M={row['m']}")


def _contests(content: dict[str, Any]) -> dict[tuple[Any, ...], list[Record]]:
    """Records by contest, each with its ``level``: the instruction set that qkern ran on."""
    machine = content["machine"]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for row in content["results"]:
        threads = row.get("threads", machine.get("threads"))
        key = (row["op"], tuple(row["shape"]), row["m"], row["dtype"], threads)
        level = row.get("level", machine.get("qkern_isa"))
        found.setdefault(key, []).append(row | {"level": level, "threads": threads})
    return found


def _is_ours(name: str) -> bool:
    return name.startswith("qkern") or name == enabled.ON_QKERN


def _ours(contest: Sequence[Record]) -> list[Record]:
    return [row for row in contest if _is_ours(row["name"])]


def _peers(row: Record, contest: Sequence[Record]) -> list[Record]:
    """Those that do what `row` does, with as many bits of state where that is a choice."""
    bits = _state_bits(row)
    return [
        peer
        for peer in contest
        if not _is_ours(peer["name"])
        and peer["name"] not in _NOT_PEERS
        and (row["name"], peer["name"]) not in _OTHER_WORK
        and _state_bits(peer) == bits
    ]


def _state_bits(row: Record) -> int | None:
    if row["op"] not in (optimizer.OP, optimizer.IN_FILE):
        return None
    return 8 if row["name"].endswith("(8 bits)") else 32


def _of_contest(contest: Sequence[Record]) -> Iterator[Record]:
    for row in _ours(contest):
        peers = _peers(row, contest)
        for kind, (cost, unit) in _KINDS.items():
            costs = [(value, peer["name"]) for peer in peers if (value := cost(peer)) is not None]
            ours = cost(row)
            if costs and ours is not None:
                yield _compared(row, ours, *min(costs), unit) | {"of": kind}


def _compared(row: Record, ours: float, theirs: float, peer: str, unit: str) -> Record:
    name, _, isa = row["name"].partition("[")
    what = {key: row[key] for key in ("op", "dtype", "shape", "m", "threads")}
    what["level"] = isa.removesuffix("]") or row["level"]
    figures = {"name": name, "ours": ours, "peer": peer, "theirs": theirs, "unit": unit}
    return {"ratio": theirs / ours, "of": ""} | what | figures


def _milliseconds(row: Record) -> float | None:
    return row.get("ms")


def _peak_mib(row: Record) -> float | None:
    return row["peak_bytes"] / 2**20 if "peak_bytes" in row else None


def _slower(row: Record) -> float | None:
    return row.get("times_slower")


Cost = Callable[[Record], float | None]
_KINDS: dict[str, tuple[Cost, str]] = {
    "": (_milliseconds, "ms"),
    "peak": (_peak_mib, "MiB"),
    "loss of speed": (_slower, "times its quiet time"),
}
"""What is compared, by name: the time, peak memory, and what busy processes do to the time."""


def _at_best_dtypes(content: dict[str, Any]) -> Iterator[Record]:
    """Work on a model whose user may choose the dtype: everyone in the best one that it has."""
    works: dict[tuple[Any, ...], list[Record]] = {}
    for contest in _contests(content).values():
        for row in contest:
            if row.get("unit") == "tokens/s":
                key = (row["op"], tuple(row["shape"]), row["threads"])
                works.setdefault(key, []).append(row | {"dtype": BEST_DTYPE})
    for key, work in works.items():
        dtypes = {r["dtype"] for r in content["results"] if (r["op"], tuple(r["shape"])) == key[:2]}
        ours, peers = _ours(work), [row for row in work if not _is_ours(row["name"])]
        if len(dtypes) > 1 and ours and peers:
            best, peer = (min(found, key=lambda row: float(row["ms"])) for found in (ours, peers))
            yield _compared(best, best["ms"], peer["ms"], peer["name"], "ms")


def table(content: dict[str, Any]) -> str:
    """Markdown, the worst first, and below it how many rows are under 1.0."""
    found = rows(content)
    if not found:
        return "no row has a peer"
    under = sum(row["ratio"] < 1 for row in found)
    lines = [aligned([HEADER, *map(_cells, found)]), "", _count(len(found), under)]
    if alone := without_peer(content):
        lines.append(f"without a peer: {', '.join(alone)}")
    return "\n".join(lines)


def _count(total: int, under: int) -> str:
    rest = "none is" if not under else "1 is" if under == 1 else f"{under} are"
    return f"{total} rows beside their best peer, {rest} below 1.0"


def _cells(row: Record) -> tuple[str, ...]:
    op = row["op"] + (f", {row['of']}" if row["of"] else "")
    unit = row["unit"]
    return (
        f"{row['ratio']:.2f}",
        op,
        row["dtype"],
        "x".join(map(str, row["shape"])),
        *("" if row[key] is None else str(row[key]) for key in ("m", "threads", "level")),
        row["name"],
        f"{digits(row['ours'])} {unit}",
        row["peer"],
        f"{digits(row['theirs'])} {unit}",
    )
