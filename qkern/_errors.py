"""Argument checks. Each error names the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import formats

FLOAT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_BLOCK_SIZES = frozenset(formats.BLOCK_SIZES)


def type_name(value: object) -> str:
    """The type as an error message shows it: a tensor's with its dtype."""
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(name: str, value: Any) -> None:
    """``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type_name(value)}; takes a torch.Tensor")


def check_float_tensor(name: str, value: Any) -> None:
    """``TypeError`` unless ``value`` is a dense float32, bfloat16 or float16 tensor."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}; takes float32, bfloat16 or float16")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}; takes a dense tensor")


def check_float_dtype(name: str, value: Any) -> None:
    """``TypeError`` unless ``value`` is the dtype float32, bfloat16 or float16."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: got {type_name(value)}; takes a torch.dtype")
    if value not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {value}; takes float32, bfloat16 or float16")


def check_buffer(name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Check a tensor whose dtype and shape are determined, and that it is contiguous."""
    check_tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name}: got {value.dtype}; takes {dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}; takes {list(shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: got strides {list(value.stride())}; takes a contiguous tensor")


def check_device(name: str, value: Tensor, device: torch.device, owner: str) -> None:
    """``ValueError`` unless ``value`` is on ``device``, where ``owner`` is."""
    if value.device != device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}; takes {device}, where {owner} is"
        )


def check_apart(name: str, value: Tensor, others: Mapping[str, Tensor]) -> None:
    """``ValueError`` where a tensor shares memory with another one, in part too.

    Gaps between a tensor's elements count as its memory. Those on meta have none.
    """
    begin, end = _memory(value)
    for place, other in others.items():
        first, last = _memory(other)
        if first < end and begin < last and not value.is_meta:
            raise ValueError(
                f"{name}: got a tensor that shares memory with {place}; takes one of its own"
            )


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one after its last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():  # the usual case, sooner
        return begin, begin + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) + 1
    return begin, begin + (last * tensor.itemsize if tensor.numel() else 0)


def check_block_size(value: Any) -> None:
    """Check a block size."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"block_size: got {type_name(value)}; takes an int")
    if value not in _BLOCK_SIZES:
        raise ValueError(
            f"block_size: got {value}; takes a power of two from "
            f"{formats.MIN_BLOCK_SIZE} to {formats.MAX_BLOCK_SIZE}"
        )


def check_format(format: Any, codebook: Tensor | None) -> None:
    """Check a format's name, and that a codebook comes with ``"custom"`` and only then."""
    if not isinstance(format, str):
        raise TypeError(f"format: got {type_name(format)}; takes a str")
    if format not in formats.FORMAT_IDS:
        raise ValueError(f"format: got {format!r}; takes one of {', '.join(formats.FORMATS)}")
    if (codebook is not None) != (format == "custom"):
        got = "None" if codebook is None else "a tensor"
        raise ValueError(
            f'codebook: got {got} with format="{format}"; takes a tensor with format="custom", '
            "otherwise None"
        )
