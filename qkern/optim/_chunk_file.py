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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from qkern.io._files import sync_directory
from qkern.optim import _file_layout
from qkern.optim._file_layout import (
    ChunkFileError,
    DamagedChunksError,
    FileLayout,
    Record,
)
from qkern.optim._locked_file import LockedFile

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

DEFAULT_META_CAPACITY = 1 << 16
_PIECE_BYTES = 1 << 20  # what `verify` holds in memory


@dataclass(eq=False)
class Draft:
    """What is written since a commit. It becomes the next commit as a whole, or is dropped so.

    A `ChunkFile` takes the next draft by one assignment: an interrupt comes before it or after.
    """

    committed: Record
    stamps: list[int]
    """Of each chunk; see `ChunkFile.stamp`."""
    pending: dict[int, int] = field(default_factory=dict)
    """Checksums of the chunks that are written."""
    failed: bool = False
    """Whether a write or the commit did: no commit before a rollback."""
    in_doubt: bool = False
    """Whether its record may be in the file."""
    dropped: bool = False
    """Whether a rollback has begun: no write begins any more."""


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
        count = len(layout.sizes)
        self._draft = Draft(committed, [0] * count)
        self._checked = (bytearray(count), bytearray(count))
        self._stamp = itertools.count(1)

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
        error removes; what a killed process left under that name is overwritten, and whatever else
        has it is refused.

        Args:
            path: A name that does not exist yet.
            sizes: Bytes of each chunk, at least 1.
            layout: What the chunks hold, as JSON can say it; fixed.
            meta: What every commit replaces, as JSON can say it.
            durable: Wait for the disk at every commit.
            meta_capacity: Bytes that ``meta`` may take as JSON.

        Raises:
            FileExistsError: ``path`` exists, or ``<path>.partial`` is somebody else's.
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
        file = _open_partial(path, partial)
        try:
            with file.errors_name_path():
                file.empty()
                # First, so that what a killed process leaves shows whose it is.
                file.write(memoryview(shape.header), 0)
                file.allocate(shape.file_bytes)
                zeros = _file_layout.checksums_of_zeros(sizes)
                blank = Record(0, bytearray(len(sizes)), zeros, b"")
                file.open_direct(partial)
                self = cls(file, durable, shape, blank)
                self._write_record(blank._replace(sequence=1, meta=meta_json))
                partial.rename(path)
                if durable:
                    sync_directory(path.parent)
        except BaseException:
            for name in (partial, path):
                if file.has_name(name):
                    name.unlink()
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
        file = LockedFile(path)
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
        return _file_layout.parse_json(self.path, "layout", self._layout.layout)

    @property
    def meta(self) -> dict[str, Any]:
        """The meta of the last commit, as JSON gives it back."""
        return _file_layout.parse_json(self.path, "meta", self._draft.committed.meta)

    @property
    def sequence(self) -> int:
        """Number of the last commit; creation is the first."""
        return self._draft.committed.sequence

    @property
    def draft(self) -> Draft:
        """What `write` adds to until the next commit or rollback."""
        return self._draft

    def stamp(self, index: int) -> int:
        """A number that changes whenever the chunk's bytes do: by a write or a rollback.

        A copy of a chunk is up to date as long as the stamp is the same.
        """
        return self._draft.stamps[index]

    @property
    def uncommitted(self) -> frozenset[int]:
        """Chunks written since the last commit or rollback."""
        return frozenset(self._draft.pending)

    # Reading and writing.

    def read_into(self, index: int, buffer: Buffer) -> None:
        """Read a chunk, as last written or else committed, into a buffer of exactly its size.

        Raises:
            DamagedChunksError: Its checksum is not the committed one.
            OSError: The disk failed.
        """
        view = self._view(index, buffer)
        with self._file.in_use():
            draft = self._draft
            slot = draft.committed.slots[index] ^ (index in draft.pending)
            with self._file.errors_name_path():
                self._file.read_into(view, self._layout.slot_offsets[slot][index])
            if not self._checked[slot][index]:
                if _file_layout.checksum([view]) != draft.committed.checksums[index]:
                    raise DamagedChunksError(self.path, [index], len(self))
                self._checked[slot][index] = 1

    def write(self, index: int, buffer: Buffer, draft: Draft | None = None) -> None:
        """Write a chunk from a buffer of exactly its size; ``commit`` makes it count.

        After an error the chunk reads as committed, and ``commit`` raises until a ``rollback``.

        Args:
            index: The chunk.
            buffer: Its bytes.
            draft: What the bytes belong to; by default, whatever is written now.

        Raises:
            ChunkFileError: A commit failed before, or ``draft`` has been committed or dropped.
            OSError: The disk failed.
        """
        view = self._view(index, buffer)
        with self._file.in_use():
            # Looked at only now that a rollback in another thread waits for this write.
            now = self._draft
            if draft is None:
                draft = now
            if now.in_doubt:  # its record may count, with the slots it names
                self._raise_failed("commit")
            if draft is not now or now.dropped:
                raise ChunkFileError(f"{self.path}: got a write after its rollback; takes none")
            slot = draft.committed.slots[index] ^ 1
            draft.stamps[index] = next(self._stamp)
            draft.pending.pop(index, None)
            try:
                with self._file.errors_name_path():
                    checksum = _file_layout.checksum([view])
                    self._file.write(view, self._layout.slot_offsets[slot][index])
            except BaseException:
                draft.failed = True
                raise
            self._checked[slot][index] = 1
            draft.pending[index] = checksum

    def commit(self, meta: dict[str, Any]) -> None:
        """Make everything written since the last commit count, all at once, with ``meta``.

        After an error the file holds the version before or the new one, whole. What may follow is
        ``rollback``, which settles for the version before, or ``close``. After an interrupt,
        ``sequence`` says whether the commit came to its end.

        Raises:
            ValueError: ``meta`` has more bytes than the file reserves.
            ChunkFileError: A write or commit failed before.
            OSError: The disk failed.
        """
        meta_json = _file_layout.to_json(meta)
        self._file.check_open()
        draft = self._draft
        if draft.failed or draft.in_doubt or draft.dropped:
            self._raise_failed("write or commit")
        slots, checksums = bytearray(draft.committed.slots), list(draft.committed.checksums)
        for index, checksum in draft.pending.items():
            slots[index] ^= 1
            checksums[index] = checksum
        with self._file.errors_name_path():
            self._write_record(Record(self.sequence + 1, slots, checksums, meta_json))

    def rollback(self) -> None:
        """Go back to the last commit. The file can be used again after a failed write or commit.

        Waits for writes that other threads have begun; what they have not begun yet is refused.

        Raises:
            OSError: A failed commit's record may be in the file and cannot be taken back. Nothing
                but another ``rollback`` or ``close`` may follow.
        """
        self._file.check_open()
        draft = self._draft
        draft.dropped = True
        self._file.wait_idle()
        if draft.in_doubt:
            # Left there it might count after all, and the slots it names are about to be reused.
            with self._file.errors_name_path():
                offset = self._layout.record_offset(self.sequence + 1)
                self._file.write(memoryview(_file_layout.BLANK_RECORD), offset)
                self._sync()
        stamps = list(draft.stamps)
        for index in draft.pending:
            stamps[index] = next(self._stamp)
        self._draft = Draft(draft.committed, stamps)

    def verify(self) -> None:
        """Read every committed chunk and compare its checksum; takes about 1 MiB of memory.

        Raises:
            DamagedChunksError: Names the chunks whose checksum is wrong.
            OSError: The disk failed.
        """
        self._file.check_open()
        damaged = []
        memory = memoryview(mmap.mmap(-1, _PIECE_BYTES))
        committed = self._draft.committed
        for index, slot in enumerate(committed.slots):
            checksum = _file_layout.checksum(self._read_pieces(slot, index, memory))
            self._checked[slot][index] = checksum == committed.checksums[index]
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
        draft = self._draft
        try:
            self._sync()
            draft.in_doubt = True
            offset = self._layout.record_offset(record.sequence)
            self._file.write(memoryview(record.pack()), offset)
            self._sync()
        except BaseException:
            draft.failed = True
            raise
        self._draft = Draft(record, draft.stamps)

    def _sync(self) -> None:
        if self.durable:
            self._file.sync()

    def _raise_failed(self, call: str) -> NoReturn:
        raise ChunkFileError(f"{self.path}: a {call} failed; takes rollback() first")

    # Closing.

    def close(self) -> None:
        """Release the file and its lock, dropping what is not committed. Closed twice is fine.

        Waits for reads and writes that other threads have begun.
        """
        self._file.close()

    @property
    def is_closed(self) -> bool:
        """Whether it is closed, or belongs to the process that this one was forked from."""
        return self._file.is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _open_partial(path: Path, partial: Path) -> LockedFile:
    """Open the file that is to become ``path``, new or left by a killed process, and lock it."""
    # Through a link it would be some other file that is emptied.
    flags = os.O_CREAT | os.O_NOFOLLOW
    is_new = True
    try:
        try:
            file = LockedFile(path, partial, flags | os.O_EXCL)
        except FileExistsError:
            is_new = False
            file = LockedFile(path, partial, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _not_ours(path, partial, "a symbolic link") from None
    except ChunkFileError:
        raise _not_ours(path, partial, "no regular file") from None
    try:
        with file.errors_name_path():
            file.lock()
            # Who held the lock may have finished: then this is that file, or has no name.
            if not file.has_name(partial):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            status = file.stat()
            start = file.read(0, min(status.st_size, len(_file_layout.MAGIC)))
            if not _file_layout.MAGIC.startswith(start):
                raise _not_ours(path, partial, f"a file that begins with {start!r}")
            # Some network filesystems give all files, new ones too, to one user.
            if not is_new and (status.st_nlink > 1 or status.st_uid != os.geteuid()):
                raise _not_ours(path, partial, "a file with another name too, or of another user")
            if os.path.lexists(path):
                partial.unlink()
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except BaseException:
        file.close()
        raise
    return file


def _not_ours(path: Path, partial: Path, what: str) -> FileExistsError:
    return FileExistsError(
        errno.EEXIST,
        f"{partial.name}: got {what}; takes no file, or what a killed process left there",
        str(path),
    )
