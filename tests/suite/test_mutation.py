"""The quick tests notice small bugs planted in qkern's Python: `tools/mutation.py` plants them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab import ROOT
from lab.processes import environment
from tools import mutation

CODE = b"""
import os
LIMIT: int = 3

def smallest(values: list[int], least: int = 0) -> int:
    \"\"\"Text with 1 < 2.\"\"\"
    if not values or len(values) > LIMIT:
        raise ValueError(f"{len(values) > 3}")
    values.sort()
    found = min(values[0] + 1, least) if least is not None else "\xc3\xa9"
    return found
"""


def planted(path: str = "qkern/x.py", code: bytes = CODE) -> dict[str, str]:
    """What stands in the code where a bug is, after the change, by the bug's text."""
    return {str(bug): bug.planted(code).decode() for bug in mutation.bugs_of(path, code)}


def test_every_kind_of_bug_is_planted_where_it_says() -> None:
    found = planted()
    changes = {name.partition(" | smallest | ")[2] for name in found}
    assert {
        "not values or len(values) > LIMIT -> (not values and len(values) > LIMIT)",
        "not values -> (values)",
        "len(values) > LIMIT -> (len(values) >= LIMIT)",
        "not values or len(values) > LIMIT -> (not (not values or len(values) > LIMIT))",
        "raise ValueError(f'{len(values) > 3}') -> pass",
        "values.sort() -> pass",
        "values[0] + 1 -> (values[0] - 1)",
        "0 -> 1",
        "0 -> 1 #2",
        "1 -> 2",
        "min(values[0] + 1, least) -> (min(least, values[0] + 1))",
        "least is not None -> (least is None)",
        "return found -> return None",
    } <= changes
    assert not any("3}" in change and "raise" not in change for change in changes)
    for name, text in found.items():
        ast.parse(text)
        assert text != CODE.decode()
        after = name.rpartition(" -> ")[2].partition(" #")[0]
        assert after in text
        # All else is as it was, in what comes before and after on other lines too.
        assert len(text.splitlines()) == len(CODE.decode().splitlines())
    (name,) = (name for name in found if "values.sort()" in name)
    assert found[name] == CODE.decode().replace("values.sort()", "pass")


def test_all_of_qkern_can_be_changed() -> None:
    bugs = mutation.all_bugs()
    assert len(bugs) > 3000
    assert len({str(bug) for bug in bugs}) == len(bugs)
    assert {bug.path for bug in bugs} >= {"qkern/functional.py", "qkern/optim/optimizer.py"}
    for bug in mutation.sample(bugs, 1, 200):
        ast.parse(bug.planted((ROOT / bug.path).read_bytes()))


def test_a_sample_changes_only_where_the_code_does() -> None:
    bugs = mutation.all_bugs()
    first = mutation.sample(bugs, 0, 80)
    assert first == mutation.sample(reversed(bugs), 0, 80)
    assert first != mutation.sample(bugs, 1, 80)
    moved = mutation.bugs_of("qkern/tensor.py", b"\n" + (ROOT / "qkern/tensor.py").read_bytes())
    rest = [bug for bug in bugs if bug.path != "qkern/tensor.py"]
    again = mutation.sample([*rest, *moved], 0, 80)
    assert [str(bug) for bug in again] == [str(bug) for bug in first]


def test_listed_survivors_are_of_todays_code_and_have_reasons() -> None:
    names = {str(bug) for bug in mutation.all_bugs()}
    for bug, reason in mutation.survivors().items():
        assert bug in names, "no longer in the code: take it from the list"
        assert len(reason.split()) >= 3, bug


def test_tests_near_a_bug_come_first() -> None:
    (bug, *_) = mutation.sample(mutation.all_bugs(["qkern/io/bnb.py"]), 0, 1)
    near, files = mutation.near_and_all(bug)
    assert (ROOT / mutation.EVERY_NAME.partition("::")[0]).exists()
    assert all((ROOT / test.partition("::")[0]).exists() for test in near)
    assert any(test.startswith("tests/io/") for test in near)
    assert files[0].startswith("tests/io/")
    assert set(files) >= {f"tests/io/{path.name}" for path in (ROOT / "tests/io").glob("test_*.py")}
    for start, rooms in mutation.ROOMS.items():
        assert any(path.startswith(start) for path in mutation.files()), start
        assert all((ROOT / room).is_dir() for room in rooms)


MINIATURE = {
    "qkern/__init__.py": "def double(x):\n    return x + x\n\ndef unseen(x):\n    return not x\n",
    "tests/test_it.py": "import qkern\n\ndef test_double():\n    assert qkern.double(4) == 8\n",
    "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
}
DRIVER = """
import sys
from pathlib import Path
from tools import mutation

root = Path(sys.argv.pop(1))
mutation.ROOT, mutation.SURVIVORS = root, root / "survivors.txt"
mutation.ROOMS, mutation.EVERY_NAME = {"qkern/": ("tests",)}, "tests/test_it.py::test_double"
mutation.PRELOADED = ()
sys.exit(mutation.main())
"""


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """A checkout with two functions, of which one is tested."""
    for name, text in MINIATURE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "survivors.txt").write_text("# none yet\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def run_on(tree: Path, *arguments: str) -> tuple[int, Counter[str], str]:
    """Exit status, how many of each outcome, and the output."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tree), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    words = (line.split(" (")[0] for line in done.stdout.splitlines() if " s): " in line)
    return done.returncode, Counter(words), done.stdout + done.stderr


def test_what_survives_fails_until_it_is_listed(miniature: Path) -> None:
    unseen = "qkern/__init__.py | unseen | "
    reason = " | nobody calls it\n"
    (miniature / "survivors.txt").write_text(f"# comment\n{unseen}not x -> (x){reason}")
    status, score, output = run_on(miniature)
    assert status == 1, output
    assert score == {"noticed": 2, "listed": 1, "SURVIVED": 1}, output
    assert f"{unseen}return not x -> return None" in output
    assert "2 of 3 noticed (66.7 %; takes 97 %), 1 in survivors.txt" in output
    assert (miniature / "qkern/__init__.py").read_text() == MINIATURE["qkern/__init__.py"]
    with (miniature / "survivors.txt").open("a") as file:
        file.write(f"{unseen}return not x -> return None{reason}")
    status, score, output = run_on(miniature, "--part", "1/2")
    assert status == 0, output
    assert sum(score.values()) == 2


@pytest.mark.parametrize(
    ("noticed", "survived", "status"),
    [(80, 0, 0), (78, 2, 0), (97, 3, 0), (96, 3, 1), (77, 3, 1), (0, 1, 1), (0, 0, 0)],
)
def test_of_a_hundred_bugs_three_may_survive(noticed: int, survived: int, status: int) -> None:
    assert mutation.status(noticed, survived) == status


def test_parts_make_up_the_sample(miniature: Path) -> None:
    parts = [run_on(miniature, "--list", "--part", f"{i}/2")[2].splitlines() for i in (1, 2)]
    whole = run_on(miniature, "--list")[2].splitlines()
    assert sorted([*parts[0], *parts[1]]) == sorted(whole)
    assert len(whole) == 4


def test_a_test_that_fails_anyway_notices_nothing(miniature: Path) -> None:
    (miniature / "tests/test_it.py").write_text("def test_double():\n    assert False\n")
    status, _, output = run_on(miniature)
    assert status == 1
    assert "fails without a bug: tests/test_it.py::test_double" in output


@pytest.mark.parametrize(("goal", "runs"), [("test-all", True), ("test-slow", False)])
def test_all_tests_include_it_and_slow_ones_do_not(goal: str, runs: bool) -> None:
    command = ["make", "--dry-run", goal, f"VENV={ROOT / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("-m tools.mutation" in done.stdout) == runs
