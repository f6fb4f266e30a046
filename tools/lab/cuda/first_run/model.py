"""What the model of `_cuda_paths` says of a product: the only place here that asks it."""

from __future__ import annotations

from typing import NamedTuple

from lab.cuda.first_run.device import Device, chosen, limits
from qkern.backends import _cuda_paths
from qkern.backends._cuda_paths import Matmul


class Model(NamedTuple):
    """Its choice, and for every path that was asked for the milliseconds it expects."""

    chosen: str
    ms: dict[str, float]


def of(device: Device, call: Matmul, paths: tuple[str, ...], megahertz: float) -> Model:
    """By the frequency that the device runs at."""
    known = limits(device)
    ms = {path: _cuda_paths.modelled_clocks(path, call, known) / megahertz / 1e3 for path in paths}
    return Model(chosen(device, call), ms)
