"""Targets of the op table that run the Triton kernels' IR on CPU tensors, for a chosen device."""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lab.triton.on_cpu import backend_for
from qkern import backends, reference
from qkern.backends import TritonBackend
from qkern.testing import Target, assert_bitwise

NAME = "triton"


@dataclass(frozen=True, slots=True)
class Device:
    """What the kernels are launched for; few processors leave matmuls whole, many split them."""

    kind: str
    arch: int | str
    processors: int

    def __str__(self) -> str:
        return f"{'sm_' if self.kind == 'cuda' else ''}{self.arch}"


DEVICES = (
    Device("cuda", 90, 132),
    Device("cuda", 75, 4),
    Device("hip", "gfx942", 304),
    Device("hip", "gfx1100", 8),
)
"""One for each way that tiles are chosen; sm_75 multiplies 16-bit values in float32."""


def backend(device: Device, base: type[TritonBackend] = TritonBackend) -> TritonBackend:
    """The backend ``triton`` on CPU tensors for those of ``device``."""
    return backend_for(device.kind, device.arch, device.processors, base)


class _Addressed(TritonBackend):
    """Under ttsem, where the optimizer's launch may touch what a table of addresses holds."""

    def adamw_step(self, params: Sequence[Tensor], *args: Any) -> None:
        """See ``qkern.reference.adamw_step``."""
        *lists, factors = args[:6]
        with addressed([*params, *chain(*lists), factors]):
            super().adamw_step(params, *args)


@functools.cache
def _process() -> ProcessPoolExecutor:
    """A fresh interpreter, for this process's lifetime."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run(module: str, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)


def in_own_process(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs in a process which runs nothing but such tests.

    ttsem switches the printer of Triton's IR for a whole process, which fails in one where other
    tests have used Triton's compiler in their way, and would disturb theirs.
    """

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        _process().submit(_run, test.__module__, test.__qualname__, args, kwargs).result()

    return run


unchecked: list[str] = []
"""Names of launches that were too large to be checked for races exactly."""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Every Triton launch in the block is executed and checked by ttsem; leaves no trace."""
    from triton.runtime import driver
    from ttsem import _fakedriver, sanitize

    before = dict(vars(driver))
    try:
        with (
            sanitize.session(90, "<qkern>", cuda_is_cpu=False) as state,
            warnings.catch_warnings(),
        ):
            # Triton is to find a device; torch and its compiler are not.
            _fakedriver.unstub_torch_cuda()
            # Overflow to infinity is what a conversion is to do.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
        unchecked.extend([""] * state.races_unchecked)
    finally:
        vars(driver).clear()
        vars(driver).update(before)


@contextlib.contextmanager
def addressed(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Launches in the block may touch these contiguous tensors, whose addresses a table holds.

    ttsem lets a launch touch the tensors among its arguments only.
    """
    from ttsem import harness

    views = {t.data_ptr(): t.view(-1).view(torch.uint8).numpy() for t in tensors if t.numel()}
    original = harness.Memory

    def memory() -> object:
        made = original()
        for address, view in views.items():
            made.register(address, view)
        return made

    harness.Memory = memory
    try:
        yield
    finally:
        harness.Memory = original


class SemanticsTarget(Target):
    """A target of the conformance table: the kernels under ttsem, launched for one device."""

    __slots__ = ("module",)

    def __init__(self, device: Device) -> None:
        super().__init__(NAME, str(device))
        object.__setattr__(self, "module", backend(device, _Addressed))

    def __reduce__(self) -> tuple[type[SemanticsTarget], tuple[Device]]:
        return SemanticsTarget, (next(d for d in DEVICES if str(d) == self.isa),)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Run every qkern op inside the context on the kernels."""
        with session(), backends.use(self.module):
            yield


WIDE_SUMS = (
    # Next to the middle of two float64: what lies 100 bits below decides, either way.
    (1.0, 2.0**-24, 2.0**-53, 2.0**-100),
    (1.0, 2.0**-24, 2.0**-53, -(2.0**-100)),
    (2.0**-149, 2.0**-149, -(2.0**-149)),
    (3e38, 3e38, 3e38, -(2.0**-149)),
    (2.0**127, 2.0**-149, -(2.0**127)),
    (-1.0, -(2.0**-24), -(2.0**-53), -(2.0**-120)),
)
"""Scales whose sum needs more bits than any float has."""


def check_exact_means(target: Target) -> None:
    """Raise AssertionError unless the mean of wide sums is rounded as the exact one is."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(8, 3000, generator=generator)
    random *= torch.exp2(40 * torch.randn(8, 3000, generator=generator)).clamp(1e-38, 1e30)
    for scales in (*map(torch.tensor, WIDE_SUMS), *random):
        with target.activate():
            (_, _, offset) = torch.ops.qkern.quantize_absmax(scales)
        assert_bitwise(offset, reference.quantize_absmax(scales)[2], f"mean of {scales[:4]}")
