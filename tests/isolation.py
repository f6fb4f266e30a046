"""Undoing what a test switches on for its whole process."""

from __future__ import annotations

import contextlib
import os
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


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Give the environment's variables back their values; a library may have set some.

    PEFT sets ``CC`` and ``CXX`` to gcc for one of its tuners, which then links no C++ library.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        names = before.keys() | os.environ.keys()
        for name in names - {"PYTEST_CURRENT_TEST"}:  # which pytest changes itself
            if before.get(name) == os.environ.get(name):
                continue
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
