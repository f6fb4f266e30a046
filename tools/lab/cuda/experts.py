"""Products by experts beyond the op table: inputs, and what is asked of any backend's kernels.

``groups`` are how many rows each expert has; ``none`` more rows belong to none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qkern import testing
from qkern.testing import OPS, Case, Inputs, OpSpec, Target

FORWARD, GRADIENT = (OPS[name] for name in ("grouped_linear_4bit", "grouped_linear_4bit_dx"))
INTO = OPS["grouped_matmul_into"]

WRONG_OFFSETS = (
    # Some after all rows, in turns descending and negative; numbers that 32 bits do not hold.
    (torch.int32, (3, 1, 2, 9, 400)),
    (torch.int32, (-7, 5, -(2**31), 2**31 - 1, 4)),
    (torch.int64, (-1, 3 - 2**40, 2**32 + 2, 3, 8)),
    (torch.int64, (2, 4 - 2**63, 3, 2**63 - 1, 2**31)),
    # Three experts for a lane, of which the second ends before the first.
    (torch.int32, tuple(i // 4 - i % 3 % 2 * 200 for i in range(70))),
)
"""Of five experts or more."""


def inputs_of(spec: OpSpec, case: Case, groups: Sequence[int], none: int = 0) -> Inputs:
    """The inputs of a case whose shape's rows are those of the groups, and of none."""
    shape = (sum(groups) + none, *case.shape[1:])
    case = replace(case, shape=shape, groups=tuple(groups))
    return spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(1))


def main_of(spec: OpSpec) -> str:
    """The name of the activations, or of the matrix whose rows are shared out."""
    return spec.main


def clamped(offsets: Tensor, rows: int) -> Tensor:
    """What wrong offsets count as: each at least the one before, and at most the rows."""
    found = [0]
    for end in offsets.tolist():
        found.append(max(found[-1], min(end, rows)))
    return torch.tensor(found[1:], dtype=torch.int64)


def guarded(tensor: Tensor) -> Tensor:
    """The same values with bytes 0xFF on both sides, which make NaNs of whoever reads them.

    16-aligned, as the tensor itself.
    """
    edge = 256
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    memory = torch.full((flat.numel() + 2 * edge,), 0xFF, dtype=torch.uint8)
    memory[edge : edge + flat.numel()] = flat
    inside = memory[edge : edge + flat.numel()]
    return inside.view(tensor.dtype).view(tensor.shape)


def check_wrong_offsets(
    spec: OpSpec, case: Case, target: Target, place: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """No offsets make a kernel read beyond tensors; and what they count as is what is computed.

    ``place`` puts a tensor into memory; of tensors allocated as they are a sanitizer knows the
    ends.
    """
    for dtype, numbers in WRONG_OFFSETS:
        groups = (2, 3, 1, 4, 5, *(0,) * (len(numbers) - 5))
        inputs = inputs_of(spec, case, groups, none=6)
        inputs = {name: testing.map_tensors(value, place) for name, value in inputs.items()}
        inputs["offsets"] = torch.tensor(numbers, dtype=dtype)
        right = inputs | {"offsets": clamped(inputs["offsets"], len(inputs[main_of(spec)]))}
        with target.activate(), testing.poisoned_outputs():
            (found,), (expected,) = spec.run(inputs), spec.run(right)
        testing.assert_bitwise(found, expected, f"offsets {numbers}")


NARROW, WIDE = (0, 9, 20), (0, 70, 40)
"""Columns and terms, or rows, of dense products: one for each kind of tile."""


def check_wrong_offsets_into(
    target: Target,
    place: Callable[[Tensor], Tensor] = torch.clone,
    shapes: Sequence[tuple[int, ...]] = (NARROW, WIDE),
) -> None:
    """The same of dense products."""
    for shape, own in itertools.product(shapes, (False, True)):
        case = Case(shape, torch.bfloat16, mixed=True, own_results=own)
        check_wrong_offsets(INTO, case, target, place)


def in_two_steps(spec: OpSpec, inputs: Inputs, target: Target) -> Tensor:
    """A product by experts with a term: the product, and then the term added to it."""
    term = ("left", "right", "alpha")
    product = {name: value for name, value in inputs.items() if name not in term}
    with target.activate(), testing.poisoned_outputs():
        (y,) = OPS[spec.name.removesuffix("_add")].run(product)
        left, right, alpha = (inputs[name] for name in term)
        dense = {"out": y, "a": left, "b": right, "offsets": inputs["offsets"]}
        (y,) = INTO.run(dense | {"alpha": alpha, "accumulate": True})
    return y
