"""The device under test: the first GPU, or in a dry run the emulator, in its place on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from bench import gpu, timing

from lab.cuda.emulator import backend, build
from qkern import backends
from qkern.backends import _cuda_matmul
from qkern.backends._cuda_paths import Limits, Matmul
from qkern.testing import Target

Work = Callable[[], Any]

_SPIN_CYCLES = 20_000_000  # some 10 ms


class Gpu:
    """The first CUDA device, with the kernels of the backend ``cuda``, or ``triton``.

    Raises ``RuntimeError`` where that backend is missing.
    """

    dry = False

    def __init__(self, name: str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        torch.cuda.init()
        self.device = torch.device("cuda", 0)
        self.name = name
        if reason := backends.BACKENDS[name].missing_reason():
            raise RuntimeError(f"the backend {name}: {reason}")
        self.target = Target(name, None, "cuda")

    @property
    def library(self) -> Any:
        return backends.cuda.library()

    def context(self) -> contextlib.AbstractContextManager[None]:
        """In which tensors of the device take the kernels, and those of others what they take."""
        return contextlib.nullcontext()

    def clock(self) -> timing.Clock:
        """Times calls between which the L2 cache is filled with other data."""
        return gpu.EventClock(self.device, cold=True)

    def megahertz(self) -> float:
        """At which the processors run now, by a kernel that waits for a number of cycles."""
        clock = gpu.EventClock(self.device, cold=False)
        found = [clock(lambda: torch.cuda._sleep(_SPIN_CYCLES)) for _ in range(3)]
        return _SPIN_CYCLES / min(times.device for times in found) / 1e6

    def captured(self, work: Work) -> Work:
        """What runs the work again, captured in a CUDA graph; its result stays the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        """Runs what is inside on another stream, late: on the first one it would come too early."""
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            torch.cuda._sleep(_SPIN_CYCLES // 4)
            yield
        current.wait_stream(other)

    def others(self) -> list[torch.device]:
        """The other devices of this kind; another kind may sum in another order."""
        own = torch.cuda.get_device_name(0)
        devices = [torch.device("cuda", i) for i in range(1, torch.cuda.device_count())]
        return [d for d in devices if torch.cuda.get_device_name(d) == own]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Emulator:
    """The CUDA kernels on a CPU, of a Hopper GPU, which has every path.

    It has neither graphs nor streams: work is only done again.
    """

    dry = True

    def __init__(self, name: str = "cuda") -> None:
        self.device = torch.device("cpu")
        self.name = name
        self.library: Any = build.load(build.build("plain"))
        hopper = replace(backend.SCHEDULES[0], capability=90)
        self.target = backend.EmulatedTarget(self.library, hopper)

    def context(self) -> contextlib.AbstractContextManager[None]:
        return self.target.activate()

    def clock(self) -> timing.Clock:
        return timing.wall_clock

    def megahertz(self) -> float:
        """No figure: modelled times are as if of a thousand."""
        return 1000.0

    def captured(self, work: Work) -> Work:
        work()
        return work

    def other_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def others(self) -> list[torch.device]:
        return [self.device]

    def synchronize(self) -> None:
        pass


Device = Gpu | Emulator


def get(dry: bool, name: str = "cuda") -> Device:
    """The device of a run."""
    return Emulator(name) if dry else Gpu(name)


def limits(device: Device) -> Limits:
    """What the model of `_cuda_paths` knows of the device."""
    with device.target.activate():
        return _cuda_matmul.device_limits(device.library)


def chosen(device: Device, call: Matmul) -> str:
    """The path that a call takes, or is forced to; ``ValueError`` where it cannot take that."""
    with device.target.activate():
        return _cuda_matmul.choose(device.library, call, limits(device)).path
