"""The backend ``cuda``: the kernels of ``qkern._C`` on tensors of one CUDA device.

Every op starts its kernels on the caller's current stream of the tensors' device and returns:
nothing waits, and memory comes from torch's allocator, so a CUDA graph can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from qkern.backends import _cuda_matmul
from qkern.backends._backend import Product
from qkern.backends._compiled import CompiledBackend, reads_tensors

_DLPACK_CUDA = 2
"""DLPack's number for CUDA devices."""
_KEPT_WAYS = 4096
"""Of how many shapes it is kept how they are computed."""


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """``device`` made the current one, and the address of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def has_code(capability: int, architectures: str, jit: bool) -> bool:
    """Whether a build for ``architectures`` runs on a device.

    ``capability`` is major * 10 + minor; ``architectures`` are words as CMake's, ``90-real`` for
    machine code and ``90-virtual`` for PTX, which counts only where the driver compiles it
    (``jit``). CUDA C++ Programming Guide, Binary Compatibility and PTX Compatibility.
    """
    for word in architectures.split():
        number, kind = word.split("-")
        built = int(number)
        if built > capability:
            continue
        if jit if kind == "virtual" else built // 10 == capability // 10:
            return True
    return False


def _driver_reason(library: Any) -> str | None:
    """Why the driver cannot run the library's kernels, or None."""
    try:
        driver, runtime, _ = library.cuda_versions()
    except RuntimeError as error:
        return f"CUDA does not tell its versions: {error}"
    if 0 < driver // 1000 < runtime // 1000:
        wanted = f"qkern._C needs one for CUDA {runtime // 1000}.0 or newer"
        return f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}; {wanted}"
    return None


class CudaBackend(CompiledBackend):
    """CUDA kernels. Whether there is a device shows when a kernel starts.

    ``stream`` gives for a device the context in which kernels start, and the stream's address.
    ``device_type`` is DLPack's number for the devices of tensors that the library may read itself,
    with torch's own current streams; None is for none.
    """

    def __init__(
        self,
        name: str = "cuda",
        library: Any = None,
        stream: Callable[[torch.device], AbstractContextManager[int]] = current_stream,
        device_type: int | None = _DLPACK_CUDA,
    ) -> None:
        super().__init__(name, library)
        self._stream = stream
        self._unfit: dict[int, str | None] = {}
        """By device, once that is known."""
        self._missing: list[str | None] = []
        """The answer of `missing_reason`, once it can change no more."""
        self.fast: dict[str, Callable[..., Any]] = {}
        on_tensors = getattr(self._library, "cuda_on_tensors", None)
        if on_tensors is not None and device_type is not None and reads_tensors(self._library):
            way = functools.partial(_cuda_matmul.way_of_its_own, self._library)
            found = on_tensors(functools.lru_cache(_KEPT_WAYS)(way), device_type)
            self.fast = self._without_replaced(CudaBackend, found)

    def missing_reason(self) -> str | None:
        """Why the kernels are missing, too new for the driver, or for none of the devices; or None.

        Devices are asked for only once torch has initialised CUDA: to do so here would keep a
        process from forking.
        """
        if self._missing:
            return self._missing[0]
        reason = super().missing_reason()
        if reason is None and not hasattr(self._library, "cuda_linear_4bit"):
            reason = "qkern._C was built without CUDA kernels"
        if reason is None and hasattr(self._library, "cuda_versions"):
            reason = _driver_reason(self._library)
        if reason is None:
            if not torch.cuda.is_initialized():
                return None
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
            reasons = [self.unfit_reason(device) for device in devices]
            reason = reasons[0] if reasons and all(reasons) else None
        self._missing.append(reason)
        return reason

    def unfit_reason(self, device: torch.device) -> str | None:
        """Why the kernels cannot run on ``device``, or None.

        A library that does not tell its versions runs anywhere.
        """
        versions = getattr(self._library, "cuda_versions", None)
        if versions is None or not torch.cuda.is_initialized():
            return None
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._unfit:
            driver, runtime, architectures = versions()
            major, minor = torch.cuda.get_device_capability(index)
            runs = has_code(10 * major + minor, architectures, driver >= runtime)
            where = f"cuda:{index}, compute capability {major}.{minor}"
            reason = f"qkern._C has no code for {where}: it was built for {architectures}"
            self._unfit[index] = None if runs else reason
        return self._unfit[index]

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        with self._stream(device) as stream:
            self._function(f"cuda_{op}")(*arguments, stream)

    def _multiply(self, product: Product) -> None:
        with self._stream(product.x.device) as stream:
            _cuda_matmul.start(self.library(), stream, product)
