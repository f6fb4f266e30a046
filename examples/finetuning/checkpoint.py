"""Checkpoints that are either whole or absent, and the random state that belongs in them."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` by a rename once its files are on the disk.

    A crash at any point leaves the old `target`, or none, and at worst a hidden directory that the
    next try removes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    yield unfinished
    for path in [*unfinished.rglob("*"), unfinished]:
        _fsync(path)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    _fsync(target.parent)


def write_atomic(target: Path, text: str) -> None:
    """Write a text file so that it is the old one or the new one, whole."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _fsync(unfinished)
    unfinished.replace(target)
    _fsync(target.parent)


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"checkpoint-{step:06d}"


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(root)[:-keep]:
        shutil.rmtree(path)


def rng_state() -> dict[str, Any]:
    """The state of every generator a training step may draw from (loadable with weights_only)."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.tensor(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave. GPU generators are restored where there are as many."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
