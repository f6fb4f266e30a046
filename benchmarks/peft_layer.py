#!/usr/bin/env python3
"""What does PEFT's LoRA layer on 4-bit weights cost beside qkern's own `LoRALinear`?

Both are on one base layer and compute by `qkern.lora_linear`, so the difference is Python around
it. They are called in turn in one process, another first each round; times are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench.timing import Candidate, Problem, Settings, run_contest
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qkern.integrations import peft
from qkern.nn import Linear4bit, LoRALinear

SHAPES = ((64, 64, 1, 100), (576, 576, 16, 10), (1536, 576, 256, 1), (2048, 2048, 512, 1))
"""Of the weight, ``[out, in]``, the rows of x, and calls that are timed at a time."""


def layers(out_features: int, in_features: int, rank: int) -> dict[str, nn.Module]:
    """Both layers on the same weight, with the same A and B."""
    base = Linear4bit.from_linear(nn.Linear(in_features, out_features, bias=False))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    theirs: Any = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    own = LoRALinear(base, rank, rank)
    with torch.no_grad():
        own.lora_a.copy_(theirs.lora_A["default"].weight)
        own.lora_b.copy_(theirs.lora_B["default"].weight)
    return {"LoRALinear": own, "PEFT": theirs}


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    torch.autograd.backward(y, torch.ones_like(y))


def contest(
    step: Callable[[nn.Module, Tensor], None],
    found: dict[str, nn.Module],
    x: Tensor,
    calls: int,
    max_seconds: float,
) -> list[float]:
    """Median seconds of a call of each layer."""

    def repeated(layer: nn.Module) -> Callable[[], None]:
        def call() -> None:
            for _ in range(calls):
                step(layer, x)

        return call

    candidates = [
        Candidate(name, lambda layer=layer: repeated(layer), check=lambda _: None)
        for name, layer in found.items()
    ]
    settings = Settings(repeat=100_000, max_seconds=max_seconds, cold=False)
    problem = Problem(step.__name__, x.dtype, m=len(x))
    samples = run_contest(problem, candidates, settings)
    return [sample.percentile(50) / calls for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each comparison")
    args = parser.parse_args()
    peft.register()
    torch.manual_seed(0)
    print(f"rank {args.rank}, float32, {torch.get_num_threads()} threads")
    print("| weight | rows | | LoRALinear, µs | PEFT, µs | ratio |\n|---|---|---|---|---|---|")
    for out_features, in_features, rows, calls in SHAPES:
        found = layers(out_features, in_features, args.rank)
        x = torch.randn(rows, in_features, requires_grad=True)
        expected, other = (layer(x) for layer in found.values())
        if not torch.equal(expected, other):
            raise SystemExit("the layers differ: nothing to compare")
        for step in (forward, forward_backward):
            times = contest(step, found, x, calls, args.seconds)
            own, theirs = (time * 1e6 for time in times)
            name = step.__name__.replace("_", " + ")
            cells = f"{own:.1f} | {theirs:.1f} | {theirs / own:.3f}"
            print(f"| {out_features} × {in_features} | {rows} | {name} | {cells} |")


if __name__ == "__main__":
    main()
