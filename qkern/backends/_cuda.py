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
        return reason

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        with self._stream(device) as stream:
            self._function(f"cuda_{op}")(*arguments, stream)

    def _multiply(self, product: Product) -> None:
        with self._stream(product.x.device) as stream:
            _cuda_matmul.start(self.library(), stream, product)
