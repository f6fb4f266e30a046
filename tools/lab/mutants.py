"""Planted bugs show that a check notices: each is one small replacement in a copy of kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.processes import environment

_CAUGHT = 3
"""Exit status of a judge that noticed a bug."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: ``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    scope: str
    """What is run to notice it: cases of a judge, or a kernel."""
    caught_by: str
    """The kind of check that notices it."""
    compiled: tuple[str, ...] = ()
    """Kernel files to compile anew, if they are not ``file``."""
    quick: bool = False
    """Whether the quick tests plant it."""

    def __str__(self) -> str:
        return f"{self.name}-{self.caught_by}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Kernel files that the bug is in."""
        return self.compiled or (self.file,)


def plant(mutant: Mutant, kernels: Path, folder: Path) -> Path:
    """A copy of the folder ``kernels``, in ``folder``, with the bug in it."""
    copy = folder / kernels.name
    shutil.copytree(kernels, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / mutant.file
    text = file.read_text()
    count = text.count(mutant.old)
    assert count == 1, f"{mutant.name}: what it replaces occurs {count} times in {mutant.file}"
    file.write_text(text.replace(mutant.old, mutant.new))
    return copy


def chosen(mutants: Iterable[Mutant], *, quick: bool) -> list[Mutant]:
    """Those that the quick tests plant, or the others."""
    return [mutant for mutant in mutants if mutant.quick == quick]


def report(found: str | None) -> None:
    """A judge's last line, and its exit: what noticed a bug, as ``KIND: WHERE``, or None."""
    if found is not None:
        print(f"caught by {found}")
        sys.exit(_CAUGHT)
    print("survived")


def run_judge(
    command: Sequence[str], **variables: str
) -> tuple[str | None, subprocess.CompletedProcess[str]]:
    """What a judge's process reports: a kind of check, ``survived``, or None if it reports nothing.

    Also the process as it ended.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment(OMP_NUM_THREADS="1", **variables),
    )
    if done.returncode == _CAUGHT:
        return done.stdout.split("caught by ")[1].split(":")[0], done
    survived = done.returncode == 0 and done.stdout.endswith("survived\n")
    return "survived" if survived else None, done
