"""Clipping by the norm and the inverse scale of a GradScaler, within the step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.optim.compare import assert_same, assert_same_state, close_to_fused, fused
from tests.optim.pagers import Made
from tests.optim.params import LOW_DTYPES, make_params, set_grads, train


@pytest.mark.parametrize("norm", [0.05, 1e6], ids=["clipped", "as is"])
def test_max_grad_norm_as_clip_grad_norm(make: Made, norm: float) -> None:
    ours, theirs = make_params(), make_params()
    optimizer, other = make(ours, max_grad_norm=norm), fused(theirs)
    assert optimizer.grad_norm is None
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        expected = nn.utils.clip_grad_norm_(theirs, norm)
        optimizer.step()
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, expected)
    close_to_fused(ours, theirs, 5)


def test_max_grad_norm_with_a_nan_as_clip_grad_norm(make: Made) -> None:
    """A norm that is no number reaches every parameter, not the one with the NaN alone."""
    params = make_params(((4,), (5,)))
    set_grads(params, 0)
    params[0].grad[1] = math.nan
    optimizer = make(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert all(p.isnan().all() for p in params)


@LOW_DTYPES
def test_norm_beyond_the_gradients_dtype(make: Made, dtype: torch.dtype) -> None:
    """Finite float16 gradients whose norm is beyond float16, as loss scaling makes them."""
    params = make_params(((100, 100),), dtype)
    params[0].grad = torch.full_like(params[0], 6e4)
    before = params[0].detach().clone()
    optimizer = make(params, max_grad_norm=1.0, lr=1.0, weight_decay=0.0)
    optimizer.step()
    grad = float(params[0].grad[0, 0])
    assert float(optimizer.grad_norm) == pytest.approx(100 * grad, rel=1e-5)
    torch.testing.assert_close(params[0].detach(), before - 1, rtol=0, atol=0.04)


@pytest.mark.parametrize("unscale", [False, True], ids=["in step", "unscale_ first"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_grad_scaler(make: Made, unscale: bool, max_grad_norm: float | None) -> None:
    ours, theirs = make_params(), make_params()
    optimizer, other = make(ours, max_grad_norm=max_grad_norm), fused(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaler.scale(torch.zeros(()))
        set_grads(ours, step, 1024)  # an exact power: the same numbers once divided
        set_grads(theirs, step)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if max_grad_norm:
            expected = nn.utils.clip_grad_norm_(theirs, max_grad_norm)
            torch.testing.assert_close(optimizer.grad_norm, expected)
        other.step()
    close_to_fused(ours, theirs, 4)


@pytest.mark.parametrize("unscale", [False, True], ids=["in step", "unscale_ first"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_not_finite_leave_everything(make: Made, unscale: bool, bad: float) -> None:
    params = make_params()
    optimizer = make(params, max_grad_norm=1.0)
    train(optimizer, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    files = [p.read_bytes() for p in make.folder.iterdir()]
    assert len(files) == (make.pager == "mmap")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    set_grads(params, 2)
    params[4].grad[3, 3] = bad
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same(params, before)
    assert_same_state(optimizer.state_dict(), state)
    assert [p.read_bytes() for p in make.folder.iterdir()] == files
