"""PagedAdamW: the same numbers as AdamW's, wherever the moments are and whatever happens."""

from __future__ import annotations

import copy
import errno
import gc
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lab.fake_gpu import FakeGpu
from lab.processes import environment
from qkern import formats, reference, testing
from qkern.backends import cpu
from qkern.optim import ChunkFileError, PagedAdamW, PagedAdamW8bit, _driver, _updates
from qkern.optim._chunks import plan
from qkern.optim._moments import BLOCK, Moments

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


@pytest.fixture(params=["none", "mmap", "managed", "pinned"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    if request.param in ("none", "mmap"):
        return Made(request.param, tmp_path)
    gpu = FakeGpu(managed=request.param == "managed", eagerness=1.0)
    monkeypatch.setattr(_driver, "current", gpu)
    return Made("unified", tmp_path)


def close_to_fused(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], steps: int, lr: float = 1e-3
) -> None:
    """Within what float32 rounds: each step half a unit of the parameter, and of its update."""
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=steps * eps, atol=8 * steps * lr * eps)


# 32 bits: the numbers of torch's AdamW.


def test_1000_steps_as_torch() -> None:
    """Errors against float64 are no larger than those of torch's own float32, half as much given.

    Both round about ten times a step in different orders, so neither is always the nearer one.
    """
    shapes = ((64, 96), (130, 257), (3,))
    ours, theirs, exact = make_params(shapes), make_params(shapes), make_params(shapes)
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    optimizers = [PagedAdamW(ours, **options), fused(theirs, **options), fused(exact, **options)]
    for step in range(1000):
        for params, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            set_grads(params, step) if params is ours else None
            for param, ours_too in zip(params, ours, strict=True):
                param.grad = ours_too.grad.to(param.dtype)
            optimizer.step()
    for values in (
        zip(ours, theirs, exact, strict=True),
        *(
            zip(
                *([o.state[p][key] for p in o.param_groups[0]["params"]] for o in optimizers),
                strict=True,
            )
            for key in ("exp_avg", "exp_avg_sq")
        ),
    ):
        for our, their, right in values:
            scale = right.detach().abs().max()
            our_error, their_error = (
                (t.double() - right).abs().max() / scale for t in (our, their)
            )
            assert our_error <= 1.5 * their_error + torch.finfo(torch.float32).eps
    close_to_fused(ours, theirs, 1000, 1e-2)


@LOW_DTYPES
def test_low_precision_parameters_in_float32_arithmetic(dtype: torch.dtype, make: Made) -> None:
    """Each step: torch's AdamW in float32 on the same parameters, rounded once.

    The roundings to float32 on the way may differ, and so, rarely, may the one at the end.
    """
    params, others = make_params(dtype=dtype), make_params(dtype=dtype)
    copies = [nn.Parameter(p.detach().float()) for p in others]
    optimizer, other = make(params, lr=1e-2), fused(copies, lr=1e-2)
    different = total = 0
    for step in range(30):
        set_grads(params, step)
        for param, exact in zip(params, copies, strict=True):
            exact.data.copy_(param.detach())
            exact.grad = param.grad.float()
        optimizer.step()
        other.step()
        for param, exact in zip(params, copies, strict=True):
            rounded = exact.detach().to(dtype)
            total += param.numel()
            unequal = param != rounded
            different += int(unequal.sum())
            between = testing.neighbours(rounded[unequal].view(-1))
            assert (between == param.detach()[unequal].view(-1, 1)).any(1).all()
    assert different <= total * 1e-3
    for index, exact in enumerate(copies):
        state = optimizer.state_dict()["state"][index]
        assert state["exp_avg"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq"):
            expected = other.state[exact][key]
            largest = float(expected.abs().max()) if expected.numel() else 0.0  # sums cancel
            atol = 30 * torch.finfo(torch.float32).eps * largest
            torch.testing.assert_close(state[key], expected, rtol=0, atol=atol)


def test_groups_differ(make: Made) -> None:
    def groups(params: Params, bits: bool) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.0},
            {"params": params[2:5], "betas": (0.5, 0.9), "maximize": True},
            {"params": params[5:6], "eps": 0.1, "weight_decay": 0.5},
            {"params": params[6:], **({"bits": 8} if bits else {})},
        ]

    ours, theirs = make_params(), make_params()
    optimizer = make(groups(ours, True), lr=1e-2)
    other = fused(groups(theirs, False), lr=1e-2)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        other.step()
    close_to_fused(ours[:6], theirs[:6], 20, 0.1)
    state = optimizer.state_dict()["state"]
    assert [s["exp_avg"].dtype for s in state.values()] == [torch.float32] * 6 + [torch.uint8]
    alone = make_params()[6:]
    in_8_bits = PagedAdamW8bit(alone, lr=1e-2)
    for step in range(20):
        everything = make_params()
        set_grads(everything, step)
        alone[0].grad = everything[6].grad
        in_8_bits.step()
    assert_same(ours[6:], alone)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    # Changes betas too.
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=25),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(make: Made, scheduler: str, tensor_lr: bool) -> None:
    ours, theirs = make_params(SHAPES[:5]), make_params(SHAPES[:5])
    optimizers = [
        cls(params, lr=torch.tensor(1e-2) if tensor_lr else 1e-2)
        for cls, params in ((make, ours), (fused, theirs))
    ]
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in optimizers]
    rates = set()
    for step in range(20):
        for params, optimizer, of_it in zip((ours, theirs), optimizers, schedulers, strict=True):
            set_grads(params, step)
            optimizer.step()
            of_it.step()
        rates.add(float(optimizers[0].param_groups[0]["lr"]))
    assert len(rates) > 10
    assert optimizers[0].param_groups[0]["betas"] == optimizers[1].param_groups[0]["betas"]
    close_to_fused(ours, theirs, 20, 0.1)


def test_weight_decay_comes_first_and_past_the_moments(make: Made) -> None:
    """With eps 0 the first update is the sign of the gradient: p (1 - lr wd) - lr sign(g)."""
    param = nn.Parameter(torch.tensor([2.0, -4.0]))
    param.grad = torch.tensor([0.5, -3.0])
    make([param], lr=0.125, weight_decay=0.5, eps=0.0).step()
    expected = torch.tensor([2 * 0.9375 - 0.125, -4 * 0.9375 + 0.125])
    torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=0)


def test_closure_accumulation_and_set_to_none(make: Made) -> None:
    ours, theirs = make_params(((7, 6), (6,))), make_params(((7, 6), (6,)))
    optimizers = (make(ours), fused(theirs))
    x = torch.randn(5, 7)
    for set_to_none in (True, False, True):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):

            def closure(
                params: Params = params,
                optimizer: torch.optim.Optimizer = optimizer,
                set_to_none: bool = set_to_none,
            ) -> Tensor:
                optimizer.zero_grad(set_to_none=set_to_none)
                for rows in x.split(2):
                    loss = (rows @ params[0] + params[1]).square().sum()
                    loss.backward()
                return loss

            assert torch.is_tensor(optimizer.step(closure))
    close_to_fused(ours, theirs, 3)
    assert optimizers[0].step() is None


def test_gradients_stay_and_parameters_count_as_changed(make: Made) -> None:
    params = make_params()
    optimizer = make(params, max_grad_norm=0.1, maximize=True)
    set_grads(params, 0)
    grads = [p.grad.clone() for p in params]
    (square,) = torch.autograd.grad((params[2] * 2).square().sum(), params[2], create_graph=True)
    versions = [p._version for p in params]
    optimizer.step()
    assert_same([p.grad for p in params], grads)
    assert all(p._version > v for p, v in zip(params, versions, strict=True) if p.numel())
    assert square.shape == params[2].shape
    y = (params[4] * params[4]).sum()
    set_grads(params, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_without_gradients(make: Made, bits: int) -> None:
    """Those left out keep their step, moments and bits, as if they had an optimizer alone."""
    ours = make_params()
    alone = [[p] for p in make_params()]
    optimizer = make(ours, bits=bits)
    others = [PagedAdamW(p, bits=bits) for p in alone]
    for step in range(12):
        everything = make_params()
        set_grads(everything, step)
        for index, param in enumerate(ours):
            takes_part = (step + index) % 3 != 0 and index != 5
            param.grad = everything[index].grad if takes_part else None
            if takes_part:
                alone[index][0].grad = param.grad
                others[index].step()
        optimizer.step()
    assert_same(ours, [p for (p,) in alone])
    state = optimizer.state_dict()["state"]
    assert 5 not in state
    for index in (0, 1, 2, 3, 4, 6):
        assert_same_state(
            {"state": {0: state[index]}}, {"state": others[index].state_dict()["state"]}
        )


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("bits", [32, 8])
def test_strides(make: Made, bits: int, layout: str) -> None:
    shapes = ((64, 96), (130, 257), (17,))
    plain = make_params(shapes)
    param_layout = "contiguous" if layout == "expanded" else layout  # of a parameter of its own
    odd = [nn.Parameter(testing.with_layout(p.detach(), param_layout)) for p in plain]
    optimizers = [make(odd, bits=bits), PagedAdamW(plain, bits=bits)]
    strides = [p.stride() for p in odd]
    for step in range(4):
        set_grads(plain, step)
        for param, other in zip(odd, plain, strict=True):
            param.grad = testing.with_layout(other.grad, layout)
            other.grad = param.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(odd, plain)
    assert [p.stride() for p in odd] == strides
    assert_same_state(optimizers[0].state_dict(), optimizers[1].state_dict())


def test_nothing_to_do(make: Made) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = make(params, max_grad_norm=1.0)
    optimizer.step()
    assert_same(params, before)
    assert optimizer.state_dict()["state"] == {}


def test_adding_a_group() -> None:
    params = make_params()
    optimizer = PagedAdamW(params[:2])
    train(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5, "bits": 8})
    train(optimizer, params, 2)
    assert optimizer.state[params[0]]["step"] == 4
    assert optimizer.state[params[6]]["step"] == 2
    assert optimizer.state[params[6]]["exp_avg"].dtype == torch.uint8


# Clipping and loss scaling.


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


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad: got True; takes False"),
        ({"lr": -1.0}, "lr: got -1.0; takes a number of 0 and above"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"lr": torch.tensor(math.inf)}, "lr: got inf"),
        ({"lr": torch.ones(2)}, r"lr: got shape \[2\]; takes one number"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\); takes two numbers"),
        ({"betas": (-0.1, 0.9)}, "betas: got"),
        ({"betas": (0.9, 0.9, 0.9)}, "betas: got"),
        ({"betas": (math.nan, 0.9)}, "betas: got"),
        ({"eps": -1e-8}, "eps: got -1e-08"),
        ({"weight_decay": -1}, "weight_decay: got -1"),
        ({"bits": 4}, "bits: got 4; takes 32 or 8"),
        ({"bits": "8"}, "bits: got '8'; takes 32 or 8"),
        ({"pager": "disk"}, "pager: got 'disk'; takes one of auto, none, unified, mmap"),
        ({"seed": -1}, "seed: got -1; takes 0 to"),
        ({"seed": 1 << 32}, "seed: got 4294967296"),
        ({"seed": 0.5}, "seed: got 0.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0; takes a norm above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: got nan"),
        ({"pager": "mmap"}, 'path: got None with pager "mmap"'),
        ({"pager": "none", "path": "x"}, "path: got 'x' with pager \"none\""),
        ({"resume": True}, 'resume: got True with pager "none"'),
        ({"budget_bytes": 1 << 20}, 'budget_bytes: got 1048576 with pager "none"'),
        ({"durable": True}, 'durable: got True with pager "none"'),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedAdamW(make_params(SHAPES[:2]), **options)
    group = {k: v for k, v in options.items() if k in ("lr", "betas", "eps", "weight_decay")}
    if group:
        optimizer = PagedAdamW(make_params(SHAPES[:2]))
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": make_params(SHAPES[2:3])} | group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("budget", [0, -1, LEAST_BUDGET - 1])
def test_budget_too_small(tmp_path: Path, budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget_bytes: got {budget}; takes 65536 and up"):
        PagedAdamW(make_params(), path=tmp_path / "state", budget_bytes=budget)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bool, torch.int32])
def test_parameter_dtypes(dtype: torch.dtype) -> None:
    param = torch.zeros(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"params: got {dtype}; takes float32, bfloat16 or float16"):
        PagedAdamW([param])


def test_gradients_that_are_refused(make: Made) -> None:
    """Before anything has changed: the other parameter has its gradient ready."""
    params = make_params(((4, 3), (4, 3)))
    optimizer = make(params)
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(TypeError, match="grad: got a sparse tensor; takes a dense one"):
        optimizer.step()
    assert_same(params, before)
    assert optimizer.state_dict()["state"] == {}
    params[1].grad = None
    params[1].data = params[1].data.bfloat16()
    params[1].grad = torch.ones(4, 3, dtype=torch.bfloat16)
    params[1].data = params[1].data.float()
    with pytest.raises(TypeError, match=r"grad: got torch.bfloat16; takes torch.float32"):
        optimizer.step()


def test_no_group_joins_a_file(tmp_path: Path) -> None:
    optimizer = PagedAdamW(make_params(SHAPES[:2]), path=tmp_path / "state")
    with pytest.raises(RuntimeError, match=r'param_group: got one .* with pager "mmap" all are'):
        optimizer.add_param_group({"params": make_params(SHAPES[2:3])})


def test_pager_tells_which(tmp_path: Path) -> None:
    assert PagedAdamW(make_params()).pager == "none"
    assert PagedAdamW(make_params(), path=tmp_path / "state").pager == "mmap"


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match=str(path)):
        PagedAdamW(make_params(), path=path, resume=True)
    optimizer = PagedAdamW(make_params(), path=path)
    with pytest.raises(FileExistsError, match=str(path)):
        PagedAdamW(make_params(), path=path)
    with pytest.raises(BlockingIOError, match="in use"):
        PagedAdamW(make_params(), path=path, resume=True)
    train(optimizer, optimizer.param_groups[0]["params"], 1)
    optimizer.close()
    optimizer.close()
    for shapes, bits, message in (
        (((2,), *SHAPES[1:]), 32, r"layout.params\[0\].shape: got \[\]; takes \[2\]"),
        ((*SHAPES[:6], (257, 130)), 32, r"layout.params\[6\].shape\[0\]: got 130; takes 257"),
        (SHAPES, 8, r"layout.params\[4\].bits: got 32; takes 8"),
        (SHAPES[:6], 32, r"layout.params: got a list of 7; takes one of 6"),
    ):
        with pytest.raises(ChunkFileError, match=message):
            PagedAdamW(make_params(shapes), path=path, resume=True, bits=bits)
    path.write_bytes(b"something else")
    with pytest.raises(ChunkFileError, match="begins with b'somethin'"):
        PagedAdamW(make_params(), path=path, resume=True)


def test_a_step_after_close(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    optimizer.close()
    with pytest.raises(ValueError, match="closed"):
        train(optimizer, params, 1)
    assert_same(params, before)


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


# Pagers.


@given(
    numels=st.lists(st.integers(0, 40_000) | st.integers(0, 600), max_size=12),
    bits=st.lists(st.sampled_from([32, 8]), min_size=12, max_size=12),
    chunk_bytes=st.integers(1, 64).map(lambda pages: pages * 4096),
)
def test_plan_has_every_element_once(numels: list[int], bits: list[int], chunk_bytes: int) -> None:
    bits = bits[: len(numels)]
    reached = [0] * len(numels)
    chunks = plan(numels, bits, chunk_bytes)
    for pieces in chunks:
        taken = 0
        buffer = memoryview(bytearray(chunk_bytes))
        for piece in pieces:
            assert piece.bits == bits[piece.param]
            assert piece.first == reached[piece.param]  # in order, without gaps
            assert piece.first % BLOCK == 0
            assert piece.numel > 0
            reached[piece.param] += piece.numel
            for offset, numel, dtype in piece.parts():
                assert offset >= taken
                assert offset % 64 == 0
                taken = offset + numel * dtype.itemsize
            assert taken <= piece.end <= chunk_bytes
            moments = piece.moments(buffer)
            assert moments.bits == piece.bits
            assert moments.exp_avg.numel() == moments.exp_avg_sq.numel() == piece.numel
            if piece.bits == 8:
                blocks = formats.num_blocks(piece.numel, BLOCK)
                assert [t.numel() for t in moments.absmaxes()] == [blocks, blocks]
        assert pieces
    assert reached == numels
    held = sum(n * (8 if b == 32 else 2) for n, b in zip(numels, bits, strict=True))
    assert len(chunks) <= 1 + held // (chunk_bytes // 2)


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 3 * LEAST_BUDGET, 16 << 20])
@pytest.mark.parametrize("bits", [32, 8])
def test_file_equals_memory(tmp_path: Path, bits: int, budget: int) -> None:
    in_file, in_memory = make_params(), make_params()
    options = {"bits": bits, "lr": 1e-2, "max_grad_norm": 0.5}
    optimizer = PagedAdamW(in_file, path=tmp_path / "state", budget_bytes=budget, **options)
    other = PagedAdamW(in_memory, **options)
    for step in range(0, 30, 5):
        train(optimizer, in_file, 5, step)
        train(other, in_memory, 5, step)
        assert_same(in_file, in_memory)
        assert optimizer._pager.held_bytes <= budget
    assert_same_state(optimizer.state_dict(), other.state_dict())


@settings(max_examples=100)
@given(
    shapes=st.lists(st.lists(st.integers(0, 90), max_size=3).map(tuple), min_size=1, max_size=6),
    big=st.integers(0, 60_000),
    bits=st.sampled_from([32, 8]),
    least=st.sampled_from([0, 300, 4096]),
    budget=st.integers(LEAST_BUDGET, 1 << 20),
    dtypes=st.lists(st.sampled_from(testing.DTYPES), min_size=7, max_size=7),
    skipped=st.lists(st.booleans(), min_size=21, max_size=21),
)
def test_file_equals_memory_for_any_shapes(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    big: int,
    bits: int,
    least: int,
    budget: int,
    dtypes: list[torch.dtype],
    skipped: list[bool],
) -> None:
    shapes.append((big,))
    pair = []
    path = tmp_path_factory.mktemp("any") / "state"
    for options in ({}, {"path": path, "budget_bytes": budget}):
        params = [make_params((s,), d)[0] for s, d in zip(shapes, dtypes, strict=False)]
        optimizer = PagedAdamW(
            params, bits=bits, min_8bit_size=least, stochastic_rounding=True, **options
        )
        for step in range(3):
            set_grads(params, step)
            for index, param in enumerate(params):
                if skipped[7 * step + index]:
                    param.grad = None
            optimizer.step()
        pair.append((params, optimizer))
    (in_memory, other), (in_file, optimizer) = pair
    assert_same(in_file, in_memory)
    assert_same_state(optimizer.state_dict(), other.state_dict())
    optimizer.close()
    path.unlink()


def test_chunks_without_a_gradient_stay_on_disk(tmp_path: Path) -> None:
    params = make_params(((300, 100),) * 4)
    optimizer = PagedAdamW(params, path=tmp_path / "state", budget_bytes=LEAST_BUDGET)
    set_grads(params, 0)
    for param in params[1:]:
        param.grad = None
    optimizer.step()
    # A parameter has 240 kB; chunks have 64 KiB, so that its last may hold some of the next.
    assert 240_000 <= optimizer._pager.stats.written_bytes <= 240_000 + 2 * (64 << 10)


def test_resume_after_close(tmp_path: Path) -> None:
    for bits in (32, 8):
        path = tmp_path / f"state{bits}"
        params, whole = make_params(), make_params()
        train(PagedAdamW(whole, bits=bits), whole, 7)
        optimizer = PagedAdamW(params, bits=bits, path=path, budget_bytes=4 * LEAST_BUDGET)
        train(optimizer, params, 3)
        optimizer.close()
        for first, budget in ((3, LEAST_BUDGET), (5, 1 << 20)):
            optimizer = PagedAdamW(params, bits=bits, path=path, resume=True, budget_bytes=budget)
            assert optimizer.state[params[0]]["step"] == first
            train(optimizer, params, 2, first)
            optimizer.close()
        assert_same(params, whole)


KILLED = """
import torch
from tests.optim import test_optim as t
from qkern.optim import PagedAdamW
torch.set_num_threads(1)
params = t.make_params()
optimizer = PagedAdamW(params, path={path!r}, resume={resume}, budget_bytes=t.LEAST_BUDGET)
first = int(optimizer.state[params[0]].get("step", 0))
if first:
    for param, saved in zip(params, torch.load({saved!r} + str(first)), strict=True):
        param.data.copy_(saved)
for step in range(first, 1000):
    t.set_grads(params, step)
    # Before the step that makes it current: whichever step the file has, its parameters exist.
    trial = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer_state = optimizer.state_dict()
    copy = PagedAdamW(trial)
    copy.load_state_dict(optimizer_state)
    t.train(copy, trial, 1, step)
    torch.save([p.detach() for p in trial], {saved!r} + str(step + 1))
    print(step, flush=True)
    optimizer.step()
"""


@pytest.mark.slow
def test_killed_in_a_step(tmp_path: Path) -> None:
    """Killed at once after it says that a step begins, again and again; it loses at most that."""
    path, saved = str(tmp_path / "state"), str(tmp_path / "params")
    at = 0
    for round in range(4):
        program = KILLED.format(path=path, saved=saved, resume=round > 0)
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment()
        ) as child:
            last = at
            for line in child.stdout:
                last = int(line)
                if last >= at + 3:
                    break
            else:
                raise AssertionError("the child ended by itself")
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        params, whole = make_params(), make_params()
        optimizer = PagedAdamW(params, path=path, resume=True)
        at = int(optimizer.state[params[0]]["step"])
        assert at >= last
        train(PagedAdamW(whole), whole, at)
        assert_same(torch.load(saved + str(at)), [p.detach() for p in whole])
        expected = make_params()
        other = PagedAdamW(expected)
        train(other, expected, at)
        assert_same_state(optimizer.state_dict(), other.state_dict())
        optimizer.close()


@pytest.mark.parametrize(
    ("fails_at", "times"),
    [(0, 1), (3, 1), (-1, 1), (-1, 2)],
    ids=["first chunk", "later chunk", "commit", "commit and taking it back"],
)
def test_a_full_disk_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, times: int
) -> None:
    params = make_params()
    path = tmp_path / "state"
    optimizer = PagedAdamW(params, path=path, budget_bytes=LEAST_BUDGET)
    train(optimizer, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    real, made, failed = os.pwritev, 0, 0

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal made, failed
        made += 1
        of_record = bytes(buffers[0][:8]) == b"QKCOMMIT"
        begins = made > fails_at if fails_at >= 0 else of_record
        if failed < times and (failed or begins):
            failed += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        message = rf"{path}: a step broke off and the file has the one before, but parameters of"
        with pytest.raises(RuntimeError, match=rf"{message} \d+ of \d+ chunks.*No space left"):
            train(optimizer, params, 1, 2)
    assert failed == times
    assert_same_state(optimizer.state_dict(), state)
    # With the parameters from before, it goes on; so does one that is opened anew.
    for again in (False, True):
        for param, value in zip(params, before, strict=True):
            param.data.copy_(value)
        if again:
            optimizer.load_state_dict(state)
            optimizer.close()
            optimizer = PagedAdamW(params, path=path, resume=True)
            assert_same_state(optimizer.state_dict(), state)
        train(optimizer, params, 2, 2)
        whole = make_params()
        train(PagedAdamW(whole), whole, 4)
        assert_same(params, whole)


@pytest.mark.parametrize("calls", [0, 2])
def test_an_interrupt_in_a_step_says_what_is_half_done(
    make: Made, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, 1)
    state = copy.deepcopy(optimizer.state_dict())
    before = [param.detach().clone() for param in params]
    run = _updates.Calls.run

    def interrupted(of_step: Any) -> None:
        nonlocal calls
        if calls == 0:
            raise KeyboardInterrupt
        calls -= 1
        run(of_step)

    changes = calls > 0
    with monkeypatch.context() as patch:
        patch.setattr(_updates.Calls, "run", interrupted)
        if make.pager == "none":  # one call does everything
            calls = 0
            text = "^$"
        elif make.pager == "unified" and not changes:
            text = "^$"
        else:
            text = "a step broke off.*load"
        with pytest.raises(KeyboardInterrupt, match=text):
            train(optimizer, params, 1, 1)
    assert make.pager == "none" or changes != all(map(torch.equal, params, before))
    for param, value in zip(params, before, strict=True):
        param.data.copy_(value)
    optimizer.load_state_dict(state)
    train(optimizer, params, 1, 1)
    whole = make_params()
    train(PagedAdamW(whole, pager="none"), whole, 2)
    assert_same(params, whole)


def test_a_disk_too_full_for_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and not the signal that a mapping without space behind it would give."""
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            optimizer.state_dict()
    assert len(optimizer.state_dict()["state"]) == len(params)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    params = make_params()
    path = tmp_path / "state"
    optimizer = PagedAdamW(params, path=path)
    train(optimizer, params, 1)
    optimizer.close()
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data), 997):
        data[place] ^= 1
    path.write_bytes(data)
    optimizer = PagedAdamW(params, path=path, resume=True)
    with pytest.raises(ChunkFileError, match=rf"{path}: .*damaged: wrong checksum in chunk"):
        train(optimizer, params, 1)


def open_files() -> set[str]:
    return {str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.exists()}


def test_everything_is_freed_with_the_optimizer(make: Made) -> None:
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, 2)
    moments = [weakref.ref(t) for s in optimizer.state.values() for t in s.values()]
    reference = weakref.ref(optimizer)
    gc.collect()
    gc.disable()  # by the last reference, not by a collection some day
    try:
        files = {str(p) for p in make.folder.iterdir()}
        assert files <= open_files()
        del optimizer
        assert reference() is None
        assert not files & open_files()
    finally:
        gc.enable()
    assert not any(ref() is not None for ref in moments)
    assert all(p.grad is not None for p in params)


def test_state_dict_with_a_file_leaves_no_moments_behind(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    optimizer.state_dict()
    assert all(state.keys() == {"step"} for state in optimizer.state.values())
    first = optimizer.state_dict()
    kept = copy.deepcopy(first)
    train(optimizer, params, 1, 1)
    for state in first["state"].values():
        del state["step"]  # a tensor that is the optimizer's own, as torch's state_dict has it
    for state in kept["state"].values():
        del state["step"]
    assert_same_state(first, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    params = make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state")
    train(optimizer, params, 1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            optimizer._pager.step((), lambda pieces: None)
        except ValueError:
            status = 42
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    train(optimizer, params, 1, 1)
    whole = make_params()
    train(PagedAdamW(whole), whole, 2)
    assert_same(params, whole)


# Checkpoints.

KINDS = [(pager, bits) for pager in ("none", "mmap", "unified") for bits in (32, 8)]


@pytest.mark.parametrize("saved", [False, True], ids=["state_dict", "torch.save"])
@pytest.mark.parametrize("to", KINDS, ids=lambda kind: f"to-{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("start", KINDS, ids=lambda kind: f"from-{kind[0]}-{kind[1]}")
def test_checkpoints_across_pagers_and_widths(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: tuple[str, int],
    to: tuple[str, int],
    saved: bool,
) -> None:
    monkeypatch.setattr(_driver, "current", FakeGpu(eagerness=1.0))
    params, whole = make_params(), make_params()
    optimizer = Made(start[0], tmp_path)(params, bits=start[1], lr=1e-2)
    other = PagedAdamW(whole, pager="none", bits=start[1], lr=1e-2)
    train(optimizer, params, 5)
    train(other, whole, 5)
    state = optimizer.state_dict()
    if saved:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    if start[1] != to[1]:  # the conversion that is stated, done by hand
        for index, of_it in other.state_dict()["state"].items():
            wide = PagedAdamW(whole[index : index + 1], pager="none", bits=to[1], lr=1e-2)
            moments = Moments(*(of_it.get(key) for key in Moments._fields))
            bits = to[1] if whole[index].numel() >= 4096 else 32
            found = {k: v for k, v in moments.to_bits(bits)._asdict().items() if v is not None}
            wide.state[whole[index]] = {"step": of_it["step"].clone()} | found
            train(wide, make_params()[:0], 0)
            other.state[whole[index]] = wide.state[whole[index]]
        other.param_groups[0]["bits"] = to[1]
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Made(to[0], tmp_path / "to")(fresh, bits=to[1], lr=0.5)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["bits"] == to[1]
    assert_same_state(optimizer.state_dict(), other.state_dict())
    train(optimizer, fresh, 5, 5)
    train(other, whole, 5, 5)
    assert_same(fresh, whole)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.DTYPE_NAMES.get)
def test_moments_stay_in_float32_whatever_the_parameters(make: Made, dtype: torch.dtype) -> None:
    params, whole = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, other = make(params), PagedAdamW(whole)
    train(optimizer, params, 3)
    train(other, whole, 6)
    fresh = make(params)
    fresh.load_state_dict(optimizer.state_dict())
    state = fresh.state_dict()["state"]
    assert {t.dtype for s in state.values() for t in s.values()} == {torch.float32}
    train(fresh, params, 3, 3)
    assert_same(params, whole)


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_without_a_loaded_state_begin_anew(make: Made, bits: int) -> None:
    params, fresh = make_params(), make_params()
    optimizer, other = make(params, bits=bits), PagedAdamW(fresh, bits=bits)
    train(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {index: state["state"][index] for index in (0, 4)}
    optimizer.load_state_dict(state)
    other.load_state_dict(state)
    assert optimizer.state_dict()["state"].keys() == {0, 4}
    for param, value in zip(fresh, params, strict=True):
        param.data.copy_(value.detach())
    train(optimizer, params, 2, 3)
    train(other, fresh, 2, 3)
    assert_same(params, fresh)
    assert optimizer.state_dict()["state"][6]["step"] == 2


def test_a_step_that_parameters_share_in_a_checkpoint(make: Made) -> None:
    params, whole = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(whole)
    train(optimizer, params, 3)
    train(other, whole, 5)
    state = optimizer.state_dict()
    step = torch.tensor([3])
    for of_it in state["state"].values():
        of_it["step"] = step
    again = make(params)
    again.load_state_dict(state)
    train(again, params, 2, 3)
    assert_same(params, whole)
    assert step == 3


def test_loading_copies(make: Made) -> None:
    params, others = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(others)
    train(other, others, 2)
    state = other.state_dict()
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(optimizer, params, 2, 2)
    assert_same_state(state, kept)


@pytest.mark.parametrize("foreign", ["fused", "plain", "channels last"])
def test_from_torch_and_back(make: Made, foreign: str) -> None:
    """torch's moments have the parameter's strides; the checkpoint need not be contiguous."""
    shapes = (*SHAPES, (4, 6, 5, 3))
    ours, theirs = make_params(shapes), make_params(shapes)
    if foreign == "channels last":
        for params in (ours, theirs):
            params[-1].data = params[-1].data.to(memory_format=torch.channels_last)
            params[4].data = params[4].data.mT.contiguous().mT
    # The fused one takes a gradient for one in the parameter's strides.
    cls = fused if foreign == "fused" else torch.optim.AdamW
    optimizer, other = make(ours), cls(theirs)
    train(other, theirs, 4)
    for param, value in zip(ours, theirs, strict=True):
        param.data.copy_(value.detach())
    optimizer.load_state_dict(other.state_dict())
    train(optimizer, ours, 4, 4)
    train(other, theirs, 4, 4)
    close_to_fused(ours, theirs, 8)
    back = cls([nn.Parameter(p.detach().clone()) for p in ours])
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's may share tensors
    train(back, back.param_groups[0]["params"], 4, 8)
    train(optimizer, ours, 4, 8)
    close_to_fused(ours, back.param_groups[0]["params"], 12)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW", "AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_from_bitsandbytes(make: Made, name: str, bits: int) -> None:
    """Continued as its own optimizer continues, of which the 8-bit codes may differ at ties."""
    shapes = (*SHAPES[:3], *SHAPES[4:])
    theirs = make_params(shapes)
    other = getattr(bitsandbytes.optim, name)(theirs, lr=1e-2, weight_decay=0.1)
    train(other, theirs, 4)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = make(ours, bits=bits)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["bits"]) == (1e-2, 0.1, bits)
    state = optimizer.state_dict()["state"]
    for index, param in enumerate(theirs):
        assert state[index]["step"] == 4
        found = Moments(*(state[index].get(key) for key in Moments._fields))
        in_theirs = other.state[param]
        moments = Moments(*(in_theirs.get(k) for k in ("state1", "state2", "absmax1", "absmax2")))
        assert moments.bits == (8 if "8bit" in name and param.numel() >= 4096 else 32)
        for a, b in zip(found, moments.to_bits(found.bits), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                testing.assert_bitwise(a, b)
    train(optimizer, ours, 4, 4)
    train(other, theirs, 4, 4)
    coarse = 0.02 if bits == 8 or "8bit" in name else 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= coarse


def test_bitsandbytes_decodes_these_moments_alike() -> None:
    (param,) = params = make_params(((5000,),))
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params, 3)
    state = optimizer.state[param]
    moments = Moments(*(state[key] for key in Moments._fields)).to_bits(32)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        code = bitsandbytes.functional.create_dynamic_map(signed=signed)
        decoded = bitsandbytes.functional.dequantize_blockwise(
            state[key], absmax=state[f"{key}_absmax"], code=code, blocksize=BLOCK
        )
        testing.assert_bitwise(decoded, getattr(moments, key))


def foreign_state(change: str) -> dict[str, Any]:
    params = make_params()
    if change == "amsgrad":
        other: torch.optim.Optimizer = torch.optim.AdamW(params, amsgrad=True)
    elif change == "sgd":
        other = torch.optim.SGD(params, momentum=0.9)
    else:
        other = PagedAdamW(params, bits=8)
    train(other, params, 1)
    state = copy.deepcopy(other.state_dict())
    if change == "shape":
        state["state"][4]["exp_avg"] = state["state"][4]["exp_avg"].view(96, 64)
    elif change == "scales":
        state["state"][5]["exp_avg_sq_absmax"] = torch.zeros(3)
    elif change == "no scales":
        del state["state"][5]["exp_avg_absmax"]
    elif change == "map":
        state["state"][4]["qmap1"] = torch.linspace(-1, 1, 256)
    elif change == "groups":
        state["param_groups"] *= 2
    elif change == "params":
        state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("amsgrad", r"AMSGrad|amsgrad"),
        ("sgd", r"state\[0\]: got no (step|exp_avg); takes the state of an Adam or AdamW"),
        ("shape", r"state\[4\].exp_avg: got shape \[96, 64\]; takes \[64, 96\]"),
        ("scales", r"state\[5\].exp_avg_sq_absmax: got 3 scales; takes 20, one for each 256"),
        ("no scales", r"state\[5\].exp_avg_absmax: got none; takes 20"),
        ("map", r"state\[4\].qmap1: got another map"),
        ("groups", "param_groups: got 2 groups; takes 1"),
        ("params", r"param_groups\[0\].params: got 6 parameters; takes 7"),
    ],
)
def test_states_that_are_refused_change_nothing(make: Made, change: str, message: str) -> None:
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign_state(change))
    assert_same_state(optimizer.state_dict(), kept)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_amsgrad_is_refused_without_a_state_too() -> None:
    state = torch.optim.AdamW(make_params(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad: got True"):
        PagedAdamW(make_params()).load_state_dict(state)


def test_hooks_see_what_torchs_do(make: Made) -> None:
    params, others = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(others)
    train(other, others, 2)
    seen: list[set[str]] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda self, state: seen.append(set(state["state"][0])) or None
    )
    optimizer.register_load_state_dict_post_hook(
        lambda self: seen.append(set(self.state_dict()["state"][0]))
    )
    optimizer.register_state_dict_post_hook(
        lambda self, state: seen.append(set(state["state"][0])) or None
    )
    optimizer.load_state_dict(other.state_dict())
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}] * 3


def copied(optimizer: PagedAdamW, how: str) -> PagedAdamW:
    return copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = PagedAdamW(
        params, bits=8, max_grad_norm=0.1, min_8bit_size=1000, stochastic_rounding=True, seed=3
    )
    train(optimizer, params, 3)
    other = copied(optimizer, how)
    others = other.param_groups[0]["params"]
    assert_same(others, params)
    train(optimizer, params, 3, 3)
    train(other, others, 3, 3)
    assert_same(others, params)
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.pager == "none"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_file_cannot_be_copied(tmp_path: Path, how: str) -> None:
    optimizer = PagedAdamW(make_params(), path=tmp_path / "state")
    with pytest.raises(TypeError, match=r"state_dict"):
        copied(optimizer, how)


# Large states.

LARGE = """
import resource
from pathlib import Path
import torch
from qkern.optim import PagedAdamW
torch.set_num_threads(2)
N, COUNT = 1 << 24, 16  # 2 GiB of moments
params = [torch.nn.Parameter(torch.zeros(N, dtype=torch.bfloat16)) for _ in range(COUNT)]
grad = torch.empty(N, dtype=torch.bfloat16)
options = {{"path": {path!r}, "budget_bytes": 256 << 20}} if {path!r} else {{}}
optimizer = PagedAdamW(params, lr=1e-2, **options)
def rss(key):
    found = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)]
    return int(found[0].split()[1]) << 10
for step in range(2):
    generator = torch.Generator().manual_seed(step)
    grad.normal_(generator=generator)
    for param in params:
        param.grad = grad
    if step == 0:
        before = rss("VmRSS")
    optimizer.step()
print(rss("VmHWM") - before)
import hashlib
digest = hashlib.sha256()
for param in params:
    digest.update(param.detach().view(torch.int16).numpy())
print(digest.hexdigest())
state = optimizer.state_dict()["state"]
for index in range(COUNT):
    for key in ("exp_avg", "exp_avg_sq"):
        digest.update(state[index][key].numpy())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_2_gib_of_state_in_256_mib(tmp_path: Path) -> None:
    """All parameters are 0.5 GiB of bfloat16 and share one gradient; only the state is large."""
    results = []
    path = tmp_path / "state"
    try:
        for name in (str(path), ""):
            program = LARGE.format(path=name)
            found = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                timeout=3000,
                env=environment(),
            )
            assert found.returncode == 0, found.stderr
            results.append(found.stdout.split())
    finally:
        path.unlink(missing_ok=True)
    (grown, *paged), (grown_in_memory, *in_memory) = results
    assert paged == in_memory
    # Beside the budget: threads' stacks, the allocator, pages of parameters touched at first.
    assert int(grown) <= (256 << 20) + (64 << 20)
    assert int(grown_in_memory) >= 2 << 30


# The op's factors.


@pytest.mark.parametrize("in_tensors", [False, True], ids=["numbers", "tensors"])
def test_factors_are_those_of_the_paper(in_tensors: bool) -> None:
    steps = [1, 2, 10, 1000, 1 << 20]
    lr, beta1, beta2, eps, decay, scale = 3e-4, 0.9, 0.999, 1e-8, 0.1, -0.25
    given = [torch.tensor([v], dtype=torch.float64) if in_tensors else v for v in (lr, scale)]
    found = reference.adamw_factors(
        torch.tensor(steps, dtype=torch.float32), given[0], beta1, beta2, eps, decay, given[1]
    )
    expected = [
        (
            *(scale, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2),
            *(lr / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t), eps, 0.0, float(t)),
        )
        for t in steps
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"factors": torch.zeros(10)}, ValueError, r"factors: got shape \[10\]; takes \[n, 10\]"),
        ({"factors": torch.zeros(2, 9)}, ValueError, r"factors: got shape \[2, 9\]"),
        ({"factors": torch.zeros(2, 10).double()}, TypeError, "factors: got torch.float64"),
        ({"factors": torch.zeros(10, 2).T}, ValueError, "factors: got strides"),
        ({"factors": torch.zeros(0, 10)}, ValueError, r"indices: got \[0\]; takes rows of factors"),
        ({"indices": [2]}, ValueError, r"indices: got \[2\]; takes rows of factors, of 2"),
        ({"indices": [-1]}, ValueError, r"indices: got \[-1\]"),
        ({"indices": [0, 1]}, ValueError, "lists of different lengths"),
        ({"offsets": [0, 256]}, ValueError, "lists of different lengths"),
        ({"offsets": [128]}, ValueError, r"offsets: got \[128\]; takes multiples of 256"),
        ({"offsets": [-256]}, ValueError, r"offsets: got \[-256\]; takes multiples of 256"),
        ({"grads": []}, ValueError, "lists of different lengths"),
        ({"grads": [torch.zeros(3)]}, ValueError, "grad: got 3 elements; takes 4"),
    ],
    ids=str,
)
@pytest.mark.skipif(cpu.missing_reason() is not None, reason=str(cpu.missing_reason()))
def test_the_op_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"params": [torch.zeros(4)], "grads": [torch.zeros(4)]}
    arguments |= {"exp_avgs": [torch.zeros(4)], "exp_avg_sqs": [torch.zeros(4)]}
    arguments |= {"exp_avg_absmaxes": [], "exp_avg_sq_absmaxes": []}
    arguments |= {"factors": torch.zeros(2, 10)} | change
    with pytest.raises(error, match=text):
        torch.ops.qkern.adamw_step(**arguments)


def test_moments_on_another_device_are_brought_and_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with parameters on a GPU, for which copies on the CPU stand here."""
    monkeypatch.setattr(Moments, "on", lambda moments, device: moments._replace(**clones(moments)))
    params, whole = make_params(), make_params()
    optimizer = PagedAdamW(params, path=tmp_path / "state", budget_bytes=LEAST_BUDGET, bits=8)
    other = PagedAdamW(whole, bits=8)
    train(optimizer, params, 3)
    train(other, whole, 3)
    assert_same(params, whole)
    assert_same_state(optimizer.state_dict(), other.state_dict())


def clones(moments: Moments) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in moments._asdict().items() if t is not None}
