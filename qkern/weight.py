"""`Weight`: a 4-bit weight as every op takes it, one object from the op's boundary down."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weight(NamedTuple):
    """What the ops read of a 4-bit weight; `qkern.QuantizedTensor` documents each field.

    ``torch.ops.qkern`` takes the fields one by one, in this order: ``op(x, *weight, ...)``. There,
    tensors of float32 may also be int32 with the same bits, which no framework casts,
    ``packed`` may have any shape and ``nested_offset`` one element in any; `canonical` undoes that,
    so that backends see the layout of `qkern.QuantizedTensor` alone.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: Tensor | None
    format: str
    block_size: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors, in order; absent ones are None."""
        return self[:5]

    @property
    def device(self) -> torch.device:
        """The device of the codes, which is that of all tensors."""
        return self.packed.device

    def is_canonical(self) -> bool:
        """Whether `canonical` changes nothing."""
        integer = torch.int32
        if self.nested_absmax is None or self.nested_offset is None:
            as_floats = self.absmax.dtype is not integer
        else:
            scales = self.nested_absmax.dtype, self.nested_offset.dtype
            as_floats = integer not in scales and self.nested_offset.dim() == 0
        if self.codebook is not None and self.codebook.dtype is integer:
            return False
        return as_floats and self.packed.dim() == 1

    def canonical(self) -> Weight:
        """The same memory as flat codes, float32 scales and codebook, an offset of shape ``[]``."""
        packed, absmax, nested_absmax, nested_offset, codebook, *layout = self
        if packed.dim() != 1:
            packed = packed.reshape(-1)
        if nested_offset is not None and nested_offset.dim() == 1 and nested_offset.numel() == 1:
            nested_offset = nested_offset.view(())
        floats = map(as_float32, (absmax, nested_absmax, nested_offset, codebook))
        return Weight(packed, *floats, *layout)  # type: ignore[arg-type]


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """An int32 tensor seen as the float32 whose bits it holds; anything else as it is."""
    if tensor is None or tensor.dtype is not torch.int32:
        return tensor
    return tensor.view(torch.float32)


SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
    " Tensor? codebook, str format, int block_size"
)
"""The fields as arguments of a torch op's schema."""
