#!/usr/bin/env python3
"""How long the host takes to start a matmul on a GPU; no GPU is used.

The CUDA kernels are those of the emulator (tools/lab/cuda/emulator), told to count launches and to
do nothing. So what is timed is Python, the binding and torch's allocator for CPUs; torch's stream
and device, and CUDA's own time for a launch, are not. Each call is made by Python alone, as where
an argument is unusual, and by the function that reads the tensors itself, in turn in one process.
``F.linear`` is torch's on a CPU, 64 x 64, to tell how fast the machine is.

Times are of the calling thread's processor time, so that other processes count little; the
backward of CUDA tensors runs in a thread of autograd's own, and waking that is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from bench import machine, report
from bench.timing import percentile
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import qkern
from lab.cuda.emulator import backend, build
from qkern import backends

CALLS = 50
"""That are timed at a time."""
_CPU_TENSORS = 1  # DLPack's number of their device
CANDIDATES = BY_PYTHON, ON_TENSORS, DENSE = "by Python", "on tensors", "F.linear"
Call = Callable[[], object]


@contextmanager
def counted(library: ModuleType) -> Iterator[None]:
    """Launches that are counted and compute nothing."""
    library.set_computed(False)
    try:
        yield
    finally:
        library.set_computed(True)


@contextmanager
def kernels(library: ModuleType, on_tensors: bool) -> Iterator[None]:
    """CPU tensors on the emulated kernels, outside of a block of `backends.use`, which costs."""
    found = backend.backend(library, _CPU_TENSORS if on_tensors else None)
    with mock.patch.dict(backends.selected, {torch.device("cpu"): found}):
        yield


def linear_calls(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> dict[str, Call]:
    """`qkern.nf4_linear` as it is called in inference and in training."""
    qw = qkern.quantize_4bit(torch.randn(shape))
    x = torch.randn(rows, shape[1], dtype=dtype)
    trained = torch.randn(rows, shape[1], dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, shape[0], dtype=dtype)
    return _calls(lambda rows: qkern.nf4_linear(rows, qw), x, trained, dy)


def lora_calls(shape: tuple[int, int], rows: int) -> dict[str, Call]:
    """`qkern.lora_linear` of rank 4 in float32; torch's CPU computes the adapter."""
    qw = qkern.quantize_4bit(torch.randn(shape))
    a, b = (torch.randn(size, requires_grad=True) for size in ((4, shape[1]), (shape[0], 4)))
    x, dy = torch.randn(rows, shape[1], requires_grad=True), torch.randn(rows, shape[0])
    return _calls(lambda rows: qkern.lora_linear(rows, qw, a, b, 1.0), x.detach(), x, dy, a, b)


def dense_calls(shape: tuple[int, int], rows: int) -> dict[str, Call]:
    """``F.linear`` on a CPU, float32: what the smallest of torch's own layers take."""
    w = torch.randn(shape)
    x, dy = torch.randn(rows, shape[1], requires_grad=True), torch.randn(rows, shape[0])
    return _calls(lambda rows: F.linear(rows, w), x.detach(), x, dy)


def _calls(
    linear: Callable[[Tensor], Tensor], x: Tensor, trained: Tensor, dy: Tensor, *others: Tensor
) -> dict[str, Call]:
    def no_grad() -> None:
        with torch.no_grad():
            linear(trained)

    def forward_backward() -> None:
        torch.autograd.backward(linear(trained), dy)
        for leaf in (trained, *others):
            leaf.grad = None

    return {
        "plain": lambda: linear(x),
        "no_grad": no_grad,
        "recorded": lambda: linear(trained),
        "forward and backward": forward_backward,
    }


def microseconds(call: Call) -> float:
    """Of one call, the mean over a few."""
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS * 1e6


def measure(
    library: ModuleType, calls: dict[str, Call], dense: dict[str, Call], repeat: int
) -> Iterator[dict[str, Any]]:
    """For each call microseconds by candidate, of ``repeat`` rounds in which they take turns.

    Medians, and as ``fastest`` the first deciles, which other processes disturb least.
    """
    for name, call in calls.items():
        times: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
        for _ in range(repeat):
            for on_tensors in (False, True):
                with kernels(library, on_tensors):
                    call()
                    started = library.launches()[0]
                    assert started > 0, "nothing was launched"
                    times[ON_TENSORS if on_tensors else BY_PYTHON].append(microseconds(call))
            times[DENSE].append(microseconds(dense[name]))
        medians = {key: statistics.median(found) for key, found in times.items()}
        fastest = {key: percentile(found, 10) for key, found in times.items()}
        yield {"call": name, "median": medians, "fastest": fastest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=300, help="rounds of each call")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    library = build.load(build.build())
    kinds = {
        "nf4_linear, 4096x4096, bfloat16, 1 row": linear_calls((4096, 4096), 1, torch.bfloat16),
        "nf4_linear, 4096x4096, bfloat16, 64 rows": linear_calls((4096, 4096), 64, torch.bfloat16),
        "lora_linear, 64x64, float32, 1 row": lora_calls((64, 64), 1),
    }
    dense = dense_calls((64, 64), 1)
    about = machine.describe(1)
    with counted(library):
        rows = [
            {"kind": kind} | row
            for kind, calls in kinds.items()
            for row in measure(library, calls, dense, args.repeat)
        ]
    about["load_average_after"] = os.getloadavg()
    print("us a call: medians, and the first decile in brackets")
    cells = [("", "call", *CANDIDATES)]
    for row in rows:
        both = ((row["median"][key], row["fastest"][key]) for key in CANDIDATES)
        times = (f"{median:.1f} ({fastest:.1f})" for median, fastest in both)
        cells.append((row["kind"], row["call"], *times))
    print(report.aligned(cells))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "repeat": args.repeat, "calls": CALLS, "results": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
