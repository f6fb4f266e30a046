#!/usr/bin/env python3
"""`nf4_linear` inside a module of your own: two frozen 4-bit weights, one small trained one."""

from __future__ import annotations

import torch
from torch import nn

import qkern


class Bottleneck(nn.Module):
    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up = qkern.quantize_4bit(up.weight.detach())  # NF4, its scales in 8 bits
        self.down = qkern.quantize_4bit(down.weight.detach())
        self.scale = nn.Parameter(torch.ones(up.out_features))  # what is trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(qkern.nf4_linear(x, self.up)) * self.scale
        return qkern.nf4_linear(hidden, self.down)


def main() -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False)
    block = Bottleneck(up, down)
    x = torch.randn(8, 512, requires_grad=True)
    block(x).square().mean().backward()  # through the 4-bit weights, which get no gradient

    dense = sum(4 * layer.weight.numel() for layer in (up, down))
    print(f"weights: {dense:,} bytes in float32, {block.up.nbytes + block.down.nbytes:,} in NF4")
    assert x.grad is not None
    assert block.scale.grad is not None
    print(f"gradient norms: x {x.grad.norm():.2e}, scale {block.scale.grad.norm():.2e}")


if __name__ == "__main__":
    main()
