#!/usr/bin/env python3
"""Modelled times of matmuls by experts on GPUs; nothing is run on one.

Of layers of three open mixtures, with 8, 64 and 128 experts, for 1 to 8,192 tokens: the path that
qkern takes, its time by the model that chooses paths (`qkern/backends/_cuda_paths.py`, whose rates
are datasheets' and instruction counts of the machine code, and whose efficiencies are assumptions),
and what of a tile's rows are padding, since an expert's rows are no whole tiles. Beside it:

``bound``       the packed weights of experts that have rows, once, at the datasheet's bandwidth, or
                the products at its peak, whichever takes longer
``all dense``   every expert decoded to 16 bits in memory, then a grouped GEMM of the vendor's kind,
                which is what is left where no kernel takes experts in 4 bits
``dense``       that GEMM alone, of experts that are kept in 16 bits: four times the memory

Tokens choose experts at random, or by a popularity that falls as one over the rank. A model is no
measurement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_static import BYTES_A_WEIGHT, GPUS, Gpu, print_table

from qkern.backends import _cuda_paths as paths


class Layer(NamedTuple):
    """Experts of one model: each one's gate and up together, or down for the gradient of them."""

    model: str
    experts: int
    top_k: int
    out_features: int
    in_features: int
    layers: int
    """Of the model; each has such experts, and those of `down`, half as large."""

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.out_features * self.in_features


LAYERS = (
    Layer("Mixtral 8x7B", 8, 2, 28672, 4096, 32),
    Layer("OLMoE 1B-7B", 64, 8, 2048, 2048, 16),
    Layer("Qwen3 30B-A3B", 128, 8, 1536, 2048, 48),
)
TOKENS = (1, 8, 64, 512, 2048, 8192)
ROUTINGS = ("even", "skewed")
MODELLED = ("A100 80GB SXM", "RTX 4090", "H100 SXM")
IDLE_CLOCKS = 600
"""Of a block that finds no rows: two looks at its run of offsets and two scans. An assumption."""
RESIDENT = 3
"""Blocks of a processor at a time, of those: by registers and shared memory, about."""


_COLUMNS = {"vector": 16, "mma": 64, "tiled": 64}
"""Of the result, that a block has."""


def rows_by_expert(layer: Layer, tokens: int, routing: str) -> np.ndarray:
    """How many rows each expert has, by a draw that is always the same."""
    generator = np.random.default_rng(0)
    scores = generator.gumbel(size=(tokens, layer.experts))
    if routing == "skewed":
        scores -= np.log(np.arange(1, layer.experts + 1))
    chosen = np.argpartition(scores, -layer.top_k, axis=1)[:, -layer.top_k :]
    return np.bincount(chosen.ravel(), minlength=layer.experts)


def tiles_of(rows: np.ndarray, tile: int) -> int:
    return int(np.sum(-(-rows // tile)))


def grouped_tile(
    path: str, dx: bool, layer: Layer, total: int, capability: int
) -> tuple[int, float]:
    """Rows of the tile that a launch takes and its clocks a weight, as the launchers choose it."""
    mean = -(-total // min(layer.experts, total))
    if path == "vector":
        limits = {1: layer.experts // 2, 2: 4 * layer.experts, 4: 16 * layer.experts}
        wanted = next((n for n, most in limits.items() if total <= most or total == n == 1), 8)
        return paths.tile_of(path, dx, wanted, capability)
    return paths.tile_of(path, dx, mean if dx else 2 * mean, capability)


def modelled(layer: Layer, gpu: Gpu, tokens: int, routing: str, dx: bool) -> dict[str, Any]:
    """Microseconds of one product of all tokens, and what they consist of."""
    rows = rows_by_expert(layer, tokens, routing)
    total, used = int(rows.sum()), int(np.count_nonzero(rows))
    capability, quarters = gpu.architecture, 4 * gpu.processors
    shape = (layer.in_features, layer.out_features) if dx else layer[3:5]
    call = paths.Matmul(dx, torch.bfloat16, total, *shape, experts=layer.experts)
    limits = paths.Limits(capability, gpu.processors, 0)
    ways = [paths.Way(path) for path in ("vector", "mma", "tiled") if not (dx and path == "vector")]
    path = paths.best(call, limits, ways).path
    tile, clocks = grouped_tile(path, dx, layer, total, capability)
    tiles = tiles_of(rows, tile)
    quarter_hz = gpu.boost_ghz * 1e9
    bandwidth = gpu.gbytes_s * 1e9 * paths.MEMORY_EFFICIENCY
    activations = 2.0 * total * (layer.out_features + layer.in_features)
    packed = used * layer.weights * BYTES_A_WEIGHT + activations
    launch = paths.LAUNCH_CLOCKS / quarter_hz
    most = min(total, layer.experts + total // tile + 1)  # tiles that there may be, at worst
    blocks = max(0, most - tiles) * -(-call.out_features // _COLUMNS[path])
    idle = blocks * IDLE_CLOCKS / (RESIDENT * gpu.processors) / quarter_hz
    compute = tiles * layer.weights * clocks / quarters / quarter_hz
    ours = launch + idle + max(compute, packed / bandwidth)
    # Of the vendor's kind: tiles of so many rows, at its rate, and weights of 16 bits from memory.
    rate = paths.gemm_rate(torch.bfloat16 if capability >= 80 else torch.float16, capability)
    gemm_rows, efficiency = paths.VENDOR_ROWS, min(paths.VENDOR_EFFICIENCY.values())
    vendor = tiles_of(rows, gemm_rows) * gemm_rows * layer.weights / (rate * efficiency)
    read = 2.0 * used * layer.weights + activations
    dense = launch + max(vendor / quarters / quarter_hz, read / bandwidth)
    everything = layer.experts * layer.weights
    decoding = everything * paths.DECODE_ISSUE / paths.FUSED_EFFICIENCY / quarters / quarter_hz
    decode = launch + max(decoding, everything * (BYTES_A_WEIGHT + 2) / bandwidth)
    products = 2.0 * total * layer.weights
    bound = max(packed / bandwidth, products / (gpu.tensor_tflops * 1e12))
    return {
        "model": layer.model,
        "gpu": gpu.name,
        "op": "dx" if dx else "forward",
        "routing": routing,
        "tokens": tokens,
        "rows": total,
        "experts_used": used,
        "path": f"{path} {tile}",
        "padding": 1 - total / (tiles * tile),
        "us": ours * 1e6,
        "limit": "tiles" if compute > packed / bandwidth else "memory",
        "bound_us": bound * 1e6,
        "all_dense_us": (decode + dense) * 1e6,
        "dense_us": dense * 1e6,
    }


def memory(layer: Layer) -> dict[str, float]:
    """Gigabytes of all experts of the model, `down` too: in 4 bits, and in 16."""
    weights = 1.5 * layer.weights * layer.experts * layer.layers
    return {"4 bits": weights * BYTES_A_WEIGHT / 1e9, "16 bits": weights * 2 / 1e9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    found = [
        modelled(layer, gpu, tokens, routing, dx)
        for gpu in GPUS
        if gpu.name in MODELLED
        for layer in LAYERS
        for dx in (False, True)
        for routing in ROUTINGS
        for tokens in TOKENS
    ]
    print_table(found, list(found[0]))
    held = {layer.model: memory(layer) for layer in LAYERS}
    for model, gigabytes in held.items():
        print(model, ", ".join(f"{kind} {value:.1f} GB" for kind, value in gigabytes.items()))
    if args.out is not None:
        args.out.write_text(json.dumps({"memory": held, "models": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
