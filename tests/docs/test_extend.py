"""docs/extend.md's code runs, and its check of a backend notices a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from lab import ROOT
from qkern import testing
from tests.docs.recipes import fenced

DOCUMENT = ROOT / "docs" / "extend.md"
BACKEND, FORMAT = (code for _, language, code in fenced(DOCUMENT) if language == "python")


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "extend"}
    exec(compile(code, DOCUMENT.name, "exec"), names)
    return names


def test_a_backend_of_ones_own() -> None:
    names = run(BACKEND)
    assert names["y"].shape == (3, 96)
    assert str(names["target"]) == "by_rows"
    assert names["mine"].has("linear_4bit")
    assert not names["mine"].has("linear_4bit_dx")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("y + bias.float()", "y"),
        ("dense.split(self.ROWS)", "dense.flip(0).split(self.ROWS)"),
        ("x.float() @ rows.T", "(x.float() @ rows.T).bfloat16().float()"),
    ],
    ids=["no-bias", "other-order", "rounded-twice"],
)
def test_a_wrong_backend_is_noticed(right: str, wrong: str) -> None:
    assert BACKEND.count(right) == 1
    with pytest.raises(AssertionError):
        run(BACKEND.replace(right, wrong))


def test_a_format_of_ones_own() -> None:
    qw = run(FORMAT)["qw"]
    assert qw.format == "custom"
    testing.assert_bitwise(qw.codebook, run(FORMAT)["codebook"])
