"""Where an op can run: backends, and the instruction sets of the CPU's."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from qkern import backends
from qkern.backends import Backend

_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = (
    ("scalar", "neon")
    if _IS_ARM
    else ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
)
"""Instruction sets of the native CPU backend on this kind of processor, slowest first.

A build or a CPU may lack some.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A backend, by name or itself, and where it has several, one of its instruction sets.

    `reason` says why the target cannot run here; None means that it can.
    """

    backend: str | Backend
    isa: str | None = None
    device_type: str = "cpu"
    reason: str | None = None

    def __str__(self) -> str:
        name = self.backend if isinstance(self.backend, str) else self.backend.name
        return name if self.isa is None else f"{name}.{self.isa}"

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Run every qkern op inside the context on this backend and instruction set."""
        with backends.use(self.backend, isa=self.isa):
            yield


_registered_targets: list[Target] = []


def register_target(target: Target) -> None:
    """Add a backend of your own to what `targets` lists; once per name and device type."""
    if any(str(t) == str(target) and t.device_type == target.device_type for t in targets_all()):
        raise ValueError(f"target: got {target}, which is registered already")
    _registered_targets.append(target)


def targets_all() -> list[Target]:
    """Every known target on every device type, available here or not."""
    return [t for device_type in ("cpu", "cuda") for t in targets(device_type)]


def targets(device_type: str = "cpu") -> list[Target]:
    """Every backend of `device_type` with each instruction set, those missing with a reason."""
    found = []
    for name, reason in backends.available(device_type).items():
        if name != "cpu":
            found.append(Target(name, None, device_type, reason))
            continue
        built = () if reason else tuple(backends.cpu.available_isas())
        for isa in (*ISAS, *(isa for isa in built if isa not in ISAS)):
            missing = reason or (None if isa in built else f"this build or CPU has no {isa}")
            found.append(Target(name, isa, device_type, missing))
    return found + [t for t in _registered_targets if t.device_type == device_type]
