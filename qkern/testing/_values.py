"""Values that stress an op, in memory layouts that do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from qkern import formats
from qkern.testing._spec import CODEBOOKS, LAYOUTS, Case, Inputs, map_tensors
from qkern.weight import Weight


def codebook_tensor(case: Case, device: torch.device | str | None = None) -> Tensor | None:
    """The case's custom codebook, float32 ``[16]``, or None where its format has a table."""
    if case.codebook is None:
        return None
    return torch.tensor(CODEBOOKS[case.codebook], dtype=torch.float32, device=device)


def _poison(shape: Sequence[int], like: Tensor) -> Tensor:
    value = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with poison between and around them.

    ``offset`` starts one element into its storage (misaligned for vectors), ``rows`` has gaps
    between rows, ``step`` has a gap after every element, ``transposed`` is column-major and
    ``expanded`` repeats the first row with stride 0 (the only layout that changes values). A
    tensor with too few dimensions for the layout gets ``offset``.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; takes one of {', '.join(LAYOUTS)}")
    if layout == "step" and tensor.ndim > 0:
        storage = _poison((*tensor.shape, 2), tensor)
        view = storage[..., 0]
    elif layout == "rows" and tensor.ndim > 1:
        storage = _poison((*tensor.shape[:-1], tensor.shape[-1] + 5), tensor)
        view = storage[..., 1 : tensor.shape[-1] + 1]
    elif layout == "transposed" and tensor.ndim > 1:
        view = _poison(tensor.mT.shape, tensor).mT
    elif layout == "expanded" and tensor.ndim > 1:
        return tensor[:1].expand(tensor.shape)
    else:
        view = _poison((tensor.numel() + 2,), tensor)[1 : tensor.numel() + 1].view(tensor.shape)
    return view.copy_(tensor)


INT_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def neighbours(values: Tensor, steps: int = 1) -> Tensor:
    """The `steps` floats below and above each finite value, and the value: ``[…, 2·steps + 1]``.

    Neighbours are in the value's own dtype; both zeros count as one.
    """
    integers = values.contiguous().view(INT_OF[values.dtype]).long()
    sign_bit = 1 << (8 * values.element_size() - 1)
    magnitude = integers & (sign_bit - 1)
    ordered = torch.where(integers < 0, -magnitude, magnitude)
    ordered = ordered[..., None] + torch.arange(-steps, steps + 1, device=values.device)
    bits = torch.where(ordered < 0, -ordered - sign_bit, ordered)
    return bits.to(INT_OF[values.dtype]).view(values.dtype)


def tie_values(
    codes: Sequence[float], absmax: Tensor, dtype: torch.dtype, block_size: int
) -> Tensor:
    """Blocks whose elements sit at, just below and just above the points where codes change.

    `codes` is the code table, `absmax` float32 ``[a]`` the scales to try. Every block starts with
    its scale, so the block's absmax is the scale rounded to `dtype`. Returns ``[blocks,
    block_size]``; short ends are filled with zeros.
    """
    table = torch.tensor(sorted(codes), dtype=torch.float32)
    points = (table[1:] + table[:-1]) * 0.5
    points = points[(points.abs() <= 1) & (points != 0)]
    points = torch.cat([points, -points]) if table[0] >= 0 else points
    scales = absmax.to(dtype).float()
    ties = neighbours((points * scales[:, None]).to(dtype)).flatten(1)
    ties = ties.where(ties.float().abs() <= scales[:, None], 0)
    per_block = block_size - 1
    groups = -(-ties.shape[1] // per_block)
    ties = torch.nn.functional.pad(ties, (0, groups * per_block - ties.shape[1]))
    ties = ties.view(len(absmax), groups, per_block)
    heads = absmax.to(dtype)[:, None, None].expand(-1, groups, 1)
    return torch.cat([heads, ties], dim=2).flatten(0, 1)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def special(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Runs of 32 values, each of one magnitude: the extremes of `dtype`, zeros of both signs."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    scales = [1.0, 0.0, -0.0, tiny, tiny * 0.25, tiny * info.eps, info.max, info.max * 0.25, 1e-20]
    n = math.prod(shape)
    runs = -(-n // 32)
    picks = torch.tensor(scales)[torch.randint(len(scales), (runs, 1), generator=generator)]
    values = (normal((runs, 32), generator) * 0.4).clamp(-1, 1) * picks
    holes = torch.rand((runs, 32), generator=generator)
    values = values.where(holes > 0.05, 0.0).where(holes > 0.02, -0.0)
    return values.flatten()[:n].reshape(tuple(shape)).to(dtype)


def scatter(values: Tensor, specials: Sequence[float], generator: torch.Generator) -> Tensor:
    """Each of `specials` in turn put at about every 200th place, the first at a random one."""
    flat = values.flatten()
    places = torch.randperm(len(flat), generator=generator)[: max(1, len(flat) // 200)]
    for place, special in zip(places.tolist(), itertools.cycle(specials), strict=False):
        flat[place] = special
    return flat.view(values.shape)


def source(case: Case, table: Sequence[float], generator: torch.Generator) -> Tensor:
    """What an encoder is given, `case.shape` in `case.dtype`, on the CPU."""
    if case.values == "special":
        return special(case.shape, case.dtype, generator)
    if case.values == "zeros":
        return torch.zeros(case.shape, dtype=case.dtype)
    if case.values == "ties":
        absmax = torch.exp2(6 * normal((1 + case.numel // case.block_size,), generator))
        absmax[::3] = absmax[::3].log2().round().exp2()
        ties = tie_values(table, absmax, case.dtype, case.block_size).flatten()
        return ties[: case.numel].reshape(case.shape)
    values = normal(case.shape, generator).to(case.dtype)
    if case.values == "nonfinite" and case.numel:
        return scatter(values, (math.nan, math.inf, -math.inf), generator)
    if case.values == "huge" and case.numel:
        return scatter(values, (3e19, -3e19, 9.3e18, 3e38, -3e38), generator)
    return values


HALFWAY_TAILS = {4: (2.0**-53, 2.0**-60), 8: (2.0**-52, 2.0**-53), 16: (2.0**-53, 0.0)}
"""By the length of a sum, its last terms: tails that put the mean next to a rounding midpoint.

Correct only if the float64 sum is rounded up."""


def scales(n: int, values: str, generator: torch.Generator) -> Tensor:
    """`n` block scales, float32."""
    scales = normal((n,), generator).abs() * 0.02 + 0.03
    if values == "special":
        tiny = torch.finfo(torch.float32).smallest_normal
        extremes = torch.tensor([0.0, tiny, tiny * 0.25, 2.0**-149, 3e38, 6e4, 7e4, 1e-6, -0.5])
        picks = torch.randint(2 * len(extremes), (n,), generator=generator)
        scales = scales.where(picks >= len(extremes), extremes[picks % len(extremes)])
    elif values == "zeros":
        scales.zero_()
    elif values == "constant":
        scales.fill_(0.1)
    elif values == "negative":
        scales.neg_()
    elif values == "uneven":
        # One of each group is far larger than the others, each time by another factor.
        groups = formats.num_blocks(n, formats.NESTED_BLOCK_SIZE)
        scales[:: formats.NESTED_BLOCK_SIZE] *= 2.0 ** (torch.arange(groups) % 21)
    elif values == "halfway":
        scales.zero_()
        scales[:4] = torch.tensor([1.0, 2.0**-24, *HALFWAY_TAILS[n]])
    elif values == "nonfinite" and n:
        scales = scatter(scales, (math.nan, math.inf), generator)
    return scales


def place(inputs: Inputs, case: Case, device: torch.device, main: str) -> Inputs:
    """Move to `device`; give `main` the case's layout and misalign the other tensors with it."""
    other = "contiguous" if case.layout == "contiguous" else "offset"
    placed = {}
    for name, value in inputs.items():
        layout = case.layout if name == main else other
        placed[name] = map_tensors(value, partial(_moved, device=device, layout=layout))
    return placed


def _moved(tensor: Tensor, device: torch.device, layout: str) -> Tensor:
    return with_layout(tensor.to(device), layout)


def random_weight(case: Case, n: int, generator: torch.Generator) -> Weight:
    """Random 4-bit storage of `n` elements; the codes are uniform, the scales plausible."""
    blocks = formats.num_blocks(n, case.block_size)
    packed = torch.randint(256, (formats.packed_size(n),), dtype=torch.uint8, generator=generator)
    layout = codebook_tensor(case), case.format, case.block_size
    if not case.double_quant:
        return Weight(packed, scales(blocks, case.values, generator), None, None, *layout)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
    groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    nested_absmax = scales(groups, case.values, generator) * 0.5
    return Weight(packed, absmax, nested_absmax, torch.tensor(0.05), *layout)


def weight_bytes(n: int, case: Case) -> int:
    """Bytes of a 4-bit weight of `n` elements."""
    blocks = formats.num_blocks(n, case.block_size)
    if not case.double_quant:
        return formats.packed_size(n) + 4 * blocks
    nested = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    return formats.packed_size(n) + blocks + 4 * nested + 4
