"""What the pager of GPU memory asks of a GPU's driver: `Driver`, and `CudaDriver` that does it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class DriverError(RuntimeError):
    """A call of the driver failed."""


class Driver(Protocol):
    """Memory, streams and events of GPUs; each method starts work and waits for none of it."""

    def takes(self, device: torch.device) -> bool:
        """Whether this is the driver of ``device``."""

    def why_not_managed(self, device: torch.device) -> str | None:
        """Why CPU and GPU cannot both use managed memory at a time; None where they can."""

    def managed(self, nbytes: int, device: torch.device) -> Tensor:
        """Managed memory as uint8 on ``device``, freed with its last view; ``DriverError``."""

    def pinned(self, nbytes: int) -> Tensor:
        """Page-locked host memory as uint8; raises ``RuntimeError``."""

    def on_device(self, nbytes: int, device: torch.device, streams: tuple[Any, ...]) -> Tensor:
        """Device memory as uint8 that ``streams`` will use; raises ``OutOfMemoryError``."""

    def advise(self, memory: Tensor) -> None:
        """Say that managed memory belongs on the host and that its device uses it there too."""

    def current_stream(self, device: torch.device) -> Any:
        """The stream that the device's kernels go to now."""

    def new_stream(self, device: torch.device) -> Any:
        """Another stream."""

    def record(self, stream: Any) -> Any:
        """An event after all that ``stream`` has been given."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what ``stream`` is given from here on come after ``event``."""

    def prefetch(self, memory: Tensor, to_host: bool, stream: Any) -> None:
        """Move managed memory to its device or to the host, in the order of ``stream``."""

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        """Copy between pinned and device memory, in the order of ``stream``."""

    def launch(self, memory: Tensor, work: Callable[[], object], stream: Any) -> None:
        """Call ``work``, which starts kernels on ``memory`` in the current stream, ``stream``."""

    def synchronize(self, stream: Any) -> None:
        """Wait until ``stream`` has done all."""

    def is_capturing(self, device: torch.device) -> bool:
        """Whether a CUDA graph is being captured."""


# From cuda.h; these numbers are part of the driver's binary interface.
_MANAGED_MEMORY = 83
_CONCURRENT_MANAGED_ACCESS = 89
_ATTACH_GLOBAL = 1
_PREFERRED_LOCATION = 3
_ACCESSED_BY = 5
_HOST = -1
_DEINITIALIZED = 4


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The driver's own library, which every machine with an NVIDIA GPU has."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        _declare(library)
    except (OSError, AttributeError):
        return None
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, number = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    library.cuDeviceGetAttribute.argtypes = [ctypes.POINTER(number), number, number]
    library.cuMemAllocManaged.argtypes = [ctypes.POINTER(pointer), size, ctypes.c_uint]
    library.cuMemFree_v2.argtypes = [pointer]
    library.cuMemAdvise.argtypes = [pointer, size, number, number]
    library.cuMemPrefetchAsync.argtypes = [pointer, size, number, ctypes.c_void_p]
    library.cuGetErrorName.argtypes = [number, ctypes.POINTER(ctypes.c_char_p)]


def _call(name: str, *arguments: object) -> None:
    library = _library()
    assert library is not None
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or str(status).encode()).decode()}")


class _ManagedMemory:
    """Owns managed memory; torch keeps it alive as long as there is a tensor of it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        address = ctypes.c_uint64()
        self._device = device
        _call("cuMemAllocManaged", ctypes.byref(address), nbytes, _ATTACH_GLOBAL)
        self._address = address.value
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        address, self._address = getattr(self, "_address", 0), 0
        if address:
            # Kernels may still be using it. At the end of the process the driver may have gone
            # before, and the memory with it.
            with contextlib.suppress(RuntimeError, DriverError), torch.cuda.device(self._device):
                torch.cuda.synchronize()
                _call("cuMemFree_v2", address)


class CudaDriver:
    """`Driver` by ``torch.cuda`` and, for managed memory, NVIDIA's driver; not on ROCm."""

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def why_not_managed(self, device: torch.device) -> str | None:
        if _library() is None:
            return "no libcuda.so.1"
        torch.cuda.init()
        for attribute, missing in (
            (_MANAGED_MEMORY, "no managed memory"),
            (_CONCURRENT_MANAGED_ACCESS, "no concurrent managed access"),
        ):
            value = ctypes.c_int()
            try:
                _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, _index(device))
            except DriverError as error:
                return str(error)
            if not value.value:
                return missing
        return None

    def managed(self, nbytes: int, device: torch.device) -> Tensor:
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes the device's context current
            return torch.as_tensor(_ManagedMemory(nbytes, device), device=device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def on_device(self, nbytes: int, device: torch.device, streams: tuple[Any, ...]) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        for stream in streams:
            memory.record_stream(stream)
        return memory

    def advise(self, memory: Tensor) -> None:
        for advice, device in ((_PREFERRED_LOCATION, _HOST), (_ACCESSED_BY, memory.device)):
            number = device if isinstance(device, int) else _index(device)
            _call("cuMemAdvise", memory.data_ptr(), memory.numel(), advice, number)

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def prefetch(self, memory: Tensor, to_host: bool, stream: Any) -> None:
        place = _HOST if to_host else _index(memory.device)
        with torch.cuda.device(memory.device):
            arguments = (memory.data_ptr(), memory.numel(), place, stream.cuda_stream)
            _call("cuMemPrefetchAsync", *arguments)

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def launch(self, memory: Tensor, work: Callable[[], object], stream: Any) -> None:
        work()

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def is_capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()


def _index(device: torch.device) -> int:
    """The driver's number of a device, which is torch's own."""
    return torch.cuda.current_device() if device.index is None else device.index


current: Driver = CudaDriver()
"""The driver that pagers made from now on ask."""
