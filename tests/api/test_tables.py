"""Tables that are uploaded once for a device: not for a tracer, nor for a graph alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import qkern
from qkern import formats
from qkern._tables import kept_on_device, map_on

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_a_table_is_made_once_for_a_device() -> None:
    made = map_on("signed", CPU)
    assert made is map_on("signed", CPU)
    assert made is not map_on("unsigned", CPU)
    assert torch.equal(made, formats.map_tensor("signed"))


def test_calls_make_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = qkern.nn.Embedding4bit.from_embedding(nn.Embedding(32, 64), double_quant=True)
    ids = torch.arange(5)
    expected = table(ids)
    codes = qkern.quantize_8bit(torch.randn(300))
    monkeypatch.setattr(formats, "map_tensor", None)
    assert torch.equal(table(ids), expected)
    assert qkern.dequantize_8bit(*codes).shape == (300,)


def test_a_table_born_in_inference_mode_can_be_saved_for_backward() -> None:
    table = kept_on_device(formats.map_tensor)
    with torch.inference_mode():
        first = table("signed", CPU)
    scale = torch.ones(256, requires_grad=True)
    (table("signed", CPU) * scale).sum().backward()
    assert table("signed", CPU) is first
    assert scale.grad is not None


def test_what_a_tracer_sees_is_not_kept() -> None:
    table = kept_on_device(formats.map_tensor)
    with FakeTensorMode():
        assert isinstance(table("signed", CPU), FakeTensor)
    assert not isinstance(table("signed", CPU), FakeTensor)
    with FakeTensorMode():
        assert isinstance(table("signed", CPU), FakeTensor)


class Device:
    """A CUDA device of which only streams are known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.stream = "captured"
        self.made: list[str] = []
        self.waited: list[str] = []
        side = SimpleNamespace(synchronize=lambda: self.waited.append("side"))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.stream = "side"
        yield
        self.stream = "captured"

    def table(self, name: str, device: torch.device) -> Tensor:
        self.made.append(self.stream)
        return formats.map_tensor(name)


def test_a_table_is_born_on_a_stream_that_no_graph_captures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    table = kept_on_device(device.table)
    device.capturing = True
    with pytest.raises(RuntimeError, match="first call on cuda:0 while a CUDA graph is captured"):
        table("signed", GPU)
    assert not device.made
    device.capturing = False
    made = table("signed", GPU)
    assert (device.made, device.waited) == (["side"], ["side"])
    device.capturing = True
    assert table("signed", GPU) is made
