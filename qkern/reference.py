"""The specification of every op in plain PyTorch.

Each function has the signature of the op of the same name in ``qkern.ops`` and states what every
backend must compute: codes, absmax and dequantised values bit for bit, matmuls within the error of
the order of summation. Weights are worked on in bounded pieces, so that even here no whole
dequantised copy exists. It runs on any device and is the fallback where no kernel is built.

Names: ``n`` elements, ``K`` in_features, ``N`` out_features; a weight is ``[N, K]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qkern import formats

_PIECE = 1 << 22
"""Elements worked on at a time: a multiple of every block size, small enough to stay cheap."""


def _encoder(format: str, codebook: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    """The function ``(t, x) -> int64 codes`` for scaled values ``t`` of elements ``x``."""
    if format == "fp4":
        thresholds = torch.tensor(
            formats.FP4_MAGNITUDE_THRESHOLDS, dtype=torch.float32, device=device
        )
        magnitude_codes = torch.tensor(formats.FP4_MAGNITUDE_CODES, device=device)

        def encode_fp4(t: Tensor, x: Tensor) -> Tensor:
            return magnitude_codes[_count_below(t.abs(), thresholds)] + 8 * (x < 0)

        return encode_fp4

    if format == "nf4":
        midpoints = torch.tensor(formats.NF4_MIDPOINTS, dtype=torch.float32, device=device)
        return lambda t, x: _count_below(t, midpoints)

    assert codebook is not None
    values, order = codebook.sort(stable=True)
    midpoints = (values[:-1] + values[1:]) * 0.5
    return lambda t, x: order[_count_below(t, midpoints)]


def _count_below(t: Tensor, thresholds: Tensor) -> Tensor:
    """Number of ascending ``thresholds`` that each ``t`` exceeds; 0 for NaN."""
    return torch.where(t.isnan(), 0, torch.bucketize(t, thresholds))


def _scaled_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``(t, absmax)`` of the blocks of a float32 ``x`` of shape ``[blocks, block_size]``."""
    absmax = x.abs().amax(dim=1)
    absmax = torch.where(absmax.isfinite(), absmax, math.nan)
    reciprocal = torch.where(absmax == 0.0, 0.0, 1.0 / absmax)
    return x * reciprocal[:, None], absmax


def _pieces(x: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """Float32 pieces ``[blocks, block_size]`` of ``x`` with their first element's index.

    A short last block is filled with zeros.
    """
    flat = x.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].float()
        missing = -piece.numel() % block_size
        if missing:
            piece = torch.nn.functional.pad(piece, (0, missing))
        yield start, piece.view(-1, block_size)


def quantize_4bit(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` (any shape) to ``(packed uint8 [(n + 1) // 2], absmax float32 [blocks])``.

    Element 2j is the high nibble of byte j. An odd last byte is completed by the code of 0.0.
    A block that holds a NaN or an infinity gets the absmax NaN.
    """
    n = x.numel()
    packed = x.new_empty(formats.packed_size(n), dtype=torch.uint8)
    absmax = x.new_empty(formats.num_blocks(n, block_size), dtype=torch.float32)
    encode = _encoder(format, codebook, x.device)
    for start, piece in _pieces(x, block_size):
        t, piece_absmax = _scaled_blocks(piece, block_size)
        codes = encode(t, piece).view(-1, 2)
        size = formats.packed_size(min(_PIECE, n - start))
        packed[start // 2 :][:size] = (codes[:, 0] << 4 | codes[:, 1])[:size]
        absmax[start // block_size :][: len(piece)] = piece_absmax
    return packed, absmax


def _restored_absmax(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """Float32 absmax of blocks ``start`` to ``stop``: two roundings, no fused multiply-add."""
    if nested_absmax is None:
        return absmax[start:stop]
    assert nested_offset is not None
    code = formats.map_tensor("signed", absmax.device)
    group = torch.arange(start, stop, device=absmax.device) // formats.NESTED_BLOCK_SIZE
    return code[absmax[start:stop].long()] * nested_absmax[group] + nested_offset


def _decoded(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    start: int,
    stop: int,
) -> Tensor:
    """Float32 values of elements ``start`` to ``stop``."""
    table = formats.code_tensor(format, packed.device) if codebook is None else codebook
    first_byte = start // 2
    piece = packed[first_byte : formats.packed_size(stop)]
    codes = torch.stack((piece >> 4, piece & 15), dim=1).view(-1).long()
    codes = codes[start - 2 * first_byte :][: stop - start]
    first_block = start // block_size
    scales = _restored_absmax(
        absmax, nested_absmax, nested_offset, first_block, formats.num_blocks(stop, block_size)
    )
    block = torch.arange(start, stop, device=packed.device) // block_size - first_block
    return table[codes] * scales[block]


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
    """``table[code] * absmax`` in float32, rounded once to ``dtype``: a new tensor of ``shape``."""
    out = packed.new_empty(tuple(shape), dtype=dtype)
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
    """``dequantize_4bit`` into the contiguous ``out``, whose shape and dtype are the result's."""
    flat = out.view(-1)
    n = flat.numel()
    for start in range(0, n, _PIECE):
        stop = min(start + _PIECE, n)
        flat[start:stop] = _decoded(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            format,
            block_size,
            start,
            stop,
        )


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` to ``(codes uint8 of x's shape, absmax float32 [blocks])``.

    ``code`` is an ascending float32 ``[256]`` map. The code is the exact nearest entry to the
    scaled value, a tie going to the lower one.
    """
    exact = (code[:-1].double() + code[1:].double()) / 2
    thresholds = exact.float()
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -math.inf))
    thresholds = torch.where(thresholds.double() > exact, below, thresholds)

    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    flat = codes.view(-1)
    absmax = x.new_empty(formats.num_blocks(x.numel(), block_size), dtype=torch.float32)
    for start, piece in _pieces(x, block_size):
        t, piece_absmax = _scaled_blocks(piece, block_size)
        target = flat[start : start + _PIECE]
        target[:] = _count_below(t, thresholds).view(-1)[: target.numel()]
        absmax[start // block_size :][: len(piece)] = piece_absmax
    return codes, absmax


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """``code[codes] * absmax`` in float32, rounded once to ``dtype``; of the shape of ``codes``."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    flat_codes, flat_out = codes.reshape(-1), out.view(-1)
    for start in range(0, flat_codes.numel(), _PIECE):
        piece = flat_codes[start : start + _PIECE].long()
        block = torch.arange(start, start + piece.numel(), device=codes.device) // block_size
        flat_out[start : start + _PIECE] = code[piece] * absmax[block]
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: ``(codes uint8, nested_absmax float32, nested_offset float32)``.

    Of shapes ``[blocks]``, ``[ceil(blocks / 256)]`` and ``[]`` for ``absmax`` ``[blocks]``. The
    offset is the mean of ``absmax``: the exact sum rounded to float64, divided in float64, rounded
    to float32, so it does not depend on the order of summation. A NaN anywhere makes the
    offset, and with it every restored value, NaN.
    """
    if not absmax.isfinite().all():
        mean = math.nan
    else:
        mean = math.fsum(absmax.tolist()) / max(absmax.numel(), 1)
    offset = torch.tensor(mean, dtype=torch.float32, device=absmax.device)
    code = formats.map_tensor("signed", absmax.device)
    codes, nested_absmax = quantize_8bit(absmax - offset, code, formats.NESTED_BLOCK_SIZE)
    return codes, nested_absmax, offset


def _weight_slices(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Row slices of the weight, dequantised to float32."""
    rows = max(1, _PIECE // max(in_features, 1))
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        values = _decoded(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            codebook,
            format,
            block_size,
            first * in_features,
            last * in_features,
        )
        yield slice(first, last), values.view(last - first, in_features)


def _matmul(a: Tensor, b: Tensor, batch_invariant: bool) -> Tensor:
    """``a @ b`` in float32; batch-invariant: one matrix-vector product for each row of ``a``."""
    # A caller's autocast would take the matmul down to 16 bits.
    with torch.autocast(a.device.type, enabled=False):
        if not batch_invariant:
            return a @ b
        out = a.new_empty(a.shape[0], b.shape[1])
        for row, target in zip(a, out, strict=True):
            # A copy, because a library may choose its code by the address's alignment.
            target.copy_(row.clone() @ b)
        return out


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
    """``x @ W.T + bias``: ``[..., K] -> [..., N]`` in float32, rounded once to ``x.dtype``."""
    in_features = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    x2 = x.reshape(rows, in_features).float()
    y = x2.new_zeros(*x.shape[:-1], out_features)
    y2 = y.view(rows, out_features)
    for columns, weight in _weight_slices(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        codebook,
        format,
        block_size,
        out_features,
        in_features,
    ):
        y2[:, columns] = _matmul(x2, weight.t(), batch_invariant)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


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
    """``dy @ W``: ``[..., N] -> [..., K]`` in float32, rounded once to ``dy.dtype``."""
    out_features = dy.shape[-1]
    rows = math.prod(dy.shape[:-1])
    dy2 = dy.reshape(rows, out_features).float()
    dx = dy2.new_zeros(*dy.shape[:-1], in_features)
    dx2 = dx.view(rows, in_features)
    for columns, weight in _weight_slices(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        codebook,
        format,
        block_size,
        out_features,
        in_features,
    ):
        dx2 += _matmul(dy2[:, columns], weight, batch_invariant)
    return dx.to(dy.dtype)
