"""Initialisations that need the values of a 4-bit weight, and LoftQ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkern.functional import quantize_4bit
from qkern.nn import Linear4bit
from qkern.tensor import QuantizedTensor

_PREPARED = ("eigens", "_peft_loraga_grad")
"""What PEFT's preprocessing leaves on a layer: CorDA's and LoRA-GA's."""


def requantize(dense: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """``dense`` in the format, block size and kind of scales of ``like``.

    ValueError where a value is not finite.
    """
    made = quantize_4bit(
        dense, like.format, like.block_size, like.double_quant, codebook=like.codebook
    )
    return replace(made, dtype=like.dtype)


def needs_weight(config: Any) -> str | None:
    """The option of a LoRA that is computed from the base's numbers, as a message says it."""
    init = getattr(config, "init_lora_weights", None)
    if getattr(config, "use_dora", False):
        return "use_dora: got True, which"
    if isinstance(init, str) and init not in ("gaussian", "eva"):
        return f"init_lora_weights: got {init!r}, which"
    return None


@contextmanager
def dense_base(parent: Any, base: Linear4bit, weight: Tensor, changes: bool) -> Iterator[None]:
    """Within the block ``parent.base_layer`` is a dense layer of ``weight``, float32.

    PEFT's own initialisation computes with it. Where it ``changes`` the weight, what it leaves is
    quantised in the format of ``base``; where it raises, ``base`` is as it was.
    """
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    prepared = {name: vars(base)[name] for name in _PREPARED if name in vars(base)}
    vars(dense).update(prepared)
    parent.base_layer = dense
    try:
        yield
    finally:
        parent.base_layer = base
    if changes:
        base._set_quantized(requantize(dense.weight.detach().float().contiguous(), base.quantized))
    for name in prepared.keys() - vars(dense).keys():
        delattr(base, name)


@torch.no_grad()
def loftq(
    original: Tensor, like: QuantizedTensor, rank: int, iterations: int
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """LoftQ (arXiv 2310.08659): a 4-bit weight Q and factors A, B with Q + B A near ``original``.

    ``original`` is float32 ``[out, in]``; Q has the format of ``like``, A is ``[rank, in]`` and B
    ``[out, rank]``. Each iteration quantises what the last factors leave, then factorises what
    quantising lost. The error may grow from one iteration to the next: the best is returned.
    """
    best: tuple[float, QuantizedTensor, Tensor, Tensor] | None = None
    rest = original
    for _ in range(iterations):
        quantized = requantize(rest, like)
        lost = original - quantized.dequantize(torch.float32)
        a, b = low_rank(lost, rank)
        error = float(torch.linalg.norm(lost - b @ a))
        if best is None or error < best[0]:
            best = error, quantized, a, b
        rest = original - b @ a
    assert best is not None  # there is at least one iteration
    return best[1:]


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` whose product B A is nearest to ``matrix``.

    Both take the root of each singular value. Beyond the rank of ``matrix`` they are zeros.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a = matrix.new_zeros(rank, matrix.shape[1])
    b = matrix.new_zeros(matrix.shape[0], rank)
    count = min(rank, s.numel())
    roots = s[:count].sqrt()
    a[:count] = roots[:, None] * vh[:count]
    b[:, :count] = u[:, :count] * roots
    return a, b


def check_loftq(config: Any) -> int:
    """The number of LoftQ's iterations; ValueError where the configuration does not fit."""
    options = config.loftq_config
    if options.get("loftq_bits") != 4:
        raise ValueError(f"loftq_bits: got {options.get('loftq_bits')!r}; a 4-bit weight takes 4")
    iterations = options.get("loftq_iter")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"loftq_iter: got {iterations!r}; takes a positive number")
    return iterations
