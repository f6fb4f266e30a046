"""The op table of `qkern.testing` on the device, each matmul on every way that it can take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lab.cuda import ways
from lab.cuda.first_run.checks import Check
from lab.cuda.first_run.device import Device, limits
from qkern import backends, testing

MATMULS = ("linear_4bit", "linear_4bit_dx")
"""Ops that have several ways."""


def checks(device: Device, stride: int, largest: int) -> Iterator[Check]:
    """Every ``stride``-th case of each op with at most ``largest`` multiply-adds or elements.

    Labels begin with the way; ``chosen`` is what qkern takes by itself.
    """
    with_ways = device.name == "cuda"
    capability = limits(device).capability if with_ways else 0
    for spec in testing.OPS.values():
        if not backends.has_kernel(device.name, spec.name):
            continue
        for case in [c for c in spec.cases if c.numel <= largest][::stride]:
            label = spec.id(case, device.name)
            check = partial(testing.check, spec, case, device.target, device.device)
            yield Check(f"chosen {label}", check)
            if not with_ways or spec.name not in MATMULS:
                continue
            for way in ways.ways_of(spec, case, capability):
                check = partial(ways.check_way, spec, case, way, device.target, device.device)
                yield Check(f"{way} {label}", check)
