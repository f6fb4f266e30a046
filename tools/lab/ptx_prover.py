"""sentryward in a process of its own, for it counts the most memory that its caller ever had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def verify(ptx: Path, question: Path, timeout_s: float, memory_limit_mib: int) -> dict[str, Any]:
    """What it says of a launch that ``question`` describes, in its own words."""
    command = [sys.executable, "-m", "sentryward", str(ptx), "--input", str(question)]
    command += ["--timeout", str(timeout_s), "--memory-limit-mib", str(memory_limit_mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"no answer, exit {done.returncode}: {done.stderr}") from None
    return answer
