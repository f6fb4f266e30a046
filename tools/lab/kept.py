"""Files that are costly to make and kept under build/, by a hash of what they are made from."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


def kept(result: Path, make: Callable[[Path], object]) -> Path:
    """``result``, written by ``make`` if it is not there, by one process at a time.

    ``make`` gets another name in the same folder, so that an interrupted one leaves no result.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    with result.with_suffix(f"{result.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            partial = result.with_suffix(f".partial{result.suffix}")
            make(partial)
            partial.rename(result)
    return result
