"""Contests of single ops: qkern on each instruction set beside its peers.

Inputs, bytes, flops and comparisons come from the op table in `qkern.testing`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import qkern
from qkern import reference, testing
from qkern.backends import cpu

from . import crowded, enabled, loss, matmul, mixed, optimizer, overhead, peers
from .peers import Choice
from .timing import Call, Candidate, Problem, SkippedError
from .weights import BLOCK_SIZE, case, inputs, random_weight

CONTESTS = (
    *("quantize", "dequantize", "forward", "forward_backward", mixed.OP, overhead.OP),
    *(optimizer.OP, optimizer.IN_FILE),
    *enabled.OPS,
)

_EQUAL_SHARE = 0.999  # of bitsandbytes' codes that must be qkern's: it rounds ties otherwise
_DEFAULT_SHAPES = {
    "overhead": overhead.SHAPES,
    optimizer.OP: optimizer.SHAPES,
    optimizer.IN_FILE: optimizer.FILE_SHAPES,
}
_DEFAULT_ROWS = {"overhead": (1,), "mixed": (1, 64), crowded.OP: crowded.ROWS} | dict.fromkeys(
    enabled.OPS, enabled.ROWS
)
_SHAPES = ((4096, 4096),)
_ROWS = (1, 4, 8, 64, 512)


def shapes(op: str, args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """The weights that the command line asks `op` for."""
    return tuple(args.shape or _DEFAULT_SHAPES.get(op, _SHAPES))


def rows(op: str, args: argparse.Namespace) -> tuple[int, ...]:
    """The rows of activations that it asks for; one value where they do not matter."""
    if not op.startswith(("forward", "linear", "mixed", "overhead", "enabled", "crowded")):
        return (1,)
    return tuple(args.m or _DEFAULT_ROWS.get(op, _ROWS))


def losses(args: argparse.Namespace) -> tuple[tuple[tuple[int, int], int], ...]:
    """The heads, each with its rows, that the command line asks `loss.OP` for."""
    if not args.shape:
        return loss.PROBLEMS
    return tuple((shape, m) for shape in args.shape for m in args.m or (512,))


def contest(
    op: str, shape: tuple[int, int], m: int, dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """The problem, its candidates with qkern's first, and why peers are missing.

    `op` is one of `CONTESTS`, or an op of `qkern.testing.OPS`, which has no peers here.
    """
    if op == optimizer.OP:
        return optimizer.contest(shape, dtype, choice)
    if op == optimizer.IN_FILE:
        return optimizer.file_contest(shape, dtype)
    if op in testing.OPS:
        return _table_op(op, shape, m, dtype, choice)
    without_rows = {"quantize": _quantize, "dequantize": _dequantize}
    if op in without_rows:
        return without_rows[op](shape, dtype, choice)
    if op in enabled.OPS:
        return enabled.contest(op, shape, m, dtype, choice)
    of_layers = {mixed.OP: mixed.contest, overhead.OP: overhead.contest}
    if op in of_layers:
        return of_layers[op](shape, m, dtype, choice)
    problem, found, missing = matmul.contest(
        shape, m, dtype, choice, backward=op == "forward_backward"
    )
    contestants: list[Candidate] = []
    for candidate in found:
        is_ours = candidate.name in ("qkern", peers.INT8)
        contestants += _per_isa(choice, candidate) if is_ours else [candidate]
    return problem, contestants, missing


def _per_isa(choice: Choice, candidate: Candidate) -> Iterator[Candidate]:
    """`candidate` as it is, or once on each instruction set asked for."""
    if not choice.isas:
        yield candidate
        return
    for isa in choice.isas:
        yield Candidate(
            f"{candidate.name}[{isa}]",
            candidate.prepare,
            candidate.check,
            candidate.bytes,
            candidate.footprint,
            before=partial(cpu.set_isa, isa),
            integers=candidate.integers,
        )


def _table_op(
    op: str, shape: tuple[int, int], m: int, dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    spec = testing.OPS[op]
    with_rows = op.startswith("linear")
    of = case((m, *shape) if with_rows else shape, dtype)
    problem = Problem(op, dtype, shape, m if with_rows else None, spec.flops(of))
    given = inputs(op, of)

    def prepare() -> Call:
        copy = deepcopy(given)
        return lambda: spec.run(copy, in_place=True)

    def check(_: object) -> None:
        isa = cpu.isa() if cpu.missing_reason() is None else None
        name = qkern.backends.selected_name("cpu")
        testing.check(spec, of, testing.Target(name, isa if name == "cpu" else None))

    flat = [v for value in given.values() for v in (value if isinstance(value, list) else [value])]
    footprint = sum(v.nbytes for v in flat if isinstance(v, Tensor))
    ours = Candidate("qkern", prepare, check, spec.bytes(of), footprint)
    return problem, list(_per_isa(choice, ours)), []


def _bitsandbytes(choice: Choice, missing: list[str]) -> ModuleType | None:
    """``bitsandbytes.functional``, if it is asked for; ``missing`` gets why it is not there."""
    if "bitsandbytes" not in choice.peers:
        return None
    try:
        functional: ModuleType = peers.bitsandbytes(choice.limit is not None).functional
    except SkippedError as error:
        missing.append(f"bitsandbytes: {error}")
        return None
    return functional


def _quantize(
    shape: tuple[int, int], dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    w = inputs("quantize_4bit", case(shape, dtype))["x"]
    # Quantising moves what dequantising moves, the other way.
    bytes = testing.OPS["dequantize_4bit"].bytes(case(shape, dtype))
    packed, absmax = reference.quantize_4bit(w, "nf4", BLOCK_SIZE, None)
    expected = (packed, *reference.quantize_absmax(absmax))

    def check(qw: qkern.QuantizedTensor) -> None:
        for name, tensor in zip(qw.tensors(), expected, strict=True):
            testing.assert_bitwise(qw.tensors()[name], tensor, name)

    def make(quantize: Callable[[Tensor], Any]) -> Callable[[], Call]:
        def prepare() -> Call:
            copy = w.clone()
            return lambda: quantize(copy)

        return prepare

    ours = Candidate("qkern", make(qkern.quantize_4bit), check, bytes, w.nbytes)
    found, missing = list(_per_isa(choice, ours)), []
    if functional := _bitsandbytes(choice, missing):
        theirs = partial(
            functional.quantize_4bit,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            compress_statistics=True,
        )

        def check_theirs(result: tuple[Tensor, object]) -> None:
            share = (result[0].flatten() == packed).float().mean().item()
            assert share >= _EQUAL_SHARE, f"{share:.4f} of the codes are the reference's"

        found.append(Candidate("bitsandbytes", make(theirs), check_theirs, bytes, w.nbytes))
    return Problem("quantize", dtype, shape), found, missing


def _dequantize(
    shape: tuple[int, int], dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    qw = random_weight(shape, dtype)
    bytes = testing.OPS["dequantize_4bit"].bytes(case(shape, dtype))
    (expected,) = testing.OPS["dequantize_4bit"].reference(
        {"weight": qw.weight, "shape": list(shape), "dtype": dtype}
    )
    footprint = qw.nbytes + expected.nbytes

    def out() -> Tensor:
        return torch.zeros(shape, dtype=dtype)  # zeroed, so that its pages exist

    def prepare() -> Call:
        return partial(qkern.dequantize_4bit, deepcopy(qw), out=out())

    check = partial(testing.assert_bitwise, expected=expected)

    def prepare_fresh() -> Call:
        return partial(qkern.dequantize_4bit, deepcopy(qw), dtype)

    ours = Candidate("qkern", prepare, check, bytes, footprint)
    found, missing = list(_per_isa(choice, ours)), []
    # The peer must allocate its result, and page faults cost as much as the arithmetic.
    fresh = Candidate("qkern (fresh output)", prepare_fresh, check, bytes, qw.nbytes)
    found += _per_isa(choice, fresh)
    if functional := _bitsandbytes(choice, missing):

        def prepare_theirs() -> Call:
            # It takes no out= on a CPU.
            packed, state = peers.to_bitsandbytes(deepcopy(qw), dtype)
            return partial(functional.dequantize_4bit, packed, state)

        near = partial(matmul.assert_near, exact=expected, tolerance=0.01)
        found.append(Candidate("bitsandbytes", prepare_theirs, near, bytes, qw.nbytes))
    if "dense" in choice.peers:

        def prepare_copy() -> Call:
            return partial(out().copy_, expected.clone())

        size = 2 * expected.nbytes
        found.append(Candidate("dense (a copy)", prepare_copy, check, size, size))
    return Problem("dequantize", dtype, shape), found, missing
