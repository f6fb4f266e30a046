"""Threads: torch's own pool is shared, callers may be many, and a forked child does not hang."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import qkern
from qkern import backends, testing
from qkern.testing import OPS, Case

needs_native = pytest.mark.skipif(
    backends.available("cpu")["cpu"] is not None, reason="qkern._C is not built"
)
all_ops = pytest.mark.parametrize("op", OPS)


def inputs_of(op: str, seed: int) -> testing.Inputs:
    shape = (17, 258, 515) if OPS[op].multiplies else (300_001,)
    case = Case(shape, torch.bfloat16, double_quant=True)
    return OPS[op].make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(seed))


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        testing.assert_bitwise(a, e)


def in_this_context(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``function`` under the instruction set of this test, in any thread."""
    context = contextvars.copy_context()
    return lambda argument: context.copy().run(function, argument)


@all_ops
def test_alternates_with_torchs_own_parallel_regions(op: str, isa: str) -> None:
    inputs = inputs_of(op, seed=0)
    expected = OPS[op].run(inputs)
    x = torch.randn(1 << 18)
    tripled = x * 3
    for threads in (2, 1, 3, 2):
        torch.set_num_threads(threads)
        testing.assert_bitwise(x * 3, tripled)
        assert_same(OPS[op].run(inputs), expected)


@pytest.mark.parametrize("threads", [2, 3, 70])
@pytest.mark.parametrize("op", ["linear_4bit", "quantize_4bit", "dequantize_4bit"])
def test_threads_of_which_each_has_a_part(op: str, threads: int, isa: str) -> None:
    """Few rows, and blocks: as many parts as threads up to 64, some of them empty."""
    for size in (1, 40, 531):
        shape = (2, size, 1024) if OPS[op].multiplies else (size, 128 * 64)
        inputs = OPS[op].make_inputs(Case(shape), torch.device("cpu"), torch.Generator())
        torch.set_num_threads(1)
        expected = OPS[op].run(inputs)
        torch.set_num_threads(threads)
        assert_same(OPS[op].run(inputs), expected)


@all_ops
def test_concurrent_callers_get_their_own_results(op: str, isa: str) -> None:
    torch.set_num_threads(2)
    problems = [inputs_of(op, seed) for seed in range(4)]
    expected = [OPS[op].run(inputs) for inputs in problems]
    run = in_this_context(OPS[op].run)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(run, problems), expected, strict=True):
                assert_same(actual, wanted)


def test_concurrent_training_steps(isa: str) -> None:
    torch.set_num_threads(2)
    qw = qkern.quantize_4bit(torch.randn(130, 258) * 0.05)

    def step(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(33, 258, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_()
        y = qkern.linear_4bit(x, qw)
        y.square().sum().backward()
        return y, x.grad

    expected = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(in_this_context(step), range(8)), expected, strict=True):
            assert_same(actual, wanted)


@needs_native
def test_other_python_threads_run_meanwhile() -> None:
    """A kernel holds no interpreter lock: this thread counts while another one computes."""
    case = Case((64, 2048, 2048))
    inputs = OPS["linear_4bit"].make_inputs(
        case, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    span: list[float] = []

    def work() -> None:
        torch.set_num_threads(1)
        with backends.use("cpu", isa="scalar"):
            span.append(time.perf_counter())
            OPS["linear_4bit"].run(inputs)
            span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = span
    # Within the middle half of the call, so that nothing but the kernel can be running.
    quarter = (end - begin) / 4
    assert sum(begin + quarter < tick < end - quarter for tick in ticks) >= 3


def run_script(body: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(body), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
    import multiprocessing, sys
    import torch
    import qkern

    user, child_threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(2)
    w = torch.randn(512, 1024)
    qw = qkern.quantize_4bit(w) if user == "qkern" else None
    torch.sigmoid(torch.randn(1 << 20))  # torch starts its threads, which a child does not have
    x = torch.randn(64, 1024)
    expected = qkern.linear_4bit(x, qw) if user == "qkern" else None

    def child():
        if child_threads:
            torch.set_num_threads(child_threads)
        again = qkern.quantize_4bit(w)
        y = qkern.linear_4bit(x, again)
        assert y.isfinite().all()
        assert expected is None or torch.equal(y, expected)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    if process.exitcode is None:
        process.kill()
        sys.exit("the child hangs")
    sys.exit(process.exitcode)
"""


@needs_native
@pytest.mark.parametrize("child_threads", [0, 1], ids=["inherited_threads", "one_thread"])
@pytest.mark.parametrize("user", ["qkern", "torch"])
def test_forked_child(user: str, child_threads: int) -> None:
    """Whoever used the threads before the fork: torch's own ops would hang in such a child."""
    run_script(FORK, user, str(child_threads))


@needs_native
def test_one_thread_starts_no_other() -> None:
    run_script("""
        import os
        import torch
        torch.set_num_threads(1)
        import qkern
        qw = qkern.quantize_4bit(torch.randn(512, 1024))
        before = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            qw.dequantize()
            qkern.linear_4bit(torch.randn(300, 1024), qw)
        assert len(os.listdir("/proc/self/task")) == before
    """)


@needs_native
def test_torchs_openmp_is_the_only_one() -> None:
    """A second runtime would bring a second pool, spinning against the first."""
    run_script("""
        from pathlib import Path
        import torch

        def runtimes():
            names = {line.split()[-1] for line in open("/proc/self/maps")}
            stems = ("libgomp", "libomp", "libiomp")
            return {name for name in names if Path(name).name.startswith(stems)}

        torch.sigmoid(torch.randn(1 << 20))
        before = runtimes()
        assert before, "torch has no OpenMP here: nothing to compare"
        import qkern
        from qkern import _C
        torch.set_num_threads(2)
        qkern.quantize_4bit(torch.randn(512, 1024)).dequantize()
        assert runtimes() == before
    """)
