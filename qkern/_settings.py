"""What ``with`` blocks set for the code that runs in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_Blocks = tuple[list[Any], ...]
"""Of each block the setting and what it sets that to, the innermost last."""

_entered: ContextVar[_Blocks] = ContextVar("qkern", default=())
"""The blocks that the running code is in."""

_open: list[None] = []
"""One item for each block that is open anywhere: without any, nobody looks further."""

_read = _entered.get
_is_kept: Callable[[str], bool] = getattr(torch._C, "_is_key_in_tls", lambda key: False)
_TORCHS_KEY = "context"


def none_set() -> bool:
    """Whether no block can set anything here: a quick answer for small kernels."""
    return not _read() and not _open


class Setting(Generic[T]):
    """A value that blocks set, None outside of all of them.

    It is in a context variable: threads and tasks do not see each other's blocks. A task starts in
    the blocks of the code that made it, a thread in none. Blocks may end in any order, as those in
    generators do: in force is the last entered of those that have not ended.
    """

    def get(self) -> T | None:
        """The value in force."""
        blocks = _read()
        if not blocks and _open:
            blocks = _of_backward()
        for setting, value in reversed(blocks):
            if setting is self:
                found: T = value
                return found
        return None

    @contextmanager
    def held(self, value: T) -> Iterator[None]:
        """Set ``value`` inside the block."""
        mine = [self, value]
        _open.append(None)
        _entered.set((*_read(), mine))
        try:
            yield
        finally:
            entered = _read()
            left = tuple(block for block in entered if block is not mine)
            if len(left) == len(entered):
                # A generator was entered in one thread or task and ended in another: where it was
                # entered its block cannot be taken out, but set nothing.
                mine[0] = None
            _entered.set(left)
            _open.pop()


def _of_backward() -> _Blocks:
    """The blocks that the caller of ``backward`` is in, in a thread of autograd's own.

    There a checkpoint's function runs again. torch keeps the caller's context for it.
    """
    if not _is_kept(_TORCHS_KEY):
        return ()
    context: Any = torch._C._get_obj_in_tls(_TORCHS_KEY)
    found: _Blocks = context.get(_entered, ()) if context else ()
    return found


batch_invariance: Setting[bool] = Setting()
"""See `qkern.batch_invariant`."""

int8_activations: Setting[bool] = Setting()
"""Whether `qkern.precision` is ``"int8"``."""

forced_backend: Setting[Any] = Setting()
"""See `qkern.backends.use`; a `qkern.backends.Forced`."""
