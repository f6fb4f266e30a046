"""Comparisons of optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import testing


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


def close_to_fused(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], steps: int, lr: float = 1e-3
) -> None:
    """Within what float32 rounds: each step half a unit of the parameter, and of its update."""
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=steps * eps, atol=8 * steps * lr * eps)
