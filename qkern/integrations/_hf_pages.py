"""Memory of a file that is mapped: what was read of it counts as the process's until it is let go.

transformers maps all shards and closes them when the model is whole, so that by then each page of
the dense model that was quantised is still in memory beside the 4-bit one.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_MADV_DONTNEED = 4


def release(tensor: Tensor) -> None:
    """Let go of the pages of ``tensor``, where they are those of a file, unchanged.

    Whoever reads it again has them read from the file again.
    """
    if not tensor.is_cpu or not sys.platform.startswith("linux"):
        return
    begin = tensor.data_ptr()
    end = begin + tensor.nbytes
    # Whole pages only: at both ends others' tensors begin.
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and _is_mapped_file(begin, end):
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _is_mapped_file(begin: int, end: int) -> bool:
    """Whether the memory is all of one file. Of any other, its contents would be lost."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _permissions, _offset, _device, inode, *_ = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= begin and end <= last:
            return inode != "0"
    return False


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
