"""How each kernel is launched: tile sizes, warps, stages and splits, and why.

**None of it was timed on a GPU.** The choices rest on the machine code of each of them on every
target (``tools/lab/triton/static/budget.csv``) and on the arithmetic said beside them. Set
``QKERN_TRITON_TUNE`` to a file to have matmuls measured instead: see ``tune``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from qkern import formats


@dataclass(frozen=True, slots=True)
class Target:
    """A device: its kind, architecture and processors (SMs or CUs).

    ``kind`` is ``"cuda"`` with an ``arch`` such as 90 (compute capability 9.0), or ``"hip"`` with
    one such as ``"gfx942"``.
    """

    kind: str
    arch: int | str
    processors: int

    @property
    def is_cdna(self) -> bool:
        """AMD's processors with warps of 64 and MFMA, which multiplies float32 too."""
        return self.kind == "hip" and str(self.arch).startswith("gfx9")

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return 64 if self.is_cdna else 32

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether Triton makes matrix instructions of dot products of ``dtype``, summed in float32.

        Not below compute capability 8.0: there a 16-bit dot product becomes scalar code with
        thousands of accesses to local memory, though the processor has instructions for float16.
        """
        if dtype == torch.float32:
            return self.is_cdna
        return self.kind == "hip" or int(self.arch) >= 80


@dataclass(frozen=True, slots=True)
class Launch:
    """What every launch says."""

    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch. A multiply and an add stay two roundings; dot products fuse."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Elements(Launch):
    """A launch whose programs take ``elements`` each."""

    elements: int


_THREAD_CODES = formats.MIN_BLOCK_SIZE
"""Elements a thread: 16 bytes of codes are one access, and 32 values of 16 bits four."""


def codes(target: Target) -> Elements:
    """For the encoders and decoders. Encoders read a longer block twice, in pieces of so many."""
    num_warps = 4
    return Elements(num_warps, _THREAD_CODES * num_warps * target.warp_size)


def step(target: Target) -> Elements:
    """For an optimizer's step: 8 elements a thread, for registers hold them of four tensors.

    So 32 threads have a block of 256, whose largest magnitude they find without shared memory.
    """
    num_warps = 8
    return Elements(num_warps, 8 * num_warps * target.warp_size)


@dataclass(frozen=True, slots=True)
class Programs(Elements):
    """A launch of a fixed number of programs, each taking ``elements`` at a time."""

    programs: int


SUM = Programs(num_warps=1, elements=512, programs=64)
"""The exact sum of scales. The number is fixed, because the last step reads all parts at once; 64
programs read a model's scales in less time than it takes to launch them. A warp each: sums over
several go through shared memory and wait, thirteen times for every 512 scales."""

MEAN = Launch(num_warps=1)
"""Arithmetic on 14 numbers."""

SUM_PARTS = Elements(num_warps=4, elements=1024)
"""Two 16-byte loads a thread and part."""


@dataclass(frozen=True, slots=True)
class Matmul(Launch):
    """A matmul's tile, its columns being the result's, and how the contraction is split."""

    block_m: int
    block_out: int
    block_depth: int
    num_stages: int
    parts: int
    depth_per_part: int
    upcast: bool
    most_registers: int | None = None
    """Of a thread, where the compiler is told; on NVIDIA's devices only."""

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        limit = {} if self.most_registers is None else {"maxnreg": self.most_registers}
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
            **limit,
        }


_LEAST_STEPS = 4
"""Rounds of the loop in a part: a shorter part costs more to write and read than it saves."""
_MOST_PARTS = 32
_PROGRAMS_A_PROCESSOR = 2
"""Programs that are to run at once on each: one decodes while another waits for memory."""
_INVARIANT_ROWS = 16
"""Rows of a tile in batch-invariant mode, whatever M is: another tile may add in another order."""

# (rows, columns, depth, warps) of tiles by the most rows they are for; the last serves all others.
# A tile of W is decoded anew for every tile of rows, so these grow until the registers are full:
# the sums, 16 KiB of decoded weights and the operands on their way. A thread decodes 32 weights.
_MATRIX_TILES = ((16, 64, 64, 4), (32, 64, 64, 4), (64, 128, 64, 4), (128, 128, 64, 8))
_CDNA_TILES = ((16, 64, 128, 4), (32, 64, 128, 4), (64, 128, 64, 4))
_RDNA_TILES = ((16, 64, 64, 4), (32, 64, 64, 4), (64, 128, 64, 8))
_CDNA_FLOAT_TILES = ((16, 64, 64, 4), (64, 64, 32, 4))
# Scalar products keep whole rows and columns of both operands in registers, of which RDNA spills.
_SCALAR_TILES = ((16, 128, 32, 4), (64, 64, 32, 8))
_RDNA_SCALAR_TILES = ((16, 128, 32, 4), (32, 64, 32, 8))

Tile = tuple[int, int, int, int]


def tiles(target: Target, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles for products of ``dtype``, those for few rows first."""
    if not target.multiplies(dtype):
        return _SCALAR_TILES if target.kind == "cuda" else _RDNA_SCALAR_TILES
    if target.is_cdna:
        return _CDNA_FLOAT_TILES if dtype == torch.float32 else _CDNA_TILES
    return _MATRIX_TILES if target.kind == "cuda" else _RDNA_TILES


def matmul(
    target: Target,
    dtype: torch.dtype,
    rows: int,
    out: int,
    depth: int,
    batch_invariant: bool = False,
) -> Matmul:
    """For ``[rows, depth]`` times ``[depth, out]`` in ``dtype``."""
    if batch_invariant:
        rows = _INVARIANT_ROWS
    found = tiles(target, dtype)
    tile = next((tile for tile in found if rows <= tile[0]), found[-1])
    return matmul_of(target, dtype, tile, rows, out, depth)


def grouped(
    target: Target,
    dtype: torch.dtype,
    rows: int,
    experts: int,
    out: int,
    depth: int,
    batch_invariant: bool = False,
) -> Matmul:
    """For ``rows`` that experts share, each of whom has a matrix ``[depth, out]`` of its own.

    The tile is that for the average expert's rows: which expert has how many is known on the device
    only. A tile with half as many rows would decode this expert's weight twice, and one with twice
    as many would multiply as many zeros as rows.

    The contraction is whole, for the experts are many: 8 of them with 2048 columns are 256 tiles of
    64. In batch-invariant mode tile and parts are those of one expert's product on its own.
    """
    if batch_invariant:
        config = matmul(target, dtype, rows, out, depth, batch_invariant)
        if config.parts > 1 and target.multiplies(dtype):
            config = _with_registers(target, config)
        return config
    config = matmul(target, dtype, -(-rows // experts), out, depth)
    return dataclasses.replace(config, parts=1, depth_per_part=depth)


_FEW_COLUMNS = 64
_FEW_ROWS = 32


def into(target: Target, own_results: bool, rows: int, columns: int) -> Matmul:
    """For dense products by experts, which are float32, into ``[rows, columns]``.

    Small tiles for results with few columns, or with few rows where each expert has a result of its
    own. Else how many rows there are must not matter: the rest would be added in another order.
    """
    if own_results:
        tile = (16, 64, 32, 4) if rows <= _FEW_ROWS else (64, 64, 32, 8)
    else:
        tile = (16, 16, 64, 4) if columns <= _FEW_COLUMNS else (64, 64, 32, 8)
    return _with_registers(target, matmul_of(target, torch.float32, tile, rows, columns, 1))


def _with_registers(target: Target, config: Matmul) -> Matmul:
    """The same where NVIDIA's compiler, left alone, spills for one more program on a processor."""
    if target.kind != "cuda":
        return config
    return dataclasses.replace(config, most_registers=128)


def most_tiles(rows: int, experts: int, block_m: int) -> int:
    """The most tiles of rows that ``rows`` make which experts share, or leave.

    Only the last tile of an expert is not whole, and has one row at least. The rows of no expert
    are as those of one more.
    """
    shares = min(rows, experts + 1)
    return (rows + shares * (block_m - 1)) // block_m


def _stages(target: Target, dtype: torch.dtype) -> int:
    """Tiles in flight; float32, which multiplying limits, has registers for one only."""
    if dtype == torch.float32 or not target.multiplies(dtype):
        return 1
    return 2 if target.kind == "hip" else 3


def matmul_of(
    target: Target,
    dtype: torch.dtype,
    tile: Tile,
    rows: int,
    out: int,
    depth: int,
) -> Matmul:
    """The launch with a ``tile``: split so that every processor has work, never by atomics."""
    block_m, block_out, block_depth, num_warps = tile
    programs = -(-rows // block_m) * -(-out // block_out)
    wanted = _PROGRAMS_A_PROCESSOR * target.processors // programs
    parts = max(1, min(wanted, depth // (_LEAST_STEPS * block_depth), _MOST_PARTS))
    depth_per_part = -(-depth // (parts * block_depth)) * block_depth
    return Matmul(
        num_warps=num_warps,
        block_m=block_m,
        block_out=block_out,
        block_depth=block_depth,
        num_stages=_stages(target, dtype),
        parts=-(-depth // depth_per_part),
        depth_per_part=depth_per_part,
        upcast=not target.multiplies(dtype),
    )
