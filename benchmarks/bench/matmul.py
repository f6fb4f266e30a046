"""Contests of a 4-bit linear layer: forward, or forward and the gradient of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import qkern
from qkern import testing

from . import peers, weights
from .timing import Call, Candidate, Problem

_CHECKED = 1024  # features of a result that are checked, spread over all
_CHECKED_ROWS = 32
_FORMAT_TOLERANCE = 0.25  # how far a peer's own 4-bit format may be from the weight


def contest(
    shape: tuple[int, int], m: int, dtype: torch.dtype, choice: peers.Choice, backward: bool
) -> tuple[Problem, list[Candidate], list[str]]:
    """The problem, its candidates with qkern first, and why peers are missing."""
    ops = [testing.OPS[op] for op in ("linear_4bit", "linear_4bit_dx")[: 1 + backward]]
    case = weights.case((m, *shape), dtype)
    qw = weights.random_weight(shape, dtype)
    found, missing = peers.linear_peers(qw, dtype, choice, backward)
    takes_int8 = dtype == torch.float32 and m <= peers.INT8_ROWS and not shape[1] % qw.block_size
    if "llama.cpp" in choice.peers and takes_int8 and not backward:
        found[peers.INT8] = peers.qkern_in_8_bits(qw, dtype)
    x, dy = activations(m, shape, dtype)
    check = Check(qw, x, dy if backward else None)
    moved = sum(op.bytes(case) for op in ops) - len(ops) * qw.nbytes

    def candidate(name: str, peer: peers.LinearPeer) -> Candidate:
        def prepare() -> Call:
            linear = peer.make(x)
            return training_call(linear, x, dy) if backward else inference_call(linear, x)

        size = len(ops) * peer.footprint + moved
        judge = check.judge(name, peer)
        return Candidate(
            name, prepare, judge, size, peer.footprint, peer.before, integers=peer.integers
        )

    flops = sum(op.flops(case) for op in ops)
    op = "forward_backward" if backward else "forward"
    problem = Problem(op, dtype, shape, m, flops)
    return problem, [candidate(name, peer) for name, peer in found.items()], missing


def activations(m: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The input ``[m, in_features]`` and the gradient of the output, always the same."""
    drawn = [
        torch.randn(m, width, generator=torch.Generator().manual_seed(seed))
        for seed, width in ((1, shape[1]), (2, shape[0]))
    ]
    return drawn[0].to(dtype), drawn[1].to(dtype)


def inference_call(linear: peers.Linear, x: Tensor) -> Call:
    """Forward alone."""
    return lambda: (linear(x),)


def training_call(linear: peers.Linear, x: Tensor, dy: Tensor) -> Call:
    """Forward, and the gradient of x through autograd."""
    leaf = x.detach().clone().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y = linear(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        return y.detach(), dx

    return call


class Check:
    """Compares ``(y, dx)``, or ``(y,)`` without `dy`, with float64 products on the exact weights.

    Rows and features are checked that are spread over all.
    """

    def __init__(self, qw: qkern.QuantizedTensor, x: Tensor, dy: Tensor | None = None) -> None:
        n, k = qw.shape
        self.rows = weights.spread(len(x), _CHECKED_ROWS)
        self.features = [weights.spread(n, _CHECKED)]
        self.inputs = [x[self.rows]]
        self.weights = [weights.rows(qw, self.features[0])]
        if dy is not None:
            self.features.append(weights.spread(k, _CHECKED))
            self.inputs.append(dy[self.rows])
            self.weights.append(weights.columns(qw, self.features[1]))

    def judge(self, name: str, peer: peers.LinearPeer) -> Callable[[Sequence[Tensor]], None]:
        """What raises AssertionError on a wrong result of that candidate."""
        if name == "qkern":
            return self.exactly
        return partial(self.in_own_format if peer.rows else self.roughly, peer)

    def _parts(self, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        expected = zip(self.features, self.inputs, self.weights, strict=True)
        for y, (features, x, weight) in zip(results, expected, strict=True):
            yield y[self.rows][:, features], x, weight

    def exactly(self, results: Sequence[Tensor]) -> None:
        """As exact as qkern promises; see `qkern.testing.assert_matmul`."""
        for y, x, weight in self._parts(results):
            testing.assert_matmul(y, x, weight)

    def roughly(self, peer: peers.LinearPeer, results: Sequence[Tensor]) -> None:
        """The same function, up to a peer's own rounding or format."""
        for y, x, weight in self._parts(results):
            assert_near(y, x.double() @ weight.double().mT, peer.tolerance)

    def in_own_format(self, peer: peers.LinearPeer, results: Sequence[Tensor]) -> None:
        """The product with the weight that the peer holds, which must be near the one given."""
        assert peer.rows is not None
        for y, x, weight in self._parts(results):
            held = peer.rows(self.features[0])
            assert_near(held, weight, _FORMAT_TOLERANCE)
            assert_near(y, x.double() @ held.double().mT, peer.tolerance)


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return (value.to(exact.device).double() - exact).norm().item() / exact.norm().item()


def assert_near(y: Tensor, exact: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless the relative error of `y`, on any device, is at most that."""
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}, not {tuple(exact.shape)}"
    error = relative_error(y, exact)
    assert error <= tolerance, f"relative error {error:.3g}, above {tolerance}"
