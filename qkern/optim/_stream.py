"""ChunkStream: an update over the chunks of a file, of which a bounded number is in memory."""

from __future__ import annotations

import mmap
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from qkern.optim._chunk_file import ChunkFile, Draft
from qkern.optim._chunks import resident_first
from qkern.optim._crew import Crew, Job

_DEPTH = 6  # chunks read ahead, and chunks being written behind
# Threads: one reader; four writers, since checksums precede writes.
_READERS = 1
_WRITERS = 4


@dataclass
class StreamStats:
    """What a `ChunkStream` has done since it was made.

    Attributes:
        read_bytes: Bytes read from the file.
        written_bytes: Bytes written to the file.
        hits: Chunks that were resident and needed no read.
        evictions: Resident chunks that made room for others.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    hits: int = 0
    evictions: int = 0


@dataclass(eq=False)
class _Place:
    """Where a chunk is in memory: page-aligned, of the chunk's size rounded up."""

    memory: mmap.mmap
    view: memoryview
    """The chunk's bytes."""
    stamp: int = -1
    """The file's stamp of these bytes."""
    job: Job | None = None
    """The last read or write."""

    def finish(self) -> None:
        if self.job is not None:
            self.job.wait()


class ChunkStream:
    """Runs updates over chunks of a :class:`ChunkFile`, holding at most ``budget_bytes`` of them.

    The next chunks are read, and the last ones written, by threads while an update runs. What the
    budget has room for stays resident afterwards: such a chunk needs no read the next time. The
    least recently used leave first. Every update is written through.

    Chunks of equal sizes suit it best: their buffers are used again as they are.

    Args:
        file: The file; open as long as the stream is used.
        budget_bytes: Bound of all buffers together, each a chunk rounded up to whole pages. With
            less than about ten chunks' worth, reads and writes overlap less.

    Raises:
        ValueError: The largest chunk does not fit the budget.
    """

    def __init__(self, file: ChunkFile, budget_bytes: int) -> None:
        needed = max(map(_capacity, file.sizes), default=0)
        if budget_bytes < needed:
            raise ValueError(
                f"budget_bytes: got {budget_bytes}; takes at least {needed}, for the largest chunk"
            )
        self.file = file
        self.budget_bytes = budget_bytes
        self.stats = StreamStats()
        self._resident: OrderedDict[int, _Place] = OrderedDict()  # least recently used first
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by capacity
        self._held_bytes = 0
        self._crews: tuple[Crew, ...] = ()
        """Of a run that has not come to its end, or not yet been taken back."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers, in use or not."""
        return self._held_bytes

    @property
    def resident(self) -> tuple[int, ...]:
        """The resident chunks, least recently used first."""
        return tuple(self._resident)

    def resident_first(self, indices: Iterable[int]) -> list[int]:
        """The same chunks, those that are resident before all others."""
        return resident_first(indices, self._resident)

    def run(
        self,
        indices: Sequence[int],
        update: Callable[[int, memoryview], object],
        *,
        write: bool = True,
    ) -> None:
        """Call ``update(index, buffer)`` for chunks in the order given, here in this thread.

        ``buffer`` holds the chunk's bytes, which it may change, until it returns. Everything is
        written when this returns, and committed when the caller says so. No thread outlives the
        call. Chunks that ``indices`` leaves out are not touched.

        After an exception, whether of ``update``, of a read or of a write, the file is rolled back
        to its last commit and nothing is resident.

        Args:
            indices: Chunks, each at most once.
            update: May raise.
            write: Whether to write chunks back; False where ``update`` only looks.

        Raises:
            DamagedChunksError: A chunk's checksum is not the committed one.
            OSError: The disk failed.
        """
        if len(set(indices)) != len(indices):
            raise ValueError("indices: got a chunk more than once; takes each at most once")
        self.recover()
        readers, writers = self._crews = Crew(_READERS), Crew(_WRITERS if write else 0)
        try:
            # All threads are there before anything is written.
            readers.start()
            writers.start()
            self._run(indices, update, readers, writers if write else None)
            self.stop()
        except BaseException:
            self.recover()
            raise
        self._crews = ()

    def stop(self) -> None:
        """Return when no thread of a broken-off run works any more."""
        if not self.file.is_closed:  # else they are not here, but in the process this forked from
            for crew in self._crews:
                crew.stop()

    def recover(self) -> None:
        """Take back what a run has left that an exception broke off, and free all buffers.

        The run does that itself; but its caller may be interrupted a second time meanwhile.
        """
        if self._crews:
            self.stop()
            self.file.rollback()
            self.drop()
            self._crews = ()

    def drop(self) -> None:
        """Free all buffers. Nothing is lost: what was updated is written already."""
        self._resident.clear()
        self._free.clear()
        self._held_bytes = 0

    def _run(
        self,
        indices: Sequence[int],
        update: Callable[[int, memoryview], object],
        readers: Crew,
        writers: Crew | None,
    ) -> None:
        draft = self.file.draft
        ahead: deque[tuple[int, _Place]] = deque()
        writes: deque[Job] = deque()
        coming = deque(indices)
        while coming or ahead:
            while coming and len(ahead) < _DEPTH:
                place = self._fetch(coming[0], readers, wait=not ahead)
                if place is None:
                    break
                ahead.append((coming.popleft(), place))
            index, place = ahead.popleft()
            place.finish()
            update(index, place.view)
            if writers is not None:
                place.job = writers.submit(partial(self._write, index, place, draft))
                writes.append(place.job)
                self.stats.written_bytes += len(place.view)
            self._resident[index] = place
            if len(writes) > _DEPTH:
                writes.popleft().wait()
        for job in writes:
            job.wait()

    def _fetch(self, index: int, readers: Crew, wait: bool) -> _Place | None:
        """The chunk's place, being read if need be; None where it would first have to wait."""
        place = self._resident.pop(index, None)
        if place is not None:
            if place.stamp == self.file.stamp(index):
                self.stats.hits += 1
                return place
            self._free[len(place.memory)].append(place.memory)
        memory = self._take(_capacity(self.file.sizes[index]), wait)
        if memory is None:
            return None
        place = _Place(memory, memoryview(memory)[: self.file.sizes[index]])
        place.job = readers.submit(partial(self._read, index, place))
        self.stats.read_bytes += len(place.view)
        return place

    def _take(self, capacity: int, wait: bool) -> mmap.mmap | None:
        """Memory for a chunk: free, new, or what the least recently used chunk leaves."""
        while True:
            if self._free[capacity]:
                return self._free[capacity].pop()
            if self._held_bytes + capacity <= self.budget_bytes:
                self._held_bytes += capacity
                # Shared: forked children get no copies, and direct reads into a private mapping
                # may go astray while another thread forks (see open(2)).
                return mmap.mmap(-1, capacity)
            if other := next((size for size, memories in self._free.items() if memories), 0):
                self._free[other].pop()
                self._held_bytes -= other
                continue
            index, place = next(iter(self._resident.items()), (-1, None))
            if place is None or not (wait or place.job is None or place.job.is_done):
                return None
            place.finish()
            del self._resident[index]
            self.stats.evictions += 1
            self._free[len(place.memory)].append(place.memory)

    def _read(self, index: int, place: _Place) -> None:
        self.file.read_into(index, place.view)
        place.stamp = self.file.stamp(index)

    def _write(self, index: int, place: _Place, draft: Draft) -> None:
        self.file.write(index, place.view, draft)
        place.stamp = self.file.stamp(index)


def _capacity(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
