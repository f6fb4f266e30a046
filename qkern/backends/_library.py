"""The compiled module ``qkern._C``, which holds the CPU kernels and, where built, the CUDA ones."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType


def _load() -> ModuleType:
    """``qkern._C`` as installed, or the build of it that ``QKERN_NATIVE_LIBRARY`` names.

    A named build that does not load is an error, for a run under a sanitizer must not fall back.
    """
    path = os.environ.get("QKERN_NATIVE_LIBRARY")
    if not path:
        return importlib.import_module("qkern._C")
    spec = importlib.util.spec_from_file_location("qkern._C", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"QKERN_NATIVE_LIBRARY: got {path!r}; takes an extension module's path")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(f"QKERN_NATIVE_LIBRARY: {path!r} cannot be loaded: {error}") from error
    sys.modules["qkern._C"] = module
    return module


library: ModuleType | None
missing_reason: str | None
try:
    # After torch, so that both use the one OpenMP runtime torch has loaded.
    library = _load()
    missing_reason = None
except ImportError as error:
    library = None
    missing_reason = f"qkern._C cannot be imported: {error}"
