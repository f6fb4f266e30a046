"""A model on meta takes a checkpoint as what it had: parameters and buffers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qkern import io
from qkern import nn as qnn


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))


def test_parameters_stay_parameters_and_buffers_buffers(tmp_path: Path) -> None:
    dense = model()
    with torch.no_grad():
        dense[1].weight.normal_()
        dense[1].running_mean.normal_()
    saved = qnn.quantize_model(dense)
    io.save_bnb(saved, tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = model()
    io.load_bnb(loaded, tmp_path / "model.safetensors")
    expected, found = saved[1].state_dict(), loaded[1].state_dict()
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[name], expected[name]), name
    norm = loaded[1]
    assert all(type(value) is nn.Parameter for value in norm._parameters.values())
    assert all(type(value) is torch.Tensor for value in norm._buffers.values())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
