"""What ``with`` blocks set for the code that runs in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_is_kept: Callable[[str], bool] = getattr(torch._C, "_is_key_in_tls", lambda key: False)
_TORCHS_KEY = "context"


class Setting(Generic[T]):
    """A value that blocks set, None outside of all of them.

    It is a context variable: threads and tasks do not see each other's blocks. A task starts with
    the blocks that the code which made it is in, a thread with none. Blocks may end in any order,
    as those in generators do: in force is the last entered of those that have not ended.
    """

    def __init__(self, name: str) -> None:
        self._entered: ContextVar[tuple[list[T], ...]] = ContextVar(name, default=())
        self._read = self._entered.get
        self._is_used = False

    def get(self) -> T | None:
        """The value in force."""
        entered = self._read()
        if entered:
            return entered[-1][0]
        return self._of_backward() if self._is_used else None

    def _of_backward(self) -> T | None:
        """That of the blocks that the caller of ``backward`` is in, in a thread of autograd's own.

        There a checkpoint's function runs again. torch keeps the caller's context for it.
        """
        if not _is_kept(_TORCHS_KEY):
            return None
        context: Any = torch._C._get_obj_in_tls(_TORCHS_KEY)
        entered: tuple[list[T], ...] = context.get(self._entered, ()) if context else ()
        return entered[-1][0] if entered else None

    @contextmanager
    def held(self, value: T) -> Iterator[None]:
        """Set ``value`` inside the block."""
        self._is_used = True
        mine = [value]  # a list, to be told from another block's with an equal value
        self._entered.set((*self._read(), mine))
        try:
            yield
        finally:
            self._entered.set(tuple(entry for entry in self._read() if entry is not mine))


batch_invariance: Setting[bool] = Setting("qkern.batch_invariance")
"""See `qkern.batch_invariant`."""

forced_backend: Setting[Any] = Setting("qkern.backends.use")
"""See `qkern.backends.use`; a `qkern.backends.Forced`."""
