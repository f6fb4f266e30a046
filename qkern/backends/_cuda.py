"""The backend ``cuda``: the kernels of ``qkern._C`` on tensors of one CUDA device.

Every op starts its kernels on the caller's current stream of the tensors' device and returns:
nothing waits, and memory comes from torch's allocator, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from qkern.backends import _cuda_matmul
from qkern.backends._backend import Product
from qkern.backends._compiled import CompiledBackend


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


def unfit_reason(library: Any) -> str | None:
    """Why the driver or a device cannot run the library's kernels, or None.

    Devices are asked for only once torch has initialised CUDA: to do so here would keep a process
    from forking. A library that does not tell its versions runs anywhere.
    """
    if not hasattr(library, "cuda_versions"):
        return None
    driver, runtime, architectures = library.cuda_versions()
    if 0 < driver // 1000 < runtime // 1000:
        wanted = f"qkern._C needs one for CUDA {runtime // 1000}.0 or newer"
        return f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}; {wanted}"
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    for index in range(devices):
        major, minor = torch.cuda.get_device_capability(index)
        if not has_code(10 * major + minor, architectures, driver >= runtime):
            where = f"cuda:{index}, compute capability {major}.{minor}"
            return f"qkern._C has no code for {where}: it was built for {architectures}"
    return None


class CudaBackend(CompiledBackend):
    """CUDA kernels. Whether there is a device shows when a kernel starts.

    ``stream`` gives for a device the context in which kernels start, and the stream's address.
    """

    def __init__(
        self,
        name: str = "cuda",
        library: Any = None,
        stream: Callable[[torch.device], AbstractContextManager[int]] = current_stream,
    ) -> None:
        super().__init__(name, library)
        self._stream = stream

    def missing_reason(self) -> str | None:
        """Why the kernels are missing, or None."""
        reason = super().missing_reason()
        if reason is None and not hasattr(self._library, "cuda_linear_4bit"):
            return "qkern._C was built without CUDA kernels"
        return reason or unfit_reason(self._library)

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        with self._stream(device) as stream:
            self._function(f"cuda_{op}")(*arguments, stream)

    def _multiply(self, product: Product) -> None:
        with self._stream(product.x.device) as stream:
            _cuda_matmul.start(self.library(), stream, product)
