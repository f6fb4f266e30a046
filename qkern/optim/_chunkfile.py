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

The file, all numbers little-endian::

    header
         0  8   magic "QKCHUNKS"
         8  4   format version: 1
        12  4   checksum of chunks: 1 for CRC-32 (zlib's)
        16  8   N, number of chunks
        24  8   bytes of the layout
        32  8   bytes reserved for meta in a commit record
        40  32  SHA-256 of the header without these 32 bytes
        72  8N  size of each chunk in bytes
         -  -   layout: JSON, UTF-8
    two commit records; the one of sequence number s is in place s % 2
         0  8   magic "QKCOMMIT"
         8  8   sequence number; of the valid records the one with the greater number counts
        16  8   bytes of meta
        24  32  SHA-256 of the record without these 32 bytes
        56  4N  checksum of each chunk
         -  N   slot of each chunk: 0 or 1
         -  -   meta: JSON, UTF-8
    slot 0 of every chunk in order, then slot 1 of every chunk in order

Header, both records and every slot begin at a multiple of 4096 bytes, with zeros or leftovers in
between; the file ends with the last slot, padded likewise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

try:  # the same checksum by carry-less multiplication, several times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

ALIGNMENT = 4096
FORMAT_VERSION = 1
DEFAULT_META_CAPACITY = 1 << 16
_MAGIC = b"QKCHUNKS"
_RECORD_MAGIC = b"QKCOMMIT"
_CRC32 = 1
_HEADER = struct.Struct("<8sIIQQQ")
_RECORD = struct.Struct("<8sQQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
_PIECE_BYTES = 1 << 20  # what `verify` holds in memory

_open_files: weakref.WeakSet[ChunkFile] = weakref.WeakSet()


class ChunkFileError(RuntimeError):
    """A file that is not what it should be: foreign, truncated, damaged, of another layout."""


class DamagedChunksError(ChunkFileError):
    """Committed chunks whose bytes do not have the committed checksum; ``chunks`` are they."""

    def __init__(self, path: Path, chunks: Sequence[int], count: int) -> None:
        named = ", ".join(map(str, chunks[:8])) + (", ..." if len(chunks) > 8 else "")
        super().__init__(f"{path}: damaged: wrong checksum in chunk {named} of {count}")
        self.chunks = tuple(chunks)


class ChunkFile:
    """N chunks of bytes in one file; see the module's docstring for format and promises.

    ``create`` and ``open`` make one. It holds an exclusive lock on the file until ``close``, which
    drops what is not committed; so does the end of the object. In a forked child it is closed.

    ``read_into`` and ``write`` of different chunks may run in several threads at once. Everything
    else takes one thread at a time.

    A chunk's checksum is compared when it is first read after opening, and by ``verify``; what
    this object has written itself is not checked again.
    """

    def __init__(self, path: Path, fd: int, durable: bool) -> None:
        """Take over ``fd``, locked; `create` and `open` fill in the rest."""
        self.path = path
        self.durable = durable
        self.sizes: tuple[int, ...] = ()
        self._fd = fd
        self._direct_fd = -1
        self._layout = b""
        self._meta = b""
        self._meta_capacity = 0
        self._sequence = 0
        self._slots = bytearray()
        self._checksums: list[int] = []
        self._offsets: tuple[list[int], list[int]] = ([], [])
        self._pending: dict[int, int] = {}  # chunk: checksum, of what is written, not committed
        self._checked: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._failed = False  # a write or commit did: no commit before a rollback
        self._record_in_doubt = False  # a commit failed that may have left its record
        self._stamp = itertools.count(1)
        self._stamps: list[int] = []
        _open_files.add(self)

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
        layout_json, meta_json = _to_json(layout), _to_json(meta)
        partial = path.with_name(path.name + ".partial")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self = cls(path, fd, durable)
        try:
            with self._errors_name_path():
                self._lock()
                # Whoever held the lock may have finished: then this is its file, or nameless.
                ours = _names(partial, fd)
                if not ours or path.exists():
                    if ours:
                        partial.unlink()
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        except BaseException:
            self.close()
            raise
        try:
            with self._errors_name_path():
                os.ftruncate(fd, 0)
                header = self._set_shape(sizes, layout_json, meta_capacity)
                self._allocate()
                self._transfer(os.pwritev, memoryview(header), 0)
                self._checksums = _checksums_of_zeros(sizes)
                self._open_direct(partial)
                self._write_record(1, self._slots, self._checksums, meta_json)
                partial = partial.rename(path)
                if durable:
                    _sync_directory(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            self.close()
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
        self = cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), durable)
        try:
            with self._errors_name_path():
                self._lock()
                self._read_header()
                self._read_records()
                if layout is not None:
                    wanted = json.loads(_to_json(layout))
                    if difference := _difference(self.layout, wanted, "layout"):
                        raise ChunkFileError(f"{path}: {difference}")
                self._open_direct(path)
        except BaseException:
            self.close()
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "in use: another process, or another object here, has it open"
            ) from None

    def _set_shape(self, sizes: tuple[int, ...], layout: bytes, meta_capacity: int) -> bytes:
        """Compute where everything is; returns the header's bytes."""
        count = len(sizes)
        self.sizes = sizes
        self._layout = layout
        self._meta_capacity = meta_capacity
        self._slots = bytearray(count)
        self._checked = (bytearray(count), bytearray(count))
        self._stamps = [0] * count
        fixed = _HEADER.pack(
            _MAGIC, FORMAT_VERSION, _CRC32, count, len(layout), self._meta_capacity
        )
        variable = struct.pack(f"<{count}Q", *sizes) + layout
        header = fixed + hashlib.sha256(fixed + variable).digest() + variable
        record_bytes = _aligned(_RECORD.size + _DIGEST_BYTES + 5 * count + meta_capacity)
        first = _aligned(len(header))
        self._record_offsets = (first, first + record_bytes)
        slots = list(
            itertools.accumulate(map(_aligned, sizes * 2), initial=first + 2 * record_bytes)
        )
        self._offsets = (slots[:count], slots[count : 2 * count])
        self._file_bytes = slots[-1]
        return header

    def _allocate(self) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, self._file_bytes)
        else:
            os.ftruncate(self._fd, self._file_bytes)

    def _read_header(self) -> None:
        file_bytes = os.fstat(self._fd).st_size
        fixed_bytes = _HEADER.size + _DIGEST_BYTES
        start = self._read(0, min(file_bytes, fixed_bytes))
        if start[: len(_MAGIC)] != _MAGIC[: len(start)] or not start:
            raise ChunkFileError(
                f"{self.path}: got a file that begins with {start[:8]!r}; "
                f"takes a chunk file, which begins with {_MAGIC!r}"
            )
        if file_bytes < fixed_bytes:
            raise ChunkFileError(
                f"{self.path}: truncated: got {file_bytes} bytes; the header alone has more"
            )
        _, version, checksum, count, layout_bytes, meta_capacity = _HEADER.unpack_from(start)
        if version != FORMAT_VERSION:
            newer = ", made by a newer qkern" if version > FORMAT_VERSION else ""
            raise ChunkFileError(
                f"{self.path}: got format version {version}{newer}; takes {FORMAT_VERSION}"
            )
        header_bytes = fixed_bytes + 8 * count + layout_bytes
        if header_bytes > file_bytes:
            raise ChunkFileError(
                f"{self.path}: truncated or damaged: got {file_bytes} bytes; "
                f"the header claims {header_bytes} for itself"
            )
        variable = self._read(fixed_bytes, header_bytes - fixed_bytes)
        if hashlib.sha256(start[: _HEADER.size] + variable).digest() != start[_HEADER.size :]:
            raise ChunkFileError(f"{self.path}: damaged: the header has another checksum")
        if checksum != _CRC32:
            raise ChunkFileError(
                f"{self.path}: got chunks with checksum {checksum}; takes {_CRC32}, CRC-32"
            )
        sizes = struct.unpack_from(f"<{count}Q", variable)
        self._set_shape(sizes, variable[8 * count :], meta_capacity)
        if file_bytes != self._file_bytes:
            state = "truncated" if file_bytes < self._file_bytes else "damaged"
            raise ChunkFileError(
                f"{self.path}: {state}: got {file_bytes} bytes; "
                f"takes {self._file_bytes}, by its header"
            )

    def _read_records(self) -> None:
        records = [record for place in (0, 1) if (record := self._read_record(place))]
        if not records:
            raise ChunkFileError(f"{self.path}: damaged: neither commit record is valid")
        self._sequence, self._slots, self._checksums, self._meta = max(records)

    def _read_record(self, place: int) -> tuple[int, bytearray, list[int], bytes] | None:
        """The record in one of the two places; None if it is torn, blank or damaged."""
        offset = self._record_offsets[place]
        fixed_bytes = _RECORD.size + _DIGEST_BYTES
        count = len(self.sizes)
        start = self._read(offset, fixed_bytes)
        magic, sequence, meta_bytes = _RECORD.unpack_from(start)
        if magic != _RECORD_MAGIC or sequence % 2 != place or meta_bytes > self._meta_capacity:
            return None
        variable = self._read(offset + fixed_bytes, 5 * count + meta_bytes)
        if hashlib.sha256(start[: _RECORD.size] + variable).digest() != start[_RECORD.size :]:
            return None
        checksums = list(struct.unpack_from(f"<{count}I", variable))
        slots = bytearray(variable[4 * count : 5 * count])
        return sequence, slots, checksums, variable[5 * count :]

    def _open_direct(self, path: Path) -> None:
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

    # What it holds.

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.sizes)

    @property
    def layout(self) -> dict[str, Any]:
        """The layout given at creation, as JSON gives it back."""
        return dict(json.loads(self._layout))

    @property
    def meta(self) -> dict[str, Any]:
        """The meta of the last commit, as JSON gives it back."""
        return dict(json.loads(self._meta))

    @property
    def sequence(self) -> int:
        """Number of the last commit; creation is the first."""
        return self._sequence

    @property
    def direct(self) -> bool:
        """Whether data moves past the page cache, from buffers aligned to ``ALIGNMENT``."""
        return self._direct_fd >= 0

    @property
    def uncommitted(self) -> frozenset[int]:
        """Chunks written since the last commit or rollback."""
        return frozenset(self._pending)

    def stamp(self, index: int) -> int:
        """A number that changes whenever the chunk's bytes do: by a write or a rollback.

        Who keeps a copy of a chunk tells by it whether the copy still holds.
        """
        return self._stamps[index]

    # Reading and writing.

    def read_into(self, index: int, buffer: Buffer) -> None:
        """Read a chunk, as last written or else committed, into a buffer of exactly its size.

        Raises:
            DamagedChunksError: Its checksum is not the committed one.
            OSError: The disk failed.
        """
        view = self._view(index, buffer)
        self._check_open()
        slot = self._slots[index] ^ (index in self._pending)
        with self._errors_name_path():
            self._transfer(os.preadv, view, self._offsets[slot][index])
        if not self._checked[slot][index]:
            if crc32(view) != self._checksums[index]:
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
        self._check_open()
        if self._record_in_doubt:  # its record may count, with the slots it names
            self._raise_failed("commit")
        slot = self._slots[index] ^ 1
        self._stamps[index] = next(self._stamp)
        self._pending.pop(index, None)
        try:
            with self._errors_name_path():
                checksum = crc32(view)
                self._transfer(os.pwritev, view, self._offsets[slot][index])
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
        meta_json = _to_json(meta)
        self._check_open()
        if self._failed:
            self._raise_failed("write or commit")
        slots, checksums = bytearray(self._slots), list(self._checksums)
        for index, checksum in self._pending.items():
            slots[index] ^= 1
            checksums[index] = checksum
        with self._errors_name_path():
            self._write_record(self._sequence + 1, slots, checksums, meta_json)

    def rollback(self) -> None:
        """Go back to the last commit. The file can be used again after a failed write or commit.

        Raises:
            OSError: A failed commit's record may be in the file and cannot be taken back. Nothing
                but another ``rollback`` or ``close`` may follow.
        """
        self._check_open()
        if self._record_in_doubt:
            # Left there it might count after all, and the slots it names are about to be reused.
            with self._errors_name_path():
                offset = self._record_offsets[(self._sequence + 1) % 2]
                self._transfer(os.pwritev, memoryview(bytes(_RECORD.size)), offset)
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
        self._check_open()
        damaged = []
        memory = memoryview(mmap.mmap(-1, _PIECE_BYTES))
        for index, slot in enumerate(self._slots):
            checksum = _checksum(self._read_pieces(slot, index, memory))
            self._checked[slot][index] = checksum == self._checksums[index]
            if not self._checked[slot][index]:
                damaged.append(index)
        if damaged:
            raise DamagedChunksError(self.path, damaged, len(self))

    def _read_pieces(self, slot: int, index: int, memory: memoryview) -> Iterator[memoryview]:
        for start in range(0, self.sizes[index], len(memory)):
            piece = memory[: self.sizes[index] - start]
            with self._errors_name_path():
                self._transfer(os.preadv, piece, self._offsets[slot][index] + start)
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

    def _write_record(
        self, sequence: int, slots: bytearray, checksums: list[int], meta: bytes
    ) -> None:
        """Write a commit record; when this returns the version it describes counts."""
        if len(meta) > self._meta_capacity:
            raise ValueError(
                f"meta: got {len(meta)} bytes as JSON; takes {self._meta_capacity} at most, "
                "set at creation"
            )
        fixed = _RECORD.pack(_RECORD_MAGIC, sequence, len(meta))
        variable = struct.pack(f"<{len(checksums)}I", *checksums) + slots + meta
        record = fixed + hashlib.sha256(fixed + variable).digest() + variable
        try:
            self._sync()
            self._record_in_doubt = True
            self._transfer(os.pwritev, memoryview(record), self._record_offsets[sequence % 2])
            self._sync()
        except BaseException:
            self._failed = True
            raise
        self._record_in_doubt = False
        self._sequence, self._slots, self._checksums = sequence, slots, checksums
        self._meta = meta
        self._pending.clear()

    def _sync(self) -> None:
        if self.durable:
            # macOS has no fdatasync.
            getattr(os, "fdatasync", os.fsync)(self._fd)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._transfer(os.preadv, memoryview(buffer), offset)
        return bytes(buffer)

    def _transfer(self, call: Any, view: memoryview, offset: int) -> None:
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
    def _errors_name_path(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    # Closing.

    def close(self) -> None:
        """Release the file and its lock, dropping what is not committed. Closed twice is fine."""
        fds = [fd for fd in (self._fd, self._direct_fd) if fd >= 0]
        self._fd = self._direct_fd = -1
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.path}: closed, or opened by the process this one forked from")

    def _raise_failed(self, call: str) -> NoReturn:
        raise ChunkFileError(f"{self.path}: a {call} failed; takes rollback() first")


def _close_inherited() -> None:
    """Close in a forked child what its parent has open.

    The child shares the lock. A data loader's worker that outlives a killed trainer would keep the
    file locked, and a child that wrote to it would damage what the parent commits.
    """
    for file in list(_open_files):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)


def _names(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _checksum(pieces: Iterable[memoryview]) -> int:
    checksum = 0
    for piece in pieces:
        checksum = crc32(piece, checksum)
    return checksum


def _checksums_of_zeros(sizes: Sequence[int]) -> list[int]:
    zeros = memoryview(bytes(_PIECE_BYTES))

    def checksum(size: int) -> int:
        return _checksum(zeros[: size - start] for start in range(0, size, _PIECE_BYTES))

    known = {size: checksum(size) for size in set(sizes)}
    return [known[size] for size in sizes]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _difference(got: Any, wanted: Any, name: str) -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in sorted(got.keys() | wanted.keys()):
            if key not in got or key not in wanted:
                which = "an unknown" if key in got else "no"
                return f"{name}: got {which} {key!r}; takes {', '.join(wanted) or 'no keys'}"
            if found := _difference(got[key], wanted[key], f"{name}.{key}"):
                return found
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if found := _difference(a, b, f"{name}[{i}]"):
                return found
    elif type(got) is not type(wanted) or got != wanted:
        texts = _short(got), _short(wanted)
        if texts[0] == texts[1]:  # long lists that begin alike
            texts = f"a list of {len(got)}", f"one of {len(wanted)}"
        return f"{name}: got {texts[0]}; takes {texts[1]}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
