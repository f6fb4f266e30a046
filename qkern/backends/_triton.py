"""The backend ``triton``: ``qkern.triton_kernels`` on tensors of one CUDA or ROCm device.

For CUDA tensors where the native library has no CUDA kernels, and for AMD devices, which torch
calls CUDA too. Triton is imported when this backend is asked for, and it compiles a kernel at the
first call that needs it. Every op starts its kernels on the caller's current stream and returns.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkern.backends import _args
from qkern.backends._backend import Elements, KernelBackend, Product


@functools.cache
def _missing_reason() -> str | None:
    try:
        importlib.import_module("qkern.triton_kernels.codec")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


@functools.cache
def _kernels(op: str) -> ModuleType:
    """The file of an op; ``RuntimeError`` when Triton is missing."""
    if reason := _missing_reason():
        raise RuntimeError(f"the Triton kernels are missing: {reason}")
    return importlib.import_module(f"qkern.triton_kernels.{op}")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """``device`` made the current one, which is where Triton launches."""
    return torch.cuda.device(device)


@functools.cache
def target_of(device: torch.device) -> Any:
    """The ``qkern.triton_kernels.launch.Target`` of ``device``."""
    properties = torch.cuda.get_device_properties(device)
    launch = _kernels("launch")
    processors = properties.multi_processor_count
    if torch.version.hip:
        return launch.Target("hip", properties.gcnArchName.split(":")[0], processors)
    return launch.Target("cuda", properties.major * 10 + properties.minor, processors)


class TritonBackend(KernelBackend):
    """Triton kernels.

    ``on_device`` gives the context in which kernels for a device start, ``target_of`` its
    ``qkern.triton_kernels.launch.Target``.
    """

    def __init__(
        self,
        name: str = "triton",
        on_device: Callable[[torch.device], AbstractContextManager[Any]] = on_device,
        target_of: Callable[[torch.device], Any] = target_of,
    ) -> None:
        super().__init__(name)
        self._on_device, self._target_of = on_device, target_of

    def missing_reason(self) -> str | None:
        """Why it cannot run, or None; imports Triton."""
        return _missing_reason()

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        tensors = [a.tensor if isinstance(a, Elements) else a for a in arguments]
        with self._on_device(device):
            getattr(_kernels(op), op)(*tensors, self._target_of(device))

    def adamw_step(self, params: Sequence[Tensor], *args: Any) -> None:
        """See ``qkern.reference.adamw_step``."""
        device = params[0].device
        args = _args.with_adamw_defaults(args)
        pieces = _args.adamw_pieces(device, params, *args)
        if pieces:
            in_codes, seed = len(args[3]) > 0, args[6]
            self._launch("adamw_step", device, pieces, in_codes, seed, device)

    def _multiply_into(self, out: Tensor, *others: Any) -> None:
        self._launch("grouped_matmul_into", out.device, out, *others)

    def _multiply(self, product: Product) -> None:
        out = product.out.view(product.rows, -1)
        device = product.x.device
        op = "linear_4bit_dx" if product.dx else "linear_4bit"
        arguments: list[Any] = [product.x, product.weight]
        if not product.dx:
            arguments.append(product.bias)
        if product.offsets is not None:
            op = f"grouped_{op}"
            arguments.append(product.offsets)
        with self._on_device(device):
            kernel = getattr(_kernels(op), op)
            kernel(*arguments, out, self._target_of(device), product.batch_invariant)
