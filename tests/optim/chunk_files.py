"""Chunk files, and what another process would find in one."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from qkern.optim._chunk_file import ChunkFile
from tests.optim.versions import SIZES, Contents, contents, payload

LAYOUT = {"bits": 32, "tensors": [{"name": "a.weight", "shape": [3, 4]}]}


def create(path: Path, sizes: tuple[int, ...] = SIZES, **options: Any) -> ChunkFile:
    return ChunkFile.create(path, sizes, LAYOUT, {"step": 0}, meta_capacity=200, **options)


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


def documented_checksum(chunk: bytes) -> int:
    return zlib.crc32(chunk)
