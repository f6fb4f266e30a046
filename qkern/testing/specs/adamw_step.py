"""adamw_step: a step of the optimizer on several parameters."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from qkern import formats, reference
from qkern.testing._spec import DTYPES, Case, Inputs, OpSpec
from qkern.testing._values import normal, place, source
from qkern.testing.specs._common import BIG_SHAPE, FLAT_SHAPES, unique

# Beside the case's shape: a block and a bit, less than any register, and one that is skipped.
_ADAMW_SHAPES = ((257,), (1,), (3, 5), (300,))
_SHRINKING = (3, 5)
"""Shape whose moments shrink, exposing reads past the end."""
_ADAMW_INDICES = (1, 4, 7, 10, 13)


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs: Inputs = {"params": [], "grads": [], "exp_avgs": [], "exp_avg_sqs": []}
    inputs |= {"exp_avg_absmaxes": [], "exp_avg_sq_absmaxes": []}
    for shape in (case.shape, *_ADAMW_SHAPES):
        of_shape = replace(case, shape=shape, dtype=torch.float32)
        grad = source(replace(of_shape, dtype=case.dtype), (), generator)
        if case.values == "huge":
            of_shape = replace(of_shape, values="normal")  # their squares are infinite
        moments = [source(of_shape, (), generator) * 0.1, source(of_shape, (), generator) ** 2]
        if shape == _SHRINKING:
            grad = (moments[0] * 5).to(case.dtype)  # its gradients are scaled by -1.3
        inputs["params"].append(normal(shape, generator).to(case.dtype))
        inputs["grads"].append(grad)
        names = (("exp_avg", "signed"), ("exp_avg_sq", "unsigned"))
        for (name, map_name), moment in zip(names, moments, strict=True):
            if case.bits == 8:
                map = formats.map_tensor(map_name)
                moment, absmax = reference.quantize_8bit(moment, map, formats.STATE_BLOCK_SIZE)
                inputs[f"{name}_absmaxes"].append(absmax)
            inputs[f"{name}s"].append(moment)
    factors = torch.full((_ADAMW_INDICES[-1] + 1, reference.ADAMW_FACTORS), math.nan)
    for k, index in enumerate(_ADAMW_INDICES):
        # Each row is as no other, so that a wrong one shows.
        skip = index == _ADAMW_INDICES[-1]
        row = (torch.tensor([3.0 + k]), 1e-2 * (k + 1), 0.9, 0.99, 1e-8, 0.1, 0.7 - k, skip)
        factors[index] = reference.adamw_factors(*row)[0]
    inputs["factors"] = factors
    inputs["seed"] = 0x12345678 if case.stochastic_rounding else None
    inputs["indices"] = list(_ADAMW_INDICES)
    inputs["offsets"] = [(1 << 33) + 256 * k for k in range(len(_ADAMW_INDICES))]
    return place(inputs, case, device, "")


def _cases() -> tuple[Case, ...]:
    cases = []
    for dtype, bits in itertools.product(DTYPES, (32, 8)):
        base = Case((), dtype, block_size=formats.STATE_BLOCK_SIZE, bits=bits)
        cases += [replace(base, shape=shape) for shape in (*FLAT_SHAPES, BIG_SHAPE, (70_001,))]
        for values in ("special", "zeros", "nonfinite"):
            cases.append(replace(base, shape=(5, 515), values=values))
        if dtype is not torch.float16:
            cases.append(replace(base, shape=(5, 515), values="huge"))
        cases.append(replace(base, shape=(7, 333), layout="offset"))
        random = replace(base, stochastic_rounding=True)
        cases += [replace(random, shape=(3, 1111)), replace(random, shape=(70_001,))]
        cases.append(replace(random, shape=(5, 515), values="nonfinite"))
    return unique(cases)


def _bytes(case: Case) -> int:
    numels = [math.prod(shape) for shape in (case.shape, *_ADAMW_SHAPES)]
    states = 16 * sum(numels)
    if case.bits == 8:
        blocks = sum(formats.num_blocks(n, formats.STATE_BLOCK_SIZE) for n in numels)
        states = 4 * sum(numels) + 16 * blocks
    factors = 4 * reference.ADAMW_FACTORS * (_ADAMW_INDICES[-1] + 1)
    return factors + states + 3 * sum(numels) * case.dtype.itemsize


SPEC = OpSpec("adamw_step", _cases(), _inputs, "bitwise", _bytes)
