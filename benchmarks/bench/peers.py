"""What a user would run instead, each on the very weights that qkern gets where its format allows.

A peer is a function of a `Weight` that returns how to make one copy of its state and the footprint
of that copy. It raises `SkippedError` where it cannot run, saying why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

import qkern
from qkern import formats

from .timing import SkippedError

Linear = Callable[[Tensor], Tensor]
INT4_GROUP = 64


@dataclass(frozen=True)
class LinearPeer:
    """One copy is `footprint` bytes; `tolerance` bounds the relative error of a correct result."""

    make: Callable[[], Linear]
    footprint: int
    tolerance: float
    backward: bool = True


@cache
def bitsandbytes(hide_bf16: bool = False) -> ModuleType:
    """The module, imported without its advice to download kernels.

    With `hide_bf16` it does not see AVX512-BF16, so that a run limited to AVX-512 takes the path of
    processors without it. Raises `SkippedError` where it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise SkippedError(f"bitsandbytes cannot be imported: {error}") from None
    if hide_bf16:
        bnb.nn.modules.has_avx512bf16 = lambda: False
    return bnb


def qkern_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """The contestant itself."""

    def make() -> Linear:
        copy = clone(qw)
        return lambda x: qkern.linear_4bit(x, copy)

    return LinearPeer(make, qw.nbytes, tolerance=0.0)  # held to a stricter rule


def _require_memory(size: int) -> None:
    """Raise `SkippedError` where `size` bytes would not leave half of the free memory."""
    free = psutil.virtual_memory().available
    if size > free / 2:
        raise SkippedError(f"needs {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")


def dense_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """``F.linear`` on the dequantised weight: the same function without 4-bit storage."""
    _require_memory(qw.numel() * dtype.itemsize)

    def make() -> Linear:
        weight = qw.dequantize(dtype)
        return lambda x: F.linear(x, weight)

    return LinearPeer(make, qw.numel() * dtype.itemsize, 0.02)


def bitsandbytes_linear(
    qw: qkern.QuantizedTensor, dtype: torch.dtype, hide_bf16: bool = False
) -> LinearPeer:
    """``bitsandbytes.matmul_4bit``, which ``Linear4bit`` calls when training."""
    _require_memory(qw.numel() * dtype.itemsize)  # every call dequantises the whole weight
    bnb = bitsandbytes(hide_bf16)

    def make() -> Linear:
        packed, state = to_bitsandbytes(clone(qw), dtype)
        return lambda x: bnb.matmul_4bit(x, packed.t(), state)

    return LinearPeer(make, qw.nbytes, 0.02)


def bitsandbytes_packed_linear(
    qw: qkern.QuantizedTensor, dtype: torch.dtype, hide_bf16: bool = False
) -> LinearPeer:
    """The layout that ``Linear4bit`` in eval mode takes on processors with AVX512-BF16.

    It computes in bfloat16 whatever x's dtype, holds its scales in bfloat16 and has no backward.
    """
    bnb = bitsandbytes(hide_bf16)
    if hide_bf16 or not bnb.functional.has_avx512bf16():
        raise SkippedError("needs AVX512-BF16")
    if qw.shape[0] % 32 or qw.shape[1] % qw.block_size:
        raise SkippedError("takes out_features divisible by 32, in_features by the block size")
    _require_memory(qw.numel() * 8)  # to convert
    packed, state = bnb.functional._convert_weight_packed_for_cpu(*to_bitsandbytes(qw, dtype))

    def make() -> Linear:
        copy = packed.clone()
        return lambda x: bnb.matmul_4bit(x, copy, state)

    return LinearPeer(make, packed.nbytes + state.absmax.nbytes, 0.03, backward=False)


def int4_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """Uniform int4 weights by the kernel that lies in torch and that torchao's CPU layout calls.

    Another format, with larger errors, in groups of 64 with a scale and a zero each; no backward.
    """
    n, k = qw.shape
    if n % 16 or k % INT4_GROUP:
        raise SkippedError(f"takes out_features divisible by 16, in_features by {INT4_GROUP}")
    _require_memory(qw.numel() * 16)  # to convert
    groups = qw.dequantize(torch.float32).view(n, -1, INT4_GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).to(torch.int32), 1)
    # The kernel computes (code - 8) * scale + zero.
    scales = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().to(dtype)

    def make() -> Linear:
        copy, copied_scales = packed.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, copy, INT4_GROUP, copied_scales
        )

    return LinearPeer(make, packed.nbytes + scales.nbytes, 0.2, backward=False)


def clone(qw: qkern.QuantizedTensor) -> qkern.QuantizedTensor:
    """The same weight in memory of its own."""
    tensors = {name: tensor.clone() for name, tensor in qw.tensors().items()}
    fields = {name: getattr(qw, name) for name in ("format", "block_size", "shape", "dtype")}
    missing = {"nested_absmax": None, "nested_offset": None, "codebook": None}
    return qkern.QuantizedTensor(**missing | tensors | fields)


def to_bitsandbytes(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, object]:
    """``(packed [bytes, 1], QuantState)`` on the same memory: both libraries pack alike."""
    functional = bitsandbytes().functional
    nested = {}
    if qw.nested_absmax is not None:
        state2 = functional.QuantState(
            absmax=qw.nested_absmax,
            code=formats.map_tensor("signed"),
            blocksize=formats.NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        nested = {"offset": qw.nested_offset, "state2": state2}
    state = functional.QuantState(
        absmax=qw.absmax,
        shape=torch.Size(qw.shape),
        code=formats.code_tensor(qw.format),
        blocksize=qw.block_size,
        quant_type=qw.format,
        dtype=dtype,
        **nested,
    )
    return qw.packed.view(-1, 1), state
