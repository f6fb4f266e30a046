"""A chunk file survives errors, deaths of the process and full disks."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT, ChunkFileError
from qkern.optim._stream import ChunkStream
from tests.optim.chunk_files import LAYOUT, create, reopened, take_step
from tests.optim.system import Calls, Crash, both_ways, exit_status, in_child
from tests.optim.versions import SIZES, contents, payload, version


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
