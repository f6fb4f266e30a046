"""The contest of bitsandbytes' layer on its own code and on qkern's kernels."""

from __future__ import annotations

import pytest
import torch
from bench import enabled, kernels, timing

from qkern.integrations import bitsandbytes as integration
from tests.benchmarks.contests import play

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def _disabled_again():
    yield
    integration.disable()


@pytest.mark.parametrize("op", enabled.OPS)
def test_each_side_runs_on_what_its_name_says(op, monkeypatch):
    calls = []
    own = torch.nn.functional.linear

    def linear(*args):
        calls.append(integration.enabled_devices())
        return own(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    problem, samples = play(op, shape=(64, 128), m=3)
    assert [s.name for s in samples] == ["bitsandbytes on qkern", "bitsandbytes", "qkern"]
    assert (problem.op, problem.m) == (op, 3)
    assert calls
    assert set(calls) == {()}  # bitsandbytes' own code alone multiplies by a dense weight


def test_a_side_with_another_weight_is_wrong(monkeypatch):
    made = enabled._layer

    def other(*args):
        layer = made(*args)
        layer.weight.quant_state.absmax ^= 1
        return layer

    monkeypatch.setattr(enabled, "_layer", other)
    with pytest.raises(timing.WrongResultError, match="bitsandbytes on qkern"):
        play("enabled_forward", shape=(64, 128))


def test_shapes_it_decodes_wrong_are_left_out():
    _, found, missing = kernels.contest(
        "enabled_forward", (64, 96), 2, torch.float32, kernels.Choice()
    )
    assert [c.name for c in found] == ["qkern"]
    assert missing == [
        "bitsandbytes on qkern: decodes wrong values where a block of weights spans two rows"
    ]
