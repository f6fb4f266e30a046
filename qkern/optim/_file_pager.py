"""FilePager: moments in a file, brought to memory chunk by chunk."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from qkern.optim import _chunks, _file_layout
from qkern.optim._chunk_file import ChunkFile
from qkern.optim._chunks import ChunkUpdate, MomentSpec, Piece
from qkern.optim._file_layout import ChunkFileError
from qkern.optim._moments import Moments
from qkern.optim._pager import MOST_STEPS
from qkern.optim._stream import ChunkStream, StreamStats

_MOST_CHUNK_BYTES = 4 << 20
_CHUNKS_OF_BUDGET = 64  # small, so that reads and writes go on evenly beside the update


class FilePager:
    """A `Pager` of parameters of known shapes, whose file always holds one whole step.

    Args:
        path: The file.
        params: What each parameter has.
        budget_bytes: Most memory for chunks; 256 MiB by default.
        resume: Open an existing file instead of making one.
        durable: Wait for the disk at every commit.

    Raises:
        ValueError: ``budget_bytes`` is too little.
        FileExistsError, FileNotFoundError, OSError, ChunkFileError: As `ChunkFile` does.
    """

    takes_new_groups = False
    waits_for_found_inf = True  # a commit has the number of steps, and is not taken back

    def __init__(
        self,
        path: str | os.PathLike[str],
        params: Sequence[MomentSpec],
        budget_bytes: int | None,
        *,
        resume: bool = False,
        durable: bool = False,
    ) -> None:
        if budget_bytes is None:
            budget_bytes = _chunks.DEFAULT_BUDGET_BYTES
        _chunks.check_budget(budget_bytes)
        chunk_bytes = _chunks.chunk_size(budget_bytes, _CHUNKS_OF_BUDGET, _MOST_CHUNK_BYTES)
        layout = {
            "what": "AdamW",
            "params": [{"shape": list(param.shape), "bits": param.bits} for param in params],
        }
        self._numels = [param.numel for param in params]
        bits = [param.bits for param in params]
        if resume:
            self._file = ChunkFile.open(path, durable=durable)
        try:
            if resume:
                chunk_bytes = self._check_layout(layout)
            self._chunks = _chunks.plan(self._numels, bits, chunk_bytes)
            sizes = [pieces[-1].end for pieces in self._chunks]
            if not resume:
                self._file = ChunkFile.create(
                    path,
                    sizes,
                    layout | {"chunk_bytes": chunk_bytes},
                    {"steps": [0] * len(params)},
                    durable=durable,
                    # Twenty digits a parameter, and the rest.
                    meta_capacity=64 + 22 * len(params),
                )
            if self._file.sizes != tuple(sizes):
                raise ChunkFileError(f"{path}: got chunks of other sizes than its layout has")
            self._steps = (self._file.sequence, self._committed_steps())
            self._stream = ChunkStream(self._file, budget_bytes)
        except BaseException:
            if hasattr(self, "_file"):
                if not resume:
                    self._file.path.unlink()
                self._file.close()
            raise

    def _check_layout(self, wanted: dict[str, Any]) -> int:
        """The file's ``chunk_bytes``; raises `ChunkFileError` where its layout is another."""
        path, layout = self._file.path, self._file.layout
        chunk_bytes = layout.get("chunk_bytes")
        if text := _file_layout.difference(layout, wanted | {"chunk_bytes": chunk_bytes}, "layout"):
            raise ChunkFileError(f"{path}: {text}")
        least = _chunks.LEAST_CHUNK_BYTES
        if type(chunk_bytes) is not int or not least <= chunk_bytes <= _MOST_CHUNK_BYTES:
            raise ChunkFileError(
                f"{path}: layout.chunk_bytes: got {_file_layout.short(chunk_bytes)};"
                f" takes {least} to {_MOST_CHUNK_BYTES}"
            )
        return chunk_bytes

    def _committed_steps(self) -> list[int]:
        """The steps of the last commit; raises `ChunkFileError` where they are none."""
        meta, count = self._file.meta, len(self._numels)
        steps = meta.get("steps")
        if (
            meta.keys() != {"steps"}
            or not isinstance(steps, list)
            or len(steps) != count
            or not all(type(step) is int and 0 <= step <= MOST_STEPS for step in steps)
        ):
            raise ChunkFileError(
                f"{self._file.path}: meta: got {_file_layout.short(meta)};"
                f" takes the steps of {count} parameters, from 0 to {MOST_STEPS}"
            )
        return steps

    @property
    def steps(self) -> Sequence[int]:
        """Of each parameter, at the last commit; the same object until the next."""
        sequence = self._file.sequence
        if self._steps[0] != sequence:
            self._steps = (sequence, self._committed_steps())
        return self._steps[1]

    @property
    def version(self) -> int:
        """Number of the last commit."""
        return self._file.sequence

    @property
    def stats(self) -> StreamStats:
        """Counts of what was read, written, found in memory and evicted."""
        return self._stream.stats

    def add(self, first: int, params: Sequence[MomentSpec]) -> None:
        """Raises ``RuntimeError``: the file's layout is fixed."""
        raise RuntimeError(f"{self._file.path}: takes no more parameters")

    @property
    def held_bytes(self) -> int:
        """Memory that holds chunks now."""
        return self._stream.held_bytes

    def device_of_steps(self, device: torch.device) -> torch.device:
        """The CPU, where a commit needs them."""
        return torch.device("cpu")

    @property
    def report(self) -> dict[str, str]:
        """Nothing: no moments are on a GPU."""
        return {}

    def step(
        self, params: Collection[int], update: ChunkUpdate, finish: Callable[[], object]
    ) -> None:
        """Call ``update`` for every chunk with a piece of ``params``, then ``finish``; commit.

        Raises ``RuntimeError`` from whatever went wrong after the first chunk; an interrupt
        stays one, with the same text. The step counts if `version` has changed.
        """
        chunks = self._chunks_of(params)
        steps = [step + (index in params) for index, step in enumerate(self.steps)]
        updated = 0

        def of_chunk(index: int, buffer: memoryview) -> None:
            nonlocal updated
            updated += 1
            update([(piece, piece.moments(buffer)) for piece in self._chunks[index]])

        before = self.version
        try:
            self._stream.run(self._stream.resident_first(chunks), of_chunk)
            finish()
            self._commit(steps)
        except (Exception, KeyboardInterrupt) as error:
            if not updated or self.version != before:
                raise
            raise _chunks.broke_off(
                f"{self._file.path}: a step broke off and the file has the one before, but"
                f" parameters of {updated} of {len(chunks)} chunks are updated; load them and this"
                " file from before the step",
                error,
            ) from error

    def _commit(self, steps: Sequence[int]) -> None:
        try:
            self._file.commit({"steps": list(steps)})
        except BaseException:
            self._file.rollback()  # of nothing, if the commit came to its end
            raise

    def read(self, bits: Mapping[int, int]) -> dict[int, Moments]:
        """Flat moments in the bits given, in an unnamed file mapped to memory."""
        whole = {}
        offset = 0
        for index, width in bits.items():
            whole[index] = Piece(index, 0, self._numels[index], width, offset)
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
            _chunks.copy_out(self._chunks[index], chunk, moments)

        self._run(bits, copy, write=False)
        return moments

    def load(self, moments: Mapping[int, tuple[int, Moments]]) -> None:
        """Replace everything by the steps and moments given; parameters left out have none."""
        flat = {index: given for index, (_, given) in moments.items()}

        def copy(index: int, chunk: memoryview) -> None:
            _chunks.copy_in(self._chunks[index], chunk, flat)

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
        # Nothing is left to take back, unless an exception kept the last call from doing it.
        self._stream.recover()
        self._file.rollback()
        return [i for i, pieces in enumerate(self._chunks) if _chunks.has_any(pieces, params)]

    def close(self) -> None:
        """Close the file and free the memory."""
        self._stream.stop()
        self._stream.drop()
        self._file.close()
