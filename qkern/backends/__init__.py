"""Which implementation runs an op.

A backend is an object with a method for each op that it computes; the reference computes the rest:

``cpu``        compiled kernels (``qkern._C``) on CPU tensors; the default there when built
``cuda``       compiled kernels on CUDA tensors; the default there when built
``triton``     Triton kernels on CUDA and ROCm tensors, compiled at the first call; the next choice
``reference``  plain PyTorch (``qkern.reference``) on any device; the default otherwise

``QKERN_BACKEND`` forces one for the process, ``use`` for the code in a ``with`` block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from qkern._settings import Setting, forced_backend, none_set
from qkern.backends._args import check_memory, num_threads
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
    "check_memory",
    "cpu",
    "cuda",
    "forced",
    "has_cpu_matmul",
    "has_kernel",
    "holding",
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

selected: dict[torch.device, Backend] = {}
"""The choice per device outside of `use`, so that a call costs one look-up.

A device's type costs more to ask.
"""


class Forced:
    """What a block of `use` forces."""

    def __init__(self, backend: str | Backend, isa: str | None) -> None:
        self.backend, self.isa = backend, isa
        self.selected: dict[torch.device, Backend] = {}


_forced: Setting[Forced] = forced_backend


def forced() -> Forced | None:
    """What `use` forces here, for `holding`; None in code that a compiler traces."""
    return None if torch.compiler.is_dynamo_compiling() or none_set() else _forced.get()


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
    use = None if none_set() else _forced.get()
    known = selected if use is None else use.selected
    backend = known.get(device)
    if backend is None:
        backend = known[device] = _choose(device)
    return backend


def selected_name(device_type: str = "cpu") -> str:
    """The name of the backend that ``select`` gives for ``device_type``."""
    return select(torch.device(device_type)).name


def _choose(device: torch.device) -> Backend:
    use = _forced.get()
    backend = None if use is None else use.backend
    if isinstance(backend, Backend):
        return backend
    reasons = {
        name: reason or BACKENDS[name].unfit_reason(device)
        for name, reason in available(device.type).items()
    }
    name = backend or os.environ.get("QKERN_BACKEND")
    if not name:
        return next(BACKENDS[name] for name, reason in reasons.items() if reason is None)
    source = "qkern.backends.use" if backend else "QKERN_BACKEND"
    _check_name(source, name)
    if name not in reasons:
        raise RuntimeError(
            f"{source}: the backend {name!r} does not take {device.type} tensors; "
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
    """Run every qkern op in the block on the backend ``name``.

    A `Backend` of your own is taken too; what it lacks is computed as `Backend` says.
    ``isa`` makes the ``cpu`` backend take an instruction set, for example ``"avx2"``.
    The block holds in the thread or task that entered it and in tasks made inside, not in other
    threads; and for the backward of a forward done inside. Graphs of a compiler take what is in
    force when they run, their forward and their backward each.

    Raises ``TypeError`` for anything else, ``ValueError`` for an unknown name or instruction set,
    ``RuntimeError`` when the backend is missing.
    """
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
    if isa is not None:
        cpu.check_isa(isa)
    elif (outer := _forced.get()) is not None:
        isa = outer.isa
    with _holding(Forced(name, isa)):
        yield


def holding(found: Forced | None) -> AbstractContextManager[None]:
    """A block in which what `forced` gave elsewhere is in force again."""
    return nullcontext() if found is None else _holding(found)


@contextmanager
def _holding(found: Forced) -> Iterator[None]:
    try:
        with _forced.held(found):
            _tell_isa()
            yield
    finally:
        _tell_isa()


def _tell_isa() -> None:
    """Have the kernels take the instruction set that is in force."""
    if cpu.missing_reason() is None:
        found = _forced.get()
        cpu.library().isa_variable.set(None if found is None else found.isa)
