"""Which implementation runs an op.

A backend is an object with a method for each op that it computes; the reference computes the rest:

``cpu``        compiled kernels (``qkern._C``) on CPU tensors; the default there when built
``cuda``       compiled kernels on CUDA tensors; the default there when built
``triton``     Triton kernels on CUDA and ROCm tensors, compiled at the first call; the next choice
``reference``  plain PyTorch (``qkern.reference``) on any device; the default otherwise

``QKERN_BACKEND`` forces one for the process, ``use`` for a ``with`` block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qkern.backends._args import num_threads
from qkern.backends._backend import Backend, Reference
from qkern.backends._cpu import CpuBackend
from qkern.backends._cuda import CudaBackend
from qkern.backends._triton import TritonBackend

__all__ = [
    "BACKENDS",
    "NAMES",
    "Backend",
    "CpuBackend",
    "CudaBackend",
    "TritonBackend",
    "available",
    "cpu",
    "cuda",
    "has_cpu_matmul",
    "has_kernel",
    "num_threads",
    "reference",
    "select",
    "selected",
    "selected_name",
    "triton",
    "use",
]

cpu = CpuBackend()
cuda = CudaBackend()
triton = TritonBackend()
reference = Reference("reference")

BACKENDS: dict[str, Backend] = {b.name: b for b in (cpu, cuda, triton, reference)}
NAMES = tuple(BACKENDS)

_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Backends of each device type, the preferred first; any other type has the reference only."""

_forced: str | Backend | None = None

selected: dict[torch.device, Backend] = {}
"""The choice per device, so that a call costs one look-up; a device's type costs more to ask."""


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """The backends for tensors of ``device_type``, preferred first: None, or why it is missing."""
    names = _ORDER.get(device_type, ("reference",))
    return {name: BACKENDS[name].missing_reason() for name in names}


def has_kernel(name: str, op: str) -> bool:
    """Whether the backend ``name`` computes ``op`` itself, rather than by the reference."""
    return BACKENDS[name].has(op)


def has_cpu_matmul(dtype: torch.dtype) -> bool:
    """Whether torch's CPU matmuls in ``dtype`` run on instructions for it, not emulated."""
    return cpu.has_matmul(dtype)


def select(device: torch.device) -> Backend:
    """The backend for tensors on ``device``.

    Raises ``ValueError`` when ``QKERN_BACKEND`` is not a backend's name, ``RuntimeError`` when the
    forced backend is missing or does not take such tensors.
    """
    backend = selected.get(device)
    if backend is None:
        backend = selected[device] = _choose(device.type)
    return backend


def selected_name(device_type: str = "cpu") -> str:
    """The name of the backend that ``select`` gives for ``device_type``."""
    return select(torch.device(device_type)).name


def _choose(device_type: str) -> Backend:
    if isinstance(_forced, Backend):
        return _forced
    reasons = available(device_type)
    name = _forced or os.environ.get("QKERN_BACKEND")
    if not name:
        return next(BACKENDS[name] for name, reason in reasons.items() if reason is None)
    source = "qkern.backends.use" if _forced else "QKERN_BACKEND"
    _check_name(source, name)
    if name not in reasons:
        raise RuntimeError(
            f"{source}: the backend {name!r} does not take {device_type} tensors; "
            f"there it takes {', '.join(reasons)}"
        )
    if reason := reasons[name]:
        raise RuntimeError(f"{source}: the backend {name!r} is missing: {reason}")
    return BACKENDS[name]


def _check_name(argument: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}; takes one of {', '.join(NAMES)}")


@contextmanager
def use(name: str | Backend, isa: str | None = None) -> Iterator[None]:
    """Run every qkern op in the block on the backend ``name``, in all threads.

    A `Backend` of your own is taken too; what it lacks, the reference computes.
    ``isa`` makes the ``cpu`` backend take an instruction set, for example ``"avx2"``.
    Raises ``TypeError`` for anything else, ``ValueError`` for an unknown name or instruction set,
    ``RuntimeError`` when the backend is missing.
    """
    global _forced
    if isinstance(name, str):
        _check_name("name", name)
        if reason := BACKENDS[name].missing_reason():
            raise RuntimeError(f"name: the backend {name!r} is missing: {reason}")
    elif not isinstance(name, Backend):
        raise TypeError(f"name: got {type(name).__name__}; takes a name or a Backend")
    elif reason := name.missing_reason():
        raise RuntimeError(f"name: the backend {name.name!r} is missing: {reason}")
    if isa is not None and name not in ("cpu", cpu):
        raise ValueError(f'isa: got {isa!r} with the backend {name!r}; only "cpu" takes one')
    previous, previous_isa = _forced, None
    if isa is not None:
        previous_isa = cpu.isa()
        cpu.set_isa(isa)
    _forced = name
    selected.clear()
    try:
        yield
    finally:
        _forced = previous
        selected.clear()
        if previous_isa is not None:
            cpu.set_isa(previous_isa)
