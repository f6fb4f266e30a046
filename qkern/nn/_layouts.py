"""How a 4-bit weight lies in state dicts: as a module's parameters, and in two other layouts.

*Parameters*: all that is float32 in a :class:`~qkern.QuantizedTensor` (scales, offset, codebook)
is held as int32 with the same bits. Casts of a module, mixed-precision policies and the like change
floating parameters only, and a scale in 16 bits would no longer be this scale.

*bitsandbytes*: a 4-bit ``X.weight`` lies as ``X.weight`` (the packed bytes ``[n, 1]``),
``X.weight.absmax``, ``X.weight.quant_map`` (the code table), with double quantisation
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``, and as
``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), which is JSON in uint8.

*Version 0.1.0*: buffers ``packed`` ``[n]``, then ``absmax``, ``nested_absmax``, ``nested_offset``
(no dimension) and ``codebook`` in float32, and the same ``quant_meta`` as now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import _json, formats
from qkern.tensor import QuantizedTensor

PARAMETERS = ("weight", "absmax", "nested_absmax", "nested_offset", "codebook")
BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


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


def bnb_names(name: str, state_key: str) -> list[str]:
    """All that bitsandbytes may keep of the weight ``name``."""
    return [name, state_key, *(f"{name}.{part}" for part in BNB_PARTS)]


def to_bnb(path: str, qw: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one weight as bitsandbytes keeps them, by their suffix after ``weight``.

    Raises ValueError, naming ``path``, for a custom codebook.
    """
    if qw.format == "custom":
        raise ValueError(f"{path}: bitsandbytes has no file layout for a custom codebook")
    state: dict[str, Any] = {
        "quant_type": qw.format,
        "blocksize": qw.block_size,
        "dtype": str(qw.dtype).removeprefix("torch."),
        "shape": list(qw.shape),
    }
    # bitsandbytes' FP4 table has +0.0 where qkern's has -0.0; adding 0.0 makes that step.
    tensors = {
        "": qw.packed.view(-1, 1),
        ".absmax": qw.absmax,
        ".quant_map": formats.code_tensor(qw.format, "cpu") + 0.0,
    }
    if qw.nested_absmax is not None and qw.nested_offset is not None:
        state["nested_blocksize"] = formats.NESTED_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = qw.nested_offset.item()
        tensors[".nested_absmax"] = qw.nested_absmax
        tensors[".nested_quant_map"] = formats.map_tensor("signed", "cpu")
    text = list(json.dumps(state).encode())
    key = f".quant_state.bitsandbytes__{qw.format}"
    tensors[key] = torch.tensor(text, dtype=torch.uint8, device="cpu")
    return tensors


_STATE_KINDS = {
    "quant_type": _json.TEXT,
    "blocksize": _json.INTEGER,
    "dtype": _json.Kind("the name of a torch.dtype", _json.TEXT.fits),
    "shape": _json.SIZES,
}
_NESTED_KINDS = {
    "nested_blocksize": _json.INTEGER,
    "nested_dtype": _json.TEXT,
    "nested_offset": _json.NUMBER,
}
# bitsandbytes' choices of bnb_4bit_quant_storage.
_STORAGE_DTYPES = frozenset(
    {torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


def from_bnb(name: str, state_key: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight ``name``; ValueError where qkern's rule would not restore the same values."""
    state = _state(state_key, _get(tensors, state_key))
    for key in _STATE_KINDS:
        if key not in state:
            raise ValueError(f"{state_key}: has no {key}")
    _json.check_fields(state_key, state, _STATE_KINDS | _NESTED_KINDS)
    if not state_key.endswith(f"__{state['quant_type']}"):
        raise ValueError(f"{state_key}: quant_type: got {state['quant_type']!r}")
    _check_table(f"{name}.quant_map", tensors, formats.code_tensor(state["quant_type"], "cpu"))
    packed = _get(tensors, name)
    # Another storage dtype is the same bytes seen differently.
    if packed.dtype not in _STORAGE_DTYPES:
        wanted = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _STORAGE_DTYPES))
        raise ValueError(f"{name}: got {packed.dtype}; takes {wanted}")
    absmax = _get(tensors, f"{name}.absmax")
    nested_absmax = nested_offset = None
    if "nested_offset" in state:
        group = state.get("nested_blocksize"), state.get("nested_dtype")
        if group != (takes := (formats.NESTED_BLOCK_SIZE, "float32")):
            raise ValueError(
                f"{state_key}: nested_blocksize, nested_dtype: got {group}; takes {takes}"
            )
        _check_table(f"{name}.nested_quant_map", tensors, formats.map_tensor("signed", "cpu"))
        nested_absmax = _get(tensors, f"{name}.nested_absmax")
        nested_offset = torch.tensor(
            state["nested_offset"], dtype=torch.float32, device=absmax.device
        )
    try:
        qw = QuantizedTensor(
            packed=packed.view(torch.uint8).view(-1),
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
            codebook=None,
            format=state["quant_type"],
            block_size=state["blocksize"],
            shape=tuple(state["shape"]),
            dtype=getattr(torch, state["dtype"], None),  # type: ignore[arg-type]  # checked there
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    for part, tensor in qw.tensors().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}: {part}: got NaN or infinity; takes finite scales")
    if nested_absmax is None:
        for part in (f"{name}.nested_absmax", f"{name}.nested_quant_map"):
            if part in tensors:
                raise ValueError(f"{state_key}: has no nested_offset, but there is {part}")
    return qw


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """``tensors[name]``, detached: a state dict may hold parameters."""
    try:
        return tensors[name].detach()
    except KeyError:
        raise ValueError(f"{name}: is missing; bitsandbytes writes it with the weight") from None


def _state(name: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)}; takes JSON as torch.uint8 [n]"
        )
    return _json.read_object(name, bytes(tensor.tolist()))


def _check_table(name: str, tensors: Mapping[str, Tensor], expected: Tensor) -> None:
    if not torch.equal(_get(tensors, name).cpu(), expected):
        raise ValueError(f"{name}: differs from the table of that name; qkern reads only that")
