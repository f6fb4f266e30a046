"""The backends whose kernels are in ``qkern._C``: how checked tensors become addresses."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qkern import formats
from qkern.backends import _args, _library
from qkern.backends._backend import Elements, KernelBackend, Product, without_term
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

    def _without_replaced(
        self, base: type[KernelBackend], found: dict[str, Callable[..., Any]]
    ) -> dict[str, Callable[..., Any]]:
        """The functions by op, but for those of ops that a subclass of ``base`` has replaced.

        A subclass with a method of its own wants that one called.
        """

        def is_own(op: str) -> bool:
            op = "linear_4bit" if op == "linears_4bit" else op
            names = {op, without_term(op)}
            return all(getattr(type(self), name) is getattr(base, name) for name in names)

        return {op: function for op, function in found.items() if is_own(op)}

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        """Call the library's function for an op on ``device``."""
        raise NotImplementedError

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        self._start(op, device, numbers(arguments))

    def _multiply_into(
        self, out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, alpha: float, accumulate: bool
    ) -> None:
        arguments: list[Any] = [out, _args.DTYPE_IDS[out.dtype], len(a), out.shape[-1], a.shape[1]]
        for matrix in (a, b):
            arguments += (matrix, _args.DTYPE_IDS[matrix.dtype], *matrix.stride()[-2:])
        arguments += (float_bits(alpha), accumulate, len(offsets), offsets)
        arguments += (offsets.dtype is torch.int64, b.dim() == 3, b.stride(0))
        self._launch("grouped_matmul_into", out.device, *arguments)


def _storage_functions() -> tuple[int, ...]:
    """The addresses of torch's C functions for a storage's size and a tensor's place in it.

    None where torch does not have them. They are symbols of a library that ``torch._C`` loads.
    """
    try:
        loaded = ctypes.CDLL(torch._C.__file__)
        names = ("aoti_torch_get_storage_size", "aoti_torch_get_storage_offset")
        found = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names]
    except (AttributeError, OSError):
        return ()
    return tuple(address for address in found if address is not None)


@functools.cache
def reads_tensors(library: Any) -> bool:
    """Whether the library can read tensors itself; torch may lack the interface that it needs."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    of_storage = _storage_functions()
    if api is None or not of_storage:
        return False
    probes = [torch.empty(1, device="cpu"), nn.Parameter(torch.empty(1, device="cpu"))]
    return bool(library.read_tensors_with(api, probes, *of_storage))


def product_numbers(product: Product) -> list[Any]:
    """What the library's matmuls take for ``product``, but for where it runs.

    Of a product by experts the offsets come last: how many, where, and whether they are int64.
    """
    x, bias = product.x, product.bias
    found: list[Any] = [x.data_ptr(), _args.DTYPE_IDS[x.dtype], product.rows, product.row_stride]
    found += weight_numbers(product.weight)
    found += (product.out_features, product.in_features)
    if not product.dx:
        found.append(None if bias is None else bias.data_ptr())
    found += (product.out.data_ptr(), product.batch_invariant)
    if (offsets := product.offsets) is not None:
        found += (len(offsets), offsets.data_ptr(), offsets.dtype is torch.int64)
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


def float_bits(value: float) -> int:
    """The bits of a number as float32; the library takes integers."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value
