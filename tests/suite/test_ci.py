"""`.ci/run` takes shards of the slow tests in turn, in its time; the commit chooses the first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lab import ROOT

SHARDS = 24
MAKE = """#!/usr/bin/env bash
echo "$1 ${SHARD:-}" >> calls
echo "${PYTEST_ARGS:-}" >> arguments
if [[ "$1 ${SHARD:-}" == "${FAILS:-}" ]]; then exit 2; fi
if [[ "$1 ${SHARD:-}" == "${HANGS_AFTER:-}" ]]; then
  echo "test_x.py::test_y" >> "${PYTEST_ARGS##*--failures=}"
  exit 124
fi
if [[ "$1 ${SHARD:-}" == "${HANGS:-}" ]]; then exit 124; fi
"""
"""Stands for make; 124 is what `timeout` gives for a command that it had to end."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout that has CI's script, and nothing that it starts."""
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("a source distribution has no .ci/run")
    (tmp_path / ".ci").mkdir()
    shutil.copy(script, tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def run(repository: Path, budget: int = 5000, **variables: str) -> tuple[int, str, list[str]]:
    """Its status, its output and the calls of make."""
    path = f"{repository / 'bin'}{os.pathsep}{os.environ['PATH']}"
    calls = repository / "calls"
    calls.unlink(missing_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in ("SHARD", "PYTEST_ARGS")}
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        env=inherited | {"PATH": path, "CI_BUDGET_S": str(budget)} | variables,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def commit(repository: Path) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_chooses_the_first_shard_and_all_follow(repository: Path) -> None:
    status, output, calls = run(repository)
    assert status == 0, output
    assert calls[:2] == ["test ", "test-asan "]
    first = int(commit(repository)[:8], 16) % SHARDS
    order = [(first + i) % SHARDS + 1 for i in range(SHARDS)]
    assert calls[2:] == [f"test-slow {i}/{SHARDS}" for i in order]
    # pytest would take the value alone for a test's path, and for the place of its configuration.
    arguments = (repository / "arguments").read_text().split()
    assert len(arguments) == 1 + 2 * SHARDS
    assert all(re.match(r"--\w+=", argument) for argument in arguments)
    named = re.findall(r"slow tests that had a turn: (.*)", output)
    assert named == [" ".join(f"{i}/{SHARDS}" for i in order)]


def test_only_what_fits_is_begun(repository: Path) -> None:
    status, output, calls = run(repository, budget=200)
    assert status == 0, output
    assert calls == ["test "]
    assert "make test-asan skipped" in output
    assert "had a turn: none" in output


@pytest.mark.parametrize("fails", ["test ", "test-asan ", f"test-slow 7/{SHARDS}"])
def test_a_failure_is_ones_own(repository: Path, fails: str) -> None:
    status, _, calls = run(repository, FAILS=fails)
    assert status == 2
    assert calls[-1] == fails


@pytest.mark.parametrize("hangs", ["test-asan ", f"test-slow 7/{SHARDS}"])
def test_a_failure_before_the_cut_counts(repository: Path, hangs: str) -> None:
    status, output, calls = run(repository, HANGS_AFTER=hangs, TMPDIR=str(repository))
    assert status == 1
    assert calls[-1] == hangs
    assert "what had failed before:\ntest_x.py::test_y" in output
    assert not list(repository.glob("tmp*")), "the list of failures is left"


def test_what_is_cut_short_is_no_failure(repository: Path) -> None:
    status, output, calls = run(repository, HANGS=f"test-slow 7/{SHARDS}")
    assert status == 0
    assert "make test-slow cut short" in output
    assert len(calls) == 2 + SHARDS
