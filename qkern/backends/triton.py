"""The Triton backend: ``qkern.triton_kernels`` on tensors of one CUDA or ROCm device.

For CUDA tensors where the native library has no CUDA kernels, and for AMD devices, which torch
calls CUDA too. Triton is imported when this backend is asked for, and it compiles a kernel at the
first call that needs it. Every op starts its kernels on the caller's current stream and returns.
Inputs that hold no element go to the reference.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkern import formats, reference
from qkern.backends import _args


@functools.cache
def missing_reason() -> str | None:
    """Why the backend cannot run, or None; imports Triton."""
    try:
        importlib.import_module("qkern.triton_kernels.codec")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


@functools.cache
def _kernels(op: str) -> ModuleType:
    """The file of an op; ``RuntimeError`` when Triton is missing."""
    if reason := missing_reason():
        raise RuntimeError(f"the Triton kernels are missing: {reason}")
    return importlib.import_module(f"qkern.triton_kernels.{op}")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """``device`` made the current one, which is where Triton launches."""
    return torch.cuda.device(device)


@functools.cache
def target_of(device: torch.device) -> Any:
    """The ``qkern.triton_kernels.launch.Target`` of ``device``."""
    properties = torch.cuda.get_device_properties(device)
    launch = _kernels("launch")
    processors = properties.multi_processor_count
    if torch.version.hip:
        return launch.Target("hip", properties.gcnArchName.split(":")[0], processors)
    return launch.Target("cuda", properties.major * 10 + properties.minor, processors)


def _weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    numel: int,
) -> Any:
    """The weight's tensors for the kernels, checked as those of the native backends are."""
    fields = (packed, absmax, nested_absmax, nested_offset, codebook, format, block_size)
    _args.weight(*fields, numel, packed.device)
    return _kernels("codec").Weight(*fields)


def quantize_4bit(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_4bit``."""
    n = x.numel()
    device = x.device
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    _args.format_args(format, codebook, device)
    _args.dtype_id("x", x.dtype)
    packed = torch.empty(formats.packed_size(n), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        with on_device(device):
            _kernels("quantize_4bit").quantize_4bit(
                x.contiguous(), format, block_size, codebook, packed, absmax, target_of(device)
            )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ``qkern.reference.dequantize_4bit``."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    dequantize_4bit_out(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, out=out
    )
    return out


def dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    *,
    out: Tensor,
) -> None:
    """See ``qkern.reference.dequantize_4bit_out``."""
    n = out.numel()
    weight = _weight(packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, n)
    _args.dtype_id("out", out.dtype)
    _args.pointer("out", out, out.dtype, n, packed.device)
    if n:
        with on_device(packed.device):
            _kernels("dequantize_4bit").dequantize_4bit(weight, out, target_of(packed.device))


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_8bit``."""
    n = x.numel()
    device = x.device
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    _args.dtype_id("x", x.dtype)
    _args.pointer("code", code, torch.float32, 256, device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        with on_device(device):
            thresholds = _kernels("codec").byte_thresholds(code)
            _kernels("quantize_8bit").quantize_8bit(
                x.contiguous(), None, thresholds, block_size, codes, absmax, target_of(device)
            )
    return codes, absmax


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See ``qkern.reference.dequantize_8bit``."""
    n = codes.numel()
    device = codes.device
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    codes = codes.contiguous()
    _args.pointer("codes", codes, torch.uint8, n, device)
    _args.pointer("absmax", absmax, torch.float32, blocks, device)
    _args.pointer("code", code, torch.float32, 256, device)
    _args.dtype_id("dtype", dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=device)
    if n:
        with on_device(device):
            _kernels("dequantize_8bit").dequantize_8bit(
                codes, absmax, code, block_size, out, target_of(device)
            )
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``qkern.reference.quantize_absmax``."""
    n = absmax.numel()
    if n == 0:
        return reference.quantize_absmax(absmax)
    device = absmax.device
    absmax = absmax.contiguous()
    _args.pointer("absmax", absmax, torch.float32, n, device)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    groups = formats.num_blocks(n, formats.NESTED_BLOCK_SIZE)
    nested_absmax = torch.empty(groups, dtype=torch.float32, device=device)
    nested_offset = torch.empty((), dtype=torch.float32, device=device)
    with on_device(device):
        _kernels("quantize_absmax").quantize_absmax(
            absmax, codes, nested_absmax, nested_offset, target_of(device)
        )
    return codes, nested_absmax, nested_offset


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxes: Sequence[Tensor],
    exp_avg_sq_absmaxes: Sequence[Tensor],
    factors: Tensor,
    seed: int | None = None,
    indices: Sequence[int] = (),
    offsets: Sequence[int] = (),
) -> None:
    """See ``qkern.reference.adamw_step``."""
    device = params[0].device
    absmaxes = (exp_avg_absmaxes, exp_avg_sq_absmaxes)
    pieces = _args.adamw_pieces(
        params, grads, exp_avgs, exp_avg_sqs, *absmaxes, factors, indices, offsets, device
    )
    pieces = [piece for piece, param in zip(pieces, params, strict=True) if param.numel()]
    if pieces:
        in_codes = len(exp_avg_absmaxes) > 0
        with on_device(device):
            _kernels("adamw_step").adamw_step(pieces, in_codes, seed, device, target_of(device))


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    format: str,
    block_size: int,
    out_features: int,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``qkern.reference.linear_4bit``."""
    device = x.device
    in_features = x.shape[-1]
    numel = out_features * in_features
    fields = (packed, absmax, nested_absmax, nested_offset, codebook)
    weight = _weight(*fields, format, block_size, numel)
    _args.dtype_id("x", x.dtype)
    if bias is not None:
        _args.pointer("bias", bias, x.dtype, out_features, device)
    if numel == 0 or x.numel() == 0:
        return reference.linear_4bit(
            x, *fields, bias, format, block_size, out_features, batch_invariant
        )
    matrix, rows, _ = _args.rows("x", x, in_features, packed.device)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=device)
    with on_device(device):
        _kernels("linear_4bit").linear_4bit(
            matrix, weight, bias, y.view(rows, out_features), target_of(device), batch_invariant
        )
    return y


def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    in_features: int,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``qkern.reference.linear_4bit_dx``."""
    device = dy.device
    out_features = dy.shape[-1]
    numel = out_features * in_features
    fields = (packed, absmax, nested_absmax, nested_offset, codebook)
    weight = _weight(*fields, format, block_size, numel)
    _args.dtype_id("dy", dy.dtype)
    if numel == 0 or dy.numel() == 0:
        return reference.linear_4bit_dx(
            dy, *fields, format, block_size, in_features, batch_invariant
        )
    matrix, rows, _ = _args.rows("dy", dy, out_features, packed.device)
    dx = torch.empty((*dy.shape[:-1], in_features), dtype=dy.dtype, device=device)
    with on_device(device):
        _kernels("linear_4bit_dx").linear_4bit_dx(
            matrix, weight, dx.view(rows, in_features), target_of(device), batch_invariant
        )
    return dx
