"""The backends whose kernels are in ``qkern._C``: how checked tensors become addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qkern import formats
from qkern.backends import _args, _library
from qkern.backends._backend import Elements, KernelBackend, Product
from qkern.weight import Weight


class CompiledBackend(KernelBackend):
    """Kernels of a compiled library, ``qkern._C`` unless another is given."""

    def __init__(self, name: str, library: Any = None) -> None:
        super().__init__(name)
        self._library = library or _library.library
        self._functions: dict[str, Callable[..., Any]] = {}

    def missing_reason(self) -> str | None:
        """Why the kernels are missing, or None."""
        return _library.missing_reason if self._library is None else None

    def library(self) -> Any:
        """The compiled module; ``RuntimeError`` when it or the kernels are missing."""
        if reason := self.missing_reason():
            raise RuntimeError(f"the {self.name} kernels are missing: {reason}")
        return self._library

    def _function(self, name: str) -> Callable[..., Any]:
        """A function of the library, found once."""
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = getattr(self.library(), name)
        return found

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        """Call the library's function for an op on ``device``."""
        raise NotImplementedError

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        self._start(op, device, numbers(arguments))


def product_numbers(product: Product) -> list[Any]:
    """What the library's matmuls take for ``product``, but for where it runs."""
    x, bias = product.x, product.bias
    found: list[Any] = [x.data_ptr(), _args.DTYPE_IDS[x.dtype], product.rows, product.row_stride]
    found += weight_numbers(product.weight)
    found += (product.out_features, product.in_features)
    if not product.dx:
        found.append(None if bias is None else bias.data_ptr())
    found += (product.out.data_ptr(), product.batch_invariant)
    return found


def weight_numbers(weight: Weight) -> list[Any]:
    """The fields of a weight: addresses of its tensors, the format's id, the block size."""
    *tensors, format, block_size = weight
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return [*addresses, formats.FORMAT_IDS[format], block_size]


def numbers(arguments: Iterable[Any]) -> list[Any]:
    """Addresses, sizes and ids in place of tensors and names; None is an absent tensor."""
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int or argument is None:
            found.append(argument)
        elif isinstance(argument, Tensor):
            found.append(argument.data_ptr())
        elif kind is Elements:
            tensor = argument.tensor
            found += (tensor.data_ptr(), _args.DTYPE_IDS[tensor.dtype], tensor.numel())
        elif kind is Weight:
            found += weight_numbers(argument)
        elif kind is str:
            found.append(formats.FORMAT_IDS[argument])
        else:
            found.append(argument)
    return found
