"""`Weight`: a 4-bit weight as every op takes it, one object from the op's boundary down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qkern import formats


class Weight(NamedTuple):
    """What the ops read of a 4-bit weight; `qkern.QuantizedTensor` documents each field.

    ``torch.ops.qkern`` takes the fields one by one, in this order: ``op(x, *weight, ...)``. There,
    tensors of float32 may also be int32 with the same bits, which no framework casts,
    ``packed`` may be contiguous in any shape and ``nested_offset`` one element in any; `canonical`
    undoes that, so that backends see the layout of `qkern.QuantizedTensor` alone.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: Tensor | None
    format: str
    block_size: int

    def of_expert(self, index: int, numel: int) -> Weight:
        """One of several weights of ``numel`` elements, whose fields lie one after the other."""
        blocks = formats.num_blocks(numel, self.block_size)
        groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
        sizes = formats.packed_size(numel), blocks, groups, 1
        fields: list[Any] = [
            None if field is None else field.reshape(-1).narrow(0, index * size, size)
            for field, size in zip(self[:4], sizes, strict=True)
        ]
        if self.nested_offset is not None:
            fields[3] = fields[3].reshape(())
        fields += self[4:]
        return Weight(*fields)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors, in order; absent ones are None."""
        return self[:5]

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by field."""
        named = zip(Weight._fields, self[:5], strict=False)
        return {field: tensor for field, tensor in named if tensor is not None}

    @property
    def device(self) -> torch.device:
        """The device of the codes, which is that of all tensors."""
        return self.packed.device

    def is_canonical(self) -> bool:
        """Whether `canonical` changes nothing."""
        packed, absmax, nested_absmax, nested_offset, codebook, *_ = self
        integer = torch.int32
        if codebook is not None and codebook.dtype is integer:
            return False
        if nested_absmax is None:
            return absmax.dtype is not integer and packed.dim() == 1
        if nested_absmax.dtype is integer or nested_offset is None:
            return False
        return nested_offset.dtype is not integer and nested_offset.dim() == 0 and packed.dim() == 1

    def canonical(self) -> Weight:
        """The same memory as flat codes, float32 scales and codebook, an offset of shape ``[]``."""
        packed, absmax, nested_absmax, nested_offset, codebook, *layout = self
        if packed.dim() != 1 and packed.is_contiguous():
            packed = packed.view(-1)
        if nested_absmax is None:
            absmax = as_float32(absmax)
        if nested_offset is not None and nested_offset.dim() and nested_offset.numel() == 1:
            nested_offset = nested_offset.reshape(())
        nested = as_float32(nested_absmax), as_float32(nested_offset), as_float32(codebook)
        return Weight(packed, absmax, *nested, *layout)  # type: ignore[arg-type]


_Tensor = TypeVar("_Tensor", Tensor, "Tensor | None")


def as_float32(tensor: _Tensor) -> _Tensor:
    """An int32 tensor seen as the float32 whose bits it holds; anything else as it is."""
    if tensor is None or tensor.dtype is not torch.int32:
        return tensor
    return tensor.view(torch.float32)


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an op's argument, with names: itself, a weight's, a list's."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Weight):
        yield from value.named_tensors().items()
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_of(f"{name}[{index}]", item)


SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
    " Tensor? codebook, str format, int block_size"
)
"""The fields as arguments of a torch op's schema."""
