"""The specification of every op in plain PyTorch.

Each function has the signature of the op of the same name in ``qkern.ops`` and states what every
backend must compute: codes, absmax and dequantised values bit for bit, matmuls within the error of
the order of summation. Weights are worked on in bounded pieces, so that even here no whole
dequantised copy exists. It runs on any device and is the fallback where no kernel is built.

Names: ``n`` elements, ``K`` in_features, ``N`` out_features; a weight is ``[N, K]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qkern import formats
from qkern.weight import Weight

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


def restored_absmax(weight: Weight, start: int, stop: int) -> Tensor:
    """Float32 absmax of blocks ``start`` to ``stop``: two roundings, no fused multiply-add."""
    absmax = weight.absmax[start:stop]
    if weight.nested_absmax is None:
        return absmax
    assert weight.nested_offset is not None
    map = formats.map_tensor("signed", absmax.device)
    group = torch.arange(start, stop, device=absmax.device) // formats.NESTED_BLOCK_SIZE
    return map[absmax.long()] * weight.nested_absmax[group] + weight.nested_offset


def _decoded(weight: Weight, start: int, stop: int) -> Tensor:
    """Float32 values of elements ``start`` to ``stop``."""
    packed, block_size, table = weight.packed, weight.block_size, weight.codebook
    if table is None:
        table = formats.code_tensor(weight.format, packed.device)
    first_byte = start // 2
    piece = packed[first_byte : formats.packed_size(stop)]
    codes = torch.stack((piece >> 4, piece & 15), dim=1).view(-1).long()
    codes = codes[start - 2 * first_byte :][: stop - start]
    first_block = start // block_size
    scales = restored_absmax(weight, first_block, formats.num_blocks(stop, block_size))
    block = torch.arange(start, stop, device=packed.device) // block_size - first_block
    return table[codes] * scales[block]


def dequantize_4bit(weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``table[code] * absmax`` in float32, rounded once to ``dtype``: a new tensor of ``shape``."""
    out = weight.packed.new_empty(tuple(shape), dtype=dtype)
    dequantize_4bit_out(weight, out)
    return out


def dequantize_4bit_out(weight: Weight, out: Tensor) -> None:
    """``dequantize_4bit`` into the contiguous ``out``, whose shape and dtype are the result's."""
    flat = out.view(-1)
    for start, values in decoded_pieces(weight, flat.numel()):
        flat[start : start + values.numel()] = values


def decoded_pieces(weight: Weight, n: int) -> Iterator[tuple[int, Tensor]]:
    """Float32 pieces of a weight of ``n`` elements with their first element's index."""
    for start in range(0, n, _PIECE):
        yield start, _decoded(weight, start, min(start + _PIECE, n))


def byte_thresholds(map: Tensor) -> Tensor:
    """Midpoints of neighbours in an ascending float32 map, rounded down: one less than its values.

    A float32 exceeds one exactly when it exceeds the exact midpoint.
    """
    exact = (map[:-1].double() + map[1:].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


def quantize_8bit(x: Tensor, map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` to ``(codes uint8 of x's shape, absmax float32 [blocks])``.

    ``map`` is an ascending float32 ``[256]``. A code is that of the exact nearest entry to the
    scaled value, a tie going to the lower one.
    """
    thresholds = byte_thresholds(map)
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
    codes: Tensor, absmax: Tensor, map: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """``map[codes] * absmax`` in float32, rounded once to ``dtype``; of the shape of ``codes``."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    flat_codes, flat_out = codes.reshape(-1), out.view(-1)
    for start in range(0, flat_codes.numel(), _PIECE):
        piece = flat_codes[start : start + _PIECE].long()
        block = torch.arange(start, start + piece.numel(), device=codes.device) // block_size
        flat_out[start : start + _PIECE] = map[piece] * absmax[block]
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: ``(codes uint8, nested_absmax float32, nested_offset float32)``.

    Of shapes ``[blocks]``, ``[ceil(blocks / 256)]`` and ``[]`` for ``absmax`` ``[blocks]``. The
    offset is the mean of ``absmax``: the exact sum rounded to float64, divided in float64, rounded
    to float32, so it does not depend on the order of summation. A NaN anywhere makes the
    offset, and with it every restored value, NaN.

    A code is that of the nearest value, among those that restore to no negative scale: one would
    turn the signs of its block. Where all do, which takes negative ``absmax``, it is 255.
    """
    if not absmax.isfinite().all():
        mean = math.nan
    else:
        mean = math.fsum(absmax.tolist()) / max(absmax.numel(), 1)
    offset = torch.tensor(mean, dtype=torch.float32, device=absmax.device)
    map = formats.map_tensor("signed", absmax.device)
    codes, nested_absmax = quantize_8bit(absmax - offset, map, formats.NESTED_BLOCK_SIZE)
    group = torch.arange(absmax.numel(), device=absmax.device) // formats.NESTED_BLOCK_SIZE
    codes = torch.maximum(codes, _least_codes(map, nested_absmax, offset)[group].view(codes.shape))
    return codes, nested_absmax, offset


def _least_codes(map: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """For each group the smallest code that restores to no negative scale, uint8 ``[groups]``."""
    # Restored values ascend with the code, since rounding keeps an order.
    negative = map * nested_absmax[:, None] + offset < 0
    return negative.sum(dim=1).clamp(max=255).to(torch.uint8)


ADAMW_FACTORS = len(formats.ADAMW_FACTORS)
"""Floats that `adamw_step` takes for each parameter."""


def adamw_factors(
    steps: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
    skip: float | Tensor = 0.0,
) -> Tensor:
    """The factors of ``adamw_step`` for parameters that are at the numbers ``steps``, from 1.

    Computed in float64 and rounded once. Nothing waits for a device, so this can be captured in a
    CUDA graph.

    Args:
        steps: ``[n]``, on the parameters' device.
        lr: Learning rate, a number or a tensor of one element there, as the last two may be too.
        beta1: Decay of the first moment.
        beta2: Decay of the second.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        grad_scale: What gradients are multiplied by: clipping, an inverse loss scale, the sign to
            maximise.
        skip: Unless 0, the step leaves everything as it is.

    Returns:
        float32 ``[n, 10]``, in the order of ``qkern.formats.ADAMW_FACTORS``.
    """
    steps = steps.double()
    lr, grad_scale, skip = (
        value.to(steps.device, torch.float64).reshape(()) if isinstance(value, Tensor) else value
        for value in (lr, grad_scale, skip)
    )
    columns = {
        "grad_scale": grad_scale,
        "decay": 1 - lr * weight_decay,
        "beta1_complement": 1 - beta1,
        "beta2": beta2,
        "beta2_complement": 1 - beta2,
        "step_size": lr / (1 - torch.pow(beta1, steps)),
        "root_bias2_inverse": 1 / (1 - torch.pow(beta2, steps)).sqrt(),
        "eps": eps,
        "skip": skip,
        "step": steps,
    }
    factors = torch.empty(len(steps), ADAMW_FACTORS, dtype=torch.float32, device=steps.device)
    for index, name in enumerate(formats.ADAMW_FACTORS):
        factors[:, index] = columns[name]
    return factors


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
    """AdamW (arXiv 1711.05101, algorithm 2) on many parameters.

    Each parameter and its gradient have one dtype and any shape; all is updated in place, in
    float32 arithmetic without fused operations, and rounded once. The moments are float32 of the
    parameter's shape; or uint8 codes of it, with float32 scales ``[ceil(n / 256)]`` in
    ``exp_avg_absmaxes`` and ``exp_avg_sq_absmaxes``, which are empty otherwise: ``exp_avg`` on the
    signed dynamic map, ``exp_avg_sq`` on the unsigned one, quantised as `quantize_8bit` does. With
    codes a finite gradient counts as at most ``formats.MAX_GRADIENT``, 2^63: the square of a larger
    one might be infinite, which would make its block of 256 NaN.

    Row ``indices[k]`` of ``factors``, float32 ``[rows, 10]`` on the parameters' device, holds what
    else parameter ``k`` is updated by: see `adamw_factors`.

    ``seed`` rounds bfloat16 parameters up or down at random, without bias, instead of to nearest:
    element ``i`` of parameter ``k`` draws the same number on every backend, from the seed, its
    step, ``indices[k]`` and ``offsets[k] + i``. Both lists may be empty: 0, 1, … and zeros.
    """
    for k, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = factors[indices[k] if indices else k].tolist()
        scale, decay, beta1_complement, beta2, beta2_complement, *row = row
        step_size, root_inverse, eps, skip, step = row
        if skip != 0:
            continue
        states = [(exp_avgs[k], exp_avg_absmaxes[k : k + 1], "signed")]
        states += [(exp_avg_sqs[k], exp_avg_sq_absmaxes[k : k + 1], "unsigned")]
        m, v = (_moment(state, absmax, name) for state, absmax, name in states)
        g = grad.float() * scale
        if exp_avg_absmaxes:
            limit = formats.MAX_GRADIENT
            g = torch.where(g.isfinite(), g.clamp(-limit, limit), g)
        m = m + (g - m) * beta1_complement
        # Where the square is infinite, the other way about, as torch multiplies always.
        share = torch.where(g * g == math.inf, beta2_complement * g * g, g * g * beta2_complement)
        v = v * beta2 + share
        # Through float64, because torch's float32 square root may miss the last bit.
        denominator = v.double().sqrt().float() * root_inverse + eps
        new = param.float() * decay - m * step_size / denominator
        if seed is not None and param.dtype is torch.bfloat16:
            index = indices[k] if indices else k
            first = offsets[k] if offsets else 0
            random = _random_bits(new, seed << 31 ^ int(step), index, first)
            new = _rounded_stochastically(new, random)
        param.copy_(new)
        for (state, absmax, name), value in zip(states, (m, v), strict=True):
            if absmax:
                map = formats.map_tensor(name, state.device)
                codes, scales = quantize_8bit(value, map, formats.STATE_BLOCK_SIZE)
                state.copy_(codes)
                absmax[0].copy_(scales)
            else:
                state.copy_(value)


def _moment(state: Tensor, absmax: Sequence[Tensor], name: str) -> Tensor:
    if not absmax:
        return state
    map = formats.map_tensor(name, state.device)
    return dequantize_8bit(state, absmax[0], map, formats.STATE_BLOCK_SIZE, torch.float32)


_LOW_WORD = 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """Wellons' "lowbias32" of 32-bit numbers in int64: a bijection that looks random."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _LOW_WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _LOW_WORD
    return x ^ (x >> 16)


def _random_bits(like: Tensor, seed: int, index: int, first: int) -> Tensor:
    """32 random bits for each element, int64 of the shape of ``like``."""
    place = torch.arange(first, first + like.numel(), device=like.device)
    block = place // formats.STATE_BLOCK_SIZE
    x = _hash(torch.tensor(seed & _LOW_WORD, device=like.device))
    for word in (seed >> 32 & _LOW_WORD, index & _LOW_WORD, block & _LOW_WORD, block >> 32):
        x = _hash(x ^ word)
    return _hash(x + place % formats.STATE_BLOCK_SIZE & _LOW_WORD).view(like.shape)


def _rounded_stochastically(value: Tensor, random: Tensor) -> Tensor:
    bits = value.contiguous().view(torch.int32).long() & _LOW_WORD
    rounded = (bits + (random & 0xFFFF)) >> 16
    rounded = torch.where(value.isnan(), 0x7FC0, rounded)
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)
    return signed.to(torch.int16).view(torch.bfloat16)


def _weight_slices(
    weight: Weight, out_features: int, in_features: int
) -> Iterator[tuple[slice, Tensor]]:
    """Row slices of the weight, dequantised to float32."""
    rows = max(1, _PIECE // max(in_features, 1))
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        values = _decoded(weight, first * in_features, last * in_features)
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


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, accumulate: bool = False
) -> None:
    """``out = alpha * a @ b``, or ``out += alpha * a @ b``: float32, rounded once to ``out.dtype``.

    ``a`` is ``[m, k]``, ``b`` ``[k, n]``, ``out`` ``[m, n]``, each float32, bfloat16 or float16.
    """
    product = _matmul(a.float(), b.float(), False) * alpha
    out.copy_(out.float() + product if accumulate else product)


def linear_4bit(
    x: Tensor,
    weight: Weight,
    out_features: int,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x @ W.T + bias``: ``[..., K] -> [..., N]`` in float32, rounded once to ``x.dtype``."""
    in_features = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    x2 = x.reshape(rows, in_features).float()
    y = x2.new_zeros(*x.shape[:-1], out_features)
    y2 = y.view(rows, out_features)
    for columns, values in _weight_slices(weight, out_features, in_features):
        y2[:, columns] = _matmul(x2, values.t(), batch_invariant)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


def linear_4bit_add(
    x: Tensor,
    weight: Weight,
    out_features: int,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    batch_invariant: bool = False,
) -> Tensor:
    """``x @ W.T + bias + alpha * left @ right`` in float32, rounded once to ``x.dtype``.

    ``x`` is ``[..., K]`` with ``M`` rows, ``left`` ``[M, r]``, ``right`` ``[r, N]``, both float32;
    a LoRA adapter's term, for example.
    """
    wide_bias = None if bias is None else bias.float()
    y = linear_4bit(x.float(), weight, out_features, wide_bias, batch_invariant)
    return plus_product(y, left, right, alpha, batch_invariant).to(x.dtype)


def linear_4bit_dx_add(
    dy: Tensor,
    weight: Weight,
    in_features: int,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    batch_invariant: bool = False,
) -> Tensor:
    """``dy @ W + alpha * left @ right`` likewise: ``right`` is ``[r, K]``."""
    dx = linear_4bit_dx(dy.float(), weight, in_features, batch_invariant)
    return plus_product(dx, left, right, alpha, batch_invariant).to(dy.dtype)


def plus_product(
    total: Tensor, left: Tensor, right: Tensor, alpha: float, batch_invariant: bool
) -> Tensor:
    """``total + alpha * left @ right``, the latter in float32 and the shape of ``total``."""
    product = _matmul(left, right, batch_invariant) * alpha
    return total + product.view(total.shape)


def linear_4bit_int8(
    x: Tensor,
    weight: Weight,
    out_features: int,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x @ W.T + bias`` with both factors in 8 bits: ``[..., K] -> [..., N]``.

    A group of 32 elements of a row of ``x`` shares a scale: they are ``q * a / 127``, with ``a``
    their largest magnitude and ``q`` integers, rounded to nearest. The codes' values are ``t / f``,
    with ``f`` of `formats.INT8_FACTORS` and integers ``t``. So an element of ``x`` is off by at
    most ``a / 254``, a weight by ``absmax / (2 * f)``. Products of integers are exact, their sums
    are float32.

    As `linear_4bit` computes it: more than 8 rows, unless ``batch_invariant``; weights whose rows
    are no whole blocks, or whose codebook's largest magnitude is not between 2^-10 and 2^10; and
    each row with an element that is not finite, whose largest is not between 2^-60 and 2^80, or
    that has a group whose largest is below 2^-90 and not zero.
    """
    in_features = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    if (
        in_features == 0
        or in_features % weight.block_size
        or (rows > formats.INT8_ROWS and not batch_invariant)
        or (factor := int8_factor(weight)) is None
    ):
        return linear_4bit(x, weight, out_features, bias, batch_invariant)
    y = linear_4bit(x, weight, out_features, bias, batch_invariant)
    x2 = x.reshape(rows, in_features).float()
    taken = rows_in_8_bits(x2)
    rounded = rounded_to_8_bits(x2[taken])
    product = rounded.new_zeros(len(rounded), out_features)
    integers = int8_weight(weight, factor)
    for columns, values in _weight_slices(integers, out_features, in_features):
        product[:, columns] = _matmul(rounded, values.t(), batch_invariant) / factor
    if bias is not None:
        product += bias.float()
    y.view(rows, out_features)[taken] = product.to(x.dtype)
    return y


_LEAST_MAGNITUDE = 2.0**-90
"""Of a group in 8 bits: its scale over a code's factor is a normal number still."""


def int8_factor(weight: Weight) -> float | None:
    """What the codes' values are multiplied by before they are rounded to 8 bits, if they are."""
    if weight.codebook is None:
        return formats.INT8_FACTORS[weight.format]
    largest = weight.codebook.abs().max()
    if not 2.0**-10 < largest < 2.0**10:
        return None
    return (torch.full_like(largest, 127) / largest).item()  # 127 / largest would round twice


def int8_weight(weight: Weight, factor: float) -> Weight:
    """The same weight with ``factor`` times its codes' values, rounded to integers."""
    values = weight.codebook
    if values is None:
        values = formats.code_tensor(weight.format, weight.device)
    scaled = values * torch.tensor(factor, device=values.device)
    integers = (scaled.abs() + 0.5).floor().copysign(scaled)
    return weight._replace(format="custom", codebook=integers)


def rows_in_8_bits(x: Tensor) -> Tensor:
    """Which rows of the float32 matrix are computed in 8 bits, bool ``[M]``."""
    groups = x.abs().unflatten(-1, (-1, formats.INT8_GROUP_SIZE)).amax(-1)
    largest = groups.amax(-1)
    in_range = (largest == 0) | ((largest > 2.0**-60) & (largest < 2.0**80))
    return in_range & ((groups == 0) | (groups > _LEAST_MAGNITUDE)).all(-1)


def rounded_to_8_bits(x: Tensor) -> Tensor:
    """The float32 matrix with each element rounded to 8 bits, a scale for each 32 of a row."""
    groups = x.unflatten(-1, (-1, formats.INT8_GROUP_SIZE))
    largest = groups.abs().amax(-1, keepdim=True)
    counts = largest > _LEAST_MAGNITUDE
    most = torch.full_like(largest, 127)
    factor = torch.where(counts, most / largest, 0)  # 127 / largest would round twice
    scale = torch.where(counts, largest / most, 0)
    return ((groups * factor).round() * scale).flatten(-2)


def groups(offsets: Tensor, rows: int) -> list[slice]:
    """Each expert's rows: up to its item of ``offsets`` from that of the expert before, or 0.

    Raises ``ValueError`` unless these are ascending numbers from 0 to ``rows``.
    """
    ends = offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise((0, *ends))):
        if not begin <= end <= rows:
            raise ValueError(
                f"offsets: got {end} for expert {expert} after {begin}; takes ascending numbers "
                f"from 0 to {rows}, the rows of x"
            )
    return [slice(begin, end) for begin, end in itertools.pairwise((0, *ends))]


def grouped_linear_4bit(
    x: Tensor,
    weight: Weight,
    out_features: int,
    offsets: Tensor,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`linear_4bit` of each of E experts with its rows of ``x``: ``[M, K] -> [M, N]``.

    ``x`` is sorted by expert: expert ``e`` has the rows up to ``offsets[e]`` from where the one
    before ends. Rows after the last give zeros. ``offsets`` is int32 or int64 ``[E]``, ``bias``
    ``[E, N]``. The fields of ``weight`` hold those of E weights one after the other.
    """
    y = x.new_zeros(len(x), out_features)
    for expert, rows in enumerate(groups(offsets, len(x))):
        if rows.start < rows.stop:
            part = weight.of_expert(expert, out_features * x.shape[1])
            own_bias = None if bias is None else bias[expert]
            y[rows] = linear_4bit(x[rows], part, out_features, own_bias, batch_invariant)
    return y


def grouped_linear_4bit_dx(
    dy: Tensor, weight: Weight, in_features: int, offsets: Tensor, batch_invariant: bool = False
) -> Tensor:
    """`linear_4bit_dx` likewise: ``[M, N] -> [M, K]``."""
    dx = dy.new_zeros(len(dy), in_features)
    for expert, rows in enumerate(groups(offsets, len(dy))):
        if rows.start < rows.stop:
            part = weight.of_expert(expert, in_features * dy.shape[1])
            dx[rows] = linear_4bit_dx(dy[rows], part, in_features, batch_invariant)
    return dx


def grouped_linear_4bit_add(
    x: Tensor,
    weight: Weight,
    out_features: int,
    offsets: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    batch_invariant: bool = False,
) -> Tensor:
    """`linear_4bit_add` by experts: ``right`` is float32 ``[E, r, N]``, ``left`` ``[M, r]``."""
    wide_bias = None if bias is None else bias.float()
    y = grouped_linear_4bit(x.float(), weight, out_features, offsets, wide_bias, batch_invariant)
    return plus_grouped(y, left, right, offsets, alpha, batch_invariant).to(x.dtype)


def grouped_linear_4bit_dx_add(
    dy: Tensor,
    weight: Weight,
    in_features: int,
    offsets: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    batch_invariant: bool = False,
) -> Tensor:
    """`linear_4bit_dx_add` by experts: ``right`` is ``[E, r, K]``."""
    dx = grouped_linear_4bit_dx(dy.float(), weight, in_features, offsets, batch_invariant)
    return plus_grouped(dx, left, right, offsets, alpha, batch_invariant).to(dy.dtype)


def plus_grouped(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    alpha: float,
    batch_invariant: bool,
) -> Tensor:
    """``total + alpha * left @ right`` of matrices, with the ``right`` of each row's expert."""
    total = total.clone()
    for expert, rows in enumerate(groups(offsets, len(total))):
        total[rows] += _matmul(left[rows], right[expert], batch_invariant) * alpha
    return total


def grouped_matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> None:
    """`matmul_into` of each expert's rows of ``a``.

    With ``b`` ``[E, k, n]`` it is ``out[rows] = alpha * a[rows] @ b[e]``, of ``[M, k]`` to
    ``[M, n]``; rows of no expert become zeros, or stay. With ``b`` ``[M, n]`` it is
    ``out[e] = alpha * a[rows].T @ b[rows]``, of ``[M, k]`` to ``[E, k, n]``.
    """
    rows = groups(offsets, len(a))
    for expert, own in enumerate(rows):
        if b.dim() == 3:
            matmul_into(out[own], a[own], b[expert], alpha, accumulate)
        else:
            matmul_into(out[expert], a[own].mT, b[own], alpha, accumulate)
    if b.dim() == 3 and not accumulate:
        out[rows[-1].stop if rows else 0 :] = 0


def linear_4bit_dx(
    dy: Tensor, weight: Weight, in_features: int, batch_invariant: bool = False
) -> Tensor:
    """``dy @ W``: ``[..., N] -> [..., K]`` in float32, rounded once to ``dy.dtype``."""
    out_features = dy.shape[-1]
    rows = math.prod(dy.shape[:-1])
    dy2 = dy.reshape(rows, out_features).float()
    dx = dy2.new_zeros(*dy.shape[:-1], in_features)
    dx2 = dx.view(rows, in_features)
    for columns, values in _weight_slices(weight, out_features, in_features):
        dx2 += _matmul(dy2[:, columns], values, batch_invariant)
    return dx.to(dy.dtype)
