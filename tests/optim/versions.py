"""What each chunk of a file holds after a step."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from qkern.optim._chunk_file import ChunkFile
from qkern.optim._file_layout import ALIGNMENT

SIZES = (5000, 3, 2 * ALIGNMENT, 4097)
PAGE = mmap.PAGESIZE
Contents = list[bytes]


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


def fill_step(step: int) -> Callable[[int, memoryview], None]:
    def update(index: int, buffer: memoryview) -> None:
        buffer[:] = payload(index, step, len(buffer))

    return update
