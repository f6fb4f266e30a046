"""UnifiedPager: moments in host memory, brought to a GPU chunk by chunk while it updates others."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern.optim import _chunks, _driver
from qkern.optim._chunks import ChunkUpdate, MomentSpec, Piece
from qkern.optim._driver import Driver
from qkern.optim._gpu_places import Chunk, ManagedPlaces, PinnedPlaces, Places
from qkern.optim._moments import Moments
from qkern.optim._updates import device_of_steps

_MOST_CHUNK_BYTES = 64 << 20
_CHUNKS_OF_BUDGET = 8
_DEPTH = 2  # chunks that are there, or on their way, before their update starts


class _Pool:
    """The chunks of one device. The least recently used leave it first."""

    def __init__(self, driver: Driver, device: torch.device, budget_bytes: int | None) -> None:
        self.driver, self.device = driver, device
        self.why_not_managed = driver.why_not_managed(device)
        self._incoming, self._outgoing = driver.new_stream(device), driver.new_stream(device)
        self._places: Places
        if self.why_not_managed is None:
            self._places = ManagedPlaces(driver, device)
        else:
            self._places = PinnedPlaces(driver, device, (self._incoming, self._outgoing))
        self._budget = self._places.budget if budget_bytes is None else budget_bytes
        self.chunk_bytes = _MOST_CHUNK_BYTES
        if self._budget is not None:
            self.chunk_bytes = _chunks.chunk_size(
                self._budget, _CHUNKS_OF_BUDGET, _MOST_CHUNK_BYTES
            )
        self._slot_bytes = 0
        self._most: int | None = None  # resident chunks
        self.chunks: list[Chunk] = []
        self._resident: OrderedDict[Chunk, None] = OrderedDict()
        self.launches = 0
        """Of work, since it was made."""
        self._broke_off = False

    def add(self, first: int, chunks: Sequence[Sequence[Piece]]) -> None:
        """Take in the chunks of parameters of the numbers ``first`` and up, in place of others."""
        kept = [chunk for chunk in self.chunks if chunk.pieces[-1].param < first]
        wanted = kept + [Chunk(pieces) for pieces in chunks]
        slot_bytes = max((chunk.nbytes for chunk in wanted), default=1)
        if slot_bytes > self._slot_bytes and self._places.has_slots:
            self._begin(self.driver.current_stream(self.device))
            self._evict_all()
            self._places.drop_short(slot_bytes)
            self._broke_off = False
        self._slot_bytes = slot_bytes
        self._most = None if self._budget is None else self._budget // slot_bytes
        self.chunks = wanted

    @property
    def resident_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._resident)

    def run(self, wanted: Collection[int], work: Callable[[Chunk, Tensor], object]) -> None:
        """Call ``work`` with each chunk of ``wanted`` parameters and its bytes on the device."""
        if self.driver.is_capturing(self.device):
            raise RuntimeError(
                'pager: got "unified" while a CUDA graph is captured; takes "none" there'
            )
        current = self.driver.current_stream(self.device)
        self._begin(current)
        self._run(wanted, work, current)
        self._broke_off = False

    def _begin(self, current: Any) -> None:
        """Put right what an exception has left half done, if one has; until it has not."""
        if self._broke_off:
            self._join(current)
        self._broke_off = True

    def _join(self, current: Any) -> None:
        """Let each stream wait for all that others have: some event may be missing."""
        streams = (self._incoming, self._outgoing, current)
        events = [self.driver.record(stream) for stream in streams]
        for stream in streams:
            for event in events:
                self.driver.wait(stream, event)
        for chunk in self.chunks:
            if chunk.slot is None:  # it was about to leave, and its bytes have
                self._resident.pop(chunk, None)
            elif chunk not in self._resident:  # it was about to come; no update has seen it
                chunk.slot = None
            else:
                chunk.ready = chunk.used = events[0]

    def _run(
        self, wanted: Collection[int], work: Callable[[Chunk, Tensor], object], current: Any
    ) -> None:
        chunks = [chunk for chunk in self.chunks if _chunks.has_any(chunk.pieces, wanted)]
        coming = deque(_chunks.resident_first(chunks, self._resident))
        ahead: deque[Chunk] = deque()
        while coming or ahead:
            while coming and len(ahead) < _DEPTH and self._bring(coming[0], ahead):
                ahead.append(coming.popleft())
            self._launch(ahead.popleft(), work, current)

    def _launch(self, chunk: Chunk, work: Callable[[Chunk, Tensor], object], current: Any) -> None:
        assert chunk.slot is not None
        memory = chunk.slot[: chunk.nbytes]
        self.driver.wait(current, chunk.ready)
        if chunk.used is not None:  # maybe in another stream
            self.driver.wait(current, chunk.used)
        try:
            if chunk.blank:
                self.driver.launch(memory, memory.zero_, current)
                chunk.blank = False
            self.driver.launch(memory, functools.partial(work, chunk, memory), current)
            self.launches += 1
        finally:
            chunk.used = self.driver.record(current)

    def _bring(self, chunk: Chunk, ahead: Collection[Chunk]) -> bool:
        """Start to bring a chunk; False where those ahead leave no room for it."""
        if chunk in self._resident:
            self._resident.move_to_end(chunk)
            self._places.bring_again(chunk, self._incoming)
        else:
            while self._most is not None and len(self._resident) >= self._most:
                if not self._evict_oldest(ahead):
                    return False
            if chunk.memory is None:
                chunk.memory = self._allocate(chunk.nbytes)
            try:
                self._places.bring(chunk, self._incoming, self._slot_bytes)
            except torch.OutOfMemoryError:
                # Less than the budget is there: go on with what we have.
                if not self._resident:
                    raise
                self._most = len(self._resident)
                return self._bring(chunk, ahead)
            self._resident[chunk] = None
        chunk.ready = self.driver.record(self._incoming)
        return True

    def _allocate(self, nbytes: int) -> Tensor:
        try:
            return self._places.allocate(nbytes)
        except RuntimeError as error:
            raise RuntimeError(
                f"pager: got no {nbytes} bytes of host memory for moments of {self.device}:"
                f' {error}; bits=8 takes a quarter, and pager="mmap" keeps them in a file'
            ) from error

    def _evict_oldest(self, ahead: Collection[Chunk]) -> bool:
        oldest = next(iter(self._resident))
        if oldest in ahead:
            return False
        if oldest.used is not None:
            self.driver.wait(self._outgoing, oldest.used)
        self._places.evict(oldest, self._outgoing)
        del self._resident[oldest]
        # What comes takes its place only once it has left.
        self.driver.wait(self._incoming, self.driver.record(self._outgoing))
        return True

    def _evict_all(self) -> None:
        while self._resident:
            self._evict_oldest(())

    def synchronize(self) -> None:
        self.driver.synchronize(self.driver.current_stream(self.device))

    def drop(self) -> None:
        self._resident.clear()
        self.chunks.clear()


class UnifiedPager:
    """A `Pager` of parameters on GPUs. At most ``budget_bytes`` are on each GPU at once.

    Moments are in CUDA's managed memory where CPU and GPU can use it at the same time; elsewhere,
    as under WSL, in page-locked memory that is copied. Chunks come in one stream ahead of their
    update and leave in another behind it; nothing waits for a device.

    Args:
        budget_bytes: Most memory for moments on each GPU. By default the driver itself makes room
            where memory is managed; 256 MiB elsewhere.

    Raises:
        ValueError: ``budget_bytes`` is too little.
    """

    takes_new_groups = True
    waits_for_found_inf = False
    steps: Sequence[int] = ()
    version = 0

    def __init__(self, budget_bytes: int | None) -> None:
        if budget_bytes is not None:
            _chunks.check_budget(budget_bytes)
        self._budget = budget_bytes
        self._pools: dict[torch.device, _Pool] = {}
        self._numels: list[int] = []

    def add(self, first: int, params: Sequence[MomentSpec]) -> None:
        """Take in parameters of the numbers ``first`` and up.

        What an interrupt has left of parameters of these numbers goes.

        Raises ``ValueError`` for a device that is no GPU.
        """
        for device, *_ in params:
            if not _driver.current.takes(device):
                raise ValueError(
                    f'pager: got "unified" with a parameter on {device}; takes those on a GPU'
                )
        for device in dict.fromkeys(param.device for param in params):
            if device not in self._pools:
                self._pools[device] = _Pool(_driver.current, device, self._budget)
            pool = self._pools[device]
            # Those of other pools count as empty, so that numbers stay.
            mine = [param.numel if param.device == device else 0 for param in params]
            bits = [32] * first + [param.bits for param in params]
            pool.add(first, _chunks.plan([0] * first + mine, bits, pool.chunk_bytes))
        self._numels[first:] = [param.numel for param in params]

    @property
    def held_bytes(self) -> int:
        """Bytes of moments that are on their GPUs now, or on the way to or from there."""
        return sum(pool.resident_bytes for pool in self._pools.values())

    @property
    def report(self) -> dict[str, str]:
        """For each device what its moments are in, and why."""
        return {
            str(device): "managed memory"
            if pool.why_not_managed is None
            else f"pinned memory ({pool.why_not_managed})"
            for device, pool in self._pools.items()
        }

    def device_of_steps(self, device: torch.device) -> torch.device:
        """As in memory, so that no step waits for the host."""
        return device_of_steps(device)

    def step(
        self, params: Collection[int], update: ChunkUpdate, finish: Callable[[], object]
    ) -> None:
        """Call ``update`` for every chunk with a piece of ``params``, then ``finish``.

        Raises ``RuntimeError`` from whatever went wrong after the first chunk; an interrupt
        stays one, with the same text.
        """

        def of_chunk(chunk: Chunk, memory: Tensor) -> None:
            update([(piece, piece.moments(memory)) for piece in chunk.pieces])

        before = self._launches()
        try:
            self._run(params, of_chunk)
            finish()
        except (Exception, KeyboardInterrupt) as error:
            done = self._launches() - before
            if not done:
                raise
            raise _chunks.broke_off(
                f"a step broke off: {done} chunks of parameters and moments have taken it, and the"
                " others have not; load a checkpoint",
                error,
            ) from error

    def read(self, bits: Mapping[int, int]) -> dict[int, Moments]:
        """Copies on the CPU of flat moments, in the bits given."""
        found = {
            index: Piece(index, 0, self._numels[index], width, 0).empty_moments()
            for index, width in bits.items()
        }
        self._run(bits, lambda chunk, memory: _chunks.copy_out(chunk.pieces, memory, found))
        for pool in self._pools.values():
            pool.synchronize()
        return found

    def load(self, moments: Mapping[int, tuple[int, Moments]]) -> None:
        """Replace everything by the moments given; parameters left out have zeros."""
        given = {index: of_it for index, (_, of_it) in moments.items()}
        chunks = [chunk for pool in self._pools.values() for chunk in pool.chunks]
        used = [chunk for chunk in chunks if chunk.memory is not None]
        wanted = {piece.param for chunk in used for piece in chunk.pieces} | set(given)
        self._run(wanted, lambda chunk, memory: _chunks.copy_in(chunk.pieces, memory, given))

    def _launches(self) -> int:
        return sum(pool.launches for pool in self._pools.values())

    def _run(self, params: Collection[int], work: Callable[[Chunk, Tensor], object]) -> None:
        for pool in self._pools.values():
            pool.run(params, work)

    def close(self) -> None:
        """Free the memory."""
        for pool in self._pools.values():
            pool.drop()
        self._pools.clear()
