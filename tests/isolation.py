"""Undoing what a test switches on for its whole process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

SWITCHED_OFF_BY = {
    "qkern.integrations.peft": "unregister",
    "qkern.integrations.transformers": "give_back_bitsandbytes",
    "qkern.integrations.bitsandbytes": "disable",
}
"""Modules that can be switched on, and the function of each that switches it off."""


@contextlib.contextmanager
def integrations_off() -> Iterator[None]:
    """Leave no integration switched on, whether the test called it or loading a model did.

    Else a test would pass or fail by what its worker ran before.
    """
    try:
        yield
    finally:
        for name, off in SWITCHED_OFF_BY.items():
            if name in sys.modules:
                getattr(sys.modules[name], off)()
