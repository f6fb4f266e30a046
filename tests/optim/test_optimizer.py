"""PagedAdamW steps as AdamW does, wherever the moments are."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern import ops, testing
from qkern.optim import PagedAdamW, PagedAdamW8bit, _updates
from tests.optim.compare import assert_same, assert_same_state, close_to_fused, fused
from tests.optim.pagers import Made
from tests.optim.params import LOW_DTYPES, SHAPES, Params, make_params, set_grads, train
from tests.optim.system import Crash


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


def open_files() -> set[str]:
    return {str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.exists()}


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


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.usefixtures("_defaults")
def test_torchs_default_dtype_and_device_change_nothing(make: Made, bits: int) -> None:
    options = {"bits": bits, "max_grad_norm": 0.1, "lr": 1e-2}
    defaults = torch.get_default_dtype(), torch.get_default_device()

    def trained(optimizer: PagedAdamW, params: Params) -> dict[str, Any]:
        for step in range(4):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return optimizer.state_dict()

    found = []
    for cls, as_it_is in ((make, True), (PagedAdamW, False)):
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        params = make_params()
        grads = []
        for step in range(4):
            set_grads(params, step)
            grads.append([param.grad for param in params])
        if as_it_is:
            torch.set_default_dtype(defaults[0])
            torch.set_default_device(defaults[1])
        found.append((params, trained(cls(params, **options), params)))
    (params, state), (others, other) = found
    assert_same(params, others)
    assert_same_state(state, other)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_step_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Parameters of one width may have it, when the call for the others fails."""
    params, whole = make_params(), make_params()
    optimizer, other = (PagedAdamW(p, bits=8) for p in (params, whole))
    train(optimizer, params, 2)
    train(other, whole, 2)
    real = ops.adamw_step
    made = 0

    def fails(*args: Any) -> None:
        nonlocal made
        made += 1
        if made > calls:
            raise Crash
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "adamw_step", fails)
        with pytest.raises(Crash):
            train(optimizer, params, 1, 2)
    steps = [int(optimizer.state[param]["step"]) for param in params if param.numel()]
    assert set(steps) == ({2} if calls == 0 else {2, 3})
    # What does not count has not changed, and goes on as if nothing had been.
    for param, of_whole in zip(params, whole, strict=True):
        if int(optimizer.state[param]["step"]) == 2:
            assert_same([param], [of_whole])
    set_grads(params, 2)
    for param in params:
        if int(optimizer.state[param]["step"]) == 3:
            param.grad = None
    optimizer.step()
    train(other, whole, 1, 2)
    assert_same(params, whole)
    assert_same_state(optimizer.state_dict(), other.state_dict())


def test_a_scaler_that_finds_infinities_counts_no_step(make: Made) -> None:
    params = make_params(SHAPES[:5])
    optimizer = make(params)
    train(optimizer, params, 2)
    kept = [param.detach().clone() for param in params]
    state = copy.deepcopy(optimizer.state_dict())
    set_grads(params, 2)
    params[1].grad[0] = math.inf
    optimizer.grad_scale = torch.tensor(1.0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert_same(params, kept)
    assert_same_state(optimizer.state_dict(), state)
    del optimizer.grad_scale, optimizer.found_inf
    train(optimizer, params, 1, 2)
    assert {int(s["step"]) for s in optimizer.state_dict()["state"].values()} == {3}
