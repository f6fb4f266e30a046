"""Inputs and cases of the matmuls by experts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkern import reference
from qkern.testing._judge import assert_bitwise, assert_sums, matmul_sums
from qkern.testing._spec import DTYPES, LAYOUTS, Case, Inputs, OpSpec
from qkern.testing._values import normal, place, random_weight, weight_bytes
from qkern.testing.specs._common import unique
from qkern.testing.specs._matmul import matmul_flops
from qkern.weight import Weight

GROUPS = (
    # One expert, and several with some that have no rows: first, last, side by side.
    *((1,), (0, 1, 0), (1, 1, 1, 1), (2, 0, 0, 3), (0, 0, 7, 0, 0), (5, 1, 9, 2)),
    *((17, 0, 64, 3), (33, 1, 0, 90), (128, 128), (1, 200, 0, 5)),
    # As many experts as models have.
    tuple(i * 7 % 5 for i in range(64)),
)
WEIGHT_SHAPES = ((37, 130), (96, 256), (1, 1), (3, 7), (65, 127), (40, 160))


def groups_of(case: Case) -> tuple[int, ...]:
    """How many rows each expert has."""
    rows = case.shape[0]
    return case.groups or (rows // 3, 0, rows - rows // 3)


def _offsets_dtype(groups: tuple[int, ...]) -> torch.dtype:
    """Both that ops take, in turn."""
    return torch.int64 if len(groups) % 2 else torch.int32


def _stacked(weights: list[Weight]) -> Weight:
    """The fields of each, one after the other; they share a codebook."""
    first = weights[0]
    fields: list[Any] = [
        None if parts[0] is None else torch.cat([part.reshape(-1) for part in parts])
        for parts in zip(*(weight[:4] for weight in weights), strict=True)
    ]
    fields += first[4:]
    return Weight(*fields)


def _inputs(
    case: Case, device: torch.device, generator: torch.Generator, main: str, size: str
) -> Inputs:
    rows, out_features, in_features = case.shape
    inner, outer = (in_features, out_features) if main == "x" else (out_features, in_features)
    groups = groups_of(case)
    plain = replace(case, values="normal")
    numel = out_features * in_features
    weights = [random_weight(plain, numel, generator) for _ in groups]
    if case.double_quant:
        weights = [
            weight._replace(nested_offset=torch.tensor(0.05 + 0.01 * expert))
            for expert, weight in enumerate(weights)
        ]
    x = normal((rows, inner), generator)
    if case.values == "special":
        x = x * torch.exp2(4 * normal((rows, 1), generator)).clamp(2**-8, 2**6)
        x[:, ::37] *= 50
    ends = list(itertools.accumulate(groups))
    offsets = torch.tensor(ends, dtype=_offsets_dtype(groups))
    inputs: Inputs = {main: x.to(case.dtype), "weight": _stacked(weights), size: outer}
    inputs |= {"offsets": offsets, "batch_invariant": case.batch_invariant}
    if main == "x":
        bias = normal((len(groups), outer), generator).to(case.dtype)
        inputs["bias"] = bias if case.bias else None
    return place(inputs, case, device, main)


def _cases(with_bias: bool) -> tuple[Case, ...]:
    """Every dtype with all groups and weight shapes; formats and scales rotate through them."""
    variants = itertools.cycle(
        Case((), **keywords)
        for keywords in (
            {"double_quant": True, "bias": with_bias},
            {"format": "fp4", "block_size": 32},
            {"block_size": 128, "bias": with_bias},
            {"double_quant": True, "format": "custom", "codebook": "unsorted", "block_size": 32},
            {"double_quant": True, "format": "fp4", "block_size": 256, "bias": with_bias},
        )
    )
    cases: list[Case] = []

    def add(groups: tuple[int, ...], n: int, k: int, none: int = 0, **others: Any) -> None:
        case = replace(next(variants), shape=(sum(groups) + none, n, k), groups=groups)
        cases.append(replace(case, **others))

    for dtype in DTYPES:
        for groups in GROUPS:
            add(groups, 37, 130, none=len(groups) % 3, dtype=dtype)
            add(groups, 96, 256, none=(len(groups) + 1) % 2, dtype=dtype)
            add(groups, 40, 160, batch_invariant=True, dtype=dtype)
        for n, k in WEIGHT_SHAPES:
            add((3, 0, 2, 20), n, k, none=1, dtype=dtype)
        for layout in LAYOUTS[1:]:
            add((2, 0, 40), 35, 99, none=2, layout=layout, dtype=dtype)
            add((3, 9), 35, 192, layout=layout, dtype=dtype)
        # Whole tiles of tensor cores, parts of them, and wide results.
        add((64, 1, 128, 63), 256, 384, dtype=dtype)
        add((16, 17, 15), 136, 320, none=40, dtype=dtype)
        add((4, 2, 1), 520, 1056, none=1, dtype=dtype)
        add((9, 70), 96, 512, values="special", dtype=dtype)
        # No rows at all, none of any expert, and no terms.
        add((0, 0), 37, 130, dtype=dtype)
        add((0, 0, 0), 40, 160, none=5, dtype=dtype)
        add((2, 3), 8, 0, dtype=dtype)
        add((2, 3), 0, 8, dtype=dtype)
    return unique(cases)


def added_inputs(
    case: Case, device: torch.device, generator: torch.Generator, main: str, size: str
) -> Inputs:
    """`_inputs` and a term of the case's rank, a right factor for each expert."""
    inputs = _inputs(case, device, generator, main, size)
    experts, rows = len(inputs["offsets"]), case.shape[0]
    left = normal((rows, case.rank), generator)
    right = normal((experts, case.rank, inputs[size]), generator)
    # As an adapter has them: the forward's are transposed.
    right = right.mT.contiguous().mT if main == "x" else right
    return inputs | {"left": left.to(device), "right": right.to(device), "alpha": 0.75}


def _added_cases(with_bias: bool) -> tuple[Case, ...]:
    """Some of the cases without a term, with ranks that rotate."""
    ranks = itertools.cycle((16, 1, 8, 5, 64, 33, 4))
    # Without terms of the matmul the reference computes, as torch multiplies.
    taken = [case for case in _cases(with_bias) if case.values == "normal" and all(case.shape[1:])]
    cases = [replace(case, rank=next(ranks)) for case in taken[::2]]
    return unique([*cases, replace(taken[0], rank=0)])


def _judge(y: Tensor, inputs: Inputs, weights: Tensor) -> None:
    """Raise AssertionError unless each expert's rows are right and those of none are zeros."""
    x = inputs["x"] if "x" in inputs else inputs["dy"]
    groups = reference.groups(inputs["offsets"], len(x))
    bias = inputs.get("bias")
    sums = []
    for expert, rows in enumerate(groups):
        own, added = None if bias is None else bias[expert], None
        if "left" in inputs:
            added = inputs["left"][rows], inputs["right"][expert], inputs["alpha"]
        sums.append(matmul_sums(y[rows], x[rows], weights[expert], own, added))
    assert_sums(sums)
    rest = y[groups[-1].stop :]
    assert_bitwise(rest, torch.zeros_like(rest), "rows of no expert")


def _bytes(case: Case) -> int:
    """Activations, result and offsets, and the weights and biases of experts that have rows."""
    rows, out_features, in_features = case.shape
    groups = groups_of(case)
    used = sum(count > 0 for count in groups)
    offsets = len(groups) * _offsets_dtype(groups).itemsize
    activations = rows * (out_features + in_features) + used * out_features * case.bias
    weights = used * weight_bytes(out_features * in_features, case)
    return offsets + weights + activations * case.dtype.itemsize


def _added_bytes(case: Case, forward: bool) -> int:
    """Those of the matmul, and the factors of the term."""
    rows, out_features, in_features = case.shape
    used = sum(count > 0 for count in groups_of(case))
    features = out_features if forward else in_features
    return _bytes(case) + 4 * case.rank * (rows + used * features)


def grouped_added_spec(name: str, main: str, size: str) -> OpSpec:
    """The entry of such a product with a term of low rank."""
    forward = main == "x"
    return replace(
        grouped_spec(name, main, size),
        cases=_added_cases(with_bias=forward),
        make_inputs=partial(added_inputs, main=main, size=size),
        bytes=partial(_added_bytes, forward=forward),
    )


def grouped_spec(name: str, main: str, size: str) -> OpSpec:
    """The entry of a product by experts, of activations called `main`."""
    forward = main == "x"
    return OpSpec(
        name,
        _cases(with_bias=forward),
        partial(_inputs, main=main, size=size),
        "grouped",
        _bytes,
        matmul_flops,
        main=main,
        input_gradient=not forward,
        judge=_judge,
    )
