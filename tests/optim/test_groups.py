"""Parameter groups with options by the parameters' names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from qkern.optim import PagedAdamW, parameter_groups
from qkern.optim._groups import DEFAULTS


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(128, 64), "b": nn.Linear(64, 128), "norm": nn.LayerNorm(128)}
    return nn.ModuleDict(parts)


def names(of: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    known = {id(p): n for n, p in of.named_parameters()}
    return [[known[id(p)] for p in group["params"]] for group in groups]


def test_options_are_by_name_and_the_last_counts() -> None:
    parts = model()
    groups = parameter_groups(
        parts,
        {
            "norm|bias": {"weight_decay": 0.0, "lr": 1e-4},
            r"^b\.": {"bits": 8, "betas": [0.8, 0.9]},
            r"b\.bias": {"lr": 1e-5},
        },
    )
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert names(parts, groups) == [
        ["a.weight"],
        ["a.bias", "norm.weight", "norm.bias"],
        ["b.weight"],
        ["b.bias"],
    ]
    assert options == [
        {},
        {"weight_decay": 0.0, "lr": 1e-4},
        {"bits": 8, "betas": (0.8, 0.9)},
        {"weight_decay": 0.0, "lr": 1e-5, "bits": 8, "betas": (0.8, 0.9)},
    ]


def test_frozen_and_shared_parameters() -> None:
    parts = model()
    parts["a"].requires_grad_(False)
    parts["c"] = nn.Linear(64, 128)
    parts["c"].weight = parts["b"].weight
    groups = parameter_groups(parts)
    assert names(parts, groups) == [["b.weight", "b.bias", "norm.weight", "norm.bias", "c.bias"]]


def test_the_optimizer_obeys_them() -> None:
    parts = model()
    groups = parameter_groups(parts, {r"a\.": {"bits": 8}, "norm": {"lr": 0.0}})
    optimizer = PagedAdamW(groups, lr=0.1)
    before = {n: p.clone() for n, p in parts.named_parameters()}
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parts["a"].weight]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[parts["b"].weight]["exp_avg"].dtype == torch.float32
    changed = {n for n, p in parts.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_the_options_are_those_of_the_optimizer() -> None:
    optimizer = PagedAdamW([nn.Parameter(torch.zeros(3))])
    assert {k: v for k, v in optimizer.defaults.items() if k in DEFAULTS} == DEFAULTS
    assert DEFAULTS.keys() <= inspect.signature(PagedAdamW.__init__).parameters.keys()
    assert optimizer.param_groups[0].keys() - {"params"} == DEFAULTS.keys()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"nothing": {"bits": 8}}, ValueError, "overrides: 'nothing' matches no trained parameter"),
        ({"(": {"bits": 8}}, ValueError, r"overrides: '\(' is no regular expression"),
        ({3: {"bits": 8}}, TypeError, "overrides: got a int as a name; takes a str"),
        ({"a": 8}, TypeError, "overrides: 'a': got int; takes a mapping"),
        ({"a": {"bit": 8}}, ValueError, "overrides: 'a': got 'bit'; takes lr, betas"),
        ({"a": {"bits": 4}}, ValueError, "overrides: 'a': bits: got 4; takes 32 or 8"),
        ({"a": {"lr": -1.0}}, ValueError, "overrides: 'a': lr: got -1.0"),
    ],
)
def test_what_is_wrong_is_named(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parameter_groups(model(), overrides)
