"""Memory of this machine and process: by psutil, or where that is missing by what Linux tells."""

from __future__ import annotations

import os
import re
from pathlib import Path

try:
    import psutil
except ImportError:
    psutil = None


def available() -> int:
    """Bytes that programs can still take."""
    if psutil is not None:
        return int(psutil.virtual_memory().available)
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") << 10


def total() -> int:
    """Bytes that the machine has."""
    if psutil is not None:
        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes that this process holds."""
    if psutil is not None:
        return int(psutil.Process().memory_info().rss)
    return _kilobytes(Path("/proc/self/status"), "VmRSS") << 10


def _kilobytes(file: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise OSError(f"{file} has no {name}")
    return int(found[1])
