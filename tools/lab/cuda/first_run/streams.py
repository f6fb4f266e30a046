"""CUDA graphs, other streams, other devices: the same bits as without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import qkern
from lab.cuda import ways
from lab.cuda.first_run.checks import Check
from lab.cuda.first_run.device import Device
from lab.cuda.first_run.products import multiply, possible, quantized, random
from qkern import testing
from qkern.backends._cuda_paths import Matmul

SHAPE, ROWS = (4096, 4096), (1, 16, 64, 512)
DRY_SHAPE, DRY_ROWS = (96, 128), (1, 17)
_VOCABULARY = (512, 64)
_BY_VENDOR = ("gemm", ways.SLICES)
"""Ways whose library must have run once before a capture; torch asks for that."""


def _input(device: Device, call: Matmul) -> Tensor:
    features = call.out_features if call.dx else call.in_features
    return random(device, call.rows, features).to(call.dtype)


def graph(device: Device, call: Matmul, way: str) -> None:
    """A product captured on zeros and replayed on other rows equals one that was not."""
    qw = quantized(device, (call.out_features, call.in_features))
    with device.target.activate(), ways.forced(way):
        x = _input(device, call)
        static = torch.zeros_like(x)
        if way in _BY_VENDOR:
            multiply(qw, static, call.dx)
        replay = device.captured(lambda: multiply(qw, static, call.dx))
        static.copy_(x)
        found = replay()
        testing.assert_bitwise(found, multiply(qw, x, call.dx))
        static.zero_()
        found = replay()
        testing.assert_bitwise(found, torch.zeros_like(found), "a second replay")


def stream(device: Device, call: Matmul, way: str) -> None:
    """A product on another stream, of rows that come to be there."""
    qw = quantized(device, (call.out_features, call.in_features))
    with device.target.activate(), ways.forced(way):
        x = _input(device, call)
        want = multiply(qw, x, call.dx)
        device.synchronize()
        other = torch.zeros_like(x)
        with device.other_stream():
            other.copy_(x)
            found = multiply(qw, other, call.dx)
        testing.assert_bitwise(found, want)


def other_device(device: Device, other: torch.device, call: Matmul, way: str) -> None:
    """The same bits on another device, which is not the current one."""
    qw = quantized(device, (call.out_features, call.in_features))
    with device.target.activate(), ways.forced(way):
        x = _input(device, call)
        found = multiply(qw.to(device=other), x.to(other), call.dx)
        testing.assert_bitwise(found, multiply(qw, x, call.dx))


def captured(device: Device, work: Callable[[qkern.QuantizedTensor], Tensor]) -> None:
    """Some other work captured, and replayed."""
    with device.target.activate():
        qw = quantized(device, _VOCABULARY)
        replay = device.captured(lambda: work(qw))
        testing.assert_bitwise(replay(), work(qw))


def _embedding(qw: qkern.QuantizedTensor) -> Tensor:
    ids = torch.arange(8, device=qw.device)
    return qkern.nn.Embedding4bit(qw)(ids)


def _checks(device: Device, what: str, check: Callable[..., None]) -> Iterator[Check]:
    shape, rows = (DRY_SHAPE, DRY_ROWS) if device.dry else (SHAPE, ROWS)
    for m in rows:
        for dx in (False, True):
            call = Matmul(dx, torch.bfloat16, m, *shape)
            for way in possible(device, call):
                name = f"{what}-{'dx' if dx else 'forward'}-M{m}"
                yield Check(f"{way} {name}", partial(check, device, call, way))


def checks(device: Device) -> Iterator[Check]:
    """Graphs come first: the first of them captures launches of kernels that never ran before."""
    yield from _checks(device, "graph", graph)
    yield Check("chosen graph-embedding", partial(captured, device, _embedding))
    dequantized = partial(captured, device, lambda qw: qw.dequantize(torch.bfloat16))
    yield Check("chosen graph-dequantize", dequantized)
    yield from _checks(device, "stream", stream)
    for other in device.others():
        there = partial(other_device, device, other)
        yield from _checks(device, f"{other.type}{other.index or 0}", lambda d, *a, f=there: f(*a))
