"""The loss of a large head, forward and backward: `qkern.linear_cross_entropy` and plain torch.

A problem's shape is the head's, ``[vocabulary, hidden]``, and its rows are tokens. The head is
frozen, as with LoRA; the gradient is that of the hidden states. A head in 4 bits is held to the
same loss on its dequantised weight, which the dense candidates have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qkern

from . import matmul, peak, weights
from .timing import Call, Candidate, Problem

OP = "loss"
PROBLEMS = (((262144, 640), 512), ((49152, 576), 1024))
"""Heads with rows: a vocabulary of Gemma 3's size, and SmolLM2's."""
IN_4_BITS = "qkern (4-bit head)"
NAMES = ("qkern", IN_4_BITS, "dense")
_TOLERANCE = 0.02  # in 16 bits; both round logits


@dataclass(frozen=True)
class _Inputs:
    hidden: Tensor
    labels: Tensor
    weight: Any


def _inputs(name: str, shape: tuple[int, int], m: int, dtype: torch.dtype) -> _Inputs:
    """Always the same; logits have a deviation of about one."""
    quantized = weights.random_weight(shape, dtype)
    weight = quantized if name == IN_4_BITS else quantized.dequantize(dtype)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(m, shape[1], generator=generator) / shape[1] ** 0.5
    labels = torch.randint(shape[0], (m,), generator=generator)
    return _Inputs(hidden.to(dtype).requires_grad_(), labels, weight)


def _step(name: str, inputs: _Inputs) -> Call:
    """Loss and gradient of the hidden states."""

    def loss() -> Tensor:
        if name != "dense":
            return qkern.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)
        return F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.labels)

    def call() -> tuple[Tensor, Tensor]:
        value = loss()
        (gradient,) = torch.autograd.grad(value, inputs.hidden)
        return value.detach(), gradient

    return call


def contest(
    shape: tuple[int, int], m: int, dtype: torch.dtype, chosen: tuple[str, ...]
) -> tuple[Problem, list[Candidate], list[str]]:
    """Both of qkern's heads, and plain torch if `chosen` has ``dense``."""
    exact: list[Tensor] = []

    def check(result: tuple[Tensor, Tensor]) -> None:
        exact[:] = exact or _exact(_inputs("dense", shape, m, dtype))
        for found, expected in zip(result, exact, strict=True):
            matmul.assert_near(found, expected, _TOLERANCE)

    def candidate(name: str) -> Candidate:
        made = _once(lambda: _inputs(name, shape, m, dtype))
        return Candidate(name, lambda: _step(name, made()), check)

    names = [name for name in NAMES if name != "dense" or "dense" in chosen]
    problem = Problem(OP, dtype, shape, m, work=m, unit="tokens/s")
    return problem, [candidate(name) for name in names], []


def _once(make: Callable[[], _Inputs]) -> Callable[[], _Inputs]:
    found: list[_Inputs] = []

    def get() -> _Inputs:
        found[:] = found or [make()]
        return found[0]

    return get


@torch.no_grad()
def _exact(inputs: _Inputs, rows: int = 64) -> list[Tensor]:
    """Loss and gradient in float32, some rows at a time."""
    weight, hidden = inputs.weight.float(), inputs.hidden.detach().float()
    losses, gradients = [], []
    for chunk, labels in zip(hidden.split(rows), inputs.labels.split(rows), strict=True):
        logits = chunk @ weight.T
        losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        of_logits = logits.softmax(1)
        of_logits[torch.arange(len(labels)), labels] -= 1
        gradients.append(of_logits @ weight / len(hidden))
    return [torch.stack(losses).sum() / len(hidden), torch.cat(gradients)]


def peak_memory(name: str, shape: tuple[int, int], m: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of this process before a step, and what the step adds at its peak.

    Run it in a fresh process.
    """
    _step(name, _inputs(name, (256, shape[1]), 4, dtype))()  # what is allocated once
    found = peak.during(_step(name, _inputs(name, shape, m, dtype)))
    return {"model": found["model"], "peak": found["peak"] - found["model"]}
