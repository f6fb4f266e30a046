"""Every way that a 4-bit matmul can take on a device, to be forced one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from qkern import testing
from qkern.backends import _cuda_matmul, _cuda_paths
from qkern.backends._cuda_paths import Limits, Matmul
from qkern.testing import Case, OpSpec, Target

SLICES = "gemm-slices"
"""``gemm`` with so small a workspace that W goes in slices of 128 rows or columns."""
WAYS = (*_cuda_paths.PATHS, SLICES)


def expected_paths(call: Matmul, capability: int) -> tuple[str, ...]:
    """The paths that can compute a call, by the rules that csrc/cuda/linear_4bit.cu must follow."""
    found = [] if call.dx else ["vector"]
    hopper = []
    least = {torch.float16: 75, torch.bfloat16: 80}.get(call.dtype)
    depth = call.out_features if call.dx else call.in_features
    whole_pieces = call.aligned and call.in_features % 32 == 0 and depth % 8 == 0
    by_experts = call.experts is not None
    if by_experts and call.in_features > 1 << 30:
        found.clear()
    if least is not None and capability >= least and whole_pieces and call.in_features <= 1 << 29:
        found += ["mma"] if not by_experts or depth <= 1 << 16 else []
        hopper = ["wgmma"] if capability == 90 else []
    if by_experts:
        return (*found, "tiled")
    return (*found, "tiled", *hopper, *(() if call.batch_invariant else ("gemm",)))


def smallest(capability: int) -> Limits:
    """The limits of a device that has nothing to spare for `SLICES`."""
    return Limits(capability, processors=1, l2_bytes=0, workspace_bytes=0)


def call_of(spec: OpSpec, case: Case) -> Matmul:
    """The call that a case of a matmul is. In another layout its weight is misaligned too."""
    return Matmul(
        *(spec.input_gradient, case.dtype, *case.shape),
        batch_invariant=case.batch_invariant,
        aligned=case.layout == "contiguous",
        experts=(len(case.groups) or 3) if spec.comparison == "grouped" else None,
    )


def ways_of(spec: OpSpec, case: Case, capability: int) -> tuple[str, ...]:
    """What can be forced for a case: its paths, and `SLICES` where these are several."""
    call = call_of(spec, case)
    found = expected_paths(call, capability)
    several = "gemm" in found and len(_cuda_paths.slices_of(call, smallest(capability))) > 1
    return (*found, SLICES) if several else found


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Every CUDA matmul inside the context on one of `WAYS`."""
    limits = _cuda_matmul.device_limits

    def without_workspace(library: Any) -> Limits:
        return replace(limits(library), l2_bytes=0, workspace_bytes=0)

    before = os.environ.get("QKERN_CUDA_PATH")
    os.environ["QKERN_CUDA_PATH"] = "gemm" if way == SLICES else way
    if way == SLICES:
        _cuda_matmul.device_limits = without_workspace
    try:
        yield
    finally:
        _cuda_matmul.device_limits = limits
        del os.environ["QKERN_CUDA_PATH"]
        if before is not None:
            os.environ["QKERN_CUDA_PATH"] = before


@contextmanager
def _recorded(name: str, started: list[str], path: Callable[..., str]) -> Iterator[None]:
    """Notes what a function of `_cuda_matmul` is called for."""
    original = getattr(_cuda_matmul, name)

    def record(*arguments: Any) -> None:
        started.append(path(*arguments))
        original(*arguments)

    setattr(_cuda_matmul, name, record)
    try:
        yield
    finally:
        setattr(_cuda_matmul, name, original)


def check_way(
    spec: OpSpec, case: Case, way: str, target: Target, device: torch.device | str
) -> None:
    """`testing.check` of a matmul's case on one of `WAYS`; what ran is what was forced.

    `SLICES` must have run in several.
    """
    inputs = spec.make_inputs(case, torch.device(device), torch.Generator().manual_seed(1))
    started: list[str] = []
    with (
        target.activate(),
        forced(way),
        _recorded("_fused", started, lambda library, stream, way, product: str(way.path)),
        _recorded("multiply", started, lambda x, part, bias, out: "gemm"),
    ):
        spec.run(inputs)
    wanted = "gemm" if way == SLICES else way
    assert set(started) == ({wanted} if case.numel else set()), (way, started)
    assert len(started) > 1 or way != SLICES or not case.numel
    with forced(way):
        testing.check(spec, case, target, device)
