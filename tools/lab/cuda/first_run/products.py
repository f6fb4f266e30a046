"""A 4-bit weight on the device, its products, and which ways each can take."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import qkern
from lab.cuda import ways
from lab.cuda.first_run.device import Device, chosen, limits
from qkern.backends import _cuda_paths
from qkern.backends._cuda_paths import Matmul

Shape = tuple[int, int]
"""Out features and in features."""

_SCALE = 0.02  # of the weights: about a model's


def random(device: Device, *shape: int) -> Tensor:
    """Float32, the same for the same shape."""
    generator = torch.Generator(device.device).manual_seed(math.prod(shape))
    return torch.randn(shape, device=device.device, generator=generator)


@functools.lru_cache(maxsize=1)
def quantized(device: Device, shape: Shape, double_quant: bool = True) -> qkern.QuantizedTensor:
    """NF4 in blocks of 64; the last one is kept."""
    with device.target.activate():
        return qkern.quantize_4bit(random(device, *shape) * _SCALE, double_quant=double_quant)


def multiply(qw: qkern.QuantizedTensor, x: Tensor, dx: bool) -> Tensor:
    """``x W^T``, or for ``dx`` ``x W``, on the backend now selected."""
    op = torch.ops.qkern.linear_4bit_dx if dx else torch.ops.qkern.linear_4bit
    return op(x, *qw.weight, qw.shape[1 if dx else 0])


def possible(device: Device, call: Matmul) -> tuple[str, ...]:
    """Those of `ways.WAYS` that the kernels take the call on; slices where these are several."""
    found = []
    for way in ways.WAYS:
        try:
            with ways.forced(way):
                chosen(device, call)
        except ValueError:
            continue
        found.append(way)
    capability = limits(device).capability
    if len(_cuda_paths.slices_of(call, ways.smallest(capability))) < 2:
        found = [way for way in found if way != ways.SLICES]
    return tuple(found)
