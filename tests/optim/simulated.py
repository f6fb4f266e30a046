"""Parameters whose moments take several chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkern.optim import PagedAdamW

SHAPES = ((50_000,), (30, 70), (9_000,), (40_000,), (1,))  # 791 KiB of moments in 32 bits


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def trained(optimizer: PagedAdamW, params: list[nn.Parameter], steps: int) -> list[Tensor]:
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return [param.detach() for param in params]


def expected(steps: int, **options: Any) -> list[Tensor]:
    params = make_params()
    return trained(PagedAdamW(params, pager="none", **options), params, steps)
