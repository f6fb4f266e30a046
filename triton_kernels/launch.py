"""How each kernel is launched: tile sizes, warps, stages and splits, and why.

**None of it was timed on a GPU.** What the choices rest on: the machine code of every one of them on
every target (`tests/triton_budget.csv`: no spills, wide accesses, tensor cores), and the arithmetic
said at each. ``tune`` measures where there is a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Of every launch: a multiply and an add are two roundings. Dot products fuse all the same."""

ONE_WARP = OPTIONS | {"num_warps": 1}


@dataclass(frozen=True, slots=True)
class Target:
    """A device: ``"cuda"`` with a compute capability (major * 10 + minor) or ``"hip"`` with a name
    such as ``"gfx942"``, and its processors (SMs, CUs)."""

    kind: str
    arch: int | str
    processors: int

    def has_dot(self, dtype: torch.dtype) -> bool:
        """Whether dot products of ``dtype`` compile to matrix instructions, or well without.

        Without bfloat16 (compute capability 7.5), a bfloat16 product becomes thousands of accesses
        to local memory; values go to float32 there, in which their products are exact.
        """
        return dtype != torch.bfloat16 or self.kind == "hip" or int(self.arch) >= 80


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Encoders: blocks a program."""

    blocks: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        return OPTIONS | {"num_warps": self.num_warps}


_ENCODED = 4096
"""Elements a program: 32 a thread of four warps, so that codes leave in 16-byte pieces."""


def blockwise(block_size: int) -> Blockwise:
    """For the encoders: a program takes 4096 elements, in as many blocks as these are."""
    return Blockwise(blocks=max(1, _ENCODED // block_size), num_warps=4)


@dataclass(frozen=True, slots=True)
class Units:
    """Decoders: units of 32 elements a program."""

    units: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        return OPTIONS | {"num_warps": self.num_warps}


DEQUANTIZE = Units(units=128, num_warps=4)
"""A unit a thread: its 16 bytes of codes are one access, its scale another."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Exact sum of scales: programs, and scales that each takes at a time."""

    programs: int
    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        return OPTIONS | {"num_warps": self.num_warps}


SUM = Sum(programs=32, block=1024, num_warps=4)
"""Fixed, because the last step reads all programs' parts at once; 32 are enough for what lies in
memory beside a weight a hundred times as large."""


@dataclass(frozen=True, slots=True)
class SumParts:
    """The sum over a split contraction: elements a program."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        return OPTIONS | {"num_warps": self.num_warps}


SUM_PARTS = SumParts(block=1024, num_warps=4)


@dataclass(frozen=True, slots=True)
class Matmul:
    """A matmul: rows, columns of the result and depth of a tile, and how the depth is split."""

    block_m: int
    block_out: int
    block_depth: int
    num_warps: int
    num_stages: int
    parts: int
    depth_a_part: int
    upcast: bool

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        return OPTIONS | {"num_warps": self.num_warps, "num_stages": self.num_stages}


_LEAST_STEPS = 4
"""Steps of the loop in a part, at least: fewer would not repay the part's write and read."""
_MOST_PARTS = 32
_PROGRAMS_A_PROCESSOR = 2
_INVARIANT_ROWS = 16
"""Rows of a tile in batch-invariant mode, whatever M: another tile may add in another order."""


def matmul(
    target: Target,
    dtype: torch.dtype,
    rows: int,
    out: int,
    depth: int,
    batch_invariant: bool = False,
) -> Matmul:
    """For ``[rows, depth]`` times ``[depth, out]``."""
    if batch_invariant:
        rows = _INVARIANT_ROWS
    upcast = not target.has_dot(dtype)
    block_m = next((size for size in (16, 32, 64) if rows <= size), 64)
    wide = dtype != torch.float32 and not upcast
    block_out, block_depth = (128, 64) if wide and block_m >= 64 else (64, 64 if wide else 32)
    num_warps = 4
    tiles = -(-rows // block_m) * -(-out // block_out)
    wanted = _PROGRAMS_A_PROCESSOR * target.processors // tiles
    most = depth // (_LEAST_STEPS * block_depth)
    parts = max(1, min(wanted, most, _MOST_PARTS))
    steps = -(-(-(-depth // block_depth)) // parts)
    depth_a_part = steps * block_depth
    return Matmul(
        block_m=block_m,
        block_out=block_out,
        block_depth=block_depth,
        num_warps=num_warps,
        num_stages=2 if target.kind == "hip" else 3,
        parts=-(-depth // depth_a_part),
        depth_a_part=depth_a_part,
        upcast=upcast,
    )
