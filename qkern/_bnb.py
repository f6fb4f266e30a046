"""A 4-bit weight as bitsandbytes keeps it, both ways.

A weight ``X`` lies as ``X`` (the packed bytes ``[n, 1]``), ``X.absmax``, ``X.quant_map`` (the code
table), with double quantisation ``X.nested_absmax`` and ``X.nested_quant_map``, and as
``X.quant_state.bitsandbytes__nf4`` (or ``__fp4``), which is JSON in uint8.

What bitsandbytes restores from such tensors is what qkern restores. It keeps 8-bit codes of scales
only where its own rule gives the same float32 for each; otherwise it restores them as bitsandbytes
does and keeps them in float32:

- The 256 values of those codes are computed where a weight is quantised, and not every processor
  rounds them alike. The file's own decode.
- After an evaluation on a processor with BF16 instructions bitsandbytes has rounded the scales to
  bfloat16, or to the weight's dtype, and restores them in it: ``nested_dtype`` says so. Scales that
  were not double-quantised it leaves transposed, ``[in / block_size, out]``, and whoever saves the
  weight past its layer has the packed codes in another order too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkern import _json, formats
from qkern.tensor import QuantizedTensor

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def names(name: str, state_key: str) -> list[str]:
    """All that bitsandbytes may keep of the weight ``name``."""
    return [name, state_key, *(f"{name}.{part}" for part in PARTS)]


def to_bnb(name: str, qw: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one weight as bitsandbytes keeps them, in the memory of ``qw``.

    Raises ValueError, naming the weight, for what bitsandbytes could not decode, a custom codebook
    or a long block, and on the meta device.
    """
    if qw.format == "custom":
        raise ValueError(f"{name}: bitsandbytes has no file layout for a custom codebook")
    if qw.block_size not in formats.BNB_BLOCK_SIZES:
        raise ValueError(
            f"{name}: block_size: got {qw.block_size}; bitsandbytes decodes blocks of up to "
            f"{formats.BNB_BLOCK_SIZES[-1]}"
        )
    if qw.packed.is_meta:
        raise ValueError(f"{name}: is on the meta device; takes a weight with values")
    state: dict[str, Any] = {
        "quant_type": qw.format,
        "blocksize": qw.block_size,
        "dtype": str(qw.dtype).removeprefix("torch."),
        "shape": list(qw.shape),
    }
    tensors = {
        name: qw.packed.view(-1, 1),
        f"{name}.absmax": qw.absmax,
        # bitsandbytes' FP4 table has +0.0 where qkern's has -0.0; adding 0.0 makes that step.
        f"{name}.quant_map": formats.code_tensor(qw.format, qw.device) + 0.0,
    }
    if qw.nested_absmax is not None and qw.nested_offset is not None:
        state["nested_blocksize"] = formats.NESTED_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = qw.nested_offset.item()
        tensors[f"{name}.nested_absmax"] = qw.nested_absmax
        # A copy, since the table is everybody's.
        tensors[f"{name}.nested_quant_map"] = formats.map_tensor("signed", qw.device).clone()
    text = list(json.dumps(state).encode())
    key = f"{name}.quant_state.bitsandbytes__{qw.format}"
    tensors[key] = torch.tensor(text, dtype=torch.uint8, device="cpu")
    return tensors


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight ``name`` of a state dict; ValueError where its tensors are not one weight."""
    own = [key for key in tensors if key.startswith(f"{name}.")]
    states = [key for key in own if key.startswith(f"{name}.quant_state.")]
    if len(states) != 1:
        found = " and ".join(states) or "none"
        raise ValueError(
            f"{name}: got {found}; takes one {name}.quant_state.bitsandbytes__nf4 or __fp4"
        )
    qw = read(name, states[0], tensors)
    if left := sorted(set(own) - set(names(name, states[0]))):
        raise ValueError(f"{left[0]}: is no part of a weight of bitsandbytes")
    return qw


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


class Nested(NamedTuple):
    """How scales are double-quantised."""

    absmax: Tensor
    map: Tensor
    offset: Tensor
    blocksize: int | None
    dtype: str | None


class Parts(NamedTuple):
    """A weight of bitsandbytes, of a file or of a layer."""

    packed: Tensor
    absmax: Tensor
    table: Tensor
    nested: Nested | None
    format: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read(name: str, state_key: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight ``name`` with its state at ``state_key``; ValueError for what is damaged."""
    state = _state(state_key, _get(tensors, state_key))
    for key in _STATE_KINDS:
        if key not in state:
            raise ValueError(f"{state_key}: has no {key}")
    _json.check_fields(state_key, state, _STATE_KINDS | _NESTED_KINDS)
    if not state_key.endswith(f"__{state['quant_type']}"):
        raise ValueError(f"{state_key}: quant_type: got {state['quant_type']!r}")
    absmax = _get(tensors, f"{name}.absmax")
    nested = None
    if "nested_offset" in state:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        nested = Nested(
            _get(tensors, f"{name}.nested_absmax"),
            _get(tensors, f"{name}.nested_quant_map"),
            offset,
            state.get("nested_blocksize"),
            state.get("nested_dtype"),
        )
    qw = assemble(
        name,
        Parts(
            _get(tensors, name),
            absmax,
            _get(tensors, f"{name}.quant_map"),
            nested,
            state["quant_type"],
            state["blocksize"],
            tuple(state["shape"]),
            getattr(torch, state["dtype"], None),  # type: ignore[arg-type]  # checked there
        ),
    )
    if nested is None:
        for part in (f"{name}.nested_absmax", f"{name}.nested_quant_map"):
            if part in tensors:
                raise ValueError(f"{state_key}: has no nested_offset, but there is {part}")
    return qw


def assemble(name: str, parts: Parts) -> QuantizedTensor:
    """The weight of these parts, in their memory as far as it is kept as it is."""
    packed, absmax = parts.packed, parts.absmax
    if packed.dtype not in _STORAGE_DTYPES:
        wanted = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _STORAGE_DTYPES))
        raise ValueError(f"{name}: got {packed.dtype}; takes {wanted}")
    if not formats.is_table(parts.table, formats.code_tensor(parts.format, "cpu")):
        raise ValueError(f"{name}.quant_map: differs from the table of that name")
    nested_absmax = nested_offset = None
    if (nested := parts.nested) is not None:
        _check_nested(name, nested)
        if nested.dtype == "float32" and is_own_map(nested.map):
            nested_absmax, nested_offset = nested.absmax, nested.offset
        else:
            absmax = _restored(name, absmax, nested)
    elif absmax.dim() == 2:
        packed, absmax = _for_inference(name, packed, absmax, parts)
    try:
        qw = QuantizedTensor(
            # Another storage dtype is the same bytes seen differently.
            packed=packed.view(torch.uint8).view(-1),
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
            codebook=None,
            format=parts.format,
            block_size=parts.block_size,
            shape=parts.shape,
            dtype=parts.dtype,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    for part, tensor in qw.tensors().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}: {part}: got NaN or infinity; takes finite scales")
    return qw


_NESTED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _check_nested(name: str, nested: Nested) -> None:
    if nested.blocksize != formats.NESTED_BLOCK_SIZE or nested.dtype not in _NESTED_DTYPES:
        raise ValueError(
            f"{name}: nested_blocksize, nested_dtype: got {nested.blocksize}, {nested.dtype}; "
            f"takes {formats.NESTED_BLOCK_SIZE} and {', '.join(_NESTED_DTYPES)}"
        )
    if not _is_like_own_map(nested.map):
        raise ValueError(
            f"{name}.nested_quant_map: differs from bitsandbytes' signed map by more than what "
            "another processor or a 16-bit dtype makes of it"
        )


def is_own_map(found: Tensor) -> bool:
    """Whether it is the signed map of 256 values that qkern's kernels decode scales by."""
    own = formats.map_tensor("signed", found.device)
    return found.dtype == own.dtype and torch.equal(found, own)


_LIKE_OWN_MAP = 1 / 32
"""What of a value may differ: computed in float16, the smallest are 2.5 % off, others less."""


def _is_like_own_map(found: Tensor) -> bool:
    """Whether it is the signed map, however it was rounded where it was computed."""
    own = formats.map_tensor("signed", "cpu").double()
    if found.shape != own.shape or not found.is_floating_point():
        return False
    values = found.to(own)
    near = (values - own).abs() <= own.abs() * _LIKE_OWN_MAP
    return bool(near.all() and (values[1:] > values[:-1]).all())


def _restored(name: str, codes: Tensor, nested: Nested) -> Tensor:
    """Scales in float32 as bitsandbytes restores them: in its ``nested_dtype``, rounded twice."""
    groups = formats.num_blocks(codes.numel(), formats.NESTED_BLOCK_SIZE)
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise ValueError(f"{name}.absmax: got {codes.dtype} {list(codes.shape)}; takes uint8 [n]")
    if nested.absmax.dtype != torch.float32 or tuple(nested.absmax.shape) != (groups,):
        got = f"{nested.absmax.dtype} {list(nested.absmax.shape)}"
        raise ValueError(f"{name}.nested_absmax: got {got}; takes float32 [{groups}]")
    dtype = _NESTED_DTYPES[nested.dtype or ""]
    factors = nested.absmax.repeat_interleave(formats.NESTED_BLOCK_SIZE)[: codes.numel()]
    scales = (nested.map.float()[codes.long()] * factors).to(dtype)
    return scales.add_(nested.offset).float()


ROWS = 32
"""Rows of the weight that bitsandbytes takes together for its kernel of BF16 instructions."""


def _for_inference(
    name: str, packed: Tensor, absmax: Tensor, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Codes and scales in their usual order, of a weight that was repacked for inference.

    The scales are bfloat16 ``[in / block_size, out]``. The codes are in the usual order already
    where they are ``[n, 1]``, as bitsandbytes' layers put them back for their state dict. Otherwise
    they are ``[out, in / 2]``, as `unpacked` takes them.
    """
    got = f"{absmax.dtype} {list(absmax.shape)}"
    if len(parts.shape) != 2 or parts.shape[1] % parts.block_size:
        raise ValueError(f"{name}.absmax: got {got}; takes one dimension for {list(parts.shape)}")
    rows, columns = parts.shape
    if absmax.dtype != torch.bfloat16 or absmax.shape != (columns // parts.block_size, rows):
        takes = [columns // parts.block_size, rows]
        raise ValueError(f"{name}.absmax: got {got}; takes one dimension, or bfloat16 {takes}")
    scales = absmax.T.reshape(-1).float()
    if packed.shape != (rows, columns // 2):
        return packed, scales
    if packed.dtype != torch.uint8 or rows % ROWS:
        raise ValueError(f"{name}: got {packed.dtype} {list(packed.shape)}; takes uint8 [n, 1]")
    return unpacked(packed), scales


def unpacked(packed: Tensor) -> Tensor:
    """The usual codes, uint8 ``[n / 2]``, of a weight that was repacked for inference.

    ``packed`` is uint8 ``[out, in / 2]`` with 32 rows together: byte j of 32 has the codes j and
    32 + j of 64, which are two columns of each row.
    """
    rows, half = packed.shape
    parcels = packed.reshape(rows // ROWS, half, ROWS)
    codes = torch.cat([parcels & 15, parcels >> 4], -1)
    pairs = codes.view(rows // ROWS, half, ROWS, 2).transpose(1, 2)
    return (pairs[..., 0] << 4 | pairs[..., 1]).reshape(-1)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """``tensors[name]``, detached: a state dict may hold parameters."""
    try:
        found = tensors[name]
    except KeyError:
        raise ValueError(f"{name}: is missing; bitsandbytes writes it with the weight") from None
    if not isinstance(found, Tensor):
        raise ValueError(f"{name}: got {type(found).__name__}; takes a torch.Tensor")
    return found.detach()


def _state(name: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)}; takes JSON as torch.uint8 [n]"
        )
    return _json.read_object(name, bytes(tensor.tolist()))
