"""The backend ``cpu``: the kernels of ``qkern._C`` on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern import reference
from qkern.backends import _args
from qkern.backends._backend import Product
from qkern.backends._compiled import (
    CompiledBackend,
    float_bits,
    product_numbers,
    reads_tensors,
)
from qkern.weight import Weight


class CpuBackend(CompiledBackend):
    """C++ kernels, of an instruction set that is chosen at run time."""

    def __init__(self, name: str = "cpu", library: Any = None) -> None:
        super().__init__(name, library)
        self.fast: dict[str, Callable[..., Any]] = {}
        if library is None and self.missing_reason() is None:
            self.fast = self._without_replaced(CpuBackend, _on_tensors(self.library()))

    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.library().isa())

    def available_isas(self) -> list[str]:
        """The instruction sets this build has and this processor runs, slowest first."""
        return list(self.library().available_isas())

    def set_isa(self, name: str) -> None:
        """Take an instruction set in the process; ``""`` is ``QKERN_CPU_ISA`` or the best.

        The `qkern.backends.use` of a block goes before.

        Raises ``ValueError`` when it is not available.
        """
        self.library().set_isa(name)

    def check_isa(self, name: str) -> None:
        """Raise ``ValueError`` unless the instruction set is available."""
        if name not in (available := self.available_isas()):
            raise ValueError(f"isa: got {name!r}; takes one of {', '.join(available)}")

    def has_matmul(self, dtype: torch.dtype) -> bool:
        """Whether torch's CPU matmuls in ``dtype`` run on instructions for it.

        Without them a 16-bit matmul is emulated, several times as slow as one in float32.
        """
        if dtype == torch.bfloat16:
            return self.missing_reason() is None and bool(self.library().multiplies_bfloat16())
        return dtype == torch.float32

    def linear_4bit_int8(
        self,
        x: Tensor,
        weight: Weight,
        out_features: int,
        bias: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.linear_4bit_int8``."""
        product = self._product("x", x, weight, out_features, bias, batch_invariant)
        if product is None:
            return reference.linear_4bit(x, weight, out_features, bias, batch_invariant)
        self._multiply(product._replace(int8=True))
        return product.out

    def grouped_linear_4bit(
        self, x: Tensor, weight: Weight, out_features: int, offsets: Tensor, *others: Any
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit``."""
        self._check_offsets(offsets, x)
        return super().grouped_linear_4bit(x, weight, out_features, offsets, *others)

    def grouped_linear_4bit_dx(
        self, dy: Tensor, weight: Weight, in_features: int, offsets: Tensor, *others: Any
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit_dx``."""
        self._check_offsets(offsets, dy)
        return super().grouped_linear_4bit_dx(dy, weight, in_features, offsets, *others)

    def _check_offsets(self, offsets: Tensor, x: Tensor) -> None:
        """Raise for numbers that the kernels must not be given; here they cost nothing to read."""
        _args.check_offsets(offsets, self._device_of(x))
        reference.groups(offsets, len(x))

    def linear_4bit_add(
        self,
        x: Tensor,
        weight: Weight,
        out_features: int,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        alpha: float = 1.0,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.linear_4bit_add``."""
        term = left, right, alpha, batch_invariant
        return self._add("x", x, weight, out_features, bias, *term)

    def linear_4bit_dx_add(
        self,
        dy: Tensor,
        weight: Weight,
        in_features: int,
        left: Tensor,
        right: Tensor,
        alpha: float = 1.0,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.linear_4bit_dx_add``."""
        return self._add("dy", dy, weight, in_features, None, left, right, alpha, batch_invariant)

    def grouped_linear_4bit_add(
        self,
        x: Tensor,
        weight: Weight,
        out_features: int,
        offsets: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        alpha: float = 1.0,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit_add``."""
        term = left, right, alpha, batch_invariant
        return self._add("x", x, weight, out_features, bias, *term, offsets)

    def grouped_linear_4bit_dx_add(
        self,
        dy: Tensor,
        weight: Weight,
        in_features: int,
        offsets: Tensor,
        left: Tensor,
        right: Tensor,
        alpha: float = 1.0,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit_dx_add``."""
        term = left, right, alpha, batch_invariant
        return self._add("dy", dy, weight, in_features, None, *term, offsets)

    def _add(
        self,
        name: str,
        x: Tensor,
        weight: Weight,
        features: int,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        alpha: float,
        batch_invariant: bool,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The product of ``x``, or of ``dy`` by its ``name``, with a term; by experts or not."""
        device = self._device_of(x)
        if offsets is None:
            _args.check_added(x, features, left, right, device)
        else:
            _args.check_grouped_added(x, features, offsets, left, right, device)
            self._check_offsets(offsets, x)
        product = self._product(name, x, weight, features, bias, batch_invariant, offsets)
        if product is None:
            grouped = () if offsets is None else (offsets,)
            op = "linear_4bit_dx_add" if name == "dy" else "linear_4bit_add"
            arguments = x, weight, features, *grouped, *(() if name == "dy" else (bias,))
            function = getattr(reference, f"grouped_{op}" if grouped else op)
            result: Tensor = function(*arguments, left, right, alpha, batch_invariant)
            return result
        if left.shape[1]:
            if left.stride(1) != 1 and left.shape[1] > 1:
                left = left.contiguous()
            product = product._replace(added=(left, right, alpha))
        self._multiply(product)
        return product.out

    def matmul_into(
        self, out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, accumulate: bool = False
    ) -> None:
        """See ``qkern.reference.matmul_into``; no other argument shares memory with ``out``."""
        device = self._device_of(out)
        _args.check_matmul_into(out, a, b, device)
        (m, n), k = out.shape, a.shape[1]
        if k == 0 or out.numel() == 0:
            reference.matmul_into(out, a, b, alpha, accumulate)
            return
        arguments: list[Any] = [out, _args.DTYPE_IDS[out.dtype], m, n, k, out.stride(0)]
        for matrix in (a, b):
            arguments += (matrix, _args.DTYPE_IDS[matrix.dtype], *matrix.stride())
        self._launch("matmul_into", device, *arguments, float_bits(alpha), accumulate)

    def _device_of(self, tensor: Tensor) -> torch.device:
        # Also where a caller has set another default device, such as meta.
        return _args.CPU

    def _start(self, op: str, device: torch.device, arguments: list[Any]) -> None:
        self._function(op)(*arguments, _args.num_threads())

    def _multiply(self, product: Product) -> None:
        op = "linear_4bit_dx" if product.dx else "linear_4bit"
        arguments = product_numbers(product)
        if product.int8:
            op += "_int8"
        elif product.added is not None:
            op += "_add"
            left, right, alpha = product.added
            arguments += (left.shape[1], left.data_ptr(), left.stride(0))
            arguments += (right.data_ptr(), *right.stride()[-2:], float_bits(alpha))
            if product.offsets is not None:
                arguments.append(right.stride(0))
        if product.offsets is not None:
            op = f"grouped_{op}"
        self._start(op, product.x.device, arguments)


def _on_tensors(library: Any) -> dict[str, Callable[..., Any]]:
    """The library's functions on tensors, by op; none where torch lacks the interface they need.

    They read plain CPU tensors themselves, in a fraction of the time that Python takes to ask for
    addresses and sizes. They take the op's arguments, a `qkern.weight.Weight` as one, then the
    number of threads; forward products also the ``in_features`` that ``x`` must have.
    ``linears_4bit`` takes tuples of weights, sizes and biases.
    """
    if not reads_tensors(library):
        return {}
    ops = (
        *("linear_4bit", "linear_4bit_int8", "linear_4bit_dx", "adamw_step", "matmul_into"),
        *("linear_4bit_add", "linear_4bit_dx_add"),
        *("grouped_linear_4bit", "grouped_linear_4bit_dx", "grouped_matmul_into"),
        *("grouped_linear_4bit_add", "grouped_linear_4bit_dx_add"),
    )
    found = {op: getattr(library, f"{op}_on_tensors") for op in ops}
    # No op: several of the first, by one reading of their input.
    return found | {"linears_4bit": library.linears_4bit_on_tensors}
