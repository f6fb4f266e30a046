"""Exceptions that come between any two lines, or any two bytecodes, of a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

_MODULES = ("qkern.optim", "contextlib", "threading", "queue", "concurrent")


class Interrupter:
    """Raises in this thread at one place of what runs within it, as Ctrl-C would.

    A place is a line, or a bytecode, of the optimizer's code or of those parts of the standard
    library that one might use for threads.

    Args:
        place: Which of the places that come by, from 0; -1 for none of them.
        opcodes: Whether bytecodes are places instead of lines.
        error: What is raised.
        within: What the names of modules begin with whose code has places.
    """

    def __init__(
        self,
        place: int,
        opcodes: bool = False,
        error: type[BaseException] = KeyboardInterrupt,
        within: tuple[str, ...] = _MODULES,
    ) -> None:
        self.seen = 0
        """Places that came by."""
        self.raised_in = ""
        """The function and the line where it raised."""
        self.text = ""
        """Of the exception that came out in the end."""
        self._place, self._event, self._error = place, "opcode" if opcodes else "line", error
        self._within = within

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(self._within) or _is_finalizer(frame):
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        if event == self._event:
            self.seen += 1
            if self.seen == self._place + 1:
                self.raised_in = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise self._error
        return self._trace


def _is_finalizer(frame: FrameType | None) -> bool:
    """Whether it runs within a ``__del__``, out of which Python lets no exception."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def in_a_thread(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a thread of its own.

    An exception between two bytecodes of an ``except`` may leave a thread with the exception it
    was handling, as a context of all that follow.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(test, *args, **kwargs).result()

    return run
