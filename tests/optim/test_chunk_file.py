"""What is written to a chunk file comes back, and one user at a time has it."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT
from qkern.optim._stream import ChunkStream
from tests.optim.chunk_files import LAYOUT, create, reopened, take_step
from tests.optim.system import Calls, both_ways, exit_status, in_child
from tests.optim.versions import SIZES, contents, payload, version


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
    partial.write_bytes(b"QKCHUNKS" + b"being made" * 10_000)
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
