"""Inputs and cases of the two fused matmuls."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import torch

from qkern import formats
from qkern.testing._spec import DTYPES, LAYOUTS, Case, Inputs, OpSpec
from qkern.testing._values import normal, place, random_weight, weight_bytes, with_layout
from qkern.testing.specs._common import unique

ROWS = (0, 1, 2, 3, 5, 8, 13, 16, 17, 33, 64, 129, 300)
WEIGHT_SHAPES = (
    *((1, 64), (1, 1), (3, 7), (64, 1), (33, 65), (64, 64)),
    *((65, 127), (16, 1000), (130, 33), (128, 256), (100, 385)),
)
# Rows of whole blocks, as real models have: kernels may take a faster path there.
ALIGNED_SHAPES = (
    *((5, 32), (13, 96), (40, 160), (37, 384), (3, 416), (66, 640), (7, 1056), (2, 4224)),
    *((384, 32), (1057, 64), (4100, 32)),
)
# Around the tiles of tensor-core kernels: (rows, N, K), whole tiles and parts of them.
TILE_SHAPES = (
    *((17, 128, 128), (64, 256, 384), (128, 128, 256), (129, 384, 128), (130, 136, 160)),
    *((33, 120, 224), (65, 264, 96), (100, 520, 64), (128, 130, 288), (63, 72, 544)),
)
# Longer and wider than any panel or segment that a kernel is likely to keep.
LONG_SHAPES = ((2, 3, 132_096), (8, 260, 16_448), (3, 16_448, 96), (8, 66_000, 32))
# Rows of a few long blocks, by the blocks' size: longer than a strip, and up to whole segments.
LONG_BLOCK_SHAPES = (
    *((4096, (2, 7, 8192)), (8192, (1, 5, 24_576)), (8192, (6, 3, 49_152)), (8192, (19, 9, 8192))),
    *((16_384, (1, 6, 16_384)), (16_384, (5, 3, 32_768)), (16_384, (8, 2, 49_152))),
    *((16_384, (3, 40, 16_384)), (16_384, (21, 9, 16_384))),
)


def matmul_inputs(
    case: Case, device: torch.device, generator: torch.Generator, main: str, size: str
) -> Inputs:
    """Activations called `main`, a weight, and as `size` how many features the result has."""
    rows, out_features, in_features = case.shape
    inner, outer = (in_features, out_features) if main == "x" else (out_features, in_features)
    x = normal((rows, inner), generator)
    if case.values == "special":
        # Rows of very different size, and columns of outliers, as real activations have.
        x = x * torch.exp2(4 * normal((rows, 1), generator)).clamp(2**-8, 2**6)
        x[:, ::37] *= 50
    elif case.values == "large":
        # Near the end of the dtype's range, which sums of unscaled products would leave.
        x = x.clamp(-2, 2) * (torch.finfo(case.dtype).max / 128)
    elif case.values == "unused":
        # Large where all weights are zero, below: a rounding of x beside them must not show.
        x[:, ::16] *= 1e4
    numel = out_features * in_features
    weight = random_weight(replace(case, values="normal"), numel, generator)
    if case.values == "unused":
        zero = {"nf4": 7, "fp4": 0}[case.format]
        packed = weight.packed.view(out_features, in_features // 2)
        if main == "x":
            packed[:, ::8] = packed[:, ::8] & 15 | zero << 4
        else:
            packed[::16] = zero << 4 | zero
    inputs: Inputs = {main: x.to(case.dtype), "weight": weight, size: outer}
    inputs["batch_invariant"] = case.batch_invariant
    if main == "x":
        bias = normal((outer,), generator).to(case.dtype)
        inputs["bias"] = bias if case.bias else None
    return place(inputs, case, device, main)


def matmul_cases(with_bias: bool) -> tuple[Case, ...]:
    """Every dtype with every row count and every weight shape.

    Formats, block sizes, double quantisation and bias rotate through them.
    """
    variants = itertools.cycle(
        Case((), **keywords)
        for keywords in (
            {"double_quant": True, "bias": with_bias},
            {"format": "fp4", "block_size": 32},
            {"block_size": 128, "bias": with_bias},
            {"double_quant": True, "format": "custom", "codebook": "unsorted"},
            {"block_size": 4096},
            {"double_quant": True, "format": "fp4", "block_size": 256, "bias": with_bias},
            {"format": "custom", "codebook": "asymmetric", "block_size": 32, "bias": with_bias},
        )
    )
    cases = []
    for dtype in DTYPES:
        for rows, (n, k) in itertools.product(ROWS, ((37, 130), (96, 256))):
            cases.append(replace(next(variants), shape=(rows, n, k), dtype=dtype))
        for (n, k), rows in itertools.product(WEIGHT_SHAPES, (1, 4, 21)):
            cases.append(replace(next(variants), shape=(rows, n, k), dtype=dtype))
        for layout, rows in itertools.product(LAYOUTS[1:], (1, 6, 40)):
            case = replace(next(variants), dtype=dtype, layout=layout)
            cases.append(replace(case, shape=(rows, 35, 99)))
            cases.append(replace(case, shape=(rows, 35, 192), block_size=64))
        for index, (n, k) in enumerate(ALIGNED_SHAPES):
            for rows in (1 + index % 8, 1 + (index + 3) % 8, 1 + (index + 5) % 8, 21):
                block_size = 64 if k % 64 == 0 and index % 2 else 32
                case = replace(next(variants), shape=(rows, n, k), dtype=dtype)
                cases.append(replace(case, block_size=block_size))
        cases += [
            Case(shape, dtype, block_size=32, double_quant=dq)
            for shape, dq in zip(LONG_SHAPES, (True, False, True, False), strict=True)
        ]
        cases += [replace(next(variants), shape=shape, dtype=dtype) for shape in TILE_SHAPES]
        cases += [
            Case((7, 48, 520), dtype, block_size, double_quant=True)
            for block_size in formats.BLOCK_SIZES
        ]
        cases += [
            Case(shape, dtype, block_size, double_quant=index % 2 > 0)
            for index, (block_size, shape) in enumerate(LONG_BLOCK_SHAPES)
        ]
        for rows in (1, 4, 9, 70):
            cases.append(Case((rows, 96, 512), dtype, values="special", bias=with_bias))
            cases.append(Case((rows, 96, 512), dtype, values="large"))
            cases.append(Case((rows, 96, 512), dtype, values="unused"))
            cases.append(Case((rows, 37, 130), dtype, batch_invariant=True, bias=with_bias))
    return unique(cases)


def added_inputs(
    case: Case, device: torch.device, generator: torch.Generator, main: str, size: str
) -> Inputs:
    """`matmul_inputs` and a term of the case's rank, its factors as a LoRA layer has them."""
    inputs = matmul_inputs(case, device, generator, main, size)
    left = normal((case.shape[0], case.rank), generator)
    right = normal((case.rank, inputs[size]), generator)
    if case.values == "special":
        left = left * 2**12
    layout = {"x": "transposed", "dy": "contiguous"}[main]  # B's transpose, and A
    if case.layout in ("rows", "step"):
        left, layout = with_layout(left, case.layout), case.layout
    right = with_layout(right, layout)
    return inputs | {"left": left.to(device), "right": right.to(device), "alpha": 0.75}


def added_cases(with_bias: bool) -> tuple[Case, ...]:
    """Of the cases without a term some of each kind, with ranks that rotate."""
    ranks = itertools.cycle((16, 1, 8, 5, 64, 33, 4, 260))
    cases: list[Case] = []
    for dtype in DTYPES:
        taken = [
            case
            for case in matmul_cases(with_bias)
            if case.dtype == dtype and case.values in ("normal", "special") and case.numel < 1 << 20
        ]
        cases += [replace(case, rank=next(ranks)) for case in taken[::3]]
        cases += [
            replace(case, rank=8)
            for case in taken
            if case.batch_invariant or case.layout in ("rows", "step") or case.values == "special"
        ]
        cases.append(Case((40, 64, 128), dtype, rank=0))
    return unique(cases)


def added_bytes(case: Case, forward: bool) -> int:
    """Those of the matmul, and the factors of the term."""
    rows, out_features, in_features = case.shape
    features = out_features if forward else in_features
    return matmul_bytes(case) + 4 * case.rank * (rows + features)


def added_flops(case: Case, forward: bool) -> int:
    """Two for each term of each result."""
    rows, out_features, in_features = case.shape
    features = out_features if forward else in_features
    return matmul_flops(case) + 2 * rows * case.rank * features


def matmul_bytes(case: Case) -> int:
    """Activations, weight, bias and result."""
    rows, out_features, in_features = case.shape
    activations = rows * (out_features + in_features) + (out_features if case.bias else 0)
    return weight_bytes(out_features * in_features, case) + activations * case.dtype.itemsize


def matmul_flops(case: Case) -> int:
    """Two for each term of each result."""
    return 2 * math.prod(case.shape)


def int8_cases() -> tuple[Case, ...]:
    """Of the forward product's cases those that differ in 8 bits, and some that do not."""
    cases = [
        case
        for case in matmul_cases(with_bias=True)
        if case.shape[0] <= formats.INT8_ROWS + 1 and case.shape[2] % case.block_size == 0
    ]
    for dtype in DTYPES:
        cases += [
            Case((5, 33, 128), dtype, format="custom", codebook="wide", bias=True),
            Case((3, 37, 130), dtype),
            Case((9, 40, 96), dtype, block_size=32),
            Case((9, 40, 96), dtype, block_size=32, batch_invariant=True),
            Case((19, 96, 512), dtype, values="special", batch_invariant=True, bias=True),
            Case((4, 33, 256), dtype, values="large", batch_invariant=True),
        ]
    return unique(cases)


def matmul_spec(name: str, main: str, size: str) -> OpSpec:
    """The entry of a product of activations called `main`; `size` is how many features it has."""
    forward = main == "x"
    return OpSpec(
        name,
        matmul_cases(with_bias=forward),
        partial(matmul_inputs, main=main, size=size),
        "matmul",
        matmul_bytes,
        matmul_flops,
        main=main,
        input_gradient=not forward,
    )


def added_spec(name: str, main: str, size: str) -> OpSpec:
    """The entry of such a product with a term of low rank."""
    forward = main == "x"
    return OpSpec(
        name,
        added_cases(with_bias=forward),
        partial(added_inputs, main=main, size=size),
        "matmul",
        partial(added_bytes, forward=forward),
        partial(added_flops, forward=forward),
        main=main,
        input_gradient=not forward,
    )
