"""The tables of features in docs/frameworks.md are the record's, which has every feature."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import features
from tests.integrations import record

TESTS = Path(__file__).parents[1]


def test_the_tables_are_the_records() -> None:
    assert features.PAGE.read_text("utf-8") == features.document(), "run: make features"


def test_the_record_has_every_feature() -> None:
    pytest.importorskip("transformers")
    for path in sorted(TESTS.rglob("test_*.py")):
        if "integrations.record import" in path.read_text("utf-8"):
            importlib.import_module(".".join(path.relative_to(TESTS.parent).with_suffix("").parts))
    found = features.read().rows
    wanted = {(*row, side) for row in record.REGISTERED for side in features.SIDES}
    assert set(found) == wanted, "run: make features"
    for row in record.REGISTERED:
        assert found[(*row, record.QKERN)].works == (row not in record.REFUSED), row
