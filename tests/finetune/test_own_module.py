"""examples/own_module.py runs, and computes what its dequantised weights would."""

from __future__ import annotations

import own_module
import pytest
import torch
from torch import nn


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    own_module.main()
    said = capsys.readouterr().out
    assert "8,388,608 bytes in float32" in said
    assert "gradient norms: x " in said


def test_it_equals_its_dequantised_weights() -> None:
    torch.manual_seed(0)
    block = own_module.Bottleneck(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False))
    up, down = block.up.dequantize(), block.down.dequantize()
    x = torch.randn(5, 64, requires_grad=True)
    got = block(x)
    expected = (torch.relu(x @ up.T) * block.scale) @ down.T
    torch.testing.assert_close(got, expected)
    wrt = (x, block.scale)
    grads = torch.autograd.grad(got.square().sum(), wrt)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), wrt))
