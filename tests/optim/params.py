"""Parameters with gradients that follow from the step, and optimizers of each pager."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern import testing
from qkern.optim import PagedAdamW

# A scalar, an empty one, whole and broken blocks, and some of several chunks of 64 KiB.
SHAPES = ((), (3,), (17, 5), (0, 4), (64, 96), (5000,), (130, 257))
LOW_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get
)
LEAST_BUDGET = 64 << 10
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


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        testing.assert_bitwise(a.detach(), b.detach(), f"parameter {index}")


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            testing.assert_bitwise(actual["state"][index][key], value, f"{index}.{key}")


def fused(params: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, fused=True, **options)


class Made:
    """Optimizers of one pager; those with files each have one of their own."""

    def __init__(self, pager: str, folder: Path) -> None:
        self.pager = pager
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._count = 0

    def __call__(self, params: Any, **options: Any) -> PagedAdamW:
        if self.pager == "mmap":
            self._count += 1
            options = {"budget_bytes": LEAST_BUDGET} | options
            options |= {"path": self.folder / f"state{self._count}"}
        if self.pager == "unified":
            options = {"budget_bytes": LEAST_BUDGET} | options
        return PagedAdamW(params, pager=self.pager, **options)


def close_to_fused(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], steps: int, lr: float = 1e-3
) -> None:
    """Within what float32 rounds: each step half a unit of the parameter, and of its update."""
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=steps * eps, atol=8 * steps * lr * eps)
