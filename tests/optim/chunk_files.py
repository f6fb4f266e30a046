"""Chunk files whose contents follow from the step, and calls of the system that fail."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT

SIZES = (5000, 3, 2 * ALIGNMENT, 4097)
LAYOUT = {"bits": 32, "tensors": [{"name": "a.weight", "shape": [3, 4]}]}
PAGE = mmap.PAGESIZE
Contents = list[bytes]


class Crash(BaseException):
    """Stands for the death of the process in the middle of a call."""


both_ways = pytest.mark.usefixtures("_direct")


def create(path: Path, sizes: tuple[int, ...] = SIZES, **options: Any) -> ChunkFile:
    return ChunkFile.create(path, sizes, LAYOUT, {"step": 0}, meta_capacity=200, **options)


def payload(index: int, step: int, size: int) -> bytearray:
    """What chunk `index` holds after `step`; zeros for step 0, as a new file has."""
    if step == 0:
        return bytearray(size)
    return bytearray(np.random.default_rng((index, step)).bytes(size))


def version(step: int, sizes: tuple[int, ...] = SIZES) -> Contents:
    return [bytes(payload(i, step, size)) for i, size in enumerate(sizes)]


def contents(file: ChunkFile) -> Contents:
    result = []
    for index, size in enumerate(file.sizes):
        buffer = bytearray(size)
        file.read_into(index, buffer)
        result.append(bytes(buffer))
    return result


def take_step(file: ChunkFile, step: int) -> None:
    for index, size in enumerate(file.sizes):
        file.write(index, payload(index, step, size))
    file.commit({"step": step})


def reopened(path: Path) -> tuple[int, Contents]:
    """The step and the contents a new process would find, verified."""
    with ChunkFile.open(path, LAYOUT) as file:
        file.verify()
        return file.meta["step"], contents(file)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 0x10]))


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


def documented_checksum(chunk: bytes) -> int:
    return zlib.crc32(chunk)


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


def fill_step(step: int) -> Callable[[int, memoryview], None]:
    def update(index: int, buffer: memoryview) -> None:
        buffer[:] = payload(index, step, len(buffer))

    return update
