"""The source distribution has what its tests, tools and documents need: every file of the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from lab import ROOT
from lab.processes import environment
from qkern.backends import _library

LINK = "qkern/triton_kernels"
"""A link of the checkout, in an archive a folder with what it leads to."""
MADE = ("PKG-INFO", "setup.cfg")
LEFT_OUT = (".ci", ".github")
"""Folders that only serve the repository; everything else comes along."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of this checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    into = tmp_path_factory.mktemp("sdist")
    # Its list of files goes to a folder of its own, so that no older one is read.
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", str(into)]
    command += ["sdist", "--dist-dir", str(into)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(QKERN_NATIVE="OFF"),
    )
    assert done.returncode == 0, done.stderr
    (made,) = into.glob("qkern-*.tar.gz")
    return made


def tracked() -> set[str]:
    """What git tracks, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_every_file_of_the_tree_and_no_other_is_in_it(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {
            str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            for member in tar.getmembers()
            if member.isfile()
        }
    kernels = {f"{LINK}/{path.name}" for path in (ROOT / LINK).glob("*.py")}
    assert len(kernels) > 10
    expected = tracked() - {LINK} | kernels
    assert {name for name in expected - names if not name.startswith(LEFT_OUT)} == set()
    assert names - expected == {*MADE}


def collected(tree: Path) -> list[str]:
    """The ids of all tests of a tree, collected there."""
    paths = [str(tree), str(tree / "tools")]
    variables = {"PYTHONPATH": os.pathsep.join(paths)}
    # A source distribution has no compiled kernels: those of this checkout, if there are.
    if library := getattr(_library.library, "__file__", None):
        variables["QKERN_NATIVE_LIBRARY"] = library
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if "::" in line)


@pytest.mark.slow
def test_its_tests_are_found_without_the_checkout(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("qkern-*")
    assert collected(tree) == collected(ROOT)
