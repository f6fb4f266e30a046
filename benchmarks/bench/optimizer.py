"""Contests of optimizer steps: AdamW in memory beside its peers, and with its moments in a file.

A problem's shape is parameters × elements of each.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from qkern import reference
from qkern.optim import PagedAdamW
from qkern.optim._moments import of_zeros

from . import memory, peers
from .timing import Call, Candidate, Problem, SkippedError

OP = "adamw"
IN_FILE = "adamw_in_file"
SHAPES = ((8, 1 << 22), (420, 9216))  # the second is a LoRA of SmolLM2 in its number of parameters
FILE_SHAPES = ((8, 1 << 24),)
BUDGET_BYTES = 256 << 20

_STATE_BYTES = {32: 8.0, 8: 2 + 2 * 4 / 256}  # of an element
_PIECE_BYTES = 16 << 20

Make = Callable[[Sequence[torch.nn.Parameter]], Optimizer]


def _parameters(shape: tuple[int, int], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Always the same, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(shape[0]):
        param = torch.nn.Parameter(torch.randn(shape[1], generator=generator).to(dtype))
        param.grad = (torch.randn(shape[1], generator=generator) * 0.01).to(dtype)
        params.append(param)
    return params


def _bytes(shape: tuple[int, int], dtype: torch.dtype, bits: int) -> int:
    """What a step must move: parameter and moments read and written, the gradient read."""
    return int(shape[0] * shape[1] * (3 * dtype.itemsize + 2 * _STATE_BYTES[bits]))


def _expected(shape: tuple[int, int], dtype: torch.dtype, bits: int) -> Tensor:
    """The first parameter after two steps, by the reference."""
    (param,) = _parameters((1, shape[1]), dtype)
    moments = of_zeros(param.detach(), bits)
    scales = moments.absmaxes() if bits == 8 else ()
    assert param.grad is not None
    lists = [[param.detach()], [param.grad], [moments.exp_avg], [moments.exp_avg_sq]]
    lists += [[scale] for scale in scales] or [[], []]
    for step in (1, 2):
        numbers = torch.tensor([float(step)])
        factors = reference.adamw_factors(numbers, 1e-3, 0.9, 0.999, 1e-8, 1e-2)
        reference.adamw_step(*lists, factors)
    return param.detach()


def contest(
    shape: tuple[int, int], dtype: torch.dtype, choice: peers.Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """A step with all in memory: qkern in 32 and 8 bits, torch's fused AdamW, bitsandbytes'."""

    def candidate(name: str, make: Make, bits: int, exactly: bool = False) -> Candidate:
        found: list[torch.nn.Parameter] = []

        def prepare() -> Call:
            params = _parameters(shape, dtype)
            found[:] = found or params  # the first copy is the one that is checked
            optimizer = make(params)
            optimizer.step()
            return optimizer.step

        def check(_: object) -> None:
            actual, expected = found[0].detach(), _expected(shape, dtype, bits)
            if exactly:
                assert torch.equal(actual, expected), "not the reference's bits"
            elif bits == 32:
                torch.testing.assert_close(actual, expected)
            assert actual.isfinite().all()

        bytes = _bytes(shape, dtype, bits)
        return Candidate(name, prepare, check, bytes, bytes)

    candidates = [
        candidate("qkern", PagedAdamW, 32, exactly=True),
        candidate(
            "qkern (8 bits)",
            lambda params: PagedAdamW(params, bits=8, min_8bit_size=0),
            8,
            exactly=True,
        ),
    ]
    missing = []
    if "dense" in choice.peers:
        candidates.append(
            candidate("torch (fused)", lambda params: torch.optim.AdamW(params, fused=True), 32)
        )
    if "bitsandbytes" in choice.peers:
        try:
            bnb = peers.bitsandbytes(choice.limit is not None)
        except SkippedError as error:
            missing.append(f"bitsandbytes: {error}")
        else:
            candidates += [
                candidate(
                    "bitsandbytes",
                    lambda params: bnb.optim.AdamW(params, weight_decay=1e-2, min_8bit_size=0),
                    32,
                ),
                candidate(
                    "bitsandbytes (8 bits)",
                    lambda params: bnb.optim.AdamW8bit(params, min_8bit_size=0),
                    8,
                ),
            ]
    return Problem(OP, dtype, shape), candidates, missing


def file_contest(
    shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Problem, list[Candidate], list[str]]:
    """A step with the moments in a file, beside one in memory and the disk on its own.

    ``disk`` reads as many bytes as the moments have, and writes as many, at the same time and past
    the page cache: what the file's pager can at best be.
    """
    folder = Path(tempfile.mkdtemp(prefix="qkern-benchmark-", dir=Path.cwd()))
    state_bytes = int(shape[0] * shape[1] * _STATE_BYTES[32])
    optimizers: list[PagedAdamW] = []

    def in_file() -> Call:
        path = folder / "state"
        optimizer = PagedAdamW(_parameters(shape, dtype), path=path, budget_bytes=BUDGET_BYTES)
        path.unlink()  # it goes with the process
        optimizers.append(optimizer)
        optimizer.step()
        return optimizer.step

    def in_memory() -> Call:
        optimizer = PagedAdamW(_parameters(shape, dtype))
        optimizer.step()
        return optimizer.step

    def disk() -> Call:
        path = folder / "raw"
        # An even number of pieces, of which each half is written in turn.
        pieces = -(-state_bytes // _PIECE_BYTES)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(fd, 0, 2 * pieces * _PIECE_BYTES)
        path.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        buffers = [mmap.mmap(-1, _PIECE_BYTES) for _ in range(2)]

        def run(transfer: Callable[..., int], buffer: mmap.mmap, first: int) -> None:
            for piece in range(first, first + pieces):
                assert transfer(fd, [buffer], piece * _PIECE_BYTES) == _PIECE_BYTES

        def call() -> None:
            with ThreadPoolExecutor(2) as threads:
                jobs = [
                    threads.submit(run, os.preadv, buffers[0], 0),
                    threads.submit(run, os.pwritev, buffers[1], pieces),
                ]
                for job in jobs:
                    job.result()

        run(os.pwritev, buffers[0], 0)  # allocated is not written
        return call

    def check_file(_: object) -> None:
        param = optimizers[0].param_groups[0]["params"][0]
        assert torch.equal(param.detach(), _expected(shape, dtype, 32)), "not the reference's bits"

    moved = 2 * state_bytes
    candidates, missing = [Candidate("qkern", in_file, check_file)], []
    # The parameters and gradients of both, and the moments of one; some is left for the rest.
    needed = 4 * shape[0] * shape[1] * dtype.itemsize + state_bytes + BUDGET_BYTES
    available = memory.available()
    if needed < 0.9 * available:
        candidates.append(Candidate("qkern (in memory)", in_memory, lambda _: None))
    else:
        missing.append(
            f"qkern (in memory): needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"
        )
    candidates.append(Candidate("disk", disk, lambda _: None))
    return Problem(IN_FILE, dtype, shape, work=moved / 1e9, unit="GB/s"), candidates, missing
