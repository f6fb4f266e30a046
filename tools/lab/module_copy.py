"""A second instance of a module, for a test to put other functions into."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def copy_of(module: ModuleType, name: str) -> ModuleType:
    """`module` executed anew under `name`; the original stays as it is."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
