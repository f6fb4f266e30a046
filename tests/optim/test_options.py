"""What PagedAdamW refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qkern
from qkern.optim import PagedAdamW
from tests.optim.compare import assert_same
from tests.optim.pagers import LEAST_BUDGET, Made
from tests.optim.params import SHAPES, make_params, set_grads, train


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


WRONG_TYPES = [
    *[(name, junk) for name in ("lr", "eps", "weight_decay") for junk in (True, "1e-3", None, 1j)],
    *[("betas", junk) for junk in (0.9, "ab", None, {0.5: 1, 0.9: 2})],
    *[("betas", junk) for junk in ((0.9, "0.9"), (True, 0.9), (0.9, torch.tensor(0.9)), (1j, 0))],
    *[("lr", torch.tensor(junk)) for junk in (True, 1j)],
    ("lr", torch.ones((), device="meta")),
    ("eps", torch.tensor(1e-8)),
    ("weight_decay", torch.tensor(0.1)),
    *[("maximize", junk) for junk in (1, 0, "False", None)],
    *[("max_grad_norm", junk) for junk in (True, "1", torch.tensor(1.0))],
    *[("stochastic_rounding", junk) for junk in (1, "False", None)],
    *[(name, junk) for name in ("resume", "durable") for junk in (1, "no", None)],
    *[("budget_bytes", junk) for junk in (True, 1e6, "1", torch.tensor(1 << 20))],
]


@pytest.mark.parametrize(("name", "junk"), WRONG_TYPES, ids=str)
def test_arguments_of_other_types(tmp_path: Path, name: str, junk: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: got .*; takes "):
        PagedAdamW(make_params(SHAPES[:2]), path=tmp_path / "state", **{name: junk})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "junk"),
    [
        *[("amsgrad", junk) for junk in (1, "False", 0)],
        *[("bits", junk) for junk in (True, 8.0, torch.tensor(8))],
        *[("seed", junk) for junk in (True, "0", None)],
        *[("min_8bit_size", junk) for junk in (-1, True, 0.5, "4096", None)],
    ],
)
def test_values_of_other_kinds(name: str, junk: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*; takes "):
        PagedAdamW(make_params(SHAPES[:2]), **{name: junk})


def test_numbers_of_numpy_are_numbers() -> None:
    ours, theirs = make_params(), make_params()
    options = {"lr": 0.5, "eps": 0.25, "weight_decay": 0.125, "betas": (0.5, 0.75)}
    given = {k: np.float32(v) for k, v in options.items() if k != "betas"}
    given |= {"betas": [np.float32(0.5), np.float64(0.75)], "bits": np.int64(8)}
    given |= {"min_8bit_size": np.int32(1), "seed": np.int64(3), "max_grad_norm": np.float32(1)}
    train(PagedAdamW(ours, **given), ours, 3)
    others = {"bits": 8, "min_8bit_size": 1, "max_grad_norm": 1.0}
    train(PagedAdamW(theirs, **options, **others), theirs, 3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("budget", [0, -1, LEAST_BUDGET - 1])
def test_budget_too_small(tmp_path: Path, budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget_bytes: got {budget}; takes 65536 and up"):
        PagedAdamW(make_params(), path=tmp_path / "state", budget_bytes=budget)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bool, torch.float8_e5m2])
def test_parameter_dtypes(dtype: torch.dtype) -> None:
    param = torch.zeros(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"params: got {dtype}; takes float32, bfloat16 or float16"):
        PagedAdamW([param])


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("bits", [32, 8])
def test_integers_are_let_through(make: Made, bits: int) -> None:
    """They take a number, so that a state fits torch's AdamW, and nothing else."""
    integers = [torch.arange(5000).to(dtype) for dtype in INTEGERS]
    first, second, *_ = params = make_params(SHAPES[:2])
    mixed = [*integers[:2], first, integers[2], second, *integers[3:]]
    mixed = [p if p.is_floating_point() else nn.Parameter(p, requires_grad=False) for p in mixed]
    alone = make_params(SHAPES[:2])
    pairs = ((make(mixed, bits=bits, min_8bit_size=1), params),)
    pairs += ((make(alone, bits=bits, min_8bit_size=1), alone),)
    for step in range(3):
        for optimizer, floats in pairs:
            set_grads(floats, step)
            optimizer.step()
        if step == 1:
            state = pairs[0][0].state_dict()
            assert list(state["state"]) == [2, 4]
            pairs[0][0].load_state_dict(state)
    assert_same(params, alone)
    kept = [p.data for p in mixed if not p.is_floating_point()]
    assert all(torch.equal(p, was) for p, was in zip(kept, integers, strict=True))


def test_integers_with_a_gradient_or_moments_are_refused(make: Made) -> None:
    params = [*make_params(SHAPES[:1]), nn.Parameter(torch.zeros(3, dtype=torch.int32), False)]
    optimizer = make(params)
    set_grads(params[:1], 0)
    before = params[0].detach().clone()
    params[1].grad = torch.ones(3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"grad: got one of a torch.int32 parameter; takes none"):
        optimizer.step()
    assert torch.equal(params[0], before)
    params[1].grad = None
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1] = state["state"][0]
    with pytest.raises(ValueError, match=r"state\[1\]: got moments of a torch.int32 parameter"):
        optimizer.load_state_dict(state)


def test_all_parameters_of_a_4_bit_model(tmp_path: Path) -> None:
    model = qkern.nn.quantize_model(nn.Sequential(nn.Linear(64, 64)), lora=qkern.nn.LoRAConfig(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    path = tmp_path / "state"
    optimizer = PagedAdamW(model.parameters(), lr=0.1, path=path, budget_bytes=LEAST_BUDGET)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.close()
    PagedAdamW(model.parameters(), path=path, resume=True, budget_bytes=LEAST_BUDGET).close()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["0.lora_a", "0.lora_b"]


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


def test_pager_tells_which(tmp_path: Path) -> None:
    assert PagedAdamW(make_params()).pager == "none"
    assert PagedAdamW(make_params(), path=tmp_path / "state").pager == "mmap"
