"""The tables of docs/frameworks.md: features on qkern and on bitsandbytes, as tests recorded them.

``python tools/features.py --write`` puts them into the page, from tests/docs/features.json, which
``pytest tests/integrations --record-features`` writes. tests/docs/test_features.py compares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "tests/docs/features.json", ROOT / "docs/frameworks.md"
BEGIN, END = "<!-- from tools/features.py -->", "<!-- end -->"
GROUPS = ("Loading and saving", "Training", "Adapters", "Several devices", "Architectures")
"""The tables, in their order; other groups follow."""
SIDES = ("qkern", "bitsandbytes")


class Outcome(NamedTuple):
    """Whether a test passed, and what is to be said of it: a note, or how it failed."""

    works: bool
    text: str = ""


class Record(NamedTuple):
    """What tests did, by group, name and side, with these versions of libraries."""

    versions: dict[str, str]
    rows: dict[tuple[str, str, str], Outcome]


def read(path: Path = RECORD) -> Record:
    """What `pytest --record-features` wrote."""
    data = json.loads(path.read_text("utf-8"))
    rows = {
        (group, name, side): Outcome(*outcome)
        for group, features in data["features"].items()
        for name, sides in features.items()
        for side, outcome in sides.items()
    }
    return Record(data["versions"], rows)


def write(path: Path, record: Record) -> None:
    """Write a record, an outcome a line."""
    nested: dict[str, dict[str, dict[str, Outcome]]] = {}
    for (group, name, side), outcome in sorted(record.rows.items()):
        nested.setdefault(group, {}).setdefault(name, {})[side] = outcome
    text = json.dumps({"versions": record.versions, "features": nested}, indent=1)
    text = text.replace("[\n     ", "[").replace(",\n     ", ", ").replace("\n    ]", "]")
    path.write_text(text + "\n", "utf-8")


def cell(outcome: Outcome | None) -> str:
    """An outcome as a table has it."""
    if outcome is None:
        return "not run"
    word = "yes" if outcome.works else "no"
    return f"{word}: {outcome.text}".replace("|", r"\|") if outcome.text else word


def tables(record: Record) -> str:
    """All tables, a heading each, below a line of versions."""
    named = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [f"With {named}."]
    found = {group for group, _, _ in record.rows}
    groups = [g for g in GROUPS if g in found] + sorted(found.difference(GROUPS))
    for group in groups:
        lines += ["", f"### {group}", "", f"| | {' | '.join(SIDES)} |", "|---|---|---|"]
        for name in sorted({n for g, n, _ in record.rows if g == group}, key=str.casefold):
            cells = [cell(record.rows.get((group, name, side))) for side in SIDES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document() -> str:
    """The page as it should be."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{tables(read())}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/features.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the document")
    if parser.parse_args().write:
        PAGE.write_text(document(), "utf-8")
    else:
        print(tables(read()))


if __name__ == "__main__":
    main()
