"""The backend ``cuda_emulated``: qkern's CUDA kernels on CPU tensors, under a chosen schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from qkern import backends
from qkern.backends import CudaBackend, _cuda_matmul
from qkern.testing import Target

NAME = "cuda_emulated"


def backend(library: ModuleType, device_type: int | None = None) -> CudaBackend:
    """The backend ``cuda`` on CPU tensors, with the emulated kernels.

    ``device_type`` is DLPack's for the tensors that the library reads itself (1: the CPU's), None
    for none, so that all go through Python.
    """
    return CudaBackend(
        NAME, library, lambda device: contextlib.nullcontext(0), device_type=device_type
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """In which order the threads run, when cp.async completes, and which device it is."""

    order: str = "forward"
    seed: int = 0
    late_copies: bool = True
    capability: int = 80

    def __str__(self) -> str:
        order = f"{self.order}{self.seed}" if self.order == "random" else self.order
        return f"{order}-{'late' if self.late_copies else 'early'}-sm_{self.capability}"


SCHEDULES = (
    Schedule("forward", late_copies=True),
    Schedule("forward", late_copies=False),
    Schedule("reverse", late_copies=True),
    Schedule("reverse", late_copies=False),
    Schedule("random", seed=1, late_copies=True),
    Schedule("random", seed=2, late_copies=False),
    Schedule("random", seed=3, capability=75),
)


class EmulatedTarget(Target):
    """A target of the conformance table: the emulated kernels under one schedule."""

    __slots__ = ("library", "module", "schedule")

    def __init__(self, library: ModuleType, schedule: Schedule) -> None:
        super().__init__(NAME, str(schedule))
        object.__setattr__(self, "library", library)
        object.__setattr__(self, "module", backend(library))
        object.__setattr__(self, "schedule", schedule)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Run every qkern op inside the context on the emulated kernels."""
        schedule = self.schedule
        self.library.set_schedule(
            schedule.order, schedule.seed, schedule.late_copies, schedule.capability
        )
        with backends.use(self.module), _gemm_in_float32():
            yield


@contextlib.contextmanager
def _gemm_in_float32() -> Iterator[None]:
    """Put a GEMM of our own in the vendor's place.

    torch's 16-bit GEMM for CPUs is other code on each processor, and on one of them NaNs came out
    of finite operands in poisoned memory. No CPU's GEMM is under test here.
    """

    def multiply(x: Tensor, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
        product = x.float().contiguous() @ part.float()
        out.copy_(product if bias is None else product + bias.float())

    vendors = _cuda_matmul.multiply
    _cuda_matmul.multiply = multiply
    try:
        yield
    finally:
        _cuda_matmul.multiply = vendors
