"""Peak memory of one candidate, in a process of its own."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from . import memory
from .timing import SkippedError


def during(call: Callable[[], object]) -> dict[str, int]:
    """Bytes of this process: ``model`` before the call, ``peak`` during it.

    Raises `SkippedError` where the system does not tell a peak that can be reset.
    """
    gc.collect()
    with suppress(AttributeError, TypeError):  # glibc only; elsewhere freed memory may linger
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as error:
        raise SkippedError(f"peak memory cannot be reset: {error}") from None
    before = memory.resident()
    call()
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert peak is not None
    return {"model": before, "peak": int(peak[1]) * 1024}


def in_subprocess(name: str, arguments: Sequence[str]) -> dict[str, int]:
    """What `during` finds for a candidate in a fresh ``run.py --memory-of`` with `arguments`."""
    command = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "--memory-of", name]
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SkippedError((finished.stderr.strip().splitlines() or ["it failed"])[-1])
    result: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return result
