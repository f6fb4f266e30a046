"""The native CUDA backend: the kernels of ``qkern._C`` on tensors of one CUDA device.

Every op starts its kernels on the caller's current stream of the tensors' device and returns:
nothing waits, and memory comes from torch's allocator, so a CUDA graph can capture it. Inputs that
hold no element go to the reference: a kernel never sees an empty matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from qkern import formats, reference
from qkern.backends import _args, _cuda_matmul, native


def _find_missing_reason() -> str | None:
    if native.missing_reason is not None:
        return native.missing_reason
    if not hasattr(native.library(), "cuda_linear_4bit"):
        return "qkern._C was built without CUDA kernels"
    return None


missing_reason = _find_missing_reason()
"""Why the backend cannot run, or None. Whether there is a device shows when a kernel starts."""


def library() -> ModuleType:
    """The compiled module; ``RuntimeError`` when it has no CUDA kernels."""
    if missing_reason is not None:
        raise RuntimeError(f"the CUDA kernels are missing: {missing_reason}")
    return native.library()


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """``device`` made the current one, and the address of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def quantize_4bit(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_4bit``."""
    n = x.numel()
    device = x.device
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    format_id, codebook_ptr = _args.format_args(format, codebook, device)
    x = x.contiguous()
    packed = torch.empty(formats.packed_size(n), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        with current_stream(device) as stream:
            library().cuda_quantize_4bit(
                _args.pointer("x", x, x.dtype, n, device),
                _args.dtype_id("x", x.dtype),
                n,
                format_id,
                codebook_ptr,
                block_size,
                packed.data_ptr(),
                absmax.data_ptr(),
                stream,
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
    device = packed.device
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, n, device
    )
    out_dtype = _args.dtype_id("out", out.dtype)
    out_ptr = _args.pointer("out", out, out.dtype, n, device)
    if n:
        with current_stream(device) as stream:
            library().cuda_dequantize_4bit(*weight, n, out_ptr, out_dtype, stream)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_8bit``."""
    n = x.numel()
    device = x.device
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        with current_stream(device) as stream:
            library().cuda_quantize_8bit(
                _args.pointer("x", x, x.dtype, n, device),
                _args.dtype_id("x", x.dtype),
                n,
                _args.pointer("code", code, torch.float32, 256, device),
                block_size,
                codes.data_ptr(),
                absmax.data_ptr(),
                stream,
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
    out = torch.empty(codes.shape, dtype=dtype, device=device)
    if n:
        with current_stream(device) as stream:
            library().cuda_dequantize_8bit(
                _args.pointer("codes", codes, torch.uint8, n, device),
                _args.pointer("absmax", absmax, torch.float32, blocks, device),
                _args.pointer("code", code, torch.float32, 256, device),
                block_size,
                n,
                out.data_ptr(),
                _args.dtype_id("dtype", dtype),
                stream,
            )
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``qkern.reference.quantize_absmax``."""
    n = absmax.numel()
    if n == 0:
        return reference.quantize_absmax(absmax)
    device = absmax.device
    absmax = absmax.contiguous()
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(
        formats.num_blocks(n, formats.NESTED_BLOCK_SIZE), dtype=torch.float32, device=device
    )
    nested_offset = torch.empty((), dtype=torch.float32, device=device)
    with current_stream(device) as stream:
        library().cuda_quantize_absmax(
            _args.pointer("absmax", absmax, torch.float32, n, device),
            n,
            codes.data_ptr(),
            nested_absmax.data_ptr(),
            nested_offset.data_ptr(),
            stream,
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
    """See ``qkern.reference.adamw_step``. All tensors are on the device of the first parameter."""
    device = params[0].device
    absmaxes = (exp_avg_absmaxes, exp_avg_sq_absmaxes)
    pieces = _args.adamw_pieces(
        params, grads, exp_avgs, exp_avg_sqs, *absmaxes, factors, indices, offsets, device
    )
    with current_stream(device) as stream:
        library().cuda_adamw_step(pieces, seed, stream)


def _linear(
    input_gradient: bool,
    matrix: tuple[Tensor, int, int],
    weight: _args.WeightPointers,
    sizes: tuple[int, int],
    bias: Tensor | None,
    out: Tensor,
    batch_invariant: bool,
) -> None:
    with current_stream(out.device) as stream:
        _cuda_matmul.start(
            library(), stream, input_gradient, matrix, weight, sizes, bias, out, batch_invariant
        )


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
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, numel, device
    )
    _args.dtype_id("x", x.dtype)
    if bias is not None:
        _args.pointer("bias", bias, x.dtype, out_features, device)
    if numel == 0 or x.numel() == 0:
        return reference.linear_4bit(
            x,
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            bias,
            format,
            block_size,
            out_features,
            batch_invariant,
        )
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=device)
    matrix = _args.rows("x", x, in_features, device)
    _linear(False, matrix, weight, (out_features, in_features), bias, y, batch_invariant)
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
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, numel, device
    )
    _args.dtype_id("dy", dy.dtype)
    if numel == 0 or dy.numel() == 0:
        return reference.linear_4bit_dx(
            dy,
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            format,
            block_size,
            in_features,
            batch_invariant,
        )
    dx = torch.empty((*dy.shape[:-1], in_features), dtype=dy.dtype, device=device)
    matrix = _args.rows("dy", dy, out_features, device)
    _linear(True, matrix, weight, (out_features, in_features), None, dx, batch_invariant)
    return dx
