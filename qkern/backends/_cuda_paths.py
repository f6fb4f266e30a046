"""Which way a 4-bit matmul takes on a GPU: ``best``, and the model it follows.

Four ways compute ``y = x W^T + bias`` and ``dx = dy W`` (M rows of x, W of N x K):

``vector``  float32 dot products, a few rows of x at a time; any shape; the forward only
``mma``     tensor cores on codes decoded in registers; 16-bit x, K % 32 == 0
``tiled``   float32 tiles; any dtype and shape; for what nothing else takes well
``gemm``    slices of W decoded into a workspace that stays in the L2 cache, each multiplied by the
            vendor's GEMM

The first three read W once and decode it again for every tile of rows, so they win while rows are
few. ``gemm`` decodes once however many rows there are, and the vendor's GEMM comes closer to the
peak, but it starts two kernels a slice.

The choice is the least of four modelled times. **None of it was measured on a GPU**: a kernel's
instructions a weight are counted in its machine code (sm_80, the hot loop), rates are the vendor's,
efficiencies and the cost of a launch are assumptions. Times are in clocks of a quarter of a
processor (SM), which issues one warp-instruction a clock. All ways read the packed weight once or,
from the L2 cache, once a tile of rows; that part is the same for all and left out.

``QKERN_CUDA_PATH`` forces one way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qkern import formats

PATHS = (*formats.CUDA_PATHS, "gemm")
"""All but the last by their numbers in C++."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A device: compute capability (major * 10 + minor), processors, bytes of L2 cache."""

    capability: int
    processors: int
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Matmul:
    """A call: M rows, W of ``out_features`` x ``in_features``; ``dx`` is the input gradient."""

    dx: bool
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    batch_invariant: bool = False
    aligned: bool = True
    """Whether x and W start at 16 bytes and x's rows are 16-byte pieces."""


class Way(NamedTuple):
    """What can compute a call: C++ answers for its own paths, with what they take."""

    path: str
    parts: int = 1
    """Of the contraction, each summed by itself."""
    workspace_bytes: int = 0


# Multiply-adds a clock and quarter, float16 or bfloat16 with float32 sums: (mma.sync, the best
# instruction, which is what a vendor's GEMM uses); then those of float32 without tensor cores.
# Datasheet peaks over processors and clock. Hopper's and Blackwell's mma.sync do not reach the peak
# of their own instructions; GeForce cards have half of what stands for 8.6, 8.9 and 12.0, for both.
_TENSOR_RATES = {
    75: (128, 128),
    80: (256, 256),
    86: (128, 128),
    89: (128, 128),
    90: (320, 512),
    100: (256, 1024),
    120: (128, 128),
}
_FLOAT32_RATES = {75: 16, 80: 16, 86: 32, 89: 32, 90: 32, 100: 32, 120: 32}

# Warp-instructions a weight in the hot loops: of the tensor-core kernels by rows of their tile, of
# the dot products by rows that a launch takes at once, of a float32 tile of 64 rows, of decoding.
_MMA_ISSUE = {16: 0.162, 64: 0.197}
_DX_MMA_ISSUE = {64: 0.247}
_VECTOR_ISSUE = {1: 0.139, 2: 0.181, 4: 0.270, 8: 0.599}
_TILED_ISSUE = 5.3
_DECODE_ISSUE = 0.18

# What a kernel reaches of its modelled limit, by assumption: latencies, barriers, the last wave.
_FUSED_EFFICIENCY = 0.65
_VENDOR_EFFICIENCY = 0.8
_VENDOR_TILE = 64
# Clocks between a launch and its first instruction, and those that Python takes for two kernels.
_LAUNCH_CLOCKS = 6000

_SLICE_MULTIPLE = 128  # rows or columns: whole tiles for the GEMM, 16 aligned bytes for the decoder
_L2_SHARE = 0.5  # of the cache for a slice; the rest is for x, y and the packed weight


def _architecture(capability: int) -> int:
    """The newest architecture of the tables that is not newer than the device."""
    known = (arch for arch in _TENSOR_RATES if arch <= capability)
    return max(known, default=min(_TENSOR_RATES))


def modelled_clocks(path: str, call: Matmul, limits: Limits) -> float:
    """Clocks of the device for the call: launches, and all quarters' work evenly shared."""
    weights = call.out_features * call.in_features
    share = weights / (4 * limits.processors)
    rows = call.rows
    if path == "vector":
        step = next((n for n in _VECTOR_ISSUE if rows <= n), 8)
        launches = 1 + (rows - 1) // 64
        issue = _VECTOR_ISSUE[step] * (1 + (rows - 1) // step)
        return launches * _LAUNCH_CLOCKS + share * issue / _FUSED_EFFICIENCY
    architecture = _architecture(limits.capability)
    mma_rate, vendor_rate = _TENSOR_RATES[architecture]
    if path == "mma":
        tiles = _DX_MMA_ISSUE if call.dx else _MMA_ISSUE
        tile = next((n for n in tiles if rows <= n), max(tiles))
        clocks = max(tiles[tile], tile / mma_rate) * (1 + (rows - 1) // tile)
        return _LAUNCH_CLOCKS + share * clocks / _FUSED_EFFICIENCY
    if path == "tiled":
        clocks = _TILED_ISSUE * (1 + (rows - 1) // 64)
        return _LAUNCH_CLOCKS + share * clocks / _FUSED_EFFICIENCY
    if call.dtype == torch.float32 or (call.dtype == torch.bfloat16 and limits.capability < 80):
        vendor_rate = _FLOAT32_RATES[architecture]
    padded = _VENDOR_TILE * (1 + (rows - 1) // _VENDOR_TILE)
    clocks = _DECODE_ISSUE / _FUSED_EFFICIENCY + padded / vendor_rate / _VENDOR_EFFICIENCY
    slices = len(slices_of(call, limits))
    return 2 * slices * _LAUNCH_CLOCKS + share * clocks


def slices_of(call: Matmul, limits: Limits) -> tuple[tuple[int, int], ...]:
    """``gemm``'s parts of W as (begin, end): of its rows in the forward, of its columns for dx.

    Either way each gives its own columns of the result, so nothing is summed across slices.
    """
    sliced, other = call.out_features, call.in_features
    if call.dx:
        sliced, other = other, sliced
    budget = int(limits.l2_bytes * _L2_SHARE) // (other * call.dtype.itemsize)
    most = max(_SLICE_MULTIPLE, budget // _SLICE_MULTIPLE * _SLICE_MULTIPLE)
    count = -(-sliced // most)
    # Even slices: a short last one would keep few processors busy.
    step = -(-sliced // (count * _SLICE_MULTIPLE)) * _SLICE_MULTIPLE
    return tuple((begin, min(begin + step, sliced)) for begin in range(0, sliced, step))


def best(call: Matmul, limits: Limits, ways: Sequence[Way]) -> Way:
    """The way that the model finds fastest, of those that can compute the call."""
    if call.batch_invariant:
        # The way must not depend on the number of rows either: `vector`, or for dx the best left.
        return ways[0]
    return min(ways, key=lambda way: modelled_clocks(way.path, call, limits))


def forced(call: Matmul, ways: Sequence[Way]) -> Way | None:
    """The way that ``QKERN_CUDA_PATH`` names, None where it is not set.

    Raises ``ValueError`` where it cannot compute the call.
    """
    path = os.environ.get("QKERN_CUDA_PATH")
    if not path:
        return None
    for way in ways:
        if way.path == path:
            return way
    taken = ", ".join(way.path for way in ways)
    raise ValueError(f"QKERN_CUDA_PATH: got {path!r}; takes {taken} for {call}")
