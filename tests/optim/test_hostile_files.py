"""Files that somebody else has made, or put in the way: refused by name, and nothing done by them.

Their checksums are right, since whoever makes a file can make those too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkern.optim import ChunkFileError, PagedAdamW
from qkern.optim._chunk_file import ChunkFile
from tests.optim.chunk_files import create, reopened
from tests.optim.params import make_params, train
from tests.optim.versions import version

SHAPES = ((12_000,), (3,), (90, 90))
PARAMS = [{"shape": list(shape), "bits": 32} for shape in SHAPES]
CHUNK_BYTES = 65536
HEADER = struct.Struct("<8sIIQQQ")
RECORD = struct.Struct("<8sQQ")


@contextlib.contextmanager
def bounds(path: Path) -> Iterator[None]:
    """Neither a hang nor a great allocation; a `ChunkFileError` names the file."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"{path}: opening it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    tracemalloc.start()
    raised = []
    try:
        yield
    except ChunkFileError as error:
        raised.append(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert most < 64 << 20
    for error in raised:
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{path}: ")
        raise error


def opened(path: Path) -> bool:
    """Whether an optimizer takes the file; then all of it is read."""
    with contextlib.suppress(ChunkFileError), bounds(path):
        optimizer = PagedAdamW(make_params(SHAPES), path=path, resume=True)
        try:
            optimizer.state_dict()
        finally:
            optimizer.close()
        return True
    return False


class Parts:
    """A file in pieces, to be put together with right lengths and digests."""

    def __init__(self, data: bytes) -> None:
        _, _, _, count, layout, capacity = HEADER.unpack_from(data)
        self.numbers = {"version": 1, "kind": 1, "count": count, "capacity": capacity}
        self.numbers |= {"layout bytes": layout}
        self.sizes = list(struct.unpack_from(f"<{count}Q", data, 72))
        self.layout = data[72 + 8 * count :][:layout]
        first = up(72 + 8 * count + layout)
        step = up(56 + 5 * count + capacity)
        self.records = [data[first + i * step :][:step] for i in (0, 1)]
        self.slots = data[first + 2 * step :]

    def write(self, path: Path) -> None:
        n = self.numbers
        fixed = HEADER.pack(
            b"QKCHUNKS", n["version"], n["kind"], n["count"], n["layout bytes"], n["capacity"]
        )
        header = signed(fixed, struct.pack(f"<{len(self.sizes)}Q", *self.sizes) + self.layout)
        parts = [header.ljust(up(len(header)), b"\0"), *self.records, self.slots]
        path.write_bytes(b"".join(parts))

    def set_layout(self, layout: bytes) -> None:
        self.layout = layout
        self.numbers["layout bytes"] = len(layout)

    def set_record(self, sequence: int = 2, meta: bytes | None = None, slot: int = 0) -> None:
        count = len(self.sizes)
        meta = json.dumps({"steps": [0] * len(SHAPES)}).encode() if meta is None else meta
        body = self.records[1][56 : 56 + 4 * count] + bytes([slot] * count) + meta
        record = signed(RECORD.pack(b"QKCOMMIT", sequence, len(meta)), body)
        self.records[sequence % 2] = record.ljust(len(self.records[1]), b"\0")


def up(size: int) -> int:
    return -(-size // 4096) * 4096


def signed(fixed: bytes, variable: bytes) -> bytes:
    return fixed + hashlib.sha256(fixed + variable).digest() + variable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    PagedAdamW(make_params(SHAPES), path=path, budget_bytes=CHUNK_BYTES).close()
    return path


def of_layout(**change: Any) -> Callable[[Parts], None]:
    layout = {"what": "AdamW", "params": PARAMS, "chunk_bytes": CHUNK_BYTES} | change
    return lambda parts: parts.set_layout(json.dumps(layout).encode())


def of_layout_text(text: str) -> Callable[[Parts], None]:
    return lambda parts: parts.set_layout(text.encode())


def of_meta(text: str) -> Callable[[Parts], None]:
    return lambda parts: parts.set_record(meta=text.encode())


def of_number(name: str, value: int) -> Callable[[Parts], None]:
    return lambda parts: parts.numbers.__setitem__(name, value)


TWICE = json.dumps({"params": PARAMS, "what": "AdamW"})[:-1] + ', "chunk_bytes": 0,'
HOSTILE = {
    **{
        f"chunk_bytes {value!r}": (of_layout(chunk_bytes=value), "layout.chunk_bytes: got .*takes")
        for value in (0, 1, -1, -65536, 65535, 2303, (4 << 20) + 1, 1 << 40, 1 << 70, 2**31)
    },
    **{
        f"chunk_bytes {value!r}": (of_layout(chunk_bytes=value), "layout.chunk_bytes: got .*takes")
        for value in (65536.0, True, "65536", None, [65536], {}, 1e300)
    },
    "other chunk_bytes": (of_layout(chunk_bytes=1 << 20), "got chunks of other sizes"),
    "what": (of_layout(what="SGD"), "layout.what: got"),
    "another key": (of_layout(more=1), "layout: got an unknown 'more'"),
    "bits as a float": (
        of_layout(params=[{"shape": [12_000], "bits": 32.0}, *PARAMS[1:]]),
        r"layout.params\[0\].bits: got 32.0; takes 32",
    ),
    "shape as a truth": (
        of_layout(params=[{"shape": [12_000], "bits": 32}, {"shape": [True], "bits": 32}]),
        "layout.params: got a list|layout.params: got",
    ),
    "a key twice": (of_layout_text(TWICE + ' "chunk_bytes": 65536}'), "layout: got a key given"),
    "no object": (of_layout_text("[1]"), "layout: got a list in place of an object"),
    "no JSON": (of_layout_text("{"), "layout: got .*takes an object as JSON"),
    "deep": (of_layout_text("[" * 100_000), "layout: got .*recursion"),
    "NaN": (of_layout_text('{"chunk_bytes": NaN}'), "layout: got NaN, which is no number"),
    "long number": (of_layout_text('{"a": ' + "9" * 5000 + "}"), "layout: got .*takes an object"),
    "no text": (lambda parts: parts.set_layout(b"\xff\xfe\xff"), "layout: got"),
    "steps below 0": (of_meta('{"steps": [0, -1, 0]}'), "meta: got"),
    "steps of a float": (of_meta('{"steps": [0, 1.5, 0]}'), "meta: got"),
    "steps of truths": (of_meta('{"steps": [0, true, 0]}'), "meta: got .* takes the steps of 3"),
    "steps of a text": (of_meta('{"steps": [0, "1", 0]}'), "meta: got"),
    "large steps": (of_meta('{"steps": [0, 9007199254740993, 0]}'), "meta: got"),
    "steps of fewer": (of_meta('{"steps": [0, 0]}'), "meta: got"),
    "steps by name": (of_meta('{"steps": {"0": 1}}'), "meta: got"),
    "no steps": (of_meta("{}"), "meta: got {}"),
    "steps twice": (of_meta('{"steps": [0,0,0], "steps": [9,9,9]}'), "meta: got a key given"),
    "more meta": (of_meta('{"steps": [0, 0, 0], "x": 1}'), "meta: got"),
    "no meta": (of_meta(""), "meta: got"),
    "huge count": (of_number("count", 1 << 60), "truncated or damaged: got"),
    "many chunks": (of_number("count", 1 << 26), "truncated or damaged: got"),
    "huge layout": (of_number("layout bytes", 1 << 62), "truncated or damaged: got"),
    "huge meta": (of_number("capacity", 1 << 62), "got room for"),
    "much meta": (of_number("capacity", (1 << 26) + 1), "got room for"),
    "chunk of 0": (lambda parts: parts.sizes.__setitem__(0, 0), "got a chunk of 0 bytes"),
    "huge chunk": (lambda parts: parts.sizes.__setitem__(0, 1 << 63), "truncated: got"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_header_may_say(path: Path, change: Callable[[Parts], None], message: str) -> None:
    parts = Parts(path.read_bytes())
    change(parts)
    parts.write(path)
    before = path.read_bytes()
    with pytest.raises(ChunkFileError, match=rf"^{path}: .*{message}"), bounds(path):
        PagedAdamW(make_params(SHAPES), path=path, resume=True)
    assert path.read_bytes() == before
    assert not opened(path)  # and it is not in use


@pytest.mark.parametrize("name", ["count", "layout bytes"])
def test_a_file_with_a_great_hole(path: Path, name: str) -> None:
    """It costs nothing on the disk, and must not in memory."""
    parts = Parts(path.read_bytes())
    parts.numbers[name] = 1 << 27
    parts.write(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(ChunkFileError, match="got a header of"), bounds(path):
        PagedAdamW(make_params(SHAPES), path=path, resume=True)


def test_these_parts_make_a_file_that_opens(path: Path) -> None:
    parts = Parts(path.read_bytes())
    assert opened(path)
    parts.set_layout(json.dumps(json.loads(parts.layout)).encode())
    parts.set_record(meta=b'{"steps": [9007199254740992, 0, 3]}')
    parts.write(path)
    assert opened(path)


@pytest.mark.parametrize(("sequence", "slot"), [(1 << 63, 0), ((1 << 64) - 2, 0), (2, 7), (2, 255)])
def test_a_record_that_cannot_be_is_none(path: Path, sequence: int, slot: int) -> None:
    """As if it were torn: the one before it counts."""
    parts = Parts(path.read_bytes())
    parts.set_record(sequence, b'{"steps": [5, 5, 5]}', slot)
    parts.write(path)
    params = make_params(SHAPES)
    optimizer = PagedAdamW(params, path=path, resume=True)
    assert optimizer._pager.steps == [0, 0, 0]
    train(optimizer, params, 2)
    optimizer.close()


def test_any_change_of_a_file_is_refused_or_harmless(path: Path) -> None:
    """Bytes, and fields of every kind, changed at random; digests made right again."""
    original = path.read_bytes()
    rng = random.Random(5)
    texts = ["0", "-1", "true", "null", "1e9", '"x"', "[]", "{}", "18446744073709551616", "65536"]
    taken = 0
    for number in range(150):
        parts = Parts(original)
        for _ in range(rng.randrange(1, 3)):
            kind = rng.randrange(5)
            if kind == 0:
                name = rng.choice(list(parts.numbers))
                bits = rng.choice((8, 32, 64)) if name not in ("version", "kind") else 32
                parts.numbers[name] = rng.getrandbits(bits)
            elif kind == 1:
                place = rng.randrange(len(parts.sizes))
                parts.sizes[place] = rng.getrandbits(rng.choice((1, 13, 17, 40, 64)))
            elif kind == 2:
                words = parts.layout.decode("latin-1").split(" ")
                words[rng.randrange(len(words))] = rng.choice(texts)
                parts.set_layout(" ".join(words).encode("latin-1"))
            elif kind == 3:
                layout = bytearray(parts.layout)
                layout[rng.randrange(len(layout))] = rng.randrange(256)
                parts.set_layout(bytes(layout))
            else:
                steps = ", ".join(
                    rng.choice(["0", "1", "2", "3", *texts[:4]])
                    for _ in range(rng.choice((3, 3, 4)))
                )
                meta = f'{{"steps": [{steps}]}}'.encode()
                parts.set_record(rng.choice((2, 3, 1 << rng.randrange(64))), meta, number % 3)
        parts.write(path)
        taken += opened(path)
    assert 5 < taken < 100


# Files in the way of a new one.


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "folder", "second name", "text"])
def test_creation_leaves_what_is_not_its_own(tmp_path: Path, what: str) -> None:
    path, partial, other = (tmp_path / name for name in ("state", "state.partial", "other"))
    if what != "dangling link":
        other.write_bytes(b"precious")
    if what == "second name":
        other.write_bytes(b"")
        os.link(other, partial)
    elif what == "pipe":
        os.mkfifo(partial)
    elif what == "folder":
        partial.mkdir()
    elif what == "text":
        partial.write_bytes(b"precious")
    else:
        partial.symlink_to(other)
    before = {file.name: file.lstat() for file in tmp_path.iterdir()}
    with pytest.raises((FileExistsError, IsADirectoryError), match=r"state.partial"):
        create(path)
    after = {file.name: file.lstat() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    for name, status in before.items():
        assert (after[name].st_ino, after[name].st_size) == (status.st_ino, status.st_size)
    if other.exists() and what != "second name":
        assert other.read_bytes() == b"precious"


def test_a_new_file_is_ones_own_whosever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network filesystems give all files to one user."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    create(tmp_path / "state").close()
    (tmp_path / "other.partial").touch()
    with pytest.raises(FileExistsError, match="of another user"):
        create(tmp_path / "other")
    assert reopened(tmp_path / "state") == (0, version(0))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_directories_that_cannot_be_synced_do_not_matter(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="state"):
            create(tmp_path / "state", durable=True)
    else:
        create(tmp_path / "state", durable=True).close()
        assert reopened(tmp_path / "state") == (0, version(0))


def test_creation_goes_through_no_link(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="state"):
        create(path)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert path.is_symlink()


def test_no_regular_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with bounds(path), pytest.raises(ChunkFileError, match=f"{path}: got no regular file"):
            ChunkFile.open(path)


def test_what_failed_leaves_no_file(tmp_path: Path) -> None:
    """So that the same call, put right, finds its name free."""
    path = tmp_path / "state"
    with pytest.raises(ValueError, match="budget_bytes"):
        PagedAdamW(make_params(), path=path, budget_bytes=1)
    assert not list(tmp_path.iterdir())
    create(path).close()
    assert reopened(path) == (0, version(0))
