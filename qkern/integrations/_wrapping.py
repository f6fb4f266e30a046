"""Putting a function around one of a library's, where the library has no place to ask."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK = "_qkern_original"


def is_wrapped(function: Any) -> bool:
    """Whether `wrap` has put a function around this one."""
    return hasattr(function, _MARK)


def wrap(owner: Any, name: str, function: Callable[..., Any]) -> Any:
    """Have ``owner.name(...)`` call ``function(original, ...)``; again, it does nothing.

    Returns what to put back with ``setattr``, or None where it is wrapped already.
    """
    held = inspect.getattr_static(owner, name)
    original = held.__func__ if isinstance(held, classmethod) else held
    if is_wrapped(original):
        return None

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(replaced, _MARK, original)
    setattr(owner, name, classmethod(replaced) if held is not original else replaced)
    return held
