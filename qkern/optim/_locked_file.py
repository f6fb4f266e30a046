"""LockedFile: one file, locked against others, read and written past the page cache."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkern.optim._file_layout import ALIGNMENT, ChunkFileError

_open_files: weakref.WeakSet[LockedFile] = weakref.WeakSet()


class LockedFile:
    """Takes over a descriptor and, by `lock`, an exclusive lock on its file until `close`.

    The end of the object closes it too. In a forked child it is closed. Reads and writes of
    different places may run in several threads at once. Errors name the path.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._direct_fd = -1
        _open_files.add(self)

    def lock(self) -> None:
        """Raises ``BlockingIOError`` where another process, or another object, has the lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "in use: another process, or another object here, has it open"
            ) from None

    def has_name(self, path: Path) -> bool:
        """Whether ``path`` is this file."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def open_direct(self, path: Path) -> None:
        """Open the file past the page cache too, where the filesystem can."""
        if not hasattr(os, "O_DIRECT"):
            return
        try:
            self._direct_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
            # Some filesystems refuse only when one reads.
            os.preadv(self._direct_fd, [mmap.mmap(-1, ALIGNMENT)], 0)
            same = os.path.sameopenfile(self._fd, self._direct_fd)
        except OSError:  # then data goes through the page cache
            same = False
        if not same and self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1

    @property
    def nbytes(self) -> int:
        """The file's length."""
        return os.fstat(self._fd).st_size

    def allocate(self, nbytes: int) -> None:
        """Empty the file and give it ``nbytes`` of zeros, with space on the disk where possible."""
        os.ftruncate(self._fd, 0)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, nbytes)
        else:
            os.ftruncate(self._fd, nbytes)

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
        getattr(os, "fdatasync", os.fsync)(self._fd)

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int
    ) -> None:
        """Read or write all of ``view``, past the page cache as far as alignment permits."""
        aligned_pages = 0
        if self._direct_fd >= 0 and len(view) >= ALIGNMENT:
            address = np.frombuffer(view, np.uint8).ctypes.data
            if address % ALIGNMENT == 0 and offset % ALIGNMENT == 0:
                aligned_pages = len(view) // ALIGNMENT * ALIGNMENT
        done = 0
        while done < len(view):
            if done < aligned_pages and done % ALIGNMENT == 0:
                count = call(self._direct_fd, [view[done:aligned_pages]], offset + done)
            else:
                count = call(self._fd, [view[done:]], offset + done)
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

    def check_open(self) -> None:
        """Raises ``ValueError`` after `close`, and in a forked child."""
        if self._fd < 0:
            raise ValueError(f"{self.path}: closed, or opened by the process this one forked from")

    def close(self) -> None:
        """Release the file and its lock. Closed twice is fine."""
        fds = [fd for fd in (self._fd, self._direct_fd) if fd >= 0]
        self._fd = self._direct_fd = -1
        for fd in fds:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close_inherited() -> None:
    """Close in a forked child what its parent has open.

    The child shares the lock. A data loader's worker that outlives a killed trainer would keep the
    file locked, and a child that wrote to it would damage what the parent commits.
    """
    for file in list(_open_files):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)
