"""CONTRIBUTING's table of folders is the tree's, and no document names a path that is not there."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import PurePosixPath

import pytest

from lab import ROOT
from qkern.weight import Weight

CONTRIBUTING = "CONTRIBUTING.md"
DOCUMENTS = (CONTRIBUTING, "README.md", "docs/*.md", "*/README.md", "tools/lab/**/README.md")
DEEPEST = 4
"""Folders below are not in the table, nor are those that the next has."""
NOT_LISTED = ("benchmarks/results/*", "csrc", "csrc/include")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".csv", ".yaml")
FOLLOWED = ("docs/add_an_op.md",)
"""Documents that a test of their own follows, which make the files that they name."""
PROJECTS = ("llama.cpp",)
"""Names that only look like a file's."""


@cache
def files() -> frozenset[str]:
    """Every file of the checkout that git tracks, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return frozenset(line for line in done.stdout.splitlines() if (ROOT / line).exists())


@cache
def folders() -> frozenset[str]:
    """Of all files, but the root."""
    return frozenset(str(folder) for f in files() for folder in PurePosixPath(f).parents) - {"."}


def is_listed(folder: str) -> bool:
    return len(PurePosixPath(folder).parts) <= DEEPEST and not any(
        fnmatch(folder, pattern) for pattern in NOT_LISTED
    )


def in_code(text: str) -> list[str]:
    """What stands between backticks, without blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def table(text: str) -> dict[str, str]:
    """The folders that the rows of the table name, and what is said of each."""
    section = text.split("\n## Folders\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE)
    return {name.rstrip("/"): said for cell, said in rows for name in in_code(cell)}


def missing(text: str, home: str = "") -> list[str]:
    """Paths and names of files in a text that fit nothing in the tree, or below ``home``."""
    known = files() | folders()
    tops = {name.partition("/")[0] for name in folders()}
    found = []
    # Anywhere, also in blocks of code: what starts with a folder of the root.
    for path in re.findall(r"(?<![\w./<-])[\w.]+/[\w./*-]*", text):
        name = path.rstrip("./")
        if path.partition("/")[0] in tops and not any(fnmatch(k, name) for k in known):
            found.append(path)
    # A file's name alone: in the folder that the text is about, if it is about one.
    for name in in_code(text):
        if re.fullmatch(r"[\w.*-]+", name) and name.endswith(SUFFIXES) and name not in PROJECTS:
            within = (f for f in files() if f.startswith(home))
            if not any(fnmatch(PurePosixPath(f).name, name) for f in within):
                found.append(f"{home}{name}")
    return found


def test_the_table_has_every_folder() -> None:
    named = set(table((ROOT / CONTRIBUTING).read_text("utf-8")))
    assert named == {folder for folder in folders() if is_listed(folder)}


def test_files_in_a_row_of_a_table_are_in_its_folder() -> None:
    rows = re.findall(
        r"^\| `(\w[\w./]*/)` \| (.*) \|$", (ROOT / CONTRIBUTING).read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 20
    assert [path for home, said in rows for path in missing(said, home)] == []


@pytest.mark.parametrize("pattern", DOCUMENTS)
def test_every_path_exists(pattern: str) -> None:
    names = {str(path.relative_to(ROOT)): path for path in ROOT.glob(pattern)}
    documents = [path for name, path in names.items() if name in files() and name not in FOLLOWED]
    assert documents
    lost = {str(path): missing(path.read_text("utf-8")) for path in documents}
    assert {path: names for path, names in lost.items() if names} == {}


def test_what_is_not_there_is_noticed() -> None:
    text = (
        "`tests/nowhere/test_x.py` and `qkern/ops.py`, `csrc/cpu/*.cpp`, `csrc/cpu/*.rs`, `a.cuh`"
    )
    assert missing(text) == ["tests/nowhere/test_x.py", "csrc/cpu/*.rs", "a.cuh"]
    assert missing("`launch.py`", "triton_kernels/") == []
    assert missing("`launch.py`", "csrc/cuda/") == ["csrc/cuda/launch.py"]


FIELDS = re.compile(r"\b[^;]{0,100}?\b".join(Weight._fields[:4] + Weight._fields[-1:]))
MOST_LISTS = 8


def test_a_weights_fields_are_written_out_in_few_places() -> None:
    """A `Weight` goes through everything as one; a list more is a place more to change."""
    code = [f for f in files() if PurePosixPath(f).suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    found = {f: len(FIELDS.findall((ROOT / f).read_text())) for f in code}
    assert found["qkern/weight.py"] == 2, "the pattern finds no list"
    assert sum(found.values()) <= MOST_LISTS, {f: count for f, count in found.items() if count}
