"""What a call costs besides its arithmetic: tiny layers in a warm cache, many calls at a time.

qkern is called from the outside in: the public function, the torch op below it, and the compiled
function below that.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import qkern
from qkern.backends import cpu

from . import matmul, peers, weights
from .timing import Call, Candidate, Problem, SkippedError

OP = "overhead"
SHAPES = ((64, 64), (576, 576))  # the smaller one is nearly all overhead
_CALLS = 100


def batched_clock(call: Call) -> float:
    """Seconds a call, over so many that the clock and the loop count little."""
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - begin) / _CALLS


def contest(
    shape: tuple[int, int], m: int, dtype: torch.dtype, choice: peers.Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """The three calls of qkern, then the peers; and why some are missing."""
    qw = weights.random_weight(shape, dtype)
    found, missing = peers.linear_peers(qw, dtype, choice)
    x, _ = matmul.activations(m, shape, dtype)
    check = matmul.Check(qw, x)
    del found["qkern"]
    candidates = [
        Candidate("qkern", lambda: lambda: (qkern.nf4_linear(x, qw),), check.exactly),
        Candidate("qkern (torch op)", lambda: torch_op(x, qw), check.exactly),
    ]
    try:
        compiled_function(x, qw)
    except SkippedError as error:
        missing.append(f"qkern (compiled function): {error}")
    else:
        candidates.append(
            Candidate("qkern (compiled function)", lambda: compiled_function(x, qw), check.exactly)
        )
    for name, peer in found.items():
        candidates.append(_peer(name, peer, x, check))
    return Problem(OP, dtype, shape, m), candidates, missing


def _peer(name: str, peer: peers.LinearPeer, x: Tensor, check: matmul.Check) -> Candidate:
    def prepare() -> Call:
        return matmul.inference_call(peer.make(x), x)

    return Candidate(name, prepare, check.judge(name, peer), before=peer.before)


def torch_op(x: Tensor, qw: qkern.QuantizedTensor) -> Call:
    """``torch.ops.qkern.linear_4bit`` on its arguments."""
    op = torch.ops.qkern.linear_4bit.default
    arguments = (x, *qw.weight, qw.shape[0], None, False)
    return lambda: (op(*arguments),)


def compiled_function(x: Tensor, qw: qkern.QuantizedTensor) -> Call:
    """The function of the compiled module that the torch op comes to, with what it was given.

    Raises `SkippedError` where the op does not call it through Python.
    """
    if reason := cpu.missing_reason():
        raise SkippedError(reason)
    calls: list[tuple[Any, ...]] = []
    with mock.patch.dict(cpu.fast, linear_4bit=lambda *given: calls.append(given)):
        torch_op(x, qw)()
    if not calls:
        raise SkippedError("the op does not call it through Python")
    function, arguments = cpu.fast["linear_4bit"], calls[-1]
    return lambda: (function(*arguments),)
