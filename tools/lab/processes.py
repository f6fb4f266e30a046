"""Python programs that tests run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def environment(**variables: str) -> dict[str, str]:
    """This process's variables and ``variables``, for a Python that imports what this one does."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": paths} | variables


def fresh_python(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python run with this process's variables but for QKERN_'s, and ``variables``."""
    inherited = {k: v for k, v in environment().items() if not k.startswith("QKERN_")}
    return subprocess.run(
        [sys.executable, *args],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )
