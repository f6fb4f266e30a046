"""LockedFile: one file, locked against others, read and written past the page cache."""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkern.optim._file_layout import ALIGNMENT, ChunkFileError

_PAUSE_SECONDS = 0.0005
_open_files: weakref.WeakSet[LockedFile] = weakref.WeakSet()


class LockedFile:
    """Opens a file and, by `lock`, has an exclusive lock on it until `close`.

    The end of the object closes it too. In a forked child it is closed. Reads and writes of
    different places may run in several threads at once. Errors name the path.

    Args:
        path: What errors name.
        name: The file to open, if another.
        flags: As of ``os.open``, beside those for reading and writing.

    Raises:
        ChunkFileError: It is no regular file.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, name: Path | None = None, flags: int = 0) -> None:
        self.path = path
        self._users: set[int] = set()
        self._closing = False
        self._direct: io.FileIO | None = None

        def opener(name: str, mode: int) -> int:
            # A pipe in the place of the file is refused below, and not waited for.
            return os.open(name, mode | flags | os.O_NONBLOCK, 0o666)

        # This object owns the descriptor, and with it the lock, wherever an interrupt comes.
        self._main = io.FileIO(str(name or path), "r+", opener=opener)
        _open_files.add(self)
        if not stat.S_ISREG(self.stat().st_mode):
            self.close()
            raise ChunkFileError(f"{path}: got no regular file; takes a file on a disk")

    def stat(self) -> os.stat_result:
        """As of ``os.fstat``."""
        return os.fstat(self._main.fileno())

    def lock(self) -> None:
        """Raises ``BlockingIOError`` where another process, or another object, has the lock."""
        try:
            fcntl.flock(self._main, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "in use: another process, or another object here, has it open"
            ) from None

    def has_name(self, path: Path) -> bool:
        """Whether ``path`` is this file."""
        try:
            return os.path.samestat(path.lstat(), self.stat())
        except FileNotFoundError:
            return False

    def open_direct(self, path: Path) -> None:
        """Open the file past the page cache too, where the filesystem can."""
        if not hasattr(os, "O_DIRECT"):
            return
        direct = None
        try:
            direct = io.FileIO(
                str(path), "r+", opener=lambda name, mode: os.open(name, mode | os.O_DIRECT)
            )
            # Some filesystems refuse only when one reads.
            os.preadv(direct.fileno(), [mmap.mmap(-1, ALIGNMENT)], 0)
            same = os.path.samestat(self.stat(), os.fstat(direct.fileno()))
        except OSError:  # then data goes through the page cache
            same = False
        if same:
            self._direct = direct
        elif direct is not None:
            direct.close()

    @property
    def nbytes(self) -> int:
        """The file's length."""
        return self.stat().st_size

    def allocate(self, nbytes: int) -> None:
        """Give the file ``nbytes``, with space on the disk where possible."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._main.fileno(), 0, nbytes)
        else:
            os.ftruncate(self._main.fileno(), nbytes)

    def empty(self) -> None:
        """Drop all bytes."""
        os.ftruncate(self._main.fileno(), 0)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes; raises ``ChunkFileError`` where the file ends before."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view``; raises ``ChunkFileError`` where the file ends before."""
        self._transfer(os.preadv, view, offset)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``."""
        self._transfer(os.pwritev, view, offset)

    def sync(self) -> None:
        """Wait for the disk."""
        # macOS has no fdatasync.
        getattr(os, "fdatasync", os.fsync)(self._main.fileno())

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int
    ) -> None:
        """Read or write all of ``view``, past the page cache as far as alignment permits."""
        aligned_pages = 0
        if self._direct is not None and len(view) >= ALIGNMENT:
            address = np.frombuffer(view, np.uint8).ctypes.data
            if address % ALIGNMENT == 0 and offset % ALIGNMENT == 0:
                aligned_pages = len(view) // ALIGNMENT * ALIGNMENT
        done = 0
        while done < len(view):
            if self._direct is not None and done < aligned_pages and done % ALIGNMENT == 0:
                count = call(self._direct.fileno(), [view[done:aligned_pages]], offset + done)
            else:
                count = call(self._main.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise ChunkFileError(f"{self.path}: truncated: ends at byte {offset + done}")
            done += count

    @contextlib.contextmanager
    def errors_name_path(self) -> Iterator[None]:
        """Let every ``OSError`` of the block name the file."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let `wait_idle` and `close` of other threads wait for the block."""
        # No lock, which an interrupt might leave locked. Both this and they first say what they
        # are about to do and then look, so that one of the two sees the other.
        thread = threading.get_ident()
        self._users.add(thread)
        try:
            self.check_open()
            yield
        finally:
            self._users.discard(thread)

    def wait_idle(self) -> None:
        """Return when no other thread is in an `in_use`; who comes later is not waited for."""
        while self._users - {threading.get_ident()}:
            time.sleep(_PAUSE_SECONDS)

    def check_open(self) -> None:
        """Raises ``ValueError`` after `close`, and in a forked child."""
        if self.is_closed:
            raise ValueError(f"{self.path}: closed, or opened by the process this one forked from")

    @property
    def is_closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._closing or self._main.closed

    def close(self) -> None:
        """Release the file and its lock, once no thread uses it. Closed twice is fine."""
        self._closing = True
        # A number of a closed file may become another file's, which a late write would damage.
        self.wait_idle()
        self._release()

    def _release(self) -> None:
        self._closing = True
        if self._direct is not None:
            self._direct.close()
        self._main.close()

    def __del__(self) -> None:
        if hasattr(self, "_main"):
            self._release()


def _close_inherited() -> None:
    """Close in a forked child what its parent has open.

    The child shares the lock. A data loader's worker that outlives a killed trainer would keep the
    file locked, and a child that wrote to it would damage what the parent commits.
    """
    for file in list(_open_files):
        file._users.clear()  # the parent's threads, which may be using it, are not here
        file._release()


os.register_at_fork(after_in_child=_close_inherited)
