"""The bytes of a chunk file: as documented, and what is refused."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT, ChunkFileError, DamagedChunksError
from qkern.optim._stream import ChunkStream
from tests.optim.chunk_files import LAYOUT, create, documented_checksum, flip, reopened, take_step
from tests.optim.versions import SIZES, contents, payload, version


def test_the_format_is_as_documented(tmp_path: Path) -> None:
    """Read a file by nothing but the format's description."""
    with create(tmp_path / "state") as file:
        take_step(file, 1)
    raw = (tmp_path / "state").read_bytes()
    magic, format_version, kind, count, layout_bytes, capacity = struct.unpack_from("<8sIIQQQ", raw)
    assert (magic, format_version, kind, count, capacity) == (b"QKCHUNKS", 1, 1, len(SIZES), 200)
    header_end = 72 + 8 * count + layout_bytes
    assert raw[40:72] == hashlib.sha256(raw[:40] + raw[72:header_end]).digest()
    sizes = struct.unpack_from(f"<{count}Q", raw, 72)
    assert sizes == SIZES

    def up(size: int) -> int:
        return (size + 4095) // 4096 * 4096

    record = up(header_end)
    step = up(56 + 5 * count + capacity)
    assert [raw[record + k * step :][:8] for k in (0, 1)] == [b"QKCOMMIT"] * 2
    assert [struct.unpack_from("<Q", raw, record + k * step + 8)[0] for k in (0, 1)] == [2, 1]
    meta_bytes = struct.unpack_from("<Q", raw, record + 16)[0]
    end = record + 56 + 5 * count + meta_bytes
    body = raw[record : record + 24] + raw[record + 56 : end]
    assert raw[record + 24 : record + 56] == hashlib.sha256(body).digest()
    assert raw[end - meta_bytes : end] == b'{"step": 1}'
    checksums = struct.unpack_from(f"<{count}I", raw, record + 56)
    slots = raw[record + 56 + 4 * count :][:count]
    assert slots == bytes([1] * count)
    offset = record + 2 * step + sum(map(up, sizes))
    for index, size in enumerate(sizes):
        chunk = raw[offset : offset + size]
        assert chunk == payload(index, 1, size)
        assert documented_checksum(chunk) == checksums[index]
        offset += up(size)
    assert offset == len(raw)


def test_the_checksum_of_a_long_chunk(tmp_path: Path) -> None:
    sizes = ((2 << 20) + 5, 1 << 20)
    with create(tmp_path / "state", sizes) as file:
        assert file.draft.committed.checksums == [
            documented_checksum(chunk) for chunk in version(0, sizes)
        ]
        take_step(file, 1)
        assert file.draft.committed.checksums == [
            documented_checksum(chunk) for chunk in version(1, sizes)
        ]
    assert reopened(tmp_path / "state") == (1, version(1, sizes))


# Files that are not what they should be.


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for data in (b"", b"x", b"\x89HDF\r\n\x1a\n" * 5000, bytes(50_000)):
        path.write_bytes(data)
        with pytest.raises(ChunkFileError, match=rf"{path}: got a file that begins with .*takes"):
            ChunkFile.open(path)
        assert path.read_bytes() == data
    with pytest.raises(FileNotFoundError, match=str(path) + "2"):
        ChunkFile.open(tmp_path / "state2")


def test_every_byte_of_the_header_counts(tmp_path: Path) -> None:
    path = tmp_path / "state"
    create(path).close()
    original = path.read_bytes()
    layout_bytes = struct.unpack_from("<Q", original, 24)[0]
    messages = {
        range(8): "begins with",
        range(8, 12): "got format version",
        range(12, 16): "damaged: the header has another checksum",
        range(16, 32): "truncated or damaged|another checksum",
        range(32, 72 + 8 * len(SIZES) + layout_bytes): "another checksum",
    }
    for where, message in messages.items():
        for offset in where:
            flip(path, offset)
            with pytest.raises(ChunkFileError, match=f"{path}: .*({message})"):
                ChunkFile.open(path)
            flip(path, offset)
    assert path.read_bytes() == original
    assert reopened(path) == (0, version(0))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, 2, "got format version 2, made by a newer qkern; takes 1"),
        (8, 0, "got format version 0; takes 1"),
        (12, 2, "got chunks with checksum 2; takes 1, CRC-32"),
    ],
)
def test_whole_headers_of_other_formats(
    tmp_path: Path, offset: int, value: int, message: str
) -> None:
    path = tmp_path / "state"
    create(path).close()
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, offset, value)
    end = 72 + 8 * len(SIZES) + struct.unpack_from("<Q", raw, 24)[0]
    raw[40:72] = hashlib.sha256(raw[:40] + raw[72:end]).digest()
    path.write_bytes(raw)
    with pytest.raises(ChunkFileError, match=message):
        ChunkFile.open(path)


def test_truncated_or_extended(tmp_path: Path) -> None:
    path = tmp_path / "state"
    create(path).close()
    original = path.read_bytes()
    lengths = {*range(1, 400), *range(ALIGNMENT, len(original), ALIGNMENT), len(original) - 1}
    lengths |= {length - 1 for length in lengths if length > 1}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        with pytest.raises(ChunkFileError, match=f"{path}: truncated.*: got {length} bytes"):
            ChunkFile.open(path)
    path.write_bytes(original + b"\0")
    with pytest.raises(ChunkFileError, match=f"damaged: got {len(original) + 1} bytes; takes"):
        ChunkFile.open(path)


def test_truncated_while_open(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        os.truncate(tmp_path / "state", 3 * ALIGNMENT + 5)
        with pytest.raises(ChunkFileError, match=f"truncated: ends at byte {3 * ALIGNMENT + 5}"):
            contents(file)


def test_layout_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "state"
    create(path).close()
    cases = [
        ({**LAYOUT, "bits": 8}, "layout.bits: got 32; takes 8"),
        ({**LAYOUT, "bits": 32.0}, "layout.bits: got 32; takes 32.0"),
        ({"bits": 32}, "layout: got an unknown 'tensors'; takes bits"),
        ({**LAYOUT, "block": 256}, "layout: got no 'block'; takes bits, block, tensors"),
        (
            {"bits": 32, "tensors": [{"name": "a.weight", "shape": [3, 5]}]},
            r"layout.tensors\[0\].shape\[1\]: got 4; takes 5",
        ),
        ({"bits": 32, "tensors": []}, r"layout.tensors: got \[\{.*; takes \[\]"),
    ]
    for layout, message in cases:
        with pytest.raises(ChunkFileError, match=f"{path}: {message}"):
            ChunkFile.open(path, layout)
    with ChunkFile.open(path, {**LAYOUT, "tensors": tuple(LAYOUT["tensors"])}) as file:
        assert file.layout == LAYOUT


def test_damaged_chunks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with create(path) as file:
        take_step(file, 1)
        offsets = [file._layout.slot_offsets[1][i] + size - 1 for i, size in enumerate(SIZES)]
    for index, offset in enumerate(offsets):
        flip(path, offset)
        with ChunkFile.open(path) as file:
            buffers = [bytearray(size) for size in SIZES]
            for other in set(range(len(SIZES))) - {index}:
                file.read_into(other, buffers[other])
            for _ in range(2):  # it stays damaged
                with pytest.raises(DamagedChunksError, match=f"chunk {index} of 4") as caught:
                    file.read_into(index, buffers[index])
                assert caught.value.chunks == (index,)
            with pytest.raises(DamagedChunksError, match=f"chunk {index} of 4"):
                file.verify()
            with pytest.raises(DamagedChunksError):
                ChunkStream(file, 1 << 20).run(range(4), lambda i, b: None)
        flip(path, offset)
    assert reopened(path) == (1, version(1))
    for index in (0, 3):
        flip(path, offsets[index])
    with ChunkFile.open(path) as file, pytest.raises(DamagedChunksError, match=r"chunk 0, 3 of 4"):
        file.verify()


def test_a_damaged_record_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with create(path) as file:
        take_step(file, 1)
        places = file._layout.record_offsets
    length = 56 + 5 * len(SIZES) + len(b'{"step": 0}')
    for offset in range(length):
        flip(path, places[0] + offset)
        assert reopened(path) == (0, version(0))
        flip(path, places[0] + offset)
    flip(path, places[0])
    flip(path, places[1])
    with pytest.raises(ChunkFileError, match=f"{path}: damaged: neither commit record is valid"):
        ChunkFile.open(path)
