"""The native CPU backend: the kernels in ``qkern._C``.

Importable without ``_C``; ``missing_reason`` then says why it is missing, and the backend is not
selected. Inputs that hold no element go to the reference: a kernel never sees an empty matrix.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qkern import formats, reference
from qkern.backends import _args


def _load() -> ModuleType:
    """``qkern._C`` as installed, or the build of it that ``QKERN_NATIVE_LIBRARY`` names.

    A named build that does not load is an error, for a run under a sanitizer must not fall back.
    """
    path = os.environ.get("QKERN_NATIVE_LIBRARY")
    if not path:
        return importlib.import_module("qkern._C")
    spec = importlib.util.spec_from_file_location("qkern._C", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"QKERN_NATIVE_LIBRARY: got {path!r}; takes an extension module's path")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(f"QKERN_NATIVE_LIBRARY: {path!r} cannot be loaded: {error}") from error
    sys.modules["qkern._C"] = module
    return module


_C: ModuleType | None
missing_reason: str | None
try:
    # After torch, so that both use the one OpenMP runtime torch has loaded.
    _C = _load()
    missing_reason = None
except ImportError as error:
    _C = None
    missing_reason = f"qkern._C cannot be imported: {error}"


def _refuse(*arguments: Any) -> None:
    """Stands for an op on tensors where there is none."""


linear_4bit_on_tensors: Callable[..., Tensor | None] = _refuse
"""``linear_4bit`` on plain CPU tensors, which the binding reads itself in a fraction of the time.

Takes ``(x, weight, out_features, bias, batch_invariant, num_threads, in_features=None)``; the
weight is a tuple ``(packed, absmax, nested_absmax, nested_offset, codebook, format, block_size)``,
and ``in_features`` None is whatever ``x`` has. A strided ``x`` is copied. None, with nothing done,
wherever an argument is not what it should be or not plain: a subclass, no elements. Newer versions
of torch have the interface that this takes; with others the answer is always None.
"""

linear_4bit_dx_on_tensors: Callable[..., Tensor | None] = _refuse
"""``linear_4bit_dx`` in the same way: ``(dy, weight, in_features, batch_invariant, num_threads)``.
"""

adamw_step_on_tensors: Callable[..., bool | None] = _refuse
"""``adamw_step`` in the same way: all its arguments, then ``num_threads``. True once it is done."""

_exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if _C and _exchange_api and _C.read_tensors_with(_exchange_api, Tensor, nn.Parameter):
    linear_4bit_on_tensors = _C.linear_4bit_on_tensors
    linear_4bit_dx_on_tensors = _C.linear_4bit_dx_on_tensors
    adamw_step_on_tensors = _C.adamw_step_on_tensors


# Outputs name their device, because a caller may have set another default, such as meta.
_CPU = torch.device("cpu")


def library() -> ModuleType:
    """The compiled module; ``RuntimeError`` when it is missing."""
    if _C is None:
        raise RuntimeError(f"the native kernels are missing: {missing_reason}")
    return _C


def isa() -> str:
    """The instruction set in use."""
    return str(library().isa())


def available_isas() -> list[str]:
    """The instruction sets this build has and this processor runs, slowest first."""
    return list(library().available_isas())


def set_isa(name: str) -> None:
    """Take an instruction set; ``""`` is ``QKERN_CPU_ISA`` or the best.

    Raises ``ValueError`` when it is not available.
    """
    library().set_isa(name)


def has_matmul(dtype: torch.dtype) -> bool:
    """Whether torch's CPU matmuls in ``dtype`` run on instructions for it.

    Without them a 16-bit matmul is emulated, several times as slow as one in float32.
    """
    if dtype == torch.bfloat16:
        return _C is not None and bool(_C.multiplies_bfloat16())
    return dtype == torch.float32


def quantize_4bit(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_4bit``."""
    n = x.numel()
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    format_id, codebook_ptr = _args.format_args(format, codebook)
    x = x.contiguous()
    packed = torch.empty(formats.packed_size(n), dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(blocks, dtype=torch.float32, device=_CPU)
    if n:
        library().quantize_4bit(
            _args.pointer("x", x, x.dtype, n),
            _args.dtype_id("x", x.dtype),
            n,
            format_id,
            codebook_ptr,
            block_size,
            packed.data_ptr(),
            absmax.data_ptr(),
            _args.num_threads(),
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
    out = torch.empty(tuple(shape), dtype=dtype, device=_CPU)
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
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, n
    )
    out_dtype = _args.dtype_id("out", out.dtype)
    out_ptr = _args.pointer("out", out, out.dtype, n)
    if n:
        library().dequantize_4bit(*weight, n, out_ptr, out_dtype, _args.num_threads())


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``qkern.reference.quantize_8bit``."""
    n = x.numel()
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(blocks, dtype=torch.float32, device=_CPU)
    if n:
        library().quantize_8bit(
            _args.pointer("x", x, x.dtype, n),
            _args.dtype_id("x", x.dtype),
            n,
            _args.pointer("code", code, torch.float32, 256),
            block_size,
            codes.data_ptr(),
            absmax.data_ptr(),
            _args.num_threads(),
        )
    return codes, absmax


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See ``qkern.reference.dequantize_8bit``."""
    n = codes.numel()
    blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=_CPU)
    if n:
        library().dequantize_8bit(
            _args.pointer("codes", codes, torch.uint8, n),
            _args.pointer("absmax", absmax, torch.float32, blocks),
            _args.pointer("code", code, torch.float32, 256),
            block_size,
            n,
            out.data_ptr(),
            _args.dtype_id("dtype", dtype),
            _args.num_threads(),
        )
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``qkern.reference.quantize_absmax``."""
    n = absmax.numel()
    if n == 0:
        return reference.quantize_absmax(absmax)
    absmax = absmax.contiguous()
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=_CPU)
    nested_absmax = torch.empty(
        formats.num_blocks(n, formats.NESTED_BLOCK_SIZE), dtype=torch.float32, device=_CPU
    )
    nested_offset = torch.empty((), dtype=torch.float32, device=_CPU)
    library().quantize_absmax(
        _args.pointer("absmax", absmax, torch.float32, n),
        n,
        codes.data_ptr(),
        nested_absmax.data_ptr(),
        nested_offset.data_ptr(),
        _args.num_threads(),
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
    absmaxes = (exp_avg_absmaxes, exp_avg_sq_absmaxes)
    pieces = _args.adamw_pieces(
        params, grads, exp_avgs, exp_avg_sqs, *absmaxes, factors, indices, offsets
    )
    library().adamw_step(pieces, seed, _args.num_threads())


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
    parts = (packed, absmax, nested_absmax, nested_offset, codebook, format, block_size)
    done = linear_4bit_on_tensors(
        x, parts, out_features, bias, batch_invariant, _args.num_threads()
    )
    if done is not None:
        return done
    shape = x.shape
    in_features = shape[-1]
    numel = out_features * in_features
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, numel
    )
    dtype = x.dtype
    dtype_id = _args.dtype_id("x", dtype)
    bias_ptr = 0 if bias is None else _args.pointer("bias", bias, dtype, out_features)
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
    matrix, rows, row_stride = _args.rows("x", x, in_features)
    y = torch.empty((*shape[:-1], out_features), dtype=dtype, device=_CPU)
    library().linear_4bit(
        matrix.data_ptr(),
        dtype_id,
        rows,
        row_stride,
        *weight,
        out_features,
        in_features,
        bias_ptr,
        y.data_ptr(),
        batch_invariant,
        _args.num_threads(),
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
    parts = (packed, absmax, nested_absmax, nested_offset, codebook, format, block_size)
    done = linear_4bit_dx_on_tensors(dy, parts, in_features, batch_invariant, _args.num_threads())
    if done is not None:
        return done
    shape = dy.shape
    out_features = shape[-1]
    numel = out_features * in_features
    weight = _args.weight(
        packed, absmax, nested_absmax, nested_offset, codebook, format, block_size, numel
    )
    dtype = dy.dtype
    dtype_id = _args.dtype_id("dy", dtype)
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
    matrix, rows, row_stride = _args.rows("dy", dy, out_features)
    dx = torch.empty((*shape[:-1], in_features), dtype=dtype, device=_CPU)
    library().linear_4bit_dx(
        matrix.data_ptr(),
        dtype_id,
        rows,
        row_stride,
        *weight,
        out_features,
        in_features,
        dx.data_ptr(),
        batch_invariant,
        _args.num_threads(),
    )
    return dx
