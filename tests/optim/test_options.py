"""What PagedAdamW refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qkern.optim import PagedAdamW
from tests.optim.compare import assert_same
from tests.optim.pagers import LEAST_BUDGET, Made
from tests.optim.params import SHAPES, make_params, set_grads


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


def test_pager_tells_which(tmp_path: Path) -> None:
    assert PagedAdamW(make_params()).pager == "none"
    assert PagedAdamW(make_params(), path=tmp_path / "state").pager == "mmap"
