"""Contests on a CUDA device: timed by events on the stream, between calls that empty the L2 cache.

Nothing here needs CUDA but the clock and the limits, so tests play the same contests on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qkern
from qkern import testing

from . import kernels, machine, matmul, peers, report, weights
from .timing import (
    Call,
    Candidate,
    Clock,
    Problem,
    Sample,
    Settings,
    SkippedError,
    Times,
    WrongResultError,
    run_contest,
)

OPS = ("quantize", "dequantize", "forward", "forward_backward")
PEERS = ("bitsandbytes", "dense")
_PROBE_BYTES = 1 << 30
_MATMUL_SIZE = 8192
_BLOCK_SIZE = 64


class EventClock:
    """Times between two events around a call; the cache is filled with other data before.

    The stream is kept busy until the host has launched everything, so that the device goes from one
    kernel of the call to the next: else the time between the events is the host's, which takes
    longer to launch a small kernel than the device to run it. A call that waits for the device
    itself cannot be timed so, and has its time with the waiting in it.
    """

    _SHORTEST = 20_000  # cycles to keep the stream busy for
    _LONGEST = 50_000_000  # some 30 ms

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.empty(2 * size if cold else 0, dtype=torch.uint8, device=device)
        self._cycles = self._SHORTEST

    def __call__(self, call: Call) -> Times:
        cycles = self._cycles
        host = math.inf  # the least: a call that waits for the device waits for what keeps it busy
        while True:
            found, launched_in_time = self._time(call, cycles)
            host = min(host, found.host)
            if launched_in_time:
                self._cycles = cycles
            if launched_in_time or cycles >= self._LONGEST:
                return found._replace(host=host)
            cycles = min(4 * cycles, self._LONGEST)

    def _time(self, call: Call, cycles: int) -> tuple[Times, bool]:
        """The call's times, and whether the stream was busy until all of it was launched."""
        self.other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        end.record()
        launched_in_time = not begin.query()
        end.synchronize()
        return Times(begin.elapsed_time(end) / 1e3, host), launched_in_time


def contest(
    op: str,
    shape: tuple[int, int],
    m: int,
    dtype: torch.dtype,
    chosen: Sequence[str],
    device: torch.device,
) -> tuple[Problem, list[Candidate], list[str]]:
    """The problem, its candidates with qkern's first, and why peers are missing."""
    qw = weights.random_weight(shape, dtype).to(device=device)
    if op == "quantize":
        return _quantize(shape, dtype, chosen, device)
    if op == "dequantize":
        return _dequantize(qw, dtype, chosen)
    return _matmul(qw, m, dtype, chosen, backward=op == "forward_backward")


def _bitsandbytes(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> tuple[Any, Tensor, Any]:
    packed, state = peers.to_bitsandbytes(qw, dtype)
    state.to(qw.device)
    return peers.bitsandbytes(), packed, state


def _join(
    makers: dict[str, Callable[[], Candidate]], chosen: Sequence[str]
) -> tuple[list[Candidate], list[str]]:
    found, missing = [], []
    for name, make in makers.items():
        if name != "qkern" and name not in chosen:
            continue
        try:
            found.append(make())
        except (SkippedError, torch.OutOfMemoryError) as error:
            missing.append(f"{name}: {str(error).splitlines()[0]}")
    return found, missing


def _quantize(
    shape: tuple[int, int], dtype: torch.dtype, chosen: Sequence[str], device: torch.device
) -> tuple[Problem, list[Candidate], list[str]]:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    case = testing.Case(shape, dtype, _BLOCK_SIZE, double_quant=True)
    size = testing.OPS["dequantize_4bit"].bytes(case)

    def check(result: qkern.QuantizedTensor) -> None:
        exact = testing.OPS["quantize_4bit"].reference(
            {"x": w.cpu(), "format": "nf4", "block_size": _BLOCK_SIZE, "codebook": None}
        )
        testing.assert_bitwise(result.packed, exact[0], "codes")

    def ours() -> Candidate:
        call = partial(qkern.quantize_4bit, w, check_finite=False)
        return Candidate("qkern", lambda: call, check, size, w.nbytes)

    def theirs() -> Candidate:
        functional = peers.bitsandbytes().functional
        call = partial(
            functional.quantize_4bit,
            w,
            blocksize=_BLOCK_SIZE,
            quant_type="nf4",
            compress_statistics=True,
        )
        return Candidate("bitsandbytes", lambda: call, lambda result: None, size, w.nbytes)

    candidates, missing = _join({"qkern": ours, "bitsandbytes": theirs}, chosen)
    return Problem("quantize", dtype, shape), candidates, missing


def _dequantize(
    qw: qkern.QuantizedTensor, dtype: torch.dtype, chosen: Sequence[str]
) -> tuple[Problem, list[Candidate], list[str]]:
    case = testing.Case(tuple(qw.shape), dtype, _BLOCK_SIZE, double_quant=True)
    size = testing.OPS["dequantize_4bit"].bytes(case)
    exact = qw.to(device="cpu").dequantize(dtype)
    out = torch.empty(tuple(qw.shape), dtype=dtype, device=qw.device)

    def ours() -> Candidate:
        call = partial(qkern.dequantize_4bit, qw, out=out)
        check = partial(testing.assert_bitwise, expected=exact)
        return Candidate("qkern", lambda: call, check, size, qw.nbytes)

    def theirs() -> Candidate:
        module, packed, state = _bitsandbytes(qw, dtype)
        call = partial(module.functional.dequantize_4bit, packed, state)
        return Candidate(
            "bitsandbytes",
            lambda: call,
            partial(matmul.assert_near, exact=exact, tolerance=0.01),
            size,
            qw.nbytes,
        )

    def dense() -> Candidate:
        source = exact.to(qw.device)
        copied = 2 * source.nbytes
        return Candidate(
            "dense (a copy)",
            lambda: partial(out.copy_, source),
            lambda result: None,
            copied,
            copied,
        )

    makers = {"qkern": ours, "bitsandbytes": theirs, "dense": dense}
    candidates, missing = _join(makers, chosen)
    return Problem("dequantize", dtype, tuple(qw.shape)), candidates, missing


def _matmul(
    qw: qkern.QuantizedTensor, m: int, dtype: torch.dtype, chosen: Sequence[str], backward: bool
) -> tuple[Problem, list[Candidate], list[str]]:
    n, k = qw.shape
    case = testing.Case((m, n, k), dtype, _BLOCK_SIZE, double_quant=True)
    ops = [testing.OPS[op] for op in ("linear_4bit", "linear_4bit_dx")[: 1 + backward]]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(qw.device, dtype)
    dy = torch.randn(m, n, generator=generator).to(qw.device, dtype)
    exact = qw.to(device="cpu").dequantize(torch.float32)
    activations = sum(op.bytes(case) for op in ops) - len(ops) * qw.nbytes

    def candidate(name: str, linear: peers.Linear, footprint: int, tolerance: float) -> Candidate:
        training, inference = matmul.training_call, matmul.inference_call
        call = training(linear, x, dy) if backward else inference(linear, x)

        def check(results: tuple[Tensor, ...]) -> None:
            for y, rows, weight in zip(results, (x, dy), (exact, exact.mT), strict=False):
                found, given = y[:32].cpu(), rows[:32].cpu()
                if tolerance:
                    matmul.assert_near(found, given.double() @ weight.double().mT, tolerance)
                else:
                    testing.assert_matmul(found, given, weight)

        size = len(ops) * footprint + activations
        return Candidate(name, lambda: call, check, size, footprint)

    def ours() -> Candidate:
        return candidate("qkern", lambda rows: qkern.linear_4bit(rows, qw), qw.nbytes, 0.0)

    def theirs() -> Candidate:
        module, packed, state = _bitsandbytes(qw, dtype)
        linear = partial(_matmul_4bit, module, packed, state)
        return candidate("bitsandbytes", linear, qw.nbytes, 0.02)

    def dense() -> Candidate:
        weight = exact.to(qw.device, dtype)
        return candidate("dense", lambda rows: F.linear(rows, weight), weight.nbytes, 0.02)

    makers = {"qkern": ours, "bitsandbytes": theirs, "dense": dense}
    candidates, missing = _join(makers, chosen)
    flops = sum(op.flops(case) for op in ops)
    op = "forward_backward" if backward else "forward"
    return Problem(op, dtype, (n, k), m, flops), candidates, missing


def _matmul_4bit(module: Any, packed: Tensor, state: Any, rows: Tensor) -> Tensor:
    return module.matmul_4bit(rows, packed.t(), state)


def limits(
    dtypes: Sequence[torch.dtype],
    clock: Clock,
    device: torch.device,
    probe_bytes: int = _PROBE_BYTES,
    size: int = _MATMUL_SIZE,
) -> machine.Limits:
    """What copies and ``torch.mm`` (cuBLAS) reach on the device."""

    def best(call: Call) -> float:
        found = [clock(call) for _ in range(6)]
        return min(t.device if isinstance(t, Times) else t for t in found)

    half = probe_bytes // 8
    buffer = torch.ones(2 * half, device=device)
    copied = 2 * 4 * half / best(lambda: buffer[:half].copy_(buffer[half:])) / 1e9
    rates = {}
    for dtype in {torch.float32, *dtypes}:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = best(partial(torch.mm, a, b, out=out))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds / 1e9
    return machine.Limits(copied, copied, None, None, rates)


def describe(device: torch.device) -> dict[str, Any]:
    about = machine.describe(torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "processor": torch.cuda.get_device_name(device),
        "qkern_isa": f"sm_{properties.major}{properties.minor}",
        "last_level_cache_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def play(
    args: argparse.Namespace, device: torch.device, clock: Clock
) -> tuple[list[tuple[Problem, list[Sample]]], list[str], list[str]]:
    """All contests that the command line asks for: results, notes, wrong results."""
    settings = Settings(args.repeat, args.max_seconds, cold=False)
    contests, notes, wrong = [], [], []
    for op in [op for op in args.op if op in OPS]:
        for name in args.dtype:
            for shape in kernels.shapes(op, args):
                for m in kernels.rows(op, args):
                    problem, candidates, missing = contest(
                        op, shape, m, getattr(torch, name), args.peer, device
                    )
                    notes += [f"{problem}: without {reason}" for reason in missing]
                    try:
                        samples = run_contest(problem, candidates, settings, clock)
                    except WrongResultError as error:
                        wrong.append(f"wrong result, not timed: {error}")
                        print(f"run.py: {wrong[-1]}", file=sys.stderr, flush=True)
                        continue
                    # How cold the cache was, which the clock saw to.
                    cache = args.cache
                    contests.append((problem, [replace(s, cache=cache) for s in samples]))
    return contests, notes, wrong


def run(args: argparse.Namespace) -> int:
    """Do what the command line says on the current CUDA device; returns the exit status."""
    if not torch.cuda.is_available():
        print("run.py: error: --device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    if skipped := [op for op in args.op if op not in OPS]:
        print(f"run.py: not on a CUDA device yet: {', '.join(skipped)}", file=sys.stderr)
    device = torch.device("cuda", torch.cuda.current_device())
    clock = EventClock(device, cold=args.cache == "cold")
    dtypes = [getattr(torch, name) for name in args.dtype]
    about = describe(device)
    found = limits(dtypes, clock, device)
    start = time.monotonic()
    contests, notes, wrong = play(args, device, clock)
    seconds = {"all": time.monotonic() - start}
    about["load_average_after"] = list(os.getloadavg())
    found = found.better_of(limits(dtypes, clock, device))
    rows = [row for one in contests for row in report.records(*one, found)]
    content = report.content(about, found, report.settings(args), rows, wrong + notes, seconds)
    from . import overview  # which needs matplotlib; contests alone do not

    overview.publish(args, content)
    return 1 if wrong else 0
