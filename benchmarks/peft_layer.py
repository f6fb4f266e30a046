#!/usr/bin/env python3
"""What does PEFT's LoRA layer on 4-bit weights cost beside qkern's own `LoRALinear`?

Both are on one base layer and compute by `qkern.lora_linear`, so the difference is Python around
it. They are called in turn in one process, another first each round; ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qkern.integrations import peft
from qkern.nn import Linear4bit, LoRALinear

SHAPES = ((64, 64, 1), (576, 576, 16), (1536, 576, 256), (2048, 2048, 512))
"""Of the weight, ``[out, in]``, and the rows of x."""


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


def seconds(call: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def compare(
    step: Callable[[nn.Module, Tensor], None],
    found: dict[str, nn.Module],
    x: Tensor,
    budget_s: float,
) -> dict[str, float]:
    """Median seconds of a call of each layer."""
    calls = {name: lambda layer=layer: step(layer, x) for name, layer in found.items()}
    one = max(seconds(call, 3) for call in calls.values())
    batch = max(1, round(0.01 / one))  # a hundredth of a second, well above the clock
    rounds = max(11, round(budget_s / (2 * batch * one)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in sorted(calls, reverse=index % 2 == 1):
            times[name].append(seconds(calls[name], batch))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each comparison")
    args = parser.parse_args()
    peft.register()
    torch.manual_seed(0)
    print(f"rank {args.rank}, float32, {torch.get_num_threads()} threads")
    print("| weight | rows | | LoRALinear, µs | PEFT, µs | ratio |\n|---|---|---|---|---|---|")
    for out_features, in_features, rows in SHAPES:
        found = layers(out_features, in_features, args.rank)
        x = torch.randn(rows, in_features, requires_grad=True)
        expected, other = (layer(x) for layer in found.values())
        if not torch.equal(expected, other):
            raise SystemExit("the layers differ: nothing to compare")
        for step in (forward, forward_backward):
            medians = compare(step, found, x, args.seconds)
            own, theirs = medians["LoRALinear"] * 1e6, medians["PEFT"] * 1e6
            name = step.__name__.replace("_", " + ")
            cells = f"{own:.1f} | {theirs:.1f} | {theirs / own:.3f}"
            print(f"| {out_features} × {in_features} | {rows} | {name} | {cells} |")


if __name__ == "__main__":
    main()
