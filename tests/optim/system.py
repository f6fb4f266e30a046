"""Calls of the system that fail, and processes that end."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest


class Crash(BaseException):
    """Stands for the death of the process in the middle of a call."""


both_ways = pytest.mark.usefixtures("_direct")


class Calls:
    """Stands between the store and the system: counts calls, and runs `hook` before each.

    The hook gets the call's number and name, and how to make the call; what it returns or raises
    counts as the system's answer.
    """

    NAMES = ("pwritev", "preadv", "posix_fallocate", "ftruncate", "fdatasync", "rename", "fsync")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...] = NAMES) -> None:
        self.made = 0
        self.hook: Callable[[int, str, Callable[..., Any], tuple[Any, ...]], Any] | None = None
        self._lock = threading.Lock()
        for name in names:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self._lock:
                number, self.made = self.made, self.made + 1
            return real(*args) if self.hook is None else self.hook(number, name, real, args)

        return call

    def fail_at(self, wanted: int, error: int) -> None:
        def hook(number: int, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if number != wanted:
                return real(*args)
            if name == "pwritev":  # some of it may have reached the disk
                fd, (view,), offset = args
                with contextlib.suppress(OSError):
                    real(fd, [view[: len(view) // 2]], offset)
            raise OSError(error, os.strerror(error))

        self.made, self.hook = 0, hook


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; gives the status to wait for."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    return pid


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
