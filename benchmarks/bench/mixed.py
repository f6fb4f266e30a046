"""A loop of linear layers among torch's own parallel ops, beside each of the two run alone.

Were qkern's threads others than torch's, both would spin or wait for the cores after each region of
the other, and the loop would take longer than its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import matmul, peers, weights
from .timing import Call, Candidate, Problem

OP = "mixed"
LAYERS = 8
OTHERS = "torch's ops"
ALONE = " alone"

_ROWS, _WIDTH = 256, 512  # of torch's ops: each takes tenths of a millisecond
_TOLERANCE = 0.02


class Others:
    """A product, a softmax and a GELU, which torch computes in parallel regions of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(_ROWS, _WIDTH, generator=generator).to(dtype)
        weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
        self.weight = weight.to(dtype)

    def __call__(self) -> Tensor:
        return F.gelu(torch.softmax(self.x @ self.weight, -1))

    def check(self, result: Tensor) -> None:
        """Raise AssertionError on a wrong result."""
        exact = F.gelu(torch.softmax(self.x.double() @ self.weight.double(), -1))
        matmul.assert_near(result, exact, _TOLERANCE)


def contest(
    shape: tuple[int, int], m: int, dtype: torch.dtype, choice: peers.Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """For each peer the loop and its layers alone, and at the end torch's ops alone."""
    qw = weights.random_weight(shape, dtype)
    found, missing = peers.linear_peers(qw, dtype, choice, copies=2 * LAYERS)
    x, _ = matmul.activations(m, shape, dtype)
    check = matmul.Check(qw, x)
    others = Others(dtype)

    def candidate(name: str, peer: peers.LinearPeer, between: Callable[[], object]) -> Candidate:
        def prepare() -> Call:
            layers = [peer.make(x) for _ in range(LAYERS)]
            return lambda: _loop(layers, x, between)

        judge = check.judge(name.removesuffix(ALONE), peer)
        return Candidate(name, prepare, judge, 0, LAYERS * peer.footprint, before=peer.before)

    candidates = []
    for name, peer in found.items():
        candidates.append(candidate(name, peer, others))
        candidates.append(candidate(name + ALONE, peer, lambda: None))
    candidates.append(Candidate(OTHERS, lambda: lambda: _repeat(others), others.check))
    return Problem(OP, dtype, shape, m), candidates, missing


def _loop(
    layers: Sequence[peers.Linear], x: Tensor, between: Callable[[], object]
) -> tuple[Tensor]:
    for layer in layers:
        y = layer(x)
        between()
    return (y,)


def _repeat(others: Others) -> Tensor:
    for _ in range(LAYERS):
        result = others()
    return result
