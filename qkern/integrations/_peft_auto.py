"""Registering with PEFT where a model was loaded that adapters may come to."""

from __future__ import annotations

import importlib.util
import warnings


def register_where_installed() -> None:
    """Call `qkern.integrations.peft.register`, where PEFT is installed.

    With a version that is not supported it warns: PEFT's own layers then run on 4-bit weights.
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from qkern.integrations import peft
    except ImportError as error:
        warnings.warn(f"adapters of PEFT will not use qkern's layer: {error}", stacklevel=2)
        return
    peft.register()
