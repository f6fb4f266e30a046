"""Which way a 4-bit matmul takes on a GPU: ``best``, and the model it follows.

Five ways compute ``y = x W^T + bias`` and ``dx = dy W`` (M rows of x, W of N x K):

``vector``  float32 dot products, a few rows of x at a time; any shape; the forward only
``mma``     tensor cores, each tile of rows decoding W by itself; 16-bit x, K % 32 == 0
``tiled``   float32 tiles; any dtype and shape; for what nothing else takes well
``wgmma``   Hopper's tensor cores by their own instructions (compute capability 9.0 alone); what
            ``mma`` takes. It has not run on a GPU yet: it is taken only where it is forced
``gemm``    W decoded into a workspace of at most 256 MiB, whole if that holds it, else a slice at a
            time, and multiplied by the vendor's GEMM; see `slices_of`

The first three read W once and decode it again for every tile of rows, so they win while rows are
few. ``gemm`` decodes once however many rows there are, and the vendor's GEMM comes closer to the
peak, but W in 16 bits goes to memory and back, and there are two kernels a slice.

The choice is the least of four modelled times. **None of it was measured on a GPU**: a kernel's
instructions a weight are counted in its machine code (sm_80, the hot loop), rates are the vendor's,
efficiencies and the cost of a launch are assumptions. Times are in clocks of a quarter of a
processor (SM), which issues one warp-instruction a clock. A kernel takes the longest of what it
issues, multiplies and moves. The vendor's GEMM takes whole waves of tiles: as long for one tile as
for one on every processor.

One assumption is a prior: what ``mma`` reaches of its limit. bitsandbytes has a kernel of the same
kind (``mma.sync``, W decoded in registers), and its authors measured up to how many rows it beats
decoding W whole (``_gemm_4bit_use_custom_cuda`` of its release 0.50.2). Where a layer has three
blocks of 64 columns or more for every processor, that is: T4 64 to 128, A100 128, 8.6 128, RTX 4090
256, H100 and H200 64, B200 32, RTX 5090 256. The efficiencies below bring this model to within a
factor of two of those numbers. For smaller layers theirs are lower, down to none from 8 rows on
(4096 x 4096 on an H100). Those are not taken: a block of theirs sums over all of K, so that most
processors have nothing to do, and here the contraction is split among them.

A product by experts takes ``vector``, ``mma`` or ``tiled``, as that of one expert with its share of
the rows would: where the rows end is not known here. ``gemm`` would decode every expert, also those
that have no rows. Eight tokens of which each goes to 8 of 128 experts have half a row for each,
which counts as a product of one row: ``vector`` reads every weight in use once, and its 0.139
clocks are fewer than any tile's. Of many rows ``mma`` decodes once what ``vector`` does for each 8.

``QKERN_CUDA_PATH`` forces one way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from qkern import formats

PATHS = (*formats.CUDA_PATHS, "gemm")
"""All but the last by their numbers in C++."""
FORCED_ONLY = frozenset({"wgmma"})
"""Those that have not run on a GPU yet, though others of their kind may have."""
BY_EXPERTS = frozenset({"vector", "mma", "tiled"})
"""Those of which there is a kernel for experts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A device: compute capability (major * 10 + minor), processors, bytes of L2 cache."""

    capability: int
    processors: int
    l2_bytes: int
    workspace_bytes: int = 256 << 20
    """Most that ``gemm`` may take for its workspace, unless 128 rows or columns of W take more."""


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
    experts: int | None = None
    """Of a product by experts, how many share the rows."""


class Way(NamedTuple):
    """What can compute a call: C++ answers for its own paths, with what they take."""

    path: str
    parts: int = 1
    """Of the contraction, each summed by itself."""
    workspace_bytes: int = 0


# Multiply-adds a clock and quarter, float16 or bfloat16 with float32 sums: (mma.sync, the best
# instruction, which is what a vendor's GEMM uses); then those of float32 without tensor cores.
# Datasheet peaks over processors and clock. Hopper's and Blackwell's mma.sync do not reach the peak
# of their own instructions. 8.6, 8.9 and 12.0 are GeForce cards; others of these have twice that.
_TENSOR_RATES = {
    75: (128, 128),
    80: (256, 256),
    86: (64, 64),
    89: (64, 64),
    90: (320, 512),
    100: (256, 1024),
    120: (64, 64),
}
_FLOAT32_RATES = {75: 16, 80: 16, 86: 32, 89: 32, 90: 32, 100: 32, 120: 32}
# Bytes of memory a clock and quarter: T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_MEMORY_RATES = {75: 1.26, 80: 3.3, 86: 1.68, 89: 0.78, 90: 3.5, 100: 7.3, 120: 1.1}

# Clocks that a weight's instructions take in the hot loops, one for a warp-instruction, or two for
# each of integers and bytes, of which half as many are taken: of the tensor-core kernels by rows of
# their tile, of the dot products by rows that a launch takes at once, of a float32 tile of 64 rows,
# of decoding.
_MMA_ISSUE = {16: 0.234, 32: 0.238, 64: 0.234}
_DX_MMA_ISSUE = {64: 0.277, 128: 0.318}
_WGMMA_ISSUE = {128: 0.328, 256: 0.344}
_DX_WGMMA_ISSUE = {128: 0.261}
_VECTOR_ISSUE = {1: 0.139, 2: 0.180, 4: 0.311, 8: 0.605}
_TILED_ISSUE = 5.3
DECODE_ISSUE = 0.264
_PACKED_BYTES = 0.53  # a weight: its code, its part of a scale

# What a kernel reaches of its modelled limit, by assumption: latencies, barriers, the last wave.
FUSED_EFFICIENCY = 0.65
MEMORY_EFFICIENCY = 0.85
_MMA_EFFICIENCY = {75: 0.2, 80: 0.3, 86: 0.45, 89: 0.4, 90: 0.3, 100: 0.35, 120: 0.4}  # the prior
# Hopper's own products: latencies and barriers; and bytes from the L2 cache that a processor gets a
# clock, where 5120 of the whole cache (A100's whitepaper) would be 39. A block has a processor for
# itself, and its tile so many columns of the result.
_WGMMA_EFFICIENCY = 0.85
_L2_RATE = 28
_WGMMA_COLUMNS, _DX_WGMMA_COLUMNS = 128, 256
# The vendor's GEMM: rows of its tiles, what it reaches by their columns, and into how many parts it
# may split the contraction where there are few tiles.
VENDOR_ROWS = 64
VENDOR_EFFICIENCY = {128: 0.7, 256: 0.8}
_VENDOR_PARTS = (1, 2, 4)
# From the end of a kernel to the next one's first instruction, where the host is ahead: a
# microsecond or so.
LAUNCH_CLOCKS = 2000

_SLICE_MULTIPLE = 128  # rows or columns: whole tiles for the GEMM, 16 aligned bytes for the decoder
_L2_SHARE = 0.5  # of the cache for a slice; the rest is for x, y and the packed weight
_MANY_ROWS = 1024  # with more, half of W has tiles for all processors


def _architecture(capability: int) -> int:
    """The newest architecture of the tables that is not newer than the device."""
    known = (arch for arch in _TENSOR_RATES if arch <= capability)
    return max(known, default=min(_TENSOR_RATES))


def modelled_clocks(path: str, call: Matmul, limits: Limits) -> float:
    """Clocks of the device for the call: launches, and all quarters' work evenly shared."""
    if path == "gemm":
        slices = slices_of(call, limits)
        return sum(_slice_clocks(end - begin, call, limits) for begin, end in slices)
    if path == "wgmma":
        return _hopper_clocks(call, limits)
    architecture = _architecture(limits.capability)
    tile_rows, clocks = tile_of(path, call.dx, call.rows, limits.capability)
    clocks *= 1 + (call.rows - 1) // tile_rows
    launches = 1 + (call.rows - 1) // 64 if path == "vector" else 1
    weights = call.out_features * call.in_features
    read = _moved(_PACKED_BYTES, architecture)
    return launches * LAUNCH_CLOCKS + weights / (4 * limits.processors) * max(clocks, read)


def tile_of(path: str, dx: bool, rows: int, capability: int) -> tuple[int, float]:
    """The rows of the tile that so many rows take, and the clocks of a quarter for a weight of it.

    Of ``vector``, ``mma`` and ``tiled``.
    """
    architecture = _architecture(capability)
    if path == "vector":
        step = next((n for n in _VECTOR_ISSUE if rows <= n), 8)
        return step, _VECTOR_ISSUE[step] / FUSED_EFFICIENCY
    if path == "mma":
        tiles = _DX_MMA_ISSUE if dx else _MMA_ISSUE
        tile = next((n for n in tiles if rows <= n), max(tiles))
        if capability < 80:  # the one of which several blocks fit a processor
            tile = 64 if dx else 32
        clocks = max(tiles[tile], tile / _TENSOR_RATES[architecture][0])
        return tile, clocks / _MMA_EFFICIENCY[architecture]
    return 64, _TILED_ISSUE / FUSED_EFFICIENCY


def _hopper_clocks(call: Matmul, limits: Limits) -> float:
    """Clocks of ``wgmma``: whole waves of blocks, whose parts of a split contraction are even."""
    architecture = _architecture(limits.capability)
    tiles = _DX_WGMMA_ISSUE if call.dx else _WGMMA_ISSUE
    tile = next((n for n in tiles if call.rows <= n), max(tiles))
    columns, depth, width = _WGMMA_COLUMNS, call.in_features, call.out_features
    if call.dx:
        columns, depth, width = _DX_WGMMA_COLUMNS, width, depth
    blocks = -(-call.rows // tile) * -(-width // columns)
    parts = max(1, min(limits.processors // blocks, 8, depth // 256))
    waves = -(-blocks * parts // limits.processors)
    # Clocks of a quarter for one of the contraction's terms, of a whole tile of the result.
    products = tile * columns / (4 * _TENSOR_RATES[architecture][1])
    issue = tiles[tile] * columns / 4
    cache = (2 * tile + _PACKED_BYTES * columns) / _L2_RATE
    clocks = waves * depth / parts * max(products, issue, cache) / _WGMMA_EFFICIENCY
    weights = call.out_features * call.in_features
    read = weights / (4 * limits.processors) * _moved(_PACKED_BYTES, architecture)
    return (1 + (parts > 1)) * LAUNCH_CLOCKS + max(clocks, read)


def _moved(nbytes: float, architecture: int) -> float:
    """Clocks of a quarter for its part of a weight's traffic with memory."""
    return nbytes / (_MEMORY_RATES[architecture] * MEMORY_EFFICIENCY)


def _slice_clocks(width: int, call: Matmul, limits: Limits) -> float:
    """Clocks of ``gemm`` for a slice of so many rows of W, or columns for dx: two kernels."""
    architecture = _architecture(limits.capability)
    depth = call.out_features if call.dx else call.in_features
    share = width * depth / (4 * limits.processors)
    cached = width * depth * call.dtype.itemsize <= limits.l2_bytes * _L2_SHARE
    nbytes = 0 if cached else call.dtype.itemsize  # a weight, to memory and back
    issue = DECODE_ISSUE / FUSED_EFFICIENCY
    decode = share * max(issue, _moved(_PACKED_BYTES + nbytes, architecture))
    read = share * _moved(nbytes, architecture)
    return 2 * LAUNCH_CLOCKS + decode + max(_gemm_clocks(width, depth, call, limits), read)


def _gemm_clocks(width: int, depth: int, call: Matmul, limits: Limits) -> float:
    """Clocks of the vendor's GEMM without its reading, by the tile and the split that suit best."""
    rate = gemm_rate(call.dtype, limits.capability)
    found = []
    for columns, efficiency in VENDOR_EFFICIENCY.items():
        clocks = columns * VENDOR_ROWS * depth / (4 * rate * efficiency)  # of a tile
        tiles = -(-call.rows // VENDOR_ROWS) * -(-width // columns)
        for parts in _VENDOR_PARTS:
            waves = -(-tiles * parts // limits.processors)
            found.append(waves * clocks / parts + (parts > 1) * LAUNCH_CLOCKS)
    return min(found)


def gemm_rate(dtype: torch.dtype, capability: int) -> int:
    """Multiply-adds a clock and quarter of the vendor's GEMM at its best."""
    architecture = _architecture(capability)
    if dtype == torch.float32 or (dtype == torch.bfloat16 and capability < 80):
        return _FLOAT32_RATES[architecture]
    return _TENSOR_RATES[architecture][1]


def slices_of(call: Matmul, limits: Limits) -> tuple[tuple[int, int], ...]:
    """``gemm``'s parts of W as (begin, end): of its rows in the forward, of its columns for dx.

    Either way each gives its own columns of the result, so nothing is summed across slices. They
    are as few as the workspace takes, one for most weights. Slices that stay in the L2 cache would
    keep W in 16 bits out of memory; but each starts two kernels, and with few rows a product of a
    slice has too few tiles for all processors. So W is cut for the cache only where there are many
    rows and two slices will do.
    """
    cached = _even_slices(call, int(limits.l2_bytes * _L2_SHARE))
    if call.rows > _MANY_ROWS and len(cached) <= 2:
        return cached
    return _even_slices(call, limits.workspace_bytes)


def _even_slices(call: Matmul, most_bytes: int) -> tuple[tuple[int, int], ...]:
    """As few slices as take ``most_bytes`` each, or `_SLICE_MULTIPLE` rows or columns."""
    sliced, other = call.out_features, call.in_features
    if call.dx:
        sliced, other = other, sliced
    most = most_bytes // (other * call.dtype.itemsize)
    most = max(_SLICE_MULTIPLE, most // _SLICE_MULTIPLE * _SLICE_MULTIPLE)
    count = -(-sliced // most)
    # Even slices: a short last one would keep few processors busy.
    step = -(-sliced // (count * _SLICE_MULTIPLE)) * _SLICE_MULTIPLE
    return tuple((begin, min(begin + step, sliced)) for begin in range(0, sliced, step))


def best(call: Matmul, limits: Limits, ways: Sequence[Way]) -> Way:
    """The way that the model finds fastest, of those that can compute the call."""
    if call.batch_invariant:
        # The way must not depend on the number of rows either: `vector`, or for dx the best left.
        return ways[0]
    if call.experts is not None:
        # As if as few experts as can be had no rows.
        call = replace(call, rows=-(-call.rows // min(call.experts, call.rows)), experts=None)
    ways = [way for way in ways if way.path not in FORCED_ONLY]
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
