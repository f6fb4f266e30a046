"""Contests of single ops: qkern on each instruction set beside its peers.

Inputs, bytes, flops and comparisons come from the op table in `qkern.testing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qkern
from qkern import formats, reference, testing
from qkern.backends import native

from . import peers
from .timing import Call, Candidate, Problem, SkippedError

CONTESTS = ("quantize", "dequantize", "forward", "forward_backward")
PEERS = ("bitsandbytes", "dense", "torchao")

_BLOCK_SIZE = 64
_CHECKED = 1024  # features of a matmul's result that are checked, spread over all
_CHECKED_ROWS = 32
_PIECE = 1 << 24  # elements dequantised at a time to check a matmul
_EQUAL_SHARE = 0.999  # of bitsandbytes' codes that must be qkern's: it rounds ties otherwise


@dataclass(frozen=True)
class Choice:
    """Who takes part: instruction sets (empty: the one qkern chooses) and peers."""

    isas: tuple[str, ...] = ()
    peers: tuple[str, ...] = PEERS
    hide_bf16: bool = False


def contest(
    op: str, shape: tuple[int, int], m: int, dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """The problem, its candidates with qkern's first, and why peers are missing.

    `op` is one of `CONTESTS`, or an op of `qkern.testing.OPS`, which has no peers here.
    """
    if op in testing.OPS:
        return _table_op(op, shape, m, dtype, choice)
    make = {"quantize": _quantize, "dequantize": _dequantize}
    if op in make:
        return make[op](shape, dtype, choice)
    return _matmul(shape, m, dtype, choice, backward=op == "forward_backward")


def takes_rows(op: str) -> bool:
    """Whether `op` is timed for each number of rows of activations."""
    return op.startswith(("forward", "linear"))


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
            before=partial(native.set_isa, isa),
        )


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> testing.Case:
    return testing.Case(shape, dtype, _BLOCK_SIZE, double_quant=True)


def _inputs(op: str, case: testing.Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return testing.OPS[op].make_inputs(case, torch.device("cpu"), generator)


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> qkern.QuantizedTensor:
    """Random storage, so that a weight of any size is made quickly and without a dense twin."""
    stored = _inputs("dequantize_4bit", _case(shape, dtype))
    return qkern.QuantizedTensor(**stored | {"shape": tuple(shape)})


def _table_op(
    op: str, shape: tuple[int, int], m: int, dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    spec = testing.OPS[op]
    case = _case((m, *shape) if takes_rows(op) else shape, dtype)
    problem = Problem(op, dtype, shape, m if takes_rows(op) else None, spec.flops(case))
    inputs = _inputs(op, case)

    def prepare() -> Call:
        copy = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return lambda: spec.run(copy)

    def check(_: object) -> None:
        isa = native.isa() if native.missing_reason is None else None
        name = qkern.backends.selected_name("cpu")
        testing.check(spec, case, testing.Target(name, isa if name == "cpu" else None))

    footprint = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
    ours = Candidate("qkern", prepare, check, spec.bytes(case), footprint)
    return problem, list(_per_isa(choice, ours)), []


def _quantize(
    shape: tuple[int, int], dtype: torch.dtype, choice: Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    w = _inputs("quantize_4bit", _case(shape, dtype))["x"]
    # Quantising moves what dequantising moves, the other way.
    bytes = testing.OPS["dequantize_4bit"].bytes(_case(shape, dtype))
    packed, absmax = reference.quantize_4bit(w, "nf4", _BLOCK_SIZE, None)
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
    if "bitsandbytes" in choice.peers:
        try:
            functional = peers.bitsandbytes(choice.hide_bf16).functional
        except SkippedError as error:
            missing.append(f"bitsandbytes: {error}")
        else:
            theirs = partial(
                functional.quantize_4bit,
                blocksize=_BLOCK_SIZE,
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
    case = _case(shape, dtype)
    qw = random_weight(shape, dtype)
    bytes = testing.OPS["dequantize_4bit"].bytes(case)
    (expected,) = testing.OPS["dequantize_4bit"].reference(
        {**qw.tensors(), "codebook": None, "format": "nf4", "block_size": _BLOCK_SIZE}
        | {"shape": list(shape), "dtype": dtype}
    )
    footprint = qw.nbytes + expected.nbytes

    def out() -> Tensor:
        return torch.zeros(shape, dtype=dtype)  # zeroed, so that its pages exist

    def prepare() -> Call:
        return partial(qkern.dequantize_4bit, clone(), out=out())

    clone = partial(peers.clone, qw)
    check = partial(testing.assert_bitwise, expected=expected)

    def prepare_fresh() -> Call:
        return partial(qkern.dequantize_4bit, clone(), dtype)

    ours = Candidate("qkern", prepare, check, bytes, footprint)
    found, missing = list(_per_isa(choice, ours)), []
    # The peer must allocate its result, and page faults cost as much as the arithmetic.
    fresh = Candidate("qkern (fresh output)", prepare_fresh, check, bytes, qw.nbytes)
    found += _per_isa(choice, fresh)
    if "bitsandbytes" in choice.peers:
        try:
            functional = peers.bitsandbytes(choice.hide_bf16).functional
        except SkippedError as error:
            missing.append(f"bitsandbytes: {error}")
        else:

            def prepare_theirs() -> Call:
                # It takes no out= on a CPU.
                packed, state = peers.to_bitsandbytes(clone(), dtype)
                return partial(functional.dequantize_4bit, packed, state)

            near = partial(assert_near, exact=expected, tolerance=0.01)
            found.append(Candidate("bitsandbytes", prepare_theirs, near, bytes, qw.nbytes))
    if "dense" in choice.peers:

        def prepare_copy() -> Call:
            return partial(out().copy_, expected.clone())

        size = 2 * expected.nbytes
        found.append(Candidate("dense (a copy)", prepare_copy, check, size, size))
    return Problem("dequantize", dtype, shape), found, missing


def _matmul(
    shape: tuple[int, int], m: int, dtype: torch.dtype, choice: Choice, backward: bool
) -> tuple[Problem, list[Candidate], list[str]]:
    n, k = shape
    case = _case((m, n, k), dtype)
    ops = [testing.OPS[op] for op in ("linear_4bit", "linear_4bit_dx")[: 1 + backward]]
    qw = random_weight(shape, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(dtype)
    check = _MatmulCheck(qw, x, dy)
    activations = sum(op.bytes(case) for op in ops) - len(ops) * qw.nbytes

    def candidate(name: str, peer: peers.LinearPeer) -> Candidate:
        def prepare() -> Call:
            linear = peer.make()
            return training_call(linear, x, dy) if backward else inference_call(linear, x)

        judge = check.exactly if name == "qkern" else partial(check.roughly, peer.tolerance)
        moved = len(ops) * peer.footprint + activations
        return Candidate(name, prepare, judge, moved, peer.footprint)

    ours = candidate("qkern", peers.qkern_linear(qw, dtype))
    found, missing = list(_per_isa(choice, ours)), []
    for name, make in _linear_peers(choice).items():
        try:
            peer = make(qw, dtype)
        except SkippedError as error:
            missing.append(f"{name}: {error}")
            continue
        if peer.backward or not backward:
            found.append(candidate(name, peer))
    flops = sum(op.flops(case) for op in ops)
    op = "forward_backward" if backward else "forward"
    return Problem(op, dtype, shape, m, flops), found, missing


def _linear_peers(choice: Choice) -> dict[str, Callable[..., peers.LinearPeer]]:
    found: dict[str, Callable[..., peers.LinearPeer]] = {}
    if "bitsandbytes" in choice.peers:
        hide = choice.hide_bf16
        found["bitsandbytes"] = partial(peers.bitsandbytes_linear, hide_bf16=hide)
        found["bitsandbytes (eval)"] = partial(peers.bitsandbytes_packed_linear, hide_bf16=hide)
    if "dense" in choice.peers:
        found["dense"] = peers.dense_linear
    if "torchao" in choice.peers:
        found["torchao int4"] = peers.int4_linear
    return found


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


class _MatmulCheck:
    """Compares results with float64 on the exact weights, on rows and features spread over all."""

    def __init__(self, qw: qkern.QuantizedTensor, x: Tensor, dy: Tensor) -> None:
        n, k = qw.shape
        self.rows = _spread(len(x), _CHECKED_ROWS)
        self.features = (_spread(n, _CHECKED), _spread(k, _CHECKED))
        self.inputs = (x[self.rows], dy[self.rows])
        self.weights = gather(qw, *self.features)

    def _parts(self, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        expected = zip(self.features, self.inputs, self.weights, strict=True)
        for y, (features, x, weight) in zip(results, expected, strict=False):  # a forward has no dX
            yield y[self.rows][:, features], x, weight

    def exactly(self, results: Sequence[Tensor]) -> None:
        """As exact as qkern promises; see `qkern.testing.assert_matmul`."""
        for y, x, weight in self._parts(results):
            testing.assert_matmul(y, x, weight)

    def roughly(self, tolerance: float, results: Sequence[Tensor]) -> None:
        """The same function, up to a peer's own rounding or format."""
        for y, x, weight in self._parts(results):
            assert_near(y, x.double() @ weight.double().mT, tolerance)


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return (value.to(exact.device).double() - exact).norm().item() / exact.norm().item()


def assert_near(y: Tensor, exact: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless the relative error of `y`, on any device, is at most that."""
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}, not {tuple(exact.shape)}"
    error = relative_error(y, exact)
    assert error <= tolerance, f"relative error {error:.3g}, above {tolerance}"


def _spread(n: int, count: int) -> Tensor:
    """At most `count` indices below `n`, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, count)).round().long().unique()


def gather(qw: qkern.QuantizedTensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``(W[rows, :], W[:, columns]ᵀ)`` exactly, in float32, holding no more than a piece of W.

    Pieces begin at whole groups of scales, so that each is a weight by itself.
    """
    n, k = qw.shape
    group = qw.block_size * formats.NESTED_BLOCK_SIZE
    aligned = group // math.gcd(k, group)  # rows, so that aligned * k is whole groups
    step = aligned * max(1, _PIECE // (aligned * k))
    by_row, by_column = [], []
    for first in range(0, n, step):
        last = min(first + step, n)
        piece = _dequantized_rows(qw, first, last)
        by_row.append(piece[rows[(rows >= first) & (rows < last)] - first])
        by_column.append(piece[:, columns])
    return torch.cat(by_row), torch.cat(by_column).mT


def _dequantized_rows(qw: qkern.QuantizedTensor, first: int, last: int) -> Tensor:
    """Rows by the reference; ``first * k`` must be a multiple of a group of scales."""
    k = qw.shape[1]
    start, stop = first * k, last * k
    blocks = slice(start // qw.block_size, formats.num_blocks(stop, qw.block_size))
    groups = slice(
        blocks.start // formats.NESTED_BLOCK_SIZE,
        formats.num_blocks(blocks.stop, formats.NESTED_BLOCK_SIZE),
    )
    return reference.dequantize_4bit(
        qw.packed[start // 2 : formats.packed_size(stop)],
        qw.absmax[blocks],
        None if qw.nested_absmax is None else qw.nested_absmax[groups],
        qw.nested_offset,
        qw.codebook,
        qw.format,
        qw.block_size,
        (last - first, k),
        torch.float32,
    )
