"""Steps of AdamW beyond the op table, each compared with the reference bit for bit.

Each takes a target of `qkern.testing`, whose backend is to compute the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qkern import formats, reference, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def factors(count: int, **changes: float) -> Tensor:
    """A row for each of ``count`` parameters, no two alike."""
    values = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1} | changes
    rows = [
        reference.adamw_factors(torch.tensor([3.0 + k]), **values, grad_scale=1 / (1 + k))
        for k in range(count)
    ]
    return torch.cat(rows)


def parameters(
    shapes: Sequence[tuple[int, torch.dtype]], bits: int, offset: int = 0
) -> dict[str, list[Tensor]]:
    """Parameters of so many elements and such a dtype, with what a step takes for each.

    ``offset``: elements by which all begin behind an aligned address.
    """
    generator = torch.Generator().manual_seed(len(shapes) + bits)

    def moved(values: Tensor) -> Tensor:
        memory = torch.empty(len(values) + offset, dtype=values.dtype)
        memory[offset:] = values
        return memory[offset:]

    found: dict[str, list[Tensor]] = {
        name: []
        for name in (
            *("params", "grads", "exp_avgs", "exp_avg_sqs"),
            *("exp_avg_absmaxes", "exp_avg_sq_absmaxes"),
        )
    }
    for numel, dtype in shapes:
        draws = [torch.randn(numel, generator=generator) for _ in range(4)]
        found["params"].append(moved(draws[0].to(dtype)))
        found["grads"].append(moved(draws[1].to(dtype)))
        moments = (("exp_avg", "signed", draws[2] * 0.1), ("exp_avg_sq", "unsigned", draws[3] ** 2))
        for name, map_, moment in moments:
            if bits == 8:
                code = formats.map_tensor(map_)
                moment, absmax = reference.quantize_8bit(moment, code, formats.STATE_BLOCK_SIZE)
                found[f"{name}_absmaxes"].append(absmax)
            found[f"{name}s"].append(moved(moment))
    return found


def check(
    target: testing.Target,
    tensors: dict[str, list[Tensor]],
    rows: Tensor,
    seed: int | None = None,
) -> None:
    """Raises AssertionError unless one step changes everything as the reference does."""
    expected = {name: [tensor.clone() for tensor in each] for name, each in tensors.items()}
    reference.adamw_step(*expected.values(), rows, seed)
    with target.activate():
        torch.ops.qkern.adamw_step(*tensors.values(), rows, seed)
    for name, each in tensors.items():
        for k, (actual, right) in enumerate(zip(each, expected[name], strict=True)):
            testing.assert_bitwise(actual, right, f"{name}[{k}]")


def many_parameters(target: testing.Target) -> None:
    """More than a launch takes, of all dtypes in turn, some empty."""
    numels = itertools.cycle((1, 256, 0, 300, 17))
    shapes = [(next(numels), DTYPES[k % 3]) for k in range(190)]
    for bits in (32, 8):
        check(target, parameters(shapes, bits), factors(len(shapes)), seed=5)


def several_rounds(target: testing.Target) -> None:
    """More than the blocks of a launch take at once: each goes on, with another parameter."""
    shapes = [(400_001, torch.bfloat16), (1, torch.bfloat16), (300_000, torch.bfloat16)]
    check(target, parameters(shapes, 32), factors(3))


def misaligned(target: testing.Target) -> None:
    """Each of a parameter's tensors by itself, and all, one element behind an aligned address."""
    for dtype, bits in itertools.product(DTYPES, (32, 8)):
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "all"):
            tensors, moved = (parameters([(777, dtype)], bits, offset) for offset in (0, 1))
            check(target, moved if name == "all" else tensors | {name: moved[name]}, factors(1))


def factors_that_are_no_numbers(target: testing.Target) -> None:
    """Elements behind a tensor's end, which exist in no memory, do not show in its scales."""
    for column, value in itertools.product(range(8), (math.nan, math.inf, -math.inf)):
        rows = factors(1)
        rows[0, column] = value
        check(target, parameters([(300, torch.float32)], 8), rows)


def every_threshold(target: testing.Target) -> None:
    """Moments on both sides of all thresholds, and of the powers of two, get the nearest codes.

    Both are 0 and decay at once: the first becomes the gradient, and the second its square.
    """
    block = formats.STATE_BLOCK_SIZE
    for map_ in ("signed", "unsigned"):
        code = formats.map_tensor(map_)
        middles = ((code[1:].double() + code[:-1].double()) / 2).float()
        values = torch.cat([middles, torch.ldexp(torch.ones(30), -torch.arange(30)), code])
        grads = torch.cat([values, -values]) if map_ == "signed" else values.sqrt()
        around = [grads]
        for end in (-math.inf, math.inf):
            near = grads
            for _ in range(3):
                near = torch.nextafter(near, torch.tensor(end))
                around.append(near)
        # Blocks of 255 and a one, which makes their scales 1.
        grads = torch.cat(around).clamp(-1, 1)
        grads = torch.nn.functional.pad(grads, (0, -len(grads) % (block - 1)))
        grads = torch.nn.functional.pad(grads.view(-1, block - 1), (0, 1), value=1.0).flatten()
        tensors = parameters([(len(grads), torch.float32)], 8) | {"grads": [grads]}
        for name in ("exp_avg_absmaxes", "exp_avg_sq_absmaxes"):
            tensors[name][0].zero_()
        check(target, tensors, factors(1, beta1=0.0, beta2=0.0))
        scales = tensors["exp_avg_absmaxes"] + tensors["exp_avg_sq_absmaxes"]
        assert all(bool((scale == 1).all()) for scale in scales), "every block's scale is 1"
        assert map_ == "unsigned" or len(tensors["exp_avgs"][0].unique()) == 256


STEPS: dict[str, Callable[[testing.Target], None]] = {
    step.__name__: step
    for step in (
        *(many_parameters, several_rounds, misaligned, factors_that_are_no_numbers),
        every_threshold,
    )
}
