"""Shards of tests are complete, disjoint and alike in time; what is out of time is said."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError

import pytest

from lab import ROOT
from tests.suite import shards

pytest_plugins = ["pytester"]

CONFTEST = """
from pathlib import Path
from tests.suite import shards

pytest_addoption = shards.add_options
done = Path("done")
shards.clock = lambda: len(done.read_text()) if done.exists() else 0

def pytest_configure(config):
    config.pluginmanager.register(shards.Shards(config), "shards")
"""
SUITE = """
from pathlib import Path
import pytest

@pytest.fixture(autouse=True)
def a_second_passes():
    yield
    with Path("done").open("a") as file:
        file.write(".")

def test_wrong():
    assert {right}

@pytest.mark.parametrize("i", range(9))
def test_many(i):
    pass

def test_other():
    assert True
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with eleven tests, whose clock goes on by a second a test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # hypothesis starts slowly
    monkeypatch.setattr(shards, "clock", shards.clock)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=SUITE.format(right=True))
    return pytester


def ids(count: int) -> list[str]:
    return [f"tests/a/test_{i % 7}.py::test_x[{i}]" for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("tests", [0, 3, 400])
def test_shards_are_complete_disjoint_and_the_same_in_any_order(count: int, tests: int) -> None:
    names = ids(tests)
    seconds = {shards.function(name): 1.0 + int(name[13]) for name in names[:4]}
    made = shards.partition(names, seconds, count)
    assert len(made) == count
    assert sorted(name for shard in made for name in shard) == sorted(names)
    random.shuffle(names)
    assert shards.partition(names, seconds, count) == made


def test_shards_are_alike_in_time() -> None:
    names = [*ids(300), "tests/b.py::test_long"]
    seconds = {shards.function(name): 1.0 + int(name[13]) for name in names[:7]}
    seconds["tests/b.py::test_long"] = 60.0
    made = shards.partition(names, seconds, 6)
    loads = [sum(seconds[shards.function(name)] for name in shard) for shard in made]
    assert max(loads) - min(loads) <= 2
    assert min(len(shard) for shard in made) < max(len(shard) for shard in made) - 5


def test_a_new_test_has_its_place() -> None:
    first, second = shards.partition(["tests/new.py::test_a", "tests/new.py::test_b"], {}, 2)
    assert len(first) == len(second) == 1


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "-1/3", "1/2/3"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="takes i/n"):
        shards.shard(text)
    assert shards.shard("4/12") == (4, 12)


@pytest.mark.parametrize("text", ["0", "-3", "nan"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="takes a number above 0"):
        shards.limit(text)
    assert shards.limit("2.5") == 2.5


def test_the_option_runs_each_test_in_one_shard(suite: pytest.Pytester) -> None:
    seen = []
    for i in range(1, 4):
        done = suite.inline_run("--shard", f"{i}/3", "-k", "not other")
        assert done.ret == 0
        seen += [report.nodeid for report in done.getreports() if report.when == "call"]
    names = [*(f"test_it.py::test_many[{i}]" for i in range(9)), "test_it.py::test_wrong"]
    assert sorted(seen) == names


def test_being_out_of_time_is_said_and_no_failure(suite: pytest.Pytester) -> None:
    done = suite.runpytest_inprocess("--seconds", "4")
    done.assert_outcomes(passed=4)
    assert done.ret == 0
    done.stdout.fnmatch_lines("out of time: 4 tests run, 7 not")


def test_workers_share_a_shard_and_its_time(suite: pytest.Pytester) -> None:
    done = suite.runpytest_subprocess("-p", "xdist", "-n2", "--shard", "1/2", "--seconds", "4")
    assert done.ret == 0
    (found,) = re.findall(r"out of time: (\d+) tests run, (\d+) not", done.stdout.str())
    run, left = map(int, found)
    assert run + left == 6
    assert 4 <= run <= 5  # one more may have been begun
    done.assert_outcomes(passed=run)


def test_a_failure_counts_though_time_is_out(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it=SUITE.format(right=False))
    done = suite.runpytest_inprocess("--seconds", "3")
    done.assert_outcomes(passed=2, failed=1)
    assert done.ret == 1


def test_the_list_of_failures_may_be_anywhere(
    suite: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory
) -> None:
    noted = tmp_path_factory.mktemp("elsewhere") / "failures"
    noted.touch()
    suite.makepyfile(test_it=SUITE.format(right=False))
    done = suite.runpytest_inprocess(f"--failures={noted}")
    done.assert_outcomes(passed=10, failed=1)
    assert noted.read_text().startswith("test_it.py::test_wrong, call\n")


HANGING = """
import time

def test_wrong():
    assert 1 == 2

def test_hangs():
    time.sleep(600)
"""


def test_a_failure_is_noted_before_the_end_of_the_run(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it=HANGING)
    noted = suite.path / "failures"
    command = [sys.executable, "-m", "pytest", *("-p", "xdist", "-n1"), "--failures", str(noted)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            end = time.monotonic() + 120
            while not noted.exists() and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    text = noted.read_text()
    assert text.startswith("test_it.py::test_wrong, call\n")
    assert "assert 1 == 2" in text


def test_seconds_are_recorded_by_function(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it=SUITE.format(right=False))
    record = suite.path / "seconds.json"
    record.write_text('{"test_it.py::test_other": 7.0, "test_gone.py::test_x": 1.0}')
    suite.inline_run("--record-seconds", str(record))
    known = json.loads(record.read_text())
    assert known.pop("test_gone.py::test_x") == 1.0
    assert set(known) == {"test_it.py::test_other", "test_it.py::test_many"}
    assert max(known.values()) < 7


def test_known_seconds_are_of_tests_that_exist() -> None:
    known = json.loads(shards.SECONDS.read_text())
    assert len(known) > 20
    for name, seconds in known.items():
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), name
        assert 0 <= seconds < 600
