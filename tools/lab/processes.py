"""Python programs that tests run in processes of their own."""

from __future__ import annotations

import os
import sys


def environment(**variables: str) -> dict[str, str]:
    """This process's variables and ``variables``, for a Python that imports what this one does."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": paths} | variables
