"""The stream over a chunk file stays within its budget and loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._stream import ChunkStream
from tests.optim.chunk_files import LAYOUT, create, reopened, take_step
from tests.optim.system import Calls, Crash, both_ways
from tests.optim.versions import PAGE, SIZES, contents, fill_step, payload, version


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
