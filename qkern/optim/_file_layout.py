"""What the bytes of a chunk file mean: header, commit records, slots and checksums.

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

import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:  # the same checksum by carry-less multiplication, several times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

ALIGNMENT = 4096
FORMAT_VERSION = 1
MAGIC = b"QKCHUNKS"
_RECORD_MAGIC = b"QKCOMMIT"
_CRC32 = 1
_HEADER = struct.Struct("<8sIIQQQ")
_RECORD = struct.Struct("<8sQQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
_ZEROS = bytes(1 << 20)
# What a header may claim for itself, far above what any optimizer has: a file with holes costs
# nothing on the disk, and everything in memory.
_MOST_HEADER_BYTES = 1 << 28
_MOST_JSON_BYTES = 1 << 26
_MOST_SEQUENCE = 1 << 62

Read = Callable[[int, int], bytes]
"""Reads from an offset so many bytes."""


class ChunkFileError(ValueError, RuntimeError):
    """A file that is not what it should be: foreign, truncated, damaged, of another layout."""


class DamagedChunksError(ChunkFileError):
    """Committed chunks whose bytes do not have the committed checksum; ``chunks`` are they."""

    def __init__(self, path: Path, chunks: Sequence[int], count: int) -> None:
        named = ", ".join(map(str, chunks[:8])) + (", ..." if len(chunks) > 8 else "")
        super().__init__(f"{path}: damaged: wrong checksum in chunk {named} of {count}")
        self.chunks = tuple(chunks)


class FileLayout:
    """Where everything is in a file of chunks of ``sizes`` bytes.

    Args:
        sizes: Bytes of each chunk.
        layout: What the chunks hold, as JSON.
        meta_capacity: Bytes that the meta of a commit may take as JSON.
    """

    def __init__(self, sizes: tuple[int, ...], layout: bytes, meta_capacity: int) -> None:
        count = len(sizes)
        for name, size in (("layout", len(layout)), ("meta_capacity", meta_capacity)):
            if not 0 <= size <= _MOST_JSON_BYTES:
                raise ValueError(f"{name}: got {size} bytes; takes up to {_MOST_JSON_BYTES}")
        self.sizes, self.layout, self.meta_capacity = sizes, layout, meta_capacity
        fixed = _HEADER.pack(MAGIC, FORMAT_VERSION, _CRC32, count, len(layout), meta_capacity)
        self.header = _with_digest(fixed, struct.pack(f"<{count}Q", *sizes) + layout)
        record_bytes = _aligned(_RECORD.size + _DIGEST_BYTES + 5 * count + meta_capacity)
        first = _aligned(len(self.header))
        self.record_offsets = (first, first + record_bytes)
        slots = list(
            itertools.accumulate(map(_aligned, sizes * 2), initial=first + 2 * record_bytes)
        )
        self.slot_offsets = (slots[:count], slots[count : 2 * count])
        """Of each chunk's slot 0 and slot 1."""
        self.file_bytes = slots[-1]

    def record_offset(self, sequence: int) -> int:
        """Where the commit record with this sequence number goes."""
        return self.record_offsets[sequence % 2]

    def check_meta(self, meta: bytes) -> None:
        """Raises ``ValueError`` where the file has no room for this meta."""
        if len(meta) > self.meta_capacity:
            raise ValueError(
                f"meta: got {len(meta)} bytes as JSON; takes {self.meta_capacity} at most, "
                "set at creation"
            )


class Record(NamedTuple):
    """One commit: which slot of every chunk counts, and the checksum it has."""

    sequence: int
    slots: bytearray
    checksums: list[int]
    meta: bytes

    def pack(self) -> bytes:
        """The record's bytes."""
        fixed = _RECORD.pack(_RECORD_MAGIC, self.sequence, len(self.meta))
        checksums = struct.pack(f"<{len(self.checksums)}I", *self.checksums)
        return _with_digest(fixed, checksums + self.slots + self.meta)


BLANK_RECORD = bytes(_RECORD.size)
"""Written over a record's beginning, this makes it invalid."""


def read_header(path: Path, file_bytes: int, read: Read) -> FileLayout:
    """The layout of a file of ``file_bytes``, from its header; raises `ChunkFileError`."""
    fixed_bytes = _HEADER.size + _DIGEST_BYTES
    start = read(0, min(file_bytes, fixed_bytes))
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise ChunkFileError(
            f"{path}: got a file that begins with {start[:8]!r}; "
            f"takes a chunk file, which begins with {MAGIC!r}"
        )
    if file_bytes < fixed_bytes:
        raise ChunkFileError(
            f"{path}: truncated: got {file_bytes} bytes; the header alone has more"
        )
    _, version, kind, count, layout_bytes, meta_capacity = _HEADER.unpack_from(start)
    if version != FORMAT_VERSION:
        newer = ", made by a newer qkern" if version > FORMAT_VERSION else ""
        raise ChunkFileError(f"{path}: got format version {version}{newer}; takes {FORMAT_VERSION}")
    header_bytes = fixed_bytes + 8 * count + layout_bytes
    if header_bytes > file_bytes:
        raise ChunkFileError(
            f"{path}: truncated or damaged: got {file_bytes} bytes; "
            f"the header claims {header_bytes} for itself"
        )
    if layout_bytes > _MOST_JSON_BYTES or header_bytes > _MOST_HEADER_BYTES:
        raise ChunkFileError(
            f"{path}: damaged: got a header of {header_bytes} bytes, {layout_bytes} of layout;"
            f" takes up to {_MOST_HEADER_BYTES} and {_MOST_JSON_BYTES}"
        )
    variable = read(fixed_bytes, header_bytes - fixed_bytes)
    if _with_digest(start[: _HEADER.size], variable)[:fixed_bytes] != start:
        raise ChunkFileError(f"{path}: damaged: the header has another checksum")
    if kind != _CRC32:
        raise ChunkFileError(f"{path}: got chunks with checksum {kind}; takes {_CRC32}, CRC-32")
    sizes = struct.unpack_from(f"<{count}Q", variable)
    if meta_capacity > _MOST_JSON_BYTES:
        raise ChunkFileError(
            f"{path}: got room for {meta_capacity} bytes of meta; takes up to {_MOST_JSON_BYTES}"
        )
    if 0 in sizes:
        raise ChunkFileError(f"{path}: got a chunk of 0 bytes; takes at least 1 byte a chunk")
    parse_json(path, "layout", variable[8 * count :])
    layout = FileLayout(sizes, variable[8 * count :], meta_capacity)
    if file_bytes != layout.file_bytes:
        state = "truncated" if file_bytes < layout.file_bytes else "damaged"
        raise ChunkFileError(
            f"{path}: {state}: got {file_bytes} bytes; takes {layout.file_bytes}, by its header"
        )
    return layout


def read_last_record(path: Path, layout: FileLayout, read: Read) -> Record:
    """The record of the last commit; raises `ChunkFileError` where neither is valid."""
    records = [record for place in (0, 1) if (record := _read_record(place, layout, read))]
    if not records:
        raise ChunkFileError(f"{path}: damaged: neither commit record is valid")
    last = max(records)
    parse_json(path, "meta", last.meta)
    return last


def _read_record(place: int, layout: FileLayout, read: Read) -> Record | None:
    """The record in one of the two places; None if it is torn, blank or damaged."""
    offset = layout.record_offsets[place]
    fixed_bytes = _RECORD.size + _DIGEST_BYTES
    count = len(layout.sizes)
    start = read(offset, fixed_bytes)
    magic, sequence, meta_bytes = _RECORD.unpack_from(start)
    if magic != _RECORD_MAGIC or sequence % 2 != place or meta_bytes > layout.meta_capacity:
        return None
    if not 1 <= sequence <= _MOST_SEQUENCE:
        return None
    variable = read(offset + fixed_bytes, 5 * count + meta_bytes)
    if _with_digest(start[: _RECORD.size], variable)[:fixed_bytes] != start:
        return None
    checksums = list(struct.unpack_from(f"<{count}I", variable))
    slots = bytearray(variable[4 * count : 5 * count])
    if slots.translate(None, b"\0\1"):
        return None
    return Record(sequence, slots, checksums, variable[5 * count :])


def checksum(pieces: Iterable[memoryview]) -> int:
    """The checksum of a chunk that is given in pieces."""
    found = 0
    for piece in pieces:
        found = crc32(piece, found)
    return found


def checksums_of_zeros(sizes: Sequence[int]) -> list[int]:
    """The checksums of chunks of zeros."""
    zeros = memoryview(_ZEROS)

    def of_size(size: int) -> int:
        return checksum(zeros[: size - start] for start in range(0, size, len(zeros)))

    known = {size: of_size(size) for size in set(sizes)}
    return [known[size] for size in sizes]


def to_json(value: dict[str, Any]) -> bytes:
    """As the file holds a layout or a meta."""
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def parse_json(path: Path, name: str, text: bytes) -> dict[str, Any]:
    """What `to_json` was given; raises `ChunkFileError` for what that never writes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key given twice")
        return found

    def no_number(text: str) -> None:
        raise ValueError(f"{text}, which is no number of JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} in place of an object")
    except (ValueError, RecursionError) as error:
        raise ChunkFileError(f"{path}: {name}: got {error}; takes an object as JSON") from None
    return value


def difference(got: Any, wanted: Any, name: str) -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in sorted(got.keys() | wanted.keys()):
            if key not in got or key not in wanted:
                which = "an unknown" if key in got else "no"
                return f"{name}: got {which} {key!r}; takes {', '.join(wanted) or 'no keys'}"
            if found := difference(got[key], wanted[key], f"{name}.{key}"):
                return found
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if found := difference(a, b, f"{name}[{i}]"):
                return found
    elif type(got) is not type(wanted) or got != wanted:
        texts = short(got), short(wanted)
        if texts[0] == texts[1]:  # long lists that begin alike
            texts = f"a list of {len(got)}", f"one of {len(wanted)}"
        return f"{name}: got {texts[0]}; takes {texts[1]}"
    return ""


def short(value: Any) -> str:
    """A JSON value as messages show it."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _with_digest(fixed: bytes, variable: bytes) -> bytes:
    """Both, with their SHA-256 in between."""
    return fixed + hashlib.sha256(fixed + variable).digest() + variable


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
