"""Recipes: documents whose code blocks say where they go, applied to a copy of the tree."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import ROOT

_FENCED = re.compile(
    r"^(?P<intro>[^\n]+)\n\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NEW = re.compile(r"^New file `([^`]+)`:$")
_IN = re.compile(r"^(?:Instead, i|I)n `([^`]+)`, (after|before) `([^`]+)`:$")
_COPIED = (
    *("qkern", "triton_kernels", "csrc", "tests", "tools"),
    *("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "docs"),
)


@dataclass(frozen=True)
class Block:
    """A block of code, and where the line before it puts it."""

    path: str
    code: str
    where: str = ""
    """``"after"`` or ``"before"`` the anchor; empty for a new file."""
    anchor: str = ""
    """What the line of the file reads, but for spaces at its ends."""
    instead: bool = False
    """Whether it belongs to the recipe's other way."""

    def __str__(self) -> str:
        return f"{self.path}-{self.where or 'new'}-{len(self.code)}"

    def apply(self, root: Path) -> None:
        """Write it below ``root``; AssertionError where its place is not there, or not one."""
        path = root / self.path
        if not self.where:
            assert not path.exists(), f"{self.path} exists"
            path.write_text(self.code, "utf-8")
            return
        lines = path.read_text("utf-8").splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if line.strip() == self.anchor]
        assert len(found) == 1, f"{self.path}: {len(found)} lines read {self.anchor!r}, not one"
        at = found[0] + (self.where == "after")
        lines[at:at] = self.code.splitlines(keepends=True)
        path.write_text("".join(lines), "utf-8")


def fenced(document: Path) -> list[tuple[str, str, str]]:
    """Line before, language and code of each block of a document."""
    found = _FENCED.finditer(document.read_text("utf-8"))
    return [(m["intro"], m["language"], m["code"]) for m in found]


def blocks(document: Path) -> list[Block]:
    """The blocks that go to a file."""
    found = []
    for intro, _, code in fenced(document):
        instead = intro.startswith("Instead")
        if match := _NEW.match(intro):
            found.append(Block(match[1], code, instead=instead))
        elif match := _IN.match(intro):
            found.append(Block(match[1], code, match[2], match[3], instead))
    return found


def copy_tree(to: Path) -> None:
    """What a recipe changes and what its check needs, without anything built."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)
