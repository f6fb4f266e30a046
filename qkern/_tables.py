"""Small tables that are uploaded once and stay on their device.

An upload at each call waits for the device, and nothing may wait while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qkern import formats
from qkern.ops import is_traced

T = TypeVar("T")


def kept_on_device(make: Callable[..., T]) -> Callable[..., T]:
    """``make(..., device)``, called once for equal arguments; nobody may write to what it gives.

    What a tracer or a mode would see is made anew. Raises ``RuntimeError`` where the first call of
    all comes while a CUDA graph is captured.
    """
    found: dict[tuple[Any, ...], T] = {}

    @functools.wraps(make)
    def kept(*arguments: Any) -> T:
        if is_traced():
            return make(*arguments)
        value = found.get(arguments)
        if value is None:
            value = found[arguments] = _made_outside_of_graphs(make, arguments)
        return value

    return kept


def _made_outside_of_graphs(make: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    device = arguments[-1]
    # Autograd cannot save a tensor that is born in inference mode.
    with torch.inference_mode(False):
        if device.type != "cuda":
            return make(*arguments)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{make.__name__}: got its first call on {device} while a CUDA graph is captured; "
                "takes one before, as any warm-up makes"
            )
        # A graph's pool has what its own stream allocates, in a warm-up too, and takes it back.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            value = make(*arguments)
        stream.synchronize()
        return value


@kept_on_device
def map_on(name: str, device: torch.device) -> torch.Tensor:
    """`qkern.formats.map_tensor`, kept."""
    return formats.map_tensor(name, device)
