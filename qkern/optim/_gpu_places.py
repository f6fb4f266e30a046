"""Where a chunk of moments is for a GPU: managed memory, or page-locked memory and slots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qkern.optim._chunks import DEFAULT_BUDGET_BYTES, Piece
from qkern.optim._driver import Driver, DriverError


@dataclass(eq=False)
class Chunk:
    """Moments that come to the device and leave it together."""

    pieces: Sequence[Piece]
    memory: Tensor | None = None
    """On the host's side: managed or pinned, from the first use on."""
    slot: Tensor | None = None
    """Where the device updates it while it is resident; at least as long as the chunk."""
    blank: bool = True
    """Whether its zeros are still to be written."""
    ready: Any = None
    """The event after which its bytes are in the slot."""
    used: Any = None
    """The event after its last update."""

    @property
    def nbytes(self) -> int:
        return self.pieces[-1].end


class Places(Protocol):
    """Memory of chunks on the host's side, and how a chunk comes from there and leaves again.

    What is given a stream starts work there and waits for none of it.
    """

    has_slots: bool
    """Whether a resident chunk takes one of several slots of equal size on the device."""

    budget: int | None
    """Most bytes on the device where no budget was given; None for no bound."""

    def allocate(self, nbytes: int) -> Tensor:
        """Memory for a chunk; raises ``RuntimeError``."""

    def bring(self, chunk: Chunk, stream: Any, slot_bytes: int) -> None:
        """Give a chunk a slot of ``slot_bytes``, with its bytes unless it is blank."""

    def bring_again(self, chunk: Chunk, stream: Any) -> None:
        """See to it that a resident chunk still is on the device."""

    def evict(self, chunk: Chunk, stream: Any) -> None:
        """Take a chunk's slot away, after its bytes."""

    def drop_short(self, slot_bytes: int) -> None:
        """Free the slots of less than ``slot_bytes``; no chunk is in one."""


class ManagedPlaces:
    """Memory whose pages the driver moves; what it is told ahead of time is a hint."""

    has_slots = False

    budget: int | None = None
    """None: the driver itself decides what leaves, when others need the memory."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self._driver, self._device = driver, device
        self._refused: set[str] = set()

    def allocate(self, nbytes: int) -> Tensor:
        memory = self._driver.managed(nbytes, self._device)
        self._hint("advise", self._driver.advise, memory)
        return memory

    def bring(self, chunk: Chunk, stream: Any, slot_bytes: int) -> None:
        chunk.slot = chunk.memory
        self.bring_again(chunk, stream)

    def bring_again(self, chunk: Chunk, stream: Any) -> None:
        # The driver may have moved it away since, for what others need.
        self._hint("prefetch", self._driver.prefetch, chunk.memory, False, stream)

    def evict(self, chunk: Chunk, stream: Any) -> None:
        self._hint("prefetch", self._driver.prefetch, chunk.memory, True, stream)
        chunk.slot = None

    def drop_short(self, slot_bytes: int) -> None:
        pass

    def _hint(self, name: str, call: Callable[..., None], *arguments: object) -> None:
        if name in self._refused:
            return
        try:
            call(*arguments)
        except DriverError as error:
            # Pages move all the same, later.
            self._refused.add(name)
            text = f"{self._device}: goes on without {name} of managed memory: {error}"
            warnings.warn(text, stacklevel=2)


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    chunk: Chunk | None = None
    """The last to be given it."""

    @property
    def is_free(self) -> bool:
        # The chunk alone says whether it has the slot: two notes of that might come to differ.
        return self.chunk is None or self.chunk.slot is not self.memory


class PinnedPlaces:
    """Host memory that is copied to the device and back."""

    has_slots = True

    budget: int | None = DEFAULT_BUDGET_BYTES

    def __init__(self, driver: Driver, device: torch.device, streams: tuple[Any, Any]) -> None:
        self._driver, self._device, self._streams = driver, device, streams
        self._slots: list[_Slot] = []

    def allocate(self, nbytes: int) -> Tensor:
        return self._driver.pinned(nbytes)

    def bring(self, chunk: Chunk, stream: Any, slot_bytes: int) -> None:
        assert chunk.memory is not None
        slot = next((slot for slot in self._slots if slot.is_free), None)
        if slot is None:
            slot = _Slot(self._driver.on_device(slot_bytes, self._device, self._streams))
            # Work of the current stream may still be using this memory for something else.
            current = self._driver.current_stream(self._device)
            self._driver.wait(stream, self._driver.record(current))
            self._slots.append(slot)
        if not chunk.blank:
            self._driver.copy(slot.memory[: chunk.nbytes], chunk.memory, stream)
        slot.chunk = chunk
        chunk.slot = slot.memory

    def bring_again(self, chunk: Chunk, stream: Any) -> None:
        pass

    def evict(self, chunk: Chunk, stream: Any) -> None:
        assert chunk.memory is not None
        assert chunk.slot is not None
        if not chunk.blank:
            self._driver.copy(chunk.memory, chunk.slot[: chunk.nbytes], stream)
        chunk.slot = None

    def drop_short(self, slot_bytes: int) -> None:
        self._slots = [slot for slot in self._slots if slot.memory.numel() >= slot_bytes]
