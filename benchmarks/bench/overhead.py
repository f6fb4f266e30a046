"""What a call costs besides its arithmetic: tiny layers in a warm cache, many calls at a time.

qkern is called from the outside in: the public function, the torch op below it, and the compiled
function below that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import qkern
from qkern import autograd, backends, functional, ops
from qkern.backends import native

from . import matmul, peers, weights
from .timing import Call, Candidate, Problem, SkippedError

OP = "overhead"
SHAPES = ((64, 64), (576, 576))  # the smaller one is nearly all overhead
_CALLS = 100
_CALLERS = (native, backends, ops, autograd, functional)


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
    """``torch.ops.qkern.linear_4bit`` on its arguments, by their names in the schema."""
    op = torch.ops.qkern.linear_4bit.default
    fields = ("packed", "absmax", "nested_absmax", "nested_offset", "codebook", "format")
    given = {name: getattr(qw, name) for name in (*fields, "block_size")}
    given |= {"x": x, "bias": None, "out_features": qw.shape[0]}
    arguments = [
        given.get(a.name, a.default_value) for a in op._schema.arguments if not a.kwarg_only
    ]
    return lambda: (op(*arguments),)


def compiled_function(x: Tensor, qw: qkern.QuantizedTensor) -> Call:
    """The function of the compiled module that the torch op comes to, with what it was given.

    Raises `SkippedError` where the op does not call it through Python.
    """
    if native.missing_reason:
        raise SkippedError(native.missing_reason)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with _recorded(calls):
        (result,) = torch_op(x, qw)()
    if not calls:
        raise SkippedError("the op does not call it through Python")
    function, arguments, keywords = calls[-1]
    result.zero_()  # where only this function writes from here on

    def call() -> tuple[Tensor]:
        returned = function(*arguments, **keywords)
        return (returned if isinstance(returned, Tensor) else result,)

    return call


@contextlib.contextmanager
def _recorded(calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Note every call of the compiled module's matmul, in whichever module it is looked up."""
    library = native.library()
    with contextlib.ExitStack() as stack:
        for name, function in list(vars(library).items()):
            if name.startswith("_") or "linear_4bit" not in name or not callable(function):
                continue

            def record(*arguments: Any, _function: Any = function, **keywords: Any) -> Any:
                calls.append((_function, arguments, keywords))
                return _function(*arguments, **keywords)

            for module in (library, *_CALLERS):
                for alias in [n for n, value in vars(module).items() if value is function]:
                    stack.enter_context(mock.patch.object(module, alias, record))
        yield
