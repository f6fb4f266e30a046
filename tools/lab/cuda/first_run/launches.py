"""A few launches of each kind, for a profiler.

``python -m lab.cuda.first_run.launches [--dry]``
"""

from __future__ import annotations

import sys

import torch

from lab.cuda import ways
from lab.cuda.first_run import device as devices
from lab.cuda.first_run.device import Device
from lab.cuda.first_run.products import multiply, possible, quantized, random
from qkern.backends._cuda_paths import Matmul

SHAPE, DRY_SHAPE = (4096, 4096), (96, 128)
ROWS = (1, 16, 64, 512)
_PATHLESS = ("tiled", ways.SLICES)
"""Ways that are for shapes and devices which nothing else takes well."""


def launch(device: Device) -> int:
    """The number of products."""
    shape = DRY_SHAPE if device.dry else SHAPE
    count = 0
    with device.target.activate():
        qw = quantized(device, shape)
        qw.dequantize(torch.bfloat16)
        for m in ROWS[:2] if device.dry else ROWS:
            for dx in (False, True):
                call = Matmul(dx, torch.bfloat16, m, *shape)
                x = random(device, m, shape[0 if dx else 1]).bfloat16()
                for way in possible(device, call):
                    if way in _PATHLESS or (way == "vector" and m > 16):
                        continue
                    with ways.forced(way):
                        multiply(qw, x, dx)
                    count += 1
    device.synchronize()
    return count


if __name__ == "__main__":
    print(f"{launch(devices.get('--dry' in sys.argv[1:]))} products")
