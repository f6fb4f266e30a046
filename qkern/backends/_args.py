"""Checks of the tensors whose addresses kernels are given.

The kernels see addresses, sizes and strides and trust them, so everything a wrong tensor could do
to memory is checked here: dtype, device, layout and number of elements of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import _errors, formats
from qkern.backends import _library
from qkern.reference import ADAMW_FACTORS
from qkern.weight import Weight

DTYPE_IDS = {getattr(torch, name): index for index, name in enumerate(formats.DTYPES)}
_FORMAT_IDS = formats.FORMAT_IDS
_BLOCK_SIZES = frozenset(formats.BLOCK_SIZES)

CPU = torch.device("cpu")

num_threads = torch.get_num_threads
"""How many threads a kernel takes: always torch's own setting."""


_KINDS = {
    torch.float32: 0x220,
    torch.float16: 0x210,
    torch.bfloat16: 0x410,
    torch.uint8: 0x108,
    torch.int32: 0x020,
    torch.int64: 0x040,
}
"""Dtypes as the library's ``tensor_holds`` takes them."""


def _unknown(*tensor: object) -> bool:
    """In place of the library's answers where there is no library: never yes."""
    return False


# One call in place of several of Python's, for which a small tensor would wait. Where they do not
# say yes, nothing is known.
_holds: Callable[..., bool] = getattr(_library.library, "tensor_holds", _unknown)
_has_memory: Callable[[Tensor], bool] = getattr(_library.library, "tensor_has_memory", _unknown)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    # Comparing devices takes three times as long.
    return tensor.is_cpu if device is CPU else tensor.device == device


def check_memory(name: str, value: Tensor) -> None:
    """``ValueError`` unless the storage of a dense tensor has all its elements.

    Frameworks free or shrink the storage of a tensor that lives on, as FSDP does between layers.
    Of a traced tensor nothing is asked.
    """
    if _has_memory(value):
        return
    # Of what need not be contiguous, elements may overlap or lie apart.
    first, numel = value.storage_offset(), value.numel()
    if numel and not value.is_contiguous():
        steps = zip(value.shape, value.stride(), strict=True)
        numel = sum((size - 1) * stride for size, stride in steps) + 1
    takes = (first + numel) * value.itemsize
    got = value.untyped_storage().nbytes()
    if got < takes and numel:
        raise ValueError(
            f"{name}: got a tensor whose storage has {got} bytes, as after resize_(); takes one of "
            f"{takes} bytes or more"
        )


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device = CPU
) -> None:
    """Raise unless the tensor is contiguous, on ``device``, and has ``numel`` of ``dtype``.

    Its storage must have all of them, too. Raises ``TypeError`` for another dtype, otherwise
    ``ValueError``.
    """
    if _holds(tensor, _KINDS.get(dtype), numel) and _is_on(tensor, device):
        return
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: got {tensor.dtype}; takes {dtype}")
    if not _is_on(tensor, device):
        raise ValueError(f"{name}: got a tensor on {tensor.device}; takes one on {device}")
    if tensor.numel() != numel:
        raise ValueError(f"{name}: got {tensor.numel()} elements; takes {numel}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}; takes a contiguous tensor")
    check_memory(name, tensor)


def pointer(
    name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device = CPU
) -> int:
    """The address of a tensor that `check` lets pass."""
    check(name, tensor, dtype, numel, device)
    return tensor.data_ptr()


def dtype_id(name: str, dtype: torch.dtype) -> int:
    """The kernels' number of a floating dtype."""
    found = DTYPE_IDS.get(dtype)
    if found is None:
        raise TypeError(f"{name}: got {dtype}; takes float32, bfloat16 or float16")
    return found


def check_format(format: str, codebook: Tensor | None, device: torch.device = CPU) -> None:
    """Raise unless the format is known and has a codebook just where it needs one."""
    if format not in _FORMAT_IDS or (codebook is None) == (format == "custom"):
        _errors.check_format(format, codebook)
        raise AssertionError("unreachable: check_format raises")
    if codebook is not None:
        check("codebook", codebook, torch.float32, 16, device)


def block_size_arg(block_size: int) -> int:
    """The block size, checked."""
    # Of another type, 64.0 is found in the set too.
    if type(block_size) is not int or block_size not in _BLOCK_SIZES:
        _errors.check_block_size(block_size)
    return block_size


def check_weight(weight: Weight, numel: int, device: torch.device = CPU, experts: int = 1) -> None:
    """Raise unless ``weight`` has ``numel`` elements, with the scales that they need.

    Of several ``experts`` it has those of each, one after the other.
    """
    packed, absmax, nested_absmax, nested_offset, codebook, format, block_size = weight
    check_format(format, codebook, device)
    blocks = formats.num_blocks(numel, block_size_arg(block_size))
    groups = experts * formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    blocks *= experts
    check("packed", packed, torch.uint8, experts * formats.packed_size(numel), device)
    if nested_absmax is None or nested_offset is None:
        if nested_absmax is not nested_offset:
            raise ValueError("nested_absmax, nested_offset: got only one; takes both or neither")
        check("absmax", absmax, torch.float32, blocks, device)
        return
    check("absmax", absmax, torch.uint8, blocks, device)
    check("nested_absmax", nested_absmax, torch.float32, groups, device)
    check("nested_offset", nested_offset, torch.float32, experts, device)


def check_offsets(offsets: Tensor, device: torch.device = CPU) -> int:
    """Of how many experts ``offsets`` says where their rows end; raise unless kernels can read it.

    What numbers it holds is not looked at.
    """
    if offsets.dim() != 1:
        raise ValueError(f"offsets: got shape {list(offsets.shape)}; takes [experts]")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: got {offsets.dtype}; takes torch.int32 or torch.int64")
    check("offsets", offsets, offsets.dtype, offsets.numel(), device)
    return offsets.numel()


def float_input(name: str, x: Tensor, device: torch.device = CPU) -> Tensor:
    """``x`` contiguous, of a floating dtype that kernels read."""
    if x.dtype not in DTYPE_IDS:
        dtype_id(name, x.dtype)
    if not _is_on(x, device):
        check(name, x, x.dtype, x.numel(), device)
    check_memory(name, x)
    return x.contiguous()


def rows(name: str, x: Tensor, width: int, device: torch.device = CPU) -> tuple[Tensor, int, int]:
    """``(matrix, rows, row stride)`` of ``x``'s trailing dimension over all the others.

    The matrix has unit inner stride and is ``x``'s own memory where its strides allow that; keep it
    alive while its address is in use. A row stride may be 0 (an expanded ``x``).
    """
    if not _is_on(x, device):
        raise ValueError(f"{name}: got a tensor on {x.device}; takes one on {device}")
    check_memory(name, x)
    if x.dim() != 2:
        x = x.reshape(-1, width)
    if x.stride(1) != 1 and width > 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def check_matmul_into(out: Tensor, a: Tensor, b: Tensor, device: torch.device = CPU) -> None:
    """Raise unless ``out`` can take the product of ``a`` and ``b``, matrices on ``device``.

    Their dtypes are any of three, the strides of ``a`` and ``b`` are any. A row of ``out`` is of
    adjacent elements, and no part of its memory is another row's or another matrix's.
    """
    for name, tensor in (("out", out), ("a", a), ("b", b)):
        dtype_id(name, tensor.dtype)
        _check_matrix(name, tensor, device)
    (m, n), k = out.shape, a.shape[1]
    _check_shapes(a=(a, m, k), b=(b, k, n))
    row_stride, column_stride = out.stride()
    if (n > 1 and column_stride != 1) or (m > 1 and row_stride < n):
        raise ValueError(
            f"out: got strides {list(out.stride())}; takes rows of adjacent elements, apart from "
            "one another"
        )
    _errors.check_apart("out", out, {"a": a, "b": b})


def check_added(
    x: Tensor, features: int, left: Tensor, right: Tensor, device: torch.device = CPU
) -> None:
    """Raise unless ``left @ right`` is float32 on ``device``, ``features`` for each row of x."""
    for name, tensor in (("left", left), ("right", right)):
        if tensor.dtype is not torch.float32:
            raise TypeError(f"{name}: got {tensor.dtype}; takes {torch.float32}")
        _check_matrix(name, tensor, device)
    rank = left.shape[1]
    _check_shapes(left=(left, math.prod(x.shape[:-1]), rank), right=(right, rank, features))


def check_grouped_added(
    x: Tensor, features: int, offsets: Tensor, left: Tensor, right: Tensor, device: torch.device
) -> None:
    """The same of a term by experts: ``right`` is one for each of ``offsets``."""
    for name, tensor in (("left", left), ("right", right)):
        if tensor.dtype is not torch.float32:
            raise TypeError(f"{name}: got {tensor.dtype}; takes {torch.float32}")
    _check_matrix("left", left, device)
    _check_place("right", right, device)
    _check_shape("left", left, (len(x), left.shape[1]))
    _check_shape("right", right, (check_offsets(offsets, device), left.shape[1], features))


def check_grouped_matmul_into(
    out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, device: torch.device = CPU
) -> None:
    """Raise unless ``out`` can take the products by experts of ``a`` and ``b``, on ``device``.

    As `check_matmul_into`; what the numbers of ``offsets`` are is not looked at.
    """
    for name, tensor in (("out", out), ("a", a), ("b", b)):
        dtype_id(name, tensor.dtype)
        _check_place(name, tensor, device)
    _check_matrix("a", a, device)
    if b.dim() not in (2, 3):
        raise ValueError(f"b: got shape {list(b.shape)}; takes two or three dimensions")
    experts, (m, k) = check_offsets(offsets, device), a.shape
    if b.dim() == 3:
        _check_shape("b", b, (experts, k, b.shape[2]))
        _check_shape("out", out, (m, b.shape[2]))
    else:
        _check_shape("b", b, (m, b.shape[1]))
        _check_shape("out", out, (experts, k, b.shape[1]))
    if out.numel() and not out.is_contiguous():
        raise ValueError(f"out: got strides {list(out.stride())}; takes a contiguous tensor")
    _errors.check_apart("out", out, {"a": a, "b": b})


def _check_matrix(name: str, tensor: Tensor, device: torch.device) -> None:
    _check_place(name, tensor, device)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes a matrix")


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if not _is_on(tensor, device):
        raise ValueError(f"{name}: got a tensor on {tensor.device}; takes one on {device}")
    check_memory(name, tensor)


def _check_shapes(**expected: tuple[Tensor, int, int]) -> None:
    """Of matrices by name, each with its rows and columns."""
    for name, (matrix, *takes) in expected.items():
        _check_shape(name, matrix, takes)


def _check_shape(name: str, tensor: Tensor, takes: Sequence[int]) -> None:
    if list(tensor.shape) != list(takes):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes {list(takes)}")


def with_adamw_defaults(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of ``adamw_step`` after the first, with those left out at the end."""
    return (*args, *(None, (), ())[len(args) - 6 :])


def adamw_pieces(
    device: torch.device, params: Sequence[Tensor], *args: Any
) -> list[tuple[int | None, ...]]:
    """For each parameter seven addresses (None is absent), dtype, elements, index and offset.

    Parameters without elements are left out. Takes all arguments of the op ``adamw_step``.
    """
    *lists_of_tensors, factors, _, indices, offsets = args
    grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes = lists_of_tensors
    in_codes = len(exp_avg_absmaxes) > 0
    lists = (params, grads, exp_avgs, exp_avg_sqs, indices or params, offsets or params)
    scales = {len(exp_avg_absmaxes), len(exp_avg_sq_absmaxes)}
    if len(set(map(len, lists))) != 1 or scales != {len(params) if in_codes else 0}:
        raise ValueError("params: got lists of different lengths; takes as many of everything")
    indices = indices or range(len(params))
    if factors.dim() != 2 or factors.shape[1] != ADAMW_FACTORS:
        raise ValueError(f"factors: got shape {list(factors.shape)}; takes [n, {ADAMW_FACTORS}]")
    factors_ptr = pointer("factors", factors, torch.float32, factors.numel(), device)
    rows = factors.shape[0]
    if not all(0 <= index < rows for index in indices):
        raise ValueError(f"indices: got {list(indices)}; takes rows of factors, of {rows}")
    block = formats.STATE_BLOCK_SIZE
    if not all(first >= 0 and first % block == 0 for first in offsets):
        raise ValueError(f"offsets: got {list(offsets)}; takes multiples of {block}")
    state_dtype = torch.uint8 if in_codes else torch.float32
    found: list[tuple[int | None, ...]] = []
    for k, (param, index) in enumerate(zip(params, indices, strict=True)):
        n, dtype = param.numel(), param.dtype
        absmaxes: tuple[int | None, ...] = (None, None)
        if in_codes:
            blocks = formats.num_blocks(n, block)
            absmaxes = (
                pointer("exp_avg_absmax", exp_avg_absmaxes[k], torch.float32, blocks, device),
                pointer("exp_avg_sq_absmax", exp_avg_sq_absmaxes[k], torch.float32, blocks, device),
            )
        piece = (
            pointer("param", param, dtype, n, device),
            pointer("grad", grads[k], dtype, n, device),
            pointer("exp_avg", exp_avgs[k], state_dtype, n, device),
            pointer("exp_avg_sq", exp_avg_sqs[k], state_dtype, n, device),
            *absmaxes,
            factors_ptr + index * ADAMW_FACTORS * factors.itemsize,
            dtype_id("param", dtype),
            n,
            index,
            offsets[k] if offsets else 0,
        )
        if n:
            found.append(piece)
    return found
