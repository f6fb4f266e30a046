"""The chunk file survives what can happen to it, and the stream over it stays within its budget."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT, ChunkFileError, DamagedChunksError
from qkern.optim._stream import ChunkStream

SIZES = (5000, 3, 2 * ALIGNMENT, 4097)
LAYOUT = {"bits": 32, "tensors": [{"name": "a.weight", "shape": [3, 4]}]}
PAGE = mmap.PAGESIZE
Contents = list[bytes]


class Crash(BaseException):
    """Stands for the death of the process in the middle of a call."""


@pytest.fixture(params=["direct", "page cache"])
def _direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "page cache":
        monkeypatch.delattr(os, "O_DIRECT")


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


# What is written comes back.


@both_ways
def test_round_trip(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        assert contents(file) == version(0)
        assert (file.meta, file.layout, file.sizes) == ({"step": 0}, LAYOUT, SIZES)
        for step in range(1, 5):
            take_step(file, step)
            assert contents(file) == version(step)
    assert reopened(tmp_path / "state") == (4, version(4))
    with ChunkFile.open(tmp_path / "state") as file:
        assert file.sequence == 5
        file.write(0, payload(0, 9, SIZES[0]))
        assert contents(file)[0] == payload(0, 9, SIZES[0])
        assert file.uncommitted == {0}
    assert reopened(tmp_path / "state") == (4, version(4))


@both_ways
def test_a_chunk_written_twice_before_a_commit(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        take_step(file, 1)
        file.write(2, payload(2, 7, SIZES[2]))
        file.write(2, payload(2, 8, SIZES[2]))
        file.commit({"step": 8})
    expected = version(1)
    expected[2] = bytes(payload(2, 8, SIZES[2]))
    assert reopened(tmp_path / "state") == (8, expected)


@both_ways
def test_rollback_restores_the_commit_and_changes_stamps(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        take_step(file, 1)
        stamps = [file.stamp(i) for i in range(len(file))]
        file.write(0, payload(0, 2, SIZES[0]))
        written = file.stamp(0)
        file.rollback()
        assert contents(file) == version(1)
        assert file.uncommitted == frozenset()
        assert len({stamps[0], written, file.stamp(0)}) == 3
        assert [file.stamp(i) for i in range(1, len(file))] == stamps[1:]
        file.commit({"step": 2})
    assert reopened(tmp_path / "state") == (2, version(1))


def documented_checksum(chunk: bytes) -> int:
    return zlib.crc32(chunk)


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
        assert file._committed.checksums == [
            documented_checksum(chunk) for chunk in version(0, sizes)
        ]
        take_step(file, 1)
        assert file._committed.checksums == [
            documented_checksum(chunk) for chunk in version(1, sizes)
        ]
    assert reopened(tmp_path / "state") == (1, version(1, sizes))


def test_space_is_allocated_at_creation(tmp_path: Path) -> None:
    with create(tmp_path / "state", (1 << 20,)):
        status = (tmp_path / "state").stat()
    assert status.st_blocks * 512 >= status.st_size > 2 << 20


def test_sizes_past_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # sparse, so it takes no space
    sizes = (3 << 30, 5000)
    with create(tmp_path / "state", sizes) as file:
        file.write(1, payload(1, 1, 5000))
        file.commit({"step": 1})
        file.write(1, payload(1, 2, 5000))
        file.commit({"step": 2})
    buffer = bytearray(5000)
    with ChunkFile.open(tmp_path / "state") as file:
        file.read_into(1, buffer)
        assert file.sizes == sizes
    assert buffer == payload(1, 2, 5000)
    assert (tmp_path / "state").stat().st_size > 6 << 30


def test_no_chunks(tmp_path: Path) -> None:
    with create(tmp_path / "state", ()) as file:
        ChunkStream(file, 0).run([], lambda i, b: None)
        file.commit({"step": 1})
    assert reopened(tmp_path / "state") == (1, [])


@both_ways
@pytest.mark.parametrize("limit", [1, 1000, ALIGNMENT, ALIGNMENT + 1])
def test_short_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    sizes = (3 * ALIGNMENT + 77, 5)
    calls = Calls(monkeypatch, ("pwritev", "preadv"))
    calls.hook = lambda number, name, real, args: min(real(*args), limit)
    with create(tmp_path / "state", sizes) as file:
        stream = ChunkStream(file, 1 << 20)
        for step in (1, 2):
            stream.run(
                range(2),
                lambda i, b, step=step: b.__setitem__(slice(None), (payload(i, step, len(b)))),
            )
            file.commit({"step": step})
            stream.drop()
        found: dict[int, bytes] = {}
        stream.run(range(2), lambda i, b: found.update({i: bytes(b)}), write=False)
    calls.hook = None
    assert found == dict(enumerate(version(2, sizes)))
    assert reopened(tmp_path / "state") == (2, version(2, sizes))


# Arguments.


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sizes: got 0; takes at least 1"):
        create(tmp_path / "state", (4, 0))
    with pytest.raises(ValueError, match=r"meta: got \d+ bytes as JSON; takes 200"):
        ChunkFile.create(tmp_path / "state", (4,), {}, {"x": "y" * 200}, meta_capacity=200)
    assert not list(tmp_path.iterdir())
    with create(tmp_path / "state") as file:
        with pytest.raises(IndexError, match="index: got 4; takes 0 to 3"):
            file.read_into(4, bytearray(1))
        with pytest.raises(ValueError, match="buffer: got 4 bytes; takes 3, chunk 1's size"):
            file.write(1, b"1234")
        file.write(1, b"123")
        with pytest.raises(ValueError, match="meta: got"):
            file.commit({"x": "y" * 200})
        file.commit({"step": 1})  # a refused meta leaves the file as it was
        with pytest.raises(ValueError, match="budget_bytes: got 8191; takes at least 8192"):
            ChunkStream(file, 8191)
        with pytest.raises(ValueError, match="indices: got a chunk more than once"):
            ChunkStream(file, 1 << 20).run([1, 1], lambda i, b: None)
    with pytest.raises(ValueError, match="closed"):
        file.read_into(1, bytearray(3))
    assert reopened(tmp_path / "state") == (1, [bytes(5000), b"123", *version(0)[2:]])


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


# Errors and deaths.


@both_ways
@pytest.mark.parametrize("part", ["beginning", "end"])
def test_a_record_torn_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The old or the new version is there, whole, and the file goes on from it."""
    path = tmp_path / "state"
    with create(path) as file:
        for step in (1, 2, 3):
            take_step(file, step)
        places = file._layout.record_offsets
    original = path.read_bytes()
    calls = Calls(monkeypatch, ("pwritev",))
    found = []
    cut, length = 0, 1
    while cut <= length:
        path.write_bytes(original)

        def tear(number: int, name: str, real: Any, args: Any, cut: int = cut) -> Any:
            nonlocal length
            fd, (view,), offset = args
            if offset not in places:
                return real(*args)
            length = len(view)
            if part == "beginning":
                real(fd, [view[:cut]], offset)
            else:
                real(fd, [view[length - cut :]], offset + length - cut)
            raise Crash

        calls.hook = tear
        with ChunkFile.open(path) as file, pytest.raises(Crash):
            take_step(file, 4)
        calls.hook = None
        step, now = reopened(path)
        assert now == version(step)
        found.append(step)
        with ChunkFile.open(path) as file:
            take_step(file, 5)
        assert reopened(path) == (5, version(5))
        cut += 1
    assert length > 56
    assert set(found[:-1]) <= {3, 4}
    assert (found[0], found[-1]) == (3, 4)


@both_ways
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("durable", [False, True])
def test_an_error_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, durable: bool
) -> None:
    """Each system call fails in turn; the file opens at its last commit, and rolls back to it."""
    calls = Calls(monkeypatch)
    wanted = 0
    stages = set()
    while True:
        path = tmp_path / f"state{wanted}"
        calls.fail_at(wanted, error)
        stage, committed = "create", -1
        file = None
        try:
            file = create(path, durable=durable)
            stage, committed = "steps", 0
            stream = ChunkStream(file, 1 << 20)
            for step in (1, 2, 3):
                stage = "run"

                def update(index: int, buffer: memoryview, step: int = step) -> None:
                    buffer[:] = payload(index, step, len(buffer))

                stream.run(range(len(SIZES)), update)
                stage = "commit"
                file.commit({"step": step})
                committed = step
            stage = "open"
            file.close()
            ChunkFile.open(path, durable=durable).close()
            stage = "done"
        except OSError as caught:
            failure = caught
        calls.hook = None
        if calls.made <= wanted:
            break
        stages.add(stage)
        if stage != "done":  # only whether direct reads work is found out by an error
            assert (failure.errno, failure.filename) == (error, str(path))
        if stage == "create":
            assert not list(tmp_path.iterdir())
        elif stage in ("run", "commit"):
            copy = tmp_path / "copy"  # what another process would find
            shutil.copyfile(path, copy)
            step, found = reopened(copy)
            assert found == version(step)
            assert step == committed or (stage == "commit" and step == committed + 1)
            file.rollback()
            assert (file.meta["step"], contents(file)) == (committed, version(committed))
            take_step(file, 9)
            file.close()
            assert reopened(path) == (9, version(9))
        if path.exists():
            path.unlink()
        wanted += 1
    assert stage == "done"
    assert stages >= {"create", "run", "commit", "open"}


def test_no_commit_follows_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with create(tmp_path / "state") as file:
        take_step(file, 1)
        file.write(0, payload(0, 2, SIZES[0]))
        calls.fail_at(0, errno.EIO)
        with pytest.raises(OSError, match="state"):
            file.write(0, payload(0, 3, SIZES[0]))
        calls.hook = None
        assert contents(file) == version(1)  # and not the torn rest
        file.write(1, payload(1, 2, SIZES[1]))
        with pytest.raises(ChunkFileError, match=r"a write or commit failed; takes rollback\(\)"):
            file.commit({"step": 2})
        file.rollback()
        assert contents(file) == version(1)
        take_step(file, 4)
    assert reopened(tmp_path / "state") == (4, version(4))


def test_a_record_that_may_be_on_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit failed after its record was written: what follows must not overwrite its slots
    while that record could still count.
    """
    path = tmp_path / "state"
    calls = Calls(monkeypatch, ("fdatasync",))
    with create(path, durable=True) as file:
        take_step(file, 1)
        calls.fail_at(1, errno.EIO)  # the second of a commit
        with pytest.raises(OSError, match="state"):
            take_step(file, 2)
        calls.fail_at(0, errno.EIO)
        with pytest.raises(OSError, match="state"):
            file.rollback()
        with pytest.raises(ChunkFileError, match=r"a commit failed; takes rollback\(\) first"):
            file.write(0, payload(0, 3, SIZES[0]))
        calls.hook = None
        file.rollback()
        file.write(0, payload(0, 3, SIZES[0]))
    assert reopened(path) == (1, version(1))


def test_durable_syncs_around_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for durable in (False, True):
        path = tmp_path / f"state{durable}"
        with create(path, durable=durable) as file:
            file.write(1, b"abc")
            with monkeypatch.context() as patch:
                calls = Calls(patch)
                order: list[str] = []

                def note(
                    number: int, name: str, real: Any, args: Any, order: list[str] = order
                ) -> Any:
                    order.append(name)
                    return real(*args)

                calls.hook = note
                file.commit({"step": 1})
        assert order == (["fdatasync", "pwritev", "fdatasync"] if durable else ["pwritev"])


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


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_nothing_committed(tmp_path: Path, kills: int) -> None:
    """A child counts up and reports each commit; killed at random, it goes on from the last."""
    path = tmp_path / "state"
    sizes = (40_000, 8, 65_536, 24_000, 100_000)
    rng = random.Random(0)
    create(path, sizes).close()

    def update(index: int, buffer: memoryview) -> None:
        np.frombuffer(buffer, np.uint64)[:] += index + 1

    def count_up(report: int) -> None:
        with ChunkFile.open(path, LAYOUT) as file:
            stream = ChunkStream(file, 200_000)
            while True:
                stream.run(stream.resident_first(range(len(sizes))), update)
                step = file.meta["step"] + 1
                file.commit({"step": step})
                os.write(report, struct.pack("<Q", step))

    step = 0
    for _ in range(kills):
        reader, writer = os.pipe()
        pid = in_child(lambda writer=writer: count_up(writer))
        os.close(writer)
        reports = b""
        for _ in range(rng.randrange(3)):
            assert select.select([reader], [], [], 300)[0], "the child commits nothing"
            reports += os.read(reader, 8)
        select.select([], [], [], rng.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        assert exit_status(pid) == -signal.SIGKILL
        while data := os.read(reader, 1 << 16):
            reports += data
        os.close(reader)
        reported = struct.unpack("<Q", reports[-8:])[0] if reports else step
        with ChunkFile.open(path, LAYOUT) as file:
            file.verify()
            step = file.meta["step"]
            assert step >= reported
            for index, data in enumerate(contents(file)):
                assert set(np.frombuffer(data, np.uint64)) == {step * (index + 1)}
    assert step >= kills // 2  # it did get on


# Full disks.


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes, which only root can mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no small tmpfs can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(ALIGNMENT))


def test_a_full_disk_shows_at_creation(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(OSError, match=str(disk / "state")) as caught:
            create(disk / "state", (1 << 20,))
        assert caught.value.errno == errno.ENOSPC
        assert not list(disk.iterdir())
        with create(disk / "state", (1 << 18,)) as file:
            fill(disk / "filler")
            with pytest.raises(OSError, match="No space left"):
                (disk / "another").write_bytes(bytes(ALIGNMENT))
            for step in (1, 2, 3):
                take_step(file, step)
        assert reopened(disk / "state") == (3, version(3, (1 << 18,)))


def test_a_full_disk_at_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `posix_fallocate`, as on macOS, the disk fills later: no commit is lost to that."""
    monkeypatch.delattr(os, "posix_fallocate")
    sizes = (1 << 17, 1 << 17, 1 << 17)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk / "state"
        with create(path, sizes) as file:
            take_step(file, 1)
            (disk / "filler").write_bytes(bytes(1 << 19))
            with pytest.raises(OSError, match=str(path)) as caught:
                take_step(file, 2)
            assert caught.value.errno == errno.ENOSPC
            file.rollback()
            assert contents(file) == version(1, sizes)
        assert reopened(path) == (1, version(1, sizes))
        (disk / "filler").unlink()
        with ChunkFile.open(path) as file:
            take_step(file, 2)
        assert reopened(path) == (2, version(2, sizes))


def test_a_limit_of_file_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=str(tmp_path / "state")) as caught:
            create(tmp_path / "state", (1 << 18,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


# One file, one user.


def test_creation_refuses_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=str(path)):
        create(path)
    assert path.read_bytes() == b"precious"
    path.unlink()
    create(path).close()
    with pytest.raises(FileExistsError, match=str(path)):
        create(path)
    assert list(tmp_path.iterdir()) == [path]
    assert reopened(path) == (0, version(0))


def test_creation_killed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has the file's name, and the next creation uses what was left."""
    path = tmp_path / "state"
    calls = Calls(monkeypatch)

    for wanted in range(20):

        def child(wanted: int = wanted) -> None:
            def die(number: int, name: str, real: Any, args: Any) -> Any:
                if number == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            calls.hook = die
            create(path, durable=True)

        calls.made = 0
        status = exit_status(in_child(child))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if path.exists():  # killed after the rename
            assert reopened(path) == (0, version(0))
            path.unlink()
        else:
            assert [p.name for p in tmp_path.iterdir()] in ([], ["state.partial"])
    assert wanted > 4
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert reopened(path) == (0, version(0))


def test_two_creators(tmp_path: Path) -> None:
    partial = tmp_path / "state.partial"
    with partial.open("wb") as other:
        other.write(b"being made" * 10_000)
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="in use"):
            create(tmp_path / "state")
        assert partial.read_bytes() == b"being made" * 10_000
    create(tmp_path / "state").close()  # what a dead creator left does not show
    assert reopened(tmp_path / "state") == (0, version(0))


def test_a_creator_that_finds_the_others_file_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opened the other's partial file, and got its lock only when that had its final name."""
    path = tmp_path / "state"
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        monkeypatch.undo()
        (tmp_path / "state.partial").unlink()
        with create(path) as other:
            take_step(other, 1)
        path.rename(tmp_path / "elsewhere")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FileExistsError):
        create(path)
    assert reopened(tmp_path / "elsewhere") == (1, version(1))


def test_two_openers(tmp_path: Path) -> None:
    path = tmp_path / "state"

    def refused() -> None:
        with pytest.raises(BlockingIOError, match=f"in use.*{path}"):
            ChunkFile.open(path)

    with create(path):
        refused()
        assert exit_status(in_child(refused)) == 0
    with ChunkFile.open(path):
        refused()
    file = ChunkFile.open(path)
    del file  # its end releases the file
    assert reopened(path) == (0, version(0))


def test_a_forked_child_neither_uses_nor_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    file = create(path)
    ready, leave = os.pipe(), os.pipe()

    def child() -> None:
        with pytest.raises(ValueError, match="closed, or opened by the process this one forked"):
            file.write(1, b"abc")
        os.write(ready[1], b"x")
        os.close(leave[1])
        os.read(leave[0], 1)

    pid = in_child(child)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x"
    take_step(file, 1)
    file.close()
    try:
        assert reopened(path) == (1, version(1))  # while the child lives
    finally:
        os.close(leave[1])
        assert exit_status(pid) == 0
        os.close(ready[0])
        os.close(leave[0])


# The stream.


def fill_step(step: int) -> Callable[[int, memoryview], None]:
    def update(index: int, buffer: memoryview) -> None:
        buffer[:] = payload(index, step, len(buffer))

    return update


def no_threads_left() -> bool:
    return not any(thread.name.startswith("qkern") for thread in threading.enumerate())


@both_ways
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 9, 30])
def test_stream_updates_every_chunk(tmp_path: Path, chunks: int) -> None:
    """With room for one chunk or for all: the same bytes."""
    sizes = tuple(PAGE - 100 + 9 * i for i in range(12)) + (2 * PAGE, 5, 3 * PAGE)
    budget = max(chunks, 3) * PAGE
    with create(tmp_path / "state", sizes) as file:
        stream = ChunkStream(file, budget)
        for step in range(1, 6):
            seen = []

            def update(
                index: int, buffer: memoryview, step: int = step, seen: list[int] = seen
            ) -> None:
                assert buffer == payload(index, step - 1, sizes[index])
                assert stream.held_bytes <= budget
                seen.append(index)
                buffer[:] = payload(index, step, sizes[index])

            indices = list(range(len(sizes)))
            random.Random(step).shuffle(indices)
            stream.run(indices, update)
            assert seen == indices
            assert no_threads_left()
            file.commit({"step": step})
        assert stream.held_bytes <= budget
    assert reopened(tmp_path / "state") == (5, version(5, sizes))


def test_least_recently_used_leaves_first(tmp_path: Path) -> None:
    sizes = (PAGE,) * 5
    with create(tmp_path / "state", sizes) as file:
        stream = ChunkStream(file, 3 * PAGE)
        history = [
            ([0, 1, 2, 3, 4], (2, 3, 4), 5, 0, 2),
            ([2], (3, 4, 2), 5, 1, 2),
            ([0], (4, 2, 0), 6, 1, 3),
            ([0, 4], (2, 0, 4), 6, 3, 3),
            ([1, 3], (4, 1, 3), 8, 3, 5),
            ([], (4, 1, 3), 8, 3, 5),
        ]
        written = 0
        for indices, resident, reads, hits, evictions in history:
            stream.run(indices, lambda index, buffer: None)
            written += len(indices)
            assert stream.resident == resident
            stats = stream.stats
            assert (stats.read_bytes, stats.written_bytes) == (reads * PAGE, written * PAGE)
            assert (stats.hits, stats.evictions) == (hits, evictions)
        stream.run([2], lambda index, buffer: None, write=False)
        assert stream.stats.written_bytes == written * PAGE
        assert stream.resident_first(range(5)) == [1, 2, 3, 0, 4]
        stream.drop()
        assert (stream.resident, stream.held_bytes) == ((), 0)


def test_going_round_finds_as_many_resident_as_fit(tmp_path: Path) -> None:
    with create(tmp_path / "state", (PAGE,) * 20) as file:
        stream = ChunkStream(file, 8 * PAGE)
        for _ in range(4):
            stream.run(stream.resident_first(range(20)), lambda index, buffer: None)
        assert stream.stats.hits == 3 * 8


def test_resident_chunks_are_not_used_past_other_writes(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        stream = ChunkStream(file, 1 << 20)
        stream.run(range(4), fill_step(1))
        file.commit({"step": 1})
        file.write(0, payload(0, 2, SIZES[0]))
        stream.run([1], fill_step(2))
        found: dict[int, bytes] = {}

        def look(index: int, buffer: memoryview) -> None:
            found[index] = bytes(buffer)

        stream.run(range(4), look, write=False)
        assert [found[i] for i in range(4)] == version(2)[:2] + version(1)[2:]
        file.rollback()
        stream.run(range(4), look, write=False)
        assert [found[i] for i in range(4)] == version(1)
        assert stream.stats.hits == 1 + 3 + 2


def test_skipped_chunks_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with create(path) as file:
        take_step(file, 1)
        stream = ChunkStream(file, 1 << 20)
        before = path.read_bytes()
        stream.run([1, 3], fill_step(2))
        file.commit({"step": 2})
        assert stream.stats.read_bytes == stream.stats.written_bytes == SIZES[1] + SIZES[3]
        after = path.read_bytes()
        for index in (0, 2):
            for slot in (0, 1):
                place = slice(
                    file._layout.slot_offsets[slot][index],
                    file._layout.slot_offsets[slot][index] + SIZES[index],
                )
                assert before[place] == after[place]
    expected = version(1)
    expected[1], expected[3] = version(2)[1], version(2)[3]
    assert reopened(path) == (2, expected)


@pytest.mark.parametrize("room", [2, 20])
@pytest.mark.parametrize("failing", ["preadv", "pwritev", "update"])
def test_an_error_in_the_stream_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, room: int
) -> None:
    """Whichever call fails: one exception, in the caller, and the file is at its last commit."""
    path = tmp_path / "state"
    sizes = (PAGE,) * 12
    with create(path, sizes) as file:
        take_step(file, 1)
        calls = Calls(monkeypatch, ("preadv", "pwritev"))
        for wanted in range(12):
            stream = ChunkStream(file, room * PAGE)
            counts = {"preadv": 0, "pwritev": 0, "update": 0}

            def count(name: str, counts: dict[str, int] = counts, wanted: int = wanted) -> None:
                number, counts[name] = counts[name], counts[name] + 1
                if name == failing and number == wanted:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

            def hook(number: int, name: str, real: Any, args: Any, count: Any = count) -> Any:
                count(name)
                return real(*args)

            def update(index: int, buffer: memoryview, count: Any = count) -> None:
                buffer[:] = payload(index, 2, len(buffer))
                count("update")

            calls.hook = hook
            with pytest.raises(OSError, match="Input/output error") as caught:
                stream.run(range(12), update)
            calls.hook = None
            assert caught.value.__context__ is None
            assert no_threads_left()
            assert (stream.resident, file.uncommitted) == ((), frozenset())
            stream.run(range(12), lambda i, b: None, write=False)
            assert contents(file) == version(1, sizes)
        stream.run(range(12), fill_step(2))
        file.commit({"step": 2})
    assert reopened(path) == (2, version(2, sizes))


def test_interrupting_an_update_rolls_back(tmp_path: Path) -> None:
    with create(tmp_path / "state") as file:
        take_step(file, 1)
        stream = ChunkStream(file, 1 << 20)

        def update(index: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer))
            if index == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stream.run(range(4), update)
        assert no_threads_left()
        assert contents(file) == version(1)


def memory_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """1 GiB of chunks under 256 MiB, of which 16 MiB more are allowed for all else."""
    chunk, count, budget = 16 << 20, 64, 256 << 20
    path = tmp_path / "state"
    with create(path, (chunk,) * count) as file:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now
        before = memory_bytes("VmRSS")
        stream = ChunkStream(file, budget)

        def update(index: int, buffer: memoryview) -> None:
            numbers = np.frombuffer(buffer, np.uint64)
            assert numbers[0] == numbers[-1] == step * index
            numbers += index

        for step in range(2):
            stream.run(stream.resident_first(range(count)), update)
            file.commit({"step": step})
        assert stream.stats.hits == budget // chunk
        file.verify()
        assert memory_bytes("VmHWM") - before <= budget + (16 << 20)
    path.unlink()


# Any sequence of operations.

OPERATIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3)),
    st.tuples(st.just("stream"), st.permutations(range(4)), st.integers(0, 4)),
    st.tuples(st.sampled_from(["commit", "rollback", "verify", "reopen", "raise"])),
)


@given(operations=st.lists(OPERATIONS, max_size=25), room=st.integers(2, 8))
def test_any_sequence_agrees_with_a_model(operations: list[tuple[Any, ...]], room: int) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "state"
        file = stack.enter_context(create(path))
        stream = ChunkStream(file, room * PAGE)
        committed, now, step = (0, version(0)), version(0), 0

        def update(index: int, buffer: memoryview) -> None:
            assert buffer == now[index]
            now[index] = bytes(payload(index, step, SIZES[index]))
            buffer[:] = now[index]

        def update_and_raise(index: int, buffer: memoryview) -> None:
            update(index, buffer)
            if index == step % 4:
                raise Crash

        for step, (operation, *arguments) in enumerate(operations, start=1):
            if operation == "write":
                index = arguments[0]
                now[index] = bytes(payload(index, step, SIZES[index]))
                file.write(index, now[index])
            elif operation == "stream":
                order, count = arguments
                stream.run(order[:count], update)
            elif operation == "commit":
                file.commit({"step": step})
                committed = (step, list(now))
            elif operation == "verify":
                file.verify()
            else:
                if operation == "rollback":
                    file.rollback()
                elif operation == "raise":
                    with pytest.raises(Crash):
                        stream.run(range(4), update_and_raise)
                else:
                    file.close()
                    file = stack.enter_context(ChunkFile.open(path, LAYOUT))
                    stream = ChunkStream(file, room * PAGE)
                now[:] = committed[1]
            assert contents(file) == now
            assert file.meta == {"step": committed[0]}
            assert stream.held_bytes <= room * PAGE
        file.close()
        assert reopened(path) == committed
