"""How features' outcomes are judged, recorded and shown."""

from __future__ import annotations

from pathlib import Path

import pytest

import features
from tests.integrations import record

pytest_plugins = ["pytester"]

CONFTEST = """
from pathlib import Path
import pytest
from tests.integrations import record

def pytest_addoption(parser):
    parser.addoption("--record-features", type=Path)

def pytest_configure(config):
    config.pluginmanager.register(record.Recorder(config), "features")

@pytest.fixture
def side(request):
    return record.Side(request.param)
"""
SUITE = """
from tests.integrations.record import cases, feature

@feature("works", group="One")
def test_works(side, tmp_path):
    side.note(f"said of {side.name}")

@feature("on one side", group="One")
def test_one_side(side):
    if not side.is_qkern:
        raise NotImplementedError(f"no such | thing at {__file__}\\nmore")

@cases(group="Two", names={"three": 3, "four": 4}, argument="number", slow=("four",))
def test_cases(side, number):
    assert side.is_qkern, f"{number} is too large"
"""

REFUSED = """
from tests.integrations.record import cases

@cases(group="Three", names={"refused": ValueError, "not": None, "broken": RuntimeError},
       argument="error", refused=True)
def test_refused(side, error):
    if error is not None:
        raise error("not of codes")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # hypothesis starts slowly
    monkeypatch.setattr(record, "REGISTERED", [])
    pytester.makeini("[pytest]\nmarkers = slow: slow\naddopts = --strict-markers")
    pytester.makeconftest(CONFTEST)
    return pytester


def run(suite: pytest.Pytester, text: str, *args: str) -> tuple[pytest.RunResult, features.Record]:
    record.REGISTERED.clear()
    suite.makepyfile(test_it=text)
    path = suite.path / "record.json"
    result = suite.runpytest_inprocess("--record-features", str(path), *args)
    return result, features.read(path)


def test_the_peer_may_fail_and_it_is_written_down(suite: pytest.Pytester) -> None:
    result, found = run(suite, SUITE)
    result.assert_outcomes(passed=5, xfailed=3)
    assert found.rows == {
        ("One", "works", "qkern"): (True, "said of qkern"),
        ("One", "works", "bitsandbytes"): (True, "said of bitsandbytes"),
        ("One", "on one side", "qkern"): (True, ""),
        ("One", "on one side", "bitsandbytes"): (
            False,
            "NotImplementedError: no such | thing at ...",
        ),
        ("Two", "three", "qkern"): (True, ""),
        ("Two", "three", "bitsandbytes"): (False, "3 is too large"),
        ("Two", "four", "qkern"): (True, ""),
        ("Two", "four", "bitsandbytes"): (False, "4 is too large"),
    }
    assert set(found.versions) == set(record.LIBRARIES)
    text = features.tables(found)
    assert "| on one side | yes | no: NotImplementedError: no such \\| thing at ... |" in text
    assert text.index("### One") < text.index("### Two")


def test_qkern_may_not_fail(suite: pytest.Pytester) -> None:
    result, found = run(suite, SUITE.replace("not side.is_qkern", "side.is_qkern"))
    result.assert_outcomes(passed=5, failed=1, xfailed=2)
    assert ("One", "on one side", "qkern") not in found.rows


def test_what_qkern_refuses_is_a_row_too(suite: pytest.Pytester) -> None:
    result, found = run(suite, REFUSED)
    result.assert_outcomes(passed=2, failed=2, xfailed=2)
    assert found.rows["Three", "refused", "qkern"] == (False, "ValueError: not of codes")
    assert ("Three", "not", "qkern") not in found.rows
    assert ("Three", "broken", "qkern") not in found.rows


def test_a_part_of_the_features_keeps_the_others(suite: pytest.Pytester) -> None:
    _, before = run(suite, SUITE)
    result, found = run(suite, SUITE.replace("3, ", "3.5, "), "-m", "not slow", "-k", "test_cases")
    result.assert_outcomes(passed=1, xfailed=1, deselected=6)
    assert found.rows["Two", "three", "bitsandbytes"].text == "3.5 is too large"
    assert found.rows.keys() == before.rows.keys()


def test_what_other_versions_did_is_dropped(suite: pytest.Pytester) -> None:
    path = suite.path / "record.json"
    old = features.Record({"torch": "1.0"}, {("Old", "row", "qkern"): features.Outcome(True)})
    features.write(path, old)
    assert features.read(path) == old
    _, found = run(suite, SUITE, "-k", "works")
    assert {name for _, name, _ in found.rows} == {"works"}


def test_a_row_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "REGISTERED", [])
    record.feature("a row of this test", group="Tests")
    with pytest.raises(ValueError, match="a row of this test"):
        record.feature("a row of this test", group="Tests")


def test_the_first_line_of_an_error(tmp_path: Path) -> None:
    assert record.first_line(ValueError(f"in {tmp_path}/x.py: wrong\nmore")) == (
        "ValueError: in ...: wrong"
    )
    assert record.first_line(KeyError()) == "KeyError"
    assert record.first_line(AssertionError("\n plain words \n+ where")) == "plain words"
    long = record.first_line(ValueError("word " * 100))
    assert long.endswith(" ...")
    assert len(long) < record.LONGEST + len("ValueError: ") + 1
