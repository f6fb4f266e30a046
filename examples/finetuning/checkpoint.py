"""Checkpoints that are either whole or absent, and the random state that belongs in them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import UserError
from .output import DamagedError, check_whole, remove_directory, stranger
from .strict_json import loads

STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)(?:\.(\d+))?")


def checkpoints(root: Path) -> list[Path]:
    """What is named as a checkpoint under `root`, oldest first; not all of it need be whole."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), int(match[2] or 1), path)
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def new_checkpoint_path(root: Path, step: int) -> Path:
    """A name that is free: a checkpoint is never written over another of its step."""
    name = f"checkpoint-{step:06d}"
    taken = {path.name for path in checkpoints(root)}
    version = 1
    while (numbered := name if version == 1 else f"{name}.{version}") in taken:
        version += 1
    return root / numbered


def prune(root: Path, keep: int, work: Path, damaged: Iterable[Path] = ()) -> None:
    """Remove `damaged` ones and all but the newest `keep` others; what is not ours stays."""
    damaged = set(damaged)
    ours = [
        path
        for path in checkpoints(root)
        if path not in damaged and stranger(path, content=False) is None
    ]
    for path in [*ours[:-keep], *damaged]:
        remove_directory(path, work)


def refuse_foreign(root: Path) -> None:
    """Raise `UserError` for what is named as a checkpoint and is not one that a run wrote."""
    for path in checkpoints(root):
        if reason := stranger(path, content=False):
            raise UserError(
                f"{path} is not a checkpoint of finetune.py alone ({reason}): move it away, or "
                "name another --output"
            )


def clear(root: Path, work: Path) -> None:
    """Remove the checkpoints of a run that is not to be continued."""
    refuse_foreign(root)
    for path in checkpoints(root):
        remove_directory(path, work)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's settings and history. Raises `DamagedError`."""
    check_whole(checkpoint, [STATE])
    try:
        state = loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{STATE}: {error}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{STATE} holds no object")
    return state


def began(root: Path) -> datetime | None:
    """When the run began whose newest readable checkpoint is under `root`."""
    for path in reversed(checkpoints(root)):
        with suppress(DamagedError, TypeError, KeyError, ValueError):
            return datetime.fromisoformat(read_state(path)["began"])
    return None


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
