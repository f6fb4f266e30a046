"""How moments are laid out in chunks, and what the pagers of chunks have in common."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from qkern import formats
from qkern.optim._moments import BLOCK, Moments, to_state

DEFAULT_BUDGET_BYTES = 256 << 20
LEAST_CHUNK_BYTES = 64 << 10
_ALIGNMENT = 64
_LEAST_PLANNED_BYTES = BLOCK * 8 + 4 * _ALIGNMENT  # a block, of either width

T = TypeVar("T")


class MomentSpec(NamedTuple):
    """What a pager must know of a parameter: which moments it has."""

    device: torch.device
    """Of the parameter."""
    shape: tuple[int, ...]
    bits: int
    """32 or 8."""

    @property
    def numel(self) -> int:
        """Elements of each moment."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of both moments and their scales."""
        return Piece(0, 0, self.numel, self.bits, 0).end


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of one parameter, whose moments lie in one chunk."""

    param: int
    first: int
    numel: int
    bits: int
    offset: int
    """Where its bytes begin in the chunk."""

    def parts(self) -> list[tuple[int, int, torch.dtype]]:
        """Offset in bytes, elements and dtype of each tensor, as `Moments` has them."""
        dtype = torch.float32 if self.bits == 32 else torch.uint8
        scales = 0 if self.bits == 32 else formats.num_blocks(self.numel, BLOCK)
        counts = [(self.numel, dtype)] * 2 + [(scales, torch.float32)] * (2 if scales else 0)
        found, offset = [], self.offset
        for numel, kind in counts:
            found.append((offset, numel, kind))
            offset += _aligned(numel * kind.itemsize)
        return found

    @property
    def end(self) -> int:
        """End offset in bytes."""
        offset, numel, dtype = self.parts()[-1]
        return offset + _aligned(numel * dtype.itemsize)

    def moments(self, chunk: memoryview | Tensor) -> Moments:
        """Flat views of a chunk's bytes; of uint8, if a tensor."""
        return Moments(*(_part(chunk, *part) for part in self.parts()))

    def empty_moments(self) -> Moments:
        """Flat tensors of their own on the CPU."""
        return Moments(
            *(torch.empty(numel, dtype=dtype, device="cpu") for _, numel, dtype in self.parts())
        )


def _part(chunk: memoryview | Tensor, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    if numel == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    if isinstance(chunk, Tensor):
        return chunk[offset : offset + numel * dtype.itemsize].view(dtype)
    return torch.frombuffer(chunk, dtype=dtype, count=numel, offset=offset)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def check_budget(budget_bytes: int) -> None:
    """Raises ``ValueError`` where not even the smallest chunk fits."""
    if budget_bytes < LEAST_CHUNK_BYTES:
        raise ValueError(f"budget_bytes: got {budget_bytes}; takes {LEAST_CHUNK_BYTES} and up")


def chunk_size(budget_bytes: int, chunks: int, most: int) -> int:
    """Bytes of a chunk, whole pages, so that ``chunks`` fit the budget; at most ``most``."""
    share = budget_bytes // chunks // mmap.PAGESIZE * mmap.PAGESIZE
    return min(max(share, LEAST_CHUNK_BYTES), most)


def plan(numels: Sequence[int], bits: Sequence[int], chunk_bytes: int) -> list[list[Piece]]:
    """Which pieces each chunk holds: parameters in order, cut where a chunk is full."""
    if chunk_bytes < _LEAST_PLANNED_BYTES:
        raise ValueError(f"chunk_bytes: got {chunk_bytes}; takes {_LEAST_PLANNED_BYTES} and up")
    chunks: list[list[Piece]] = []
    room_from = chunk_bytes  # where the last chunk has room
    for param, (numel, width) in enumerate(zip(numels, bits, strict=True)):
        first = 0
        while first < numel:
            piece = Piece(param, first, numel - first, width, room_from)
            if piece.end > chunk_bytes:
                # Whole blocks, as many as the rest of the chunk takes; the scales need a little.
                block_bytes = BLOCK * 8 if width == 32 else BLOCK * 2 + 8
                blocks = (chunk_bytes - room_from - 4 * _ALIGNMENT) // block_bytes
                if blocks <= 0:
                    chunks.append([])
                    room_from = 0
                    continue
                piece = Piece(param, first, min(blocks * BLOCK, numel - first), width, room_from)
            chunks[-1].append(piece)
            first += piece.numel
            room_from = piece.end
    return chunks


ChunkUpdate = Callable[[Sequence[tuple[Piece, Moments]]], object]
"""What a step does with the pieces of a chunk and their moments."""


def has_any(pieces: Sequence[Piece], params: Container[int]) -> bool:
    """Whether a chunk has a piece of ``params``."""
    return any(piece.param in params for piece in pieces)


def resident_first(chunks: Iterable[T], resident: Container[T]) -> list[T]:
    """The same chunks, those that are resident before all others.

    Going round the same chunks in the same order, least-recently-used would evict each just before
    its turn. In this order as many chunks as fit are found resident every time.
    """
    return sorted(chunks, key=lambda chunk: chunk not in resident)


def broke_off(what: str, error: BaseException) -> BaseException:
    """What to raise for ``error`` in the middle of a step; an interrupt stays one."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(what)
    return RuntimeError(f"{what}: {error}")


def copy_out(
    pieces: Sequence[Piece], chunk: memoryview | Tensor, whole: Mapping[int, Moments]
) -> None:
    """Copy what a chunk has of the parameters in ``whole`` to their flat moments.

    From 8 bits to 32 by `Moments.to_reversible`.
    """
    for piece in pieces:
        if piece.param in whole:
            to = whole[piece.param]
            moments = piece.moments(chunk)
            if to.bits == 32:
                moments = moments.to_reversible()  # a piece has whole blocks
            for of_whole, part in _matching(to, piece, moments):
                of_whole.copy_(part)


def copy_in(
    pieces: Sequence[Piece], chunk: memoryview | Tensor, given: Mapping[int, Moments]
) -> None:
    """Fill a chunk from its parameters' moments, of any shape; with zeros where there are none."""
    for piece in pieces:
        mine = piece.moments(chunk)
        if piece.param in given:
            for moment, part in _matching(given[piece.param].view((-1,)), piece, mine):
                part.copy_(moment)
        else:
            for unused in to_state(mine).values():
                unused.zero_()


def _matching(whole: Moments, piece: Piece, part: Moments) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of a piece, with the same elements of its parameter's flat moments."""
    blocks = slice(piece.first // BLOCK, formats.num_blocks(piece.first + piece.numel, BLOCK))
    elements = slice(piece.first, piece.first + piece.numel)
    found = []
    for name, of_piece in part._asdict().items():
        if of_piece is not None:
            of_whole = getattr(whole, name)
            found.append((of_whole[blocks if "absmax" in name else elements], of_piece))
    return found
