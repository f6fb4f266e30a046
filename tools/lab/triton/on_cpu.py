"""The backend ``triton`` on CPU tensors."""

from __future__ import annotations

import contextlib

from qkern.backends import TritonBackend


def backend_for(
    kind: str, arch: int | str, processors: int, base: type[TritonBackend] = TritonBackend
) -> TritonBackend:
    """A ``base`` that takes CPU tensors for those of a ``"cuda"`` or ``"hip"`` device."""
    from qkern.triton_kernels import launch

    target = launch.Target(kind, arch, processors)
    return base(
        f"triton_{arch}",
        on_device=lambda device: contextlib.nullcontext(),
        target_of=lambda device: target,
    )
