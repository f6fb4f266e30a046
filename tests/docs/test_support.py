"""The tables in README and docs/support.md are those of the tests' own records."""

from __future__ import annotations

from pathlib import Path

import pytest

import support
from qkern import backends, testing


@pytest.mark.parametrize("path", [support.README, support.PAGE], ids=lambda path: path.name)
def test_the_table_is_the_records(path: Path) -> None:
    assert path.read_text("utf-8") == support.documents()[path], "run: make support"


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", "reference"])
def test_the_record_has_every_op_and_dtype(backend: str) -> None:
    wanted = {
        (spec.name, testing.DTYPE_NAMES[case.dtype])
        for spec in testing.OPS.values()
        if backends.has_kernel(backend, spec.name)
        for case in spec.cases
    }
    found = {(op, dtype) for op, t, dtype in support.passed() if support._backend(t) == backend}
    assert found == wanted
    if backend == "triton":
        assert all(support.triton_compiled()[key] for key in wanted)
