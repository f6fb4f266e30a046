"""A GPU's memory, streams and events on a CPU, for the pager of GPU memory.

Work given to a stream is not done at once. It is done when something waits for it or, in an order
drawn at random within what events allow, at any time before: so a wait that is missing gives wrong
numbers. Memory that holds nothing yet is NaN. Every call is recorded and can be made to fail.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkern.optim._driver import DriverError


@dataclass
class Event:
    done: bool = False


@dataclass(eq=False)
class Stream:
    name: str
    queue: deque[tuple[Event | None, Callable[[], None]]] = field(default_factory=deque)
    """What is to be done: each work with the event that it must come after."""


@dataclass
class Call:
    """Of the driver: its name, where its memory starts, its bytes and its stream."""

    name: str
    address: int = 0
    nbytes: int = 0
    stream: str = ""


class FakeGpu:
    """A `qkern.optim._driver.Driver` whose device is the CPU.

    Args:
        managed: Whether CPU and GPU can use managed memory at the same time.
        eagerness: How likely waiting work is done at each call: 0 is as late as can be, 1 at once.
        seed: Of the order in which work is done.
        memory: Most bytes of slots and of prefetched memory on the device.
    """

    def __init__(
        self,
        managed: bool = True,
        eagerness: float = 0.0,
        seed: int = 0,
        memory: int | None = None,
    ) -> None:
        self.is_managed, self.eagerness, self.memory = managed, eagerness, memory
        self.calls: list[Call] = []
        self.failures: dict[tuple[str, int], Exception] = {}
        """By a call's name and how many of that name came before."""
        self.capturing = False
        self.expects_prefetch = True
        """Whether a launch on managed memory that was not prefetched is a mistake."""
        self.resident: dict[int, int] = {}
        """Bytes on the device of managed memory, or of slots, by address; as work is done."""
        self.most_resident = 0
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self._main = Stream("main")
        self._streams = [self._main]
        self._memories: list[Tensor] = []

    # What a test asks.

    def names(self, *wanted: str) -> list[str]:
        """The names of the calls so far, of ``wanted`` if given."""
        return [call.name for call in self.calls if not wanted or call.name in wanted]

    def finish(self) -> None:
        """Do all that is left."""
        while self._step():
            pass
        assert not any(stream.queue for stream in self._streams), "streams wait for each other"

    # The driver's methods.

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def why_not_managed(self, device: torch.device) -> str | None:
        return None if self.is_managed else "no concurrent managed access"

    def managed(self, nbytes: int, device: torch.device) -> Tensor:
        memory = self._new(nbytes)
        self._call("managed", memory)
        return memory

    def pinned(self, nbytes: int) -> Tensor:
        memory = self._new(nbytes)
        self._call("pinned", memory)
        return memory

    def on_device(self, nbytes: int, device: torch.device, streams: tuple[Any, ...]) -> Tensor:
        memory = self._new(nbytes)
        held = sum(self.resident.values())
        if self.memory is not None and held + nbytes > self.memory:
            raise torch.OutOfMemoryError("the fake device is full")
        self._call("on_device", memory)
        self._arrive(memory)
        slot = memory[:]
        weakref.finalize(slot, self._leave, memory)
        return slot

    def advise(self, memory: Tensor) -> None:
        self._call("advise", memory)

    def current_stream(self, device: torch.device) -> Stream:
        return self._main

    def new_stream(self, device: torch.device) -> Stream:
        stream = Stream(f"side{len(self._streams)}")
        self._streams.append(stream)
        return stream

    def record(self, stream: Stream) -> Event:
        self._call("record", stream=stream)
        event = Event()
        self._add(stream, None, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self._call("wait", stream=stream)
        self._add(stream, event, lambda: None)

    def prefetch(self, memory: Tensor, to_host: bool, stream: Stream) -> None:
        assert self.is_managed
        self._call("evict" if to_host else "prefetch", memory, stream)
        move = self._leave if to_host else self._arrive
        self._add(stream, None, lambda: move(memory))

    def copy(self, to: Tensor, source: Tensor, stream: Stream) -> None:
        assert to.shape == source.shape
        assert to.data_ptr() != source.data_ptr()
        self._call("copy", to, stream)

        def work() -> None:
            to.copy_(source)
            source.fill_(255)  # where it came from holds nothing any more: float32's NaN

        self._add(stream, None, work)

    def launch(self, memory: Tensor, work: Callable[[], object], stream: Stream) -> None:
        self._call("launch", memory, stream)

        def checked() -> None:
            if self.is_managed and self.expects_prefetch:
                assert memory.data_ptr() in self.resident, "a launch on memory that is not there"
            with torch.no_grad():
                work()

        self._add(stream, None, checked)

    def synchronize(self, stream: Stream) -> None:
        self._call("synchronize", stream=stream)
        self._do_all_of(stream)

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing

    # How it works.

    def _new(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes,), 255, dtype=torch.uint8, device="cpu")
        self._memories.append(memory)  # so that no address comes again
        return memory

    def _call(self, name: str, memory: Tensor | None = None, stream: Stream | None = None) -> None:
        failure = self.failures.get((name, self._counts[name]))
        self._counts[name] += 1
        if failure is not None:
            raise failure
        address, nbytes = (0, 0) if memory is None else (memory.data_ptr(), memory.numel())
        self.calls.append(Call(name, address, nbytes, "" if stream is None else stream.name))

    def _arrive(self, memory: Tensor) -> None:
        self.resident[memory.data_ptr()] = memory.numel()
        self.most_resident = max(self.most_resident, sum(self.resident.values()))

    def _leave(self, memory: Tensor) -> None:
        self.resident.pop(memory.data_ptr(), None)

    def _add(self, stream: Stream, event: Event | None, work: Callable[[], None]) -> None:
        stream.queue.append((event, work))
        while self._random.random() < self.eagerness and self._step():
            pass

    def _step(self) -> bool:
        """Do the next work of some stream that has one that need not wait."""
        heads = [(stream, stream.queue[0][0]) for stream in self._streams if stream.queue]
        ready = [stream for stream, event in heads if event is None or event.done]
        if not ready:
            return False
        _, work = self._random.choice(ready).queue.popleft()
        work()
        return True

    def _do_all_of(self, stream: Stream) -> None:
        """No more than what must be done before: what ``stream`` waits for, each just in time."""
        while stream.queue:
            event, work = stream.queue[0]
            if event is not None and not event.done:
                self._do_until(event)
            stream.queue.popleft()
            work()

    def _do_until(self, event: Event) -> None:
        while not event.done:
            assert self._step(), "a wait for an event that nobody records"


def failing(name: str, count: int, text: str = "CUDA_ERROR_UNKNOWN") -> dict[Any, Exception]:
    """For `FakeGpu.failures`: the call of that name after ``count`` others fails."""
    return {(name, count): DriverError(f"{name}: {text}")}
