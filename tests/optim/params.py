"""Parameters of many shapes, with gradients that follow from the step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qkern import testing

# A scalar, an empty one, whole and broken blocks, and some of several chunks of 64 KiB.
SHAPES = ((), (3,), (17, 5), (0, 4), (64, 96), (5000,), (130, 257))
LOW_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get
)
Params = list[nn.Parameter]


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> Params:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients that follow from the step alone, of another size in each parameter."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grad = torch.randn(param.shape, generator=generator) * 10.0 ** (index % 5 - 3)
        param.grad = (grad * scale).to(param.dtype)


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0
) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
