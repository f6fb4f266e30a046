"""FilePager: moments in a file, brought to memory chunk by chunk."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkern import formats
from qkern.optim._chunkfile import ChunkFile, ChunkFileError
from qkern.optim._moments import BLOCK, Moments, to_state
from qkern.optim._stream import ChunkStream, StreamStats

DEFAULT_BUDGET_BYTES = 256 << 20
_LEAST_CHUNK_BYTES = 64 << 10
_MOST_CHUNK_BYTES = 4 << 20
_CHUNKS_OF_BUDGET = 64  # small, so that reads and writes go on evenly beside the update
_ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of one parameter, whose moments lie in one chunk."""

    param: int
    first: int
    numel: int
    bits: int
    offset: int
    """Of the piece in its chunk, in bytes."""

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
        """Of its bytes in the chunk."""
        offset, numel, dtype = self.parts()[-1]
        return offset + _aligned(numel * dtype.itemsize)

    def moments(self, chunk: memoryview | Tensor) -> Moments:
        """Flat views of a chunk's bytes; of uint8, if a tensor."""
        return Moments(*(_part(chunk, *part) for part in self.parts()))

    def empty_moments(self) -> Moments:
        """Flat tensors of their own on the CPU."""
        return Moments(*(torch.empty(numel, dtype=dtype) for _, numel, dtype in self.parts()))


def _part(chunk: memoryview | Tensor, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    if isinstance(chunk, Tensor):
        return chunk[offset : offset + numel * dtype.itemsize].view(dtype)
    return torch.frombuffer(chunk, dtype=dtype, count=numel, offset=offset)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def check_budget(budget_bytes: int) -> None:
    """Raises ``ValueError`` where not even the smallest chunk fits."""
    if budget_bytes < _LEAST_CHUNK_BYTES:
        raise ValueError(f"budget_bytes: got {budget_bytes}; takes {_LEAST_CHUNK_BYTES} and up")


def chunk_size(budget_bytes: int, chunks: int, most: int) -> int:
    """Bytes of a chunk, whole pages, so that ``chunks`` fit the budget; at most ``most``."""
    share = budget_bytes // chunks // mmap.PAGESIZE * mmap.PAGESIZE
    return min(max(share, _LEAST_CHUNK_BYTES), most)


def plan(numels: Sequence[int], bits: Sequence[int], chunk_bytes: int) -> list[list[Piece]]:
    """Which pieces each chunk holds: parameters in order, cut where a chunk is full."""
    chunks: list[list[Piece]] = []
    room_from = chunk_bytes  # in the last chunk
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


class FilePager:
    """The moments of parameters of known shapes in a file that always holds one whole step.

    Args:
        path: The file.
        shapes: Of each parameter.
        bits: Of each parameter's moments, 32 or 8.
        budget_bytes: Most memory for chunks.
        resume: Open an existing file instead of making one.
        durable: Wait for the disk at every commit.

    Raises:
        ValueError: ``budget_bytes`` is too little.
        FileExistsError, FileNotFoundError, OSError, ChunkFileError: As `ChunkFile` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shapes: Sequence[tuple[int, ...]],
        bits: Sequence[int],
        budget_bytes: int,
        *,
        resume: bool = False,
        durable: bool = False,
    ) -> None:
        check_budget(budget_bytes)
        chunk_bytes = chunk_size(budget_bytes, _CHUNKS_OF_BUDGET, _MOST_CHUNK_BYTES)
        numels = [math.prod(shape) for shape in shapes]
        layout = {
            "what": "AdamW",
            "params": [
                {"shape": list(shape), "bits": width}
                for shape, width in zip(shapes, bits, strict=True)
            ],
        }
        if resume:
            self._file = ChunkFile.open(path, durable=durable)
            chunk_bytes = self._file.layout.get("chunk_bytes", 0)
            if self._file.layout != layout | {"chunk_bytes": chunk_bytes}:
                self._file.close()
                self._file = ChunkFile.open(path, layout | {"chunk_bytes": chunk_bytes})
        self._chunks = plan(numels, bits, chunk_bytes)
        sizes = [pieces[-1].end for pieces in self._chunks]
        if not resume:
            meta = {"steps": [0] * len(shapes)}
            self._file = ChunkFile.create(
                path,
                sizes,
                layout | {"chunk_bytes": chunk_bytes},
                meta,
                durable=durable,
                # Twenty digits a parameter, and the rest.
                meta_capacity=64 + 22 * len(shapes),
            )
        try:
            if self._file.sizes != tuple(sizes):
                raise ChunkFileError(f"{path}: got chunks of other sizes than its layout has")
            self._stream = ChunkStream(self._file, budget_bytes)
        except BaseException:
            self._file.close()
            raise
        self._numels, self._bits = numels, list(bits)
        self.steps: list[int] = list(self._file.meta["steps"])

    @property
    def stats(self) -> StreamStats:
        """Counts of what was read, written, found in memory and evicted."""
        return self._stream.stats

    @property
    def held_bytes(self) -> int:
        """Memory that holds chunks now."""
        return self._stream.held_bytes

    def step(
        self,
        params: Collection[int],
        update: Callable[[Sequence[tuple[Piece, Moments]]], object],
        steps: Sequence[int],
    ) -> None:
        """Call ``update`` for every chunk with a piece of ``params``, then commit with ``steps``.

        Raises ``RuntimeError`` from whatever went wrong after the first chunk; an interrupt
        stays one, with the same text.
        """
        chunks = self._chunks_of(params)
        updated = 0

        def of_chunk(index: int, buffer: memoryview) -> None:
            nonlocal updated
            updated += 1
            update([(piece, piece.moments(buffer)) for piece in self._chunks[index]])

        try:
            self._stream.run(self._stream.resident_first(chunks), of_chunk)
            self._commit(steps)
        except (Exception, KeyboardInterrupt) as error:
            if not updated:
                raise
            raise broke_off(
                f"{self._file.path}: a step broke off and the file has the one before, but"
                f" parameters of {updated} of {len(chunks)} chunks are updated; load them and this"
                " file from before the step",
                error,
            ) from error

    def _commit(self, steps: Sequence[int]) -> None:
        try:
            self._file.commit({"steps": list(steps)})
        except BaseException:
            self._file.rollback()
            raise
        self.steps = list(steps)

    def read(self, params: Collection[int]) -> dict[int, Moments]:
        """The flat moments of ``params``, in an unnamed file mapped to memory."""
        whole = {}
        offset = 0
        for index in params:
            whole[index] = Piece(index, 0, self._numels[index], self._bits[index], offset)
            offset = whole[index].end
        size = max(offset, 1)  # parameters without elements take none
        with tempfile.TemporaryFile(dir=self._file.path.parent) as file:
            if hasattr(os, "posix_fallocate"):
                # Without space of its own, a mapping on a full disk ends the process by a signal.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            buffer = memoryview(mmap.mmap(file.fileno(), size))
        moments = {index: piece.moments(buffer) for index, piece in whole.items()}

        def copy(index: int, chunk: memoryview) -> None:
            copy_out(self._chunks[index], chunk, moments)

        self._run(params, copy, write=False)
        return moments

    def load(self, moments: Mapping[int, tuple[int, Moments]]) -> None:
        """Replace everything by the steps and moments given; parameters left out have none."""
        flat = {index: given for index, (_, given) in moments.items()}

        def copy(index: int, chunk: memoryview) -> None:
            copy_in(self._chunks[index], chunk, flat)

        self._run(range(len(self._numels)), copy, write=True)
        steps = [moments[i][0] if i in moments else 0 for i in range(len(self._numels))]
        self._commit(steps)

    def _run(
        self,
        params: Collection[int],
        update: Callable[[int, memoryview], object],
        *,
        write: bool,
    ) -> None:
        chunks = self._chunks_of(params)
        self._stream.run(self._stream.resident_first(chunks), update, write=write)

    def _chunks_of(self, params: Collection[int]) -> list[int]:
        """The chunks with a piece of ``params``, at the file's last commit."""
        # Nothing is left to take back, unless an error kept the last call from doing it.
        self._file.rollback()
        return [
            index
            for index, pieces in enumerate(self._chunks)
            if any(piece.param in params for piece in pieces)
        ]

    def close(self) -> None:
        """Close the file and free the memory."""
        self._stream.drop()
        self._file.close()


def broke_off(what: str, error: BaseException) -> BaseException:
    """What to raise for ``error`` in the middle of a step; an interrupt stays one."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(what)
    return RuntimeError(f"{what}: {error}")


def copy_out(
    pieces: Sequence[Piece], chunk: memoryview | Tensor, whole: Mapping[int, Moments]
) -> None:
    """Copy what a chunk has of the parameters in ``whole`` to their flat moments."""
    for piece in pieces:
        if piece.param in whole:
            for to, part in _matching(whole[piece.param], piece, piece.moments(chunk)):
                to.copy_(part)


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
