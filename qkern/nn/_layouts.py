"""How a 4-bit weight lies in state dicts: as a module's parameters, and as of version 0.1.0.

`qkern._bnb` has the layout of bitsandbytes.

*Parameters*: all that is float32 in a :class:`~qkern.QuantizedTensor` (scales, offset, codebook)
is held as int32 with the same bits. Casts of a module, mixed-precision policies and the like change
floating parameters only, and a scale in 16 bits would no longer be this scale.

*Version 0.1.0*: buffers ``packed`` ``[n]``, then ``absmax``, ``nested_absmax``, ``nested_offset``
(no dimension) and ``codebook`` in float32, and the same ``quant_meta`` as now.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern.tensor import QuantizedTensor

PARAMETERS = ("weight", "absmax", "nested_absmax", "nested_offset", "codebook")


def as_bits(tensor: Tensor) -> Tensor:
    """A float32 tensor as int32 with the same bits, in the same memory; others as they are."""
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def to_parameters(qw: QuantizedTensor) -> dict[str, Tensor | None]:
    """The tensors of ``qw`` as a module holds them, in the same memory, by parameter name."""
    return {
        "weight": qw.packed.view(-1, 1),
        "absmax": as_bits(qw.absmax),
        "nested_absmax": None if qw.nested_absmax is None else as_bits(qw.nested_absmax),
        # FSDP2 does not shard what has no dimension.
        "nested_offset": None if qw.nested_offset is None else as_bits(qw.nested_offset.view(1)),
        "codebook": None if qw.codebook is None else as_bits(qw.codebook),
    }


_FLOATS_IN_0_1_0 = ("absmax", "nested_absmax", "nested_offset", "codebook")


def from_0_1_0(state: dict[str, Any], prefix: str) -> None:
    """Give what version 0.1.0 wrote the names and dtypes of parameters, in place.

    Raises ValueError where a tensor is not in the dtype that it was written in.
    """
    for name in ("packed", *_FLOATS_IN_0_1_0):
        tensor = state.get(prefix + name)
        takes = {torch.uint8} if name == "packed" else {torch.float32}
        if name == "absmax":
            takes.add(torch.uint8)
        if isinstance(tensor, Tensor) and tensor.dtype not in takes:
            wanted = " or ".join(sorted(map(str, takes)))
            raise ValueError(f"{prefix}{name}: got {tensor.dtype}; takes {wanted}")
    state[prefix + "weight"] = state.pop(prefix + "packed").reshape(-1, 1)
    for name in _FLOATS_IN_0_1_0:
        tensor = state.get(prefix + name)
        if isinstance(tensor, Tensor):
            state[prefix + name] = as_bits(tensor.view(1) if tensor.dim() == 0 else tensor)
