"""ChunkFile: chunks of bytes in one file, of which the last committed version always survives.

Nothing of the committed version is ever overwritten: each chunk has two slots, and a write goes to
the one that the committed version does not use. A commit writes one record that says which slot of
every chunk counts; there are two places for records, taken in turn, so a torn record leaves the one
before it. What survives, at any moment and whichever call fails:

* the death of the process (``kill -9``), a full disk, an I/O error: the last committed version.
  All space is allocated at creation, so that on most filesystems a full disk shows there and never
  later; a filesystem that copies on write (btrfs, ZFS) may still report it at a write.
* the death of the machine (a power cut, a kernel crash): only with ``durable=True``, which waits
  for the disk before and after each record. Without it the kernel chooses what reaches the disk
  first; damage is then found by the checksums, not undone.

Reads and writes are explicit (``pread``, ``pwrite``) and not through a mapping of the file. In a
mapping a full disk or a bad sector is a SIGBUS, which kills the process instead of raising, and
the pages count as resident until the kernel drops them. Data moves past the page cache
(``O_DIRECT``) where the filesystem and the caller's buffer permit: a container's memory limit
counts that cache too.

`_file_layout` has the format of the file.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from qkern.optim import _file_layout
from qkern.optim._file_layout import (
    ChunkFileError,
    DamagedChunksError,
    FileLayout,
    Record,
)
from qkern.optim._locked_file import LockedFile, sync_directory

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

DEFAULT_META_CAPACITY = 1 << 16
_PIECE_BYTES = 1 << 20  # what `verify` holds in memory


class ChunkFile:
    """N chunks of bytes in one file; see the module's docstring for format and promises.

    ``create`` and ``open`` make one. It holds an exclusive lock on the file until ``close``, which
    drops what is not committed; so does the end of the object. In a forked child it is closed.

    ``read_into`` and ``write`` of different chunks may run in several threads at once. Everything
    else takes one thread at a time.

    A chunk's checksum is compared when it is first read after opening, and by ``verify``; what
    this object has written itself is not checked again.
    """

    def __init__(
        self, file: LockedFile, durable: bool, layout: FileLayout, committed: Record
    ) -> None:
        """Take over an open file; see `create` and `open`."""
        self.path = file.path
        self.durable = durable
        self.sizes = layout.sizes
        self._file = file
        self._layout = layout
        self._committed = committed
        count = len(layout.sizes)
        self._pending: dict[int, int] = {}  # chunk: checksum, of what is written, not committed
        self._checked = (bytearray(count), bytearray(count))
        self._failed = False  # a write or commit did: no commit before a rollback
        self._record_in_doubt = False  # a commit failed that may have left its record
        self._stamp = itertools.count(1)
        self._stamps = [0] * count

    # Opening.

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        sizes: Sequence[int],
        layout: dict[str, Any],
        meta: dict[str, Any],
        *,
        durable: bool = False,
        meta_capacity: int = DEFAULT_META_CAPACITY,
    ) -> Self:
        """Make a file of zeroed chunks, committed with ``meta``.

        It appears under its name when complete. Until then it is ``<path>.partial``, which an
        error removes; what a killed process left under that name is overwritten.

        Args:
            path: A name that does not exist yet.
            sizes: Bytes of each chunk, at least 1.
            layout: What the chunks hold, as JSON can say it; fixed.
            meta: What every commit replaces, as JSON can say it.
            durable: Wait for the disk at every commit.
            meta_capacity: Bytes that ``meta`` may take as JSON.

        Raises:
            FileExistsError: ``path`` exists.
            BlockingIOError: Another process is creating it.
            OSError: Such as ENOSPC. Where ``posix_fallocate`` is missing (macOS) a full disk may
                show at a later write instead; the committed version survives there too.
        """
        path = Path(path)
        sizes = tuple(sizes)
        if any(size < 1 for size in sizes):
            raise ValueError(f"sizes: got {min(sizes)}; takes at least 1 byte a chunk")
        shape = FileLayout(sizes, _file_layout.to_json(layout), meta_capacity)
        meta_json = _file_layout.to_json(meta)
        partial = path.with_name(path.name + ".partial")
        file = LockedFile(path, os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        try:
            with file.errors_name_path():
                file.lock()
                # Who held the lock may have finished: then this is that file, or has no name.
                ours = file.has_name(partial)
                if not ours or path.exists():
                    if ours:
                        partial.unlink()
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        except BaseException:
            file.close()
            raise
        try:
            with file.errors_name_path():
                file.allocate(shape.file_bytes)
                file.write(memoryview(shape.header), 0)
                zeros = _file_layout.checksums_of_zeros(sizes)
                blank = Record(0, bytearray(len(sizes)), zeros, b"")
                file.open_direct(partial)
                self = cls(file, durable, shape, blank)
                self._write_record(blank._replace(sequence=1, meta=meta_json))
                partial = partial.rename(path)
                if durable:
                    sync_directory(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        return self

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        layout: dict[str, Any] | None = None,
        *,
        durable: bool = False,
    ) -> Self:
        """Open a file at its last commit.

        Args:
            path: A file that ``create`` made.
            layout: What the file's layout must equal; None takes any.
            durable: Wait for the disk at every commit.

        Raises:
            ChunkFileError: It is not such a file, is of a newer format, truncated or damaged, or
                has another layout.
            BlockingIOError: It is open elsewhere.
            OSError: It cannot be opened or read.
        """
        path = Path(path)
        file = LockedFile(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            with file.errors_name_path():
                file.lock()
                shape = _file_layout.read_header(path, file.nbytes, file.read)
                record = _file_layout.read_last_record(path, shape, file.read)
                self = cls(file, durable, shape, record)
                if layout is not None:
                    wanted = json.loads(_file_layout.to_json(layout))
                    if text := _file_layout.difference(self.layout, wanted, "layout"):
                        raise ChunkFileError(f"{path}: {text}")
                file.open_direct(path)
        except BaseException:
            file.close()
            raise
        return self

    # What it holds.

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.sizes)

    @property
    def layout(self) -> dict[str, Any]:
        """The layout given at creation, as JSON gives it back."""
        return dict(json.loads(self._layout.layout))

    @property
    def meta(self) -> dict[str, Any]:
        """The meta of the last commit, as JSON gives it back."""
        return dict(json.loads(self._committed.meta))

    @property
    def sequence(self) -> int:
        """Number of the last commit; creation is the first."""
        return self._committed.sequence

    def stamp(self, index: int) -> int:
        """A number that changes whenever the chunk's bytes do: by a write or a rollback.

        A copy of a chunk is up to date as long as the stamp is the same.
        """
        return self._stamps[index]

    @property
    def uncommitted(self) -> frozenset[int]:
        """Chunks written since the last commit or rollback."""
        return frozenset(self._pending)

    # Reading and writing.

    def read_into(self, index: int, buffer: Buffer) -> None:
        """Read a chunk, as last written or else committed, into a buffer of exactly its size.

        Raises:
            DamagedChunksError: Its checksum is not the committed one.
            OSError: The disk failed.
        """
        view = self._view(index, buffer)
        self._file.check_open()
        slot = self._committed.slots[index] ^ (index in self._pending)
        with self._file.errors_name_path():
            self._file.read_into(view, self._layout.slot_offsets[slot][index])
        if not self._checked[slot][index]:
            if _file_layout.checksum([view]) != self._committed.checksums[index]:
                raise DamagedChunksError(self.path, [index], len(self))
            self._checked[slot][index] = 1

    def write(self, index: int, buffer: Buffer) -> None:
        """Write a chunk from a buffer of exactly its size; ``commit`` makes it count.

        After an error the chunk reads as committed, and ``commit`` raises until a ``rollback``.

        Raises:
            ChunkFileError: A commit failed before.
            OSError: The disk failed.
        """
        view = self._view(index, buffer)
        self._file.check_open()
        if self._record_in_doubt:  # its record may count, with the slots it names
            self._raise_failed("commit")
        slot = self._committed.slots[index] ^ 1
        self._stamps[index] = next(self._stamp)
        self._pending.pop(index, None)
        try:
            with self._file.errors_name_path():
                checksum = _file_layout.checksum([view])
                self._file.write(view, self._layout.slot_offsets[slot][index])
        except BaseException:
            self._failed = True
            raise
        self._checked[slot][index] = 1
        self._pending[index] = checksum

    def commit(self, meta: dict[str, Any]) -> None:
        """Make everything written since the last commit count, all at once, with ``meta``.

        After an error the file holds the version before or the new one, whole. What may follow is
        ``rollback``, which settles for the version before, or ``close``.

        Raises:
            ValueError: ``meta`` has more bytes than the file reserves.
            ChunkFileError: A write or commit failed before.
            OSError: The disk failed.
        """
        meta_json = _file_layout.to_json(meta)
        self._file.check_open()
        if self._failed:
            self._raise_failed("write or commit")
        slots, checksums = bytearray(self._committed.slots), list(self._committed.checksums)
        for index, checksum in self._pending.items():
            slots[index] ^= 1
            checksums[index] = checksum
        with self._file.errors_name_path():
            self._write_record(Record(self.sequence + 1, slots, checksums, meta_json))

    def rollback(self) -> None:
        """Go back to the last commit. The file can be used again after a failed write or commit.

        Raises:
            OSError: A failed commit's record may be in the file and cannot be taken back. Nothing
                but another ``rollback`` or ``close`` may follow.
        """
        self._file.check_open()
        if self._record_in_doubt:
            # Left there it might count after all, and the slots it names are about to be reused.
            with self._file.errors_name_path():
                offset = self._layout.record_offset(self.sequence + 1)
                self._file.write(memoryview(_file_layout.BLANK_RECORD), offset)
                self._sync()
            self._record_in_doubt = False
        for index in self._pending:
            self._stamps[index] = next(self._stamp)
        self._pending.clear()
        self._failed = False

    def verify(self) -> None:
        """Read every committed chunk and compare its checksum; takes about 1 MiB of memory.

        Raises:
            DamagedChunksError: Names the chunks whose checksum is wrong.
            OSError: The disk failed.
        """
        self._file.check_open()
        damaged = []
        memory = memoryview(mmap.mmap(-1, _PIECE_BYTES))
        for index, slot in enumerate(self._committed.slots):
            checksum = _file_layout.checksum(self._read_pieces(slot, index, memory))
            self._checked[slot][index] = checksum == self._committed.checksums[index]
            if not self._checked[slot][index]:
                damaged.append(index)
        if damaged:
            raise DamagedChunksError(self.path, damaged, len(self))

    def _read_pieces(self, slot: int, index: int, memory: memoryview) -> Iterator[memoryview]:
        for start in range(0, self.sizes[index], len(memory)):
            piece = memory[: self.sizes[index] - start]
            with self._file.errors_name_path():
                self._file.read_into(piece, self._layout.slot_offsets[slot][index] + start)
            yield piece

    def _view(self, index: int, buffer: Buffer) -> memoryview:
        if not 0 <= index < len(self.sizes):
            raise IndexError(f"index: got {index}; takes 0 to {len(self.sizes) - 1}")
        view = memoryview(buffer).cast("B")
        if len(view) != self.sizes[index]:
            raise ValueError(
                f"buffer: got {len(view)} bytes; takes {self.sizes[index]}, chunk {index}'s size"
            )
        return view

    def _write_record(self, record: Record) -> None:
        """Write a commit record; when this returns the version it describes counts."""
        self._layout.check_meta(record.meta)
        try:
            self._sync()
            self._record_in_doubt = True
            offset = self._layout.record_offset(record.sequence)
            self._file.write(memoryview(record.pack()), offset)
            self._sync()
        except BaseException:
            self._failed = True
            raise
        self._record_in_doubt = False
        self._committed = record
        self._pending.clear()

    def _sync(self) -> None:
        if self.durable:
            self._file.sync()

    def _raise_failed(self, call: str) -> NoReturn:
        raise ChunkFileError(f"{self.path}: a {call} failed; takes rollback() first")

    # Closing.

    def close(self) -> None:
        """Release the file and its lock, dropping what is not committed. Closed twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
