"""Moments in 8 bits, and parameters rounded at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from qkern import formats, testing
from qkern.optim import PagedAdamW, PagedAdamW8bit
from qkern.optim._moments import BLOCK, Moments
from tests.optim.compare import assert_same, fused
from tests.optim.pagers import Made
from tests.optim.params import make_params, set_grads, train

# 8 bits.


def test_small_parameters_have_32_bits(make: Made) -> None:
    for options, narrow in (({}, {4, 5, 6}), ({"min_8bit_size": 0}, {0, 1, 2, 4, 5, 6})):
        params = make_params()
        optimizer = make(params, bits=8, **options)
        train(optimizer, params, 3)
        state = optimizer.state_dict()["state"]
        assert {i for i, s in state.items() if s["exp_avg"].dtype == torch.uint8} == narrow
        for index, of_it in state.items():
            assert ("exp_avg_absmax" in of_it) == (index in narrow)
            if index in narrow:
                blocks = formats.num_blocks(params[index].numel(), BLOCK)
                assert of_it["exp_avg_absmax"].shape == (blocks,)
                assert of_it["exp_avg"].shape == params[index].shape


def test_codes_are_the_nearest() -> None:
    """The first step's moments are known: each is nearest among the map's 256 multiples."""
    (param,) = params = make_params(((5000,),))
    optimizer = PagedAdamW8bit(params, betas=(0.5, 0.75))
    set_grads(params, 0, 3.0)
    optimizer.step()
    state = optimizer.state[param]
    for key, expected, map in (
        ("exp_avg", param.grad / 2, "signed"),
        ("exp_avg_sq", param.grad.square() / 4, "unsigned"),
    ):
        absmax = state[f"{key}_absmax"]
        padded = nn.functional.pad(expected, (0, -5000 % BLOCK)).view(-1, BLOCK)
        testing.assert_bitwise(absmax, padded.abs().amax(1))
        table = formats.map_tensor(map)
        exact = (table.double() * absmax.double()[:, None]).repeat_interleave(BLOCK, 0)[:5000]
        distance = (exact - expected.double()[:, None]).abs()
        chosen = distance.gather(1, state[key].long()[:, None])[:, 0]
        # A tie of the rounded quotients may be none of the exact ones.
        slack = 2**-22 * absmax.double().repeat_interleave(BLOCK)[:5000]
        assert (chosen <= distance.amin(1) + slack).all()


def test_moments_of_zero_and_of_nan() -> None:
    params = make_params(((5000,), (4096,)))
    optimizer = PagedAdamW8bit(params, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
    assert_same(params, before)
    decoded = Moments(*(optimizer.state[params[0]][k] for k in Moments._fields)).to_bits(32)
    assert not decoded.exp_avg.any()
    assert not decoded.exp_avg_sq.any()
    params[0].grad[300] = math.nan
    params[1].grad[0] = math.inf
    optimizer.step()
    assert params[0][300].isnan()
    untouched = torch.ones(5000, dtype=torch.bool)
    untouched[BLOCK : 2 * BLOCK] = False  # the NaN's block has one scale
    optimizer.step()
    testing.assert_bitwise(params[0].detach()[untouched], before[0][untouched])


def regression(optimizer_class: Callable[..., torch.optim.Optimizer], steps: int) -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x, y = torch.randn(2, 256, 64)
    optimizer = optimizer_class(net.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_converges_as_bitsandbytes_does() -> None:
    """Losses within 3 % of its 8-bit AdamW at each of 150 steps, and within 10 % of 32 bits."""
    ours = regression(PagedAdamW8bit, 150)
    theirs = regression(bitsandbytes.optim.AdamW8bit, 150)
    exact = regression(fused, 150)
    assert theirs[-1] < theirs[0] / 8
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our == pytest.approx(their, rel=0.03)
        assert our == pytest.approx(right, rel=0.10)


# Stochastic rounding.


def rounded(seed: int, steps: int, pager: Made | type[PagedAdamW] = PagedAdamW) -> Tensor:
    params = make_params(((300, 300),), torch.bfloat16)
    params[0].data.fill_(1.0)
    optimizer = pager(params, lr=1e-4, weight_decay=0.0, stochastic_rounding=True, seed=seed)
    for _ in range(steps):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    return params[0].detach().double()


def test_stochastic_rounding_has_no_bias() -> None:
    """Updates of 1e-4, a 39th of the spacing below 1 (2^-8), which rounding to nearest drops.

    Each of 90,000 elements is a step lower with probability 1e-4 · 256; the mean of the whole walk
    stays within five standard deviations.
    """
    steps, n = 40, 90_000
    moved = 1 - rounded(0, steps).mean()
    spread = math.sqrt(steps * 1e-4 * 2.0**-8 / n)
    assert float(moved) == pytest.approx(steps * 1e-4, abs=5 * spread)
    params = make_params(((300,),), torch.bfloat16)
    params[0].data.fill_(1.0)
    params[0].grad = torch.ones_like(params[0])
    PagedAdamW(params, lr=1e-4, weight_decay=0.0).step()
    assert (params[0] == 1).all()


def test_stochastic_rounding_follows_the_seed(tmp_path: Path) -> None:
    first = rounded(7, 1)
    testing.assert_bitwise(first, rounded(7, 1))
    for seed in (0, 8, 7 + (1 << 31)):
        assert (first != rounded(seed, 1)).float().mean() > 0.01
    for steps in (1, 5):
        in_file = rounded(7, steps, Made("mmap", tmp_path / str(steps)))
        testing.assert_bitwise(rounded(7, steps), in_file)


def test_stochastic_rounding_differs_between_steps_and_parameters() -> None:
    params = make_params(((300, 300), (300, 300)), torch.bfloat16)
    optimizer = PagedAdamW(params, lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
    moved = []
    for _ in range(3):
        for param in params:
            param.data.fill_(1.0)
            param.grad = torch.ones_like(param)
        optimizer.step()
        moved += [param.detach() < 1 for param in params]
    chance = 1e-3 * 256
    for i, a in enumerate(moved):
        assert float(a.float().mean()) == pytest.approx(chance, abs=0.01)
        for b in moved[:i]:  # independent: both by the product of the chances
            assert float((a & b).float().mean()) == pytest.approx(chance**2, abs=0.01)
