"""Which implementation runs an op.

A backend is a module with one function per op, of the op's signature:

``cpu``        native kernels (``qkern._C``) on CPU tensors; the default there when built
``cuda``       native kernels on CUDA tensors; the default there when built
``triton``     Triton kernels on CUDA and ROCm tensors, compiled at the first call; the next choice
``reference``  plain PyTorch (``qkern.reference``) on any device; the default otherwise

``QKERN_BACKEND`` forces one for the process, ``use`` for a ``with`` block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from qkern import reference
from qkern.backends import cuda, native, triton

_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Backends of each device type, the preferred first; any other type has the reference only."""

NAMES = ("cpu", "cuda", "triton", "reference")

_MODULES: dict[str, ModuleType] = {
    "cpu": native,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}

_forced: str | ModuleType | None = None
_selected: dict[torch.device, ModuleType] = {}
"""The choice per device, so that a call costs one look-up; a device's type costs more to ask."""


def _missing(name: str) -> str | None:
    """Why the backend cannot run, or None."""
    if name == "cpu":
        return native.missing_reason
    if name == "cuda":
        return cuda.missing_reason
    return triton.missing_reason() if name == "triton" else None


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """The backends for tensors of ``device_type``, preferred first: None, or why it is missing."""
    return {name: _missing(name) for name in _ORDER.get(device_type, ("reference",))}


def has_kernel(name: str, op: str) -> bool:
    """Whether the backend ``name`` computes ``op`` itself, rather than by the reference."""
    return name == "reference" or getattr(_MODULES[name], op) is not getattr(reference, op)


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``.

    Raises ``ValueError`` when ``QKERN_BACKEND`` is not a backend's name, ``RuntimeError`` when the
    forced backend is missing or does not take such tensors.
    """
    module = _selected.get(device)
    if module is None:
        module = _selected[device] = _choose(device.type)
    return module


def selected_name(device_type: str = "cpu") -> str:
    """The name of the backend that ``select`` gives for ``device_type``."""
    module = select(torch.device(device_type))
    names = (name for name, candidate in _MODULES.items() if candidate is module)
    return next(names, module.__name__)


def _choose(device_type: str) -> ModuleType:
    if isinstance(_forced, ModuleType):
        return _forced
    reasons = available(device_type)
    name = _forced or os.environ.get("QKERN_BACKEND")
    if not name:
        return next(_MODULES[name] for name, reason in reasons.items() if reason is None)
    source = "qkern.backends.use" if _forced else "QKERN_BACKEND"
    _check_name(source, name)
    if name not in reasons:
        raise RuntimeError(
            f"{source}: the backend {name!r} does not take {device_type} tensors; "
            f"there it takes {', '.join(reasons)}"
        )
    if reason := reasons[name]:
        raise RuntimeError(f"{source}: the backend {name!r} is missing: {reason}")
    return _MODULES[name]


def _check_name(argument: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}; takes one of {', '.join(NAMES)}")


@contextmanager
def use(name: str | ModuleType, isa: str | None = None) -> Iterator[None]:
    """Run every qkern op in the block on the backend ``name``, in all threads.

    A module of your own is taken too: one function per op, as ``qkern.reference`` has them.
    ``isa`` makes the ``cpu`` backend take an instruction set, for example ``"avx2"``.
    Raises ``ValueError`` for an unknown name or instruction set, ``RuntimeError`` when the backend
    is missing.
    """
    global _forced
    if isinstance(name, str):
        _check_name("name", name)
        if reason := _missing(name):
            raise RuntimeError(f"name: the backend {name!r} is missing: {reason}")
    if isa is not None and name != "cpu":
        raise ValueError(f'isa: got {isa!r} with the backend {name!r}; only "cpu" takes one')
    previous, previous_isa = _forced, None
    if isa is not None:
        previous_isa = native.isa()
        native.set_isa(isa)
    _forced = name
    _selected.clear()
    try:
        yield
    finally:
        _forced = previous
        _selected.clear()
        if previous_isa is not None:
            native.set_isa(previous_isa)
