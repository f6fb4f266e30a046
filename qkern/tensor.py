"""QuantizedTensor: a 4-bit weight as plain tensors and static metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qkern import _errors, formats
from qkern.ops import call
from qkern.weight import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class Stored:
    """What a 4-bit tensor and a stack of them have in common: fields, and what needs no others."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: Tensor | None
    format: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    _product: ClassVar[str] = "linear_4bit"
    """What multiplies by it."""
    _others: ClassVar[str] = ""
    """What that takes besides, for an error."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        fields = [getattr(self, name) for name in Weight._fields]
        object.__setattr__(self, "_weight", Weight(*fields))
        _errors.check_format(self.format, self.codebook)
        _errors.check_block_size(self.block_size)
        _errors.check_float_dtype("dtype", self.dtype)
        for name, (dtype, shape) in self._takes().items():
            _errors.check_buffer(name, getattr(self, name), dtype, shape)
        for name, tensor in self.tensors().items():
            _errors.check_device(name, tensor, self.packed.device, "packed")
            # A kernel that reads memory would not see it. Of traced tensors one cannot ask.
            if not torch.compiler.is_compiling() and tensor.is_neg():
                raise ValueError(f"{name}: got a lazily negated tensor; takes its resolve_neg()")

    def _takes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of each tensor that there is, by field."""
        lead, n = self._lead(), math.prod(self.shape[len(self._lead()) :])
        blocks = formats.num_blocks(n, self.block_size)
        takes = {"packed": (torch.uint8, (*lead, formats.packed_size(n)))}
        if (self.nested_absmax is None) != (self.nested_offset is None):
            raise ValueError("nested_absmax, nested_offset: got only one; takes both or neither")
        if self.nested_absmax is None:
            takes["absmax"] = torch.float32, (*lead, blocks)
        else:
            groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
            takes["absmax"] = torch.uint8, (*lead, blocks)
            takes["nested_absmax"] = torch.float32, (*lead, groups)
            takes["nested_offset"] = torch.float32, lead
        if self.codebook is not None:
            takes["codebook"] = torch.float32, (16,)
        return takes

    def _lead(self) -> tuple[int, ...]:
        """Of how many tensors there are fields of their own."""
        return ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled state, checked as a new one is."""
        self.__dict__.update(state)
        self.__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """The fields that a new one is made of."""
        return {key: value for key, value in self.__dict__.items() if key != "_weight"}

    @property
    def weight(self) -> Weight:
        """What stands before ``shape``, for ``torch.ops.qkern.linear_4bit(x, *qw.weight, N)``."""
        found: Weight = self.__dict__["_weight"]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by field name."""
        return self.weight.named_tensors()

    @property
    def device(self) -> torch.device:
        """The device all tensors are on."""
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    @property
    def ndim(self) -> int:
        """Number of dimensions of ``shape``."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def numel(self) -> int:
        """Number of elements of ``shape``."""
        return math.prod(self.shape)

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Self:
        """This weight on ``device``; itself when nothing changes.

        ``dtype`` (float32, bfloat16 or float16, also as the only positional argument) changes what
        ``dequantize`` returns by default, never the stored codes and scales. What is beyond the
        dtype's range then dequantises to infinities, as a cast of a dense tensor gives them.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(
                    "to: got two dtypes; takes a device, a dtype, or both in this order"
                )
            device, dtype = None, device
        if dtype is not None:
            _errors.check_float_dtype("dtype", dtype)
        changes: dict[str, Any] = {}
        if device is not None:
            changes = {
                name: moved
                for name, tensor in self.tensors().items()
                if (moved := tensor.to(device, non_blocking=non_blocking)) is not tensor
            }
        if dtype not in (None, self.dtype):
            changes["dtype"] = dtype
        return replace(self, **changes) if changes else self

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuse torch's functions by name: none of them takes a 4-bit weight."""
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"{name}: got a {cls.__name__}; takes a Tensor. Use qkern.{cls._product}(x, weight"
            f"{cls._others}), or weight.dequantize()"
        )

    def __repr__(self) -> str:
        """Metadata only: printing never dequantises."""
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, format={self.format!r}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={self.dtype}, device={str(self.device)!r}, nbytes={self.nbytes})"
        )


class QuantizedTensor(Stored):
    """A tensor in 4 bits with blockwise scales; ``qkern.quantize_4bit`` makes one.

    Immutable. With ``n`` elements and ``blocks = ceil(n / block_size)``:

    ``packed``
        uint8 ``[ceil(n / 2)]``; element 2j of the row-major order is the high nibble of byte j.
    ``absmax``
        float32 ``[blocks]``, or uint8 ``[blocks]`` codes when double-quantised.
    ``nested_absmax``, ``nested_offset``
        float32 ``[ceil(blocks / 256)]`` and float32 ``[]``; None unless double-quantised. A
        block's scale is ``map[absmax] * nested_absmax + nested_offset``.
    ``codebook``
        float32 ``[16]`` for the format ``"custom"``, otherwise None.
    ``format``
        ``"nf4"``, ``"fp4"`` or ``"custom"``.
    ``block_size``
        elements that share a scale: a power of two from 32 to 16384.
    ``shape``
        the shape before quantisation; ``[out_features, in_features]`` for a linear layer.
    ``dtype``
        the dtype before quantisation, and the default for ``dequantize``.

    Raises ``TypeError`` or ``ValueError`` when the parts do not fit one another.
    """

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The values as a dense tensor of ``shape``: ``table[code] * absmax``, rounded once.

        ``dtype`` is float32, bfloat16 or float16 and defaults to ``out``'s, else to ``self.dtype``.
        ``out`` is a contiguous tensor of that dtype, this shape and this device to write into; it
        is returned. Raises ``TypeError`` or ``ValueError`` when it is not, and where ``out`` shares
        memory with this weight.
        """
        if out is None:
            if dtype is None:
                dtype = self.dtype
            else:
                _errors.check_float_dtype("dtype", dtype)
            return call("dequantize_4bit", self.weight, self.shape, dtype)
        _errors.check_float_tensor("out", out)
        if dtype is not None:
            _errors.check_float_dtype("dtype", dtype)
        _errors.check_buffer("out", out, dtype or out.dtype, self.shape)
        _errors.check_device("out", out, self.device, "the weight")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out: got a tensor that requires grad; takes one that does not")
        call("dequantize_4bit_out", self.weight, out)
        return out

    def to_bnb(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors that bitsandbytes keeps of this weight in a state dict, by name.

        ``name`` has the packed codes, uint8 ``[ceil(n / 2), 1]``; ``name.absmax`` the scales;
        ``name.quant_map`` float32 ``[16]``; with double quantisation ``name.nested_absmax`` and
        ``name.nested_quant_map`` float32 ``[256]``; and ``name.quant_state.bitsandbytes__nf4`` (or
        ``__fp4``) the rest as JSON in uint8, on the CPU. Codes and scales are this weight's own
        memory. ``bitsandbytes.functional.QuantState.from_dict`` takes all but the first, and a
        ``Linear4bit`` of either library loads them with ``load_state_dict``.

        Raises ``ValueError`` for a custom codebook, which bitsandbytes has no layout for, for a
        block size above 4096, which it does not decode, and on the meta device.
        """
        from qkern import _bnb  # it imports this module

        return _bnb.to_bnb(name, self)

    @classmethod
    def from_bnb(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
        """The weight ``name`` of a state dict that bitsandbytes wrote, or :meth:`to_bnb`.

        ``tensors`` may hold others beside it. Packed codes of any ``quant_storage`` are taken.
        Codes and scales stay in the memory they are in, unless the scales have to be restored to be
        what bitsandbytes restores: by a ``nested_quant_map`` that another processor computed, or in
        a 16-bit ``nested_dtype``, to which bitsandbytes rounds scales when it repacks weights for
        inference. They are float32 then, and the weight is not ``double_quant``. A weight that is
        repacked still is brought into the usual order.

        Raises ``ValueError``, naming the key, for what is missing, left over under ``name``, of
        another dtype or shape than it says, not finite, or by a table that is not
        bitsandbytes' own.
        """
        from qkern import _bnb

        return _bnb.from_bnb(name, tensors)


# torch.load by default refuses classes it does not know; this one only holds tensors.
torch.serialization.add_safe_globals([QuantizedTensor])
