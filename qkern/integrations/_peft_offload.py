"""Adapters on 4-bit layers that accelerate offloads: their weight is on meta between calls.

PEFT puts an adapter where the base's weight is. On meta its numbers would be lost, so it goes where
accelerate computes the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qkern.nn._module import QuantizedModule
from qkern.nn._sources import execution_device

_PLACES = "hf_device_map"


def is_offloaded(layer: Any) -> bool:
    """Whether it is a 4-bit layer whose weight accelerate brings for each call."""
    return (
        isinstance(layer, QuantizedModule)
        and layer.weight.is_meta
        and execution_device(layer) is not None
    )


def base_of(module: Any) -> Any:
    """The layer below adapters, or ``module`` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def device_and_dtype(original: Callable[..., Any], layer: Any, base: Any) -> Any:
    """Around ``BaseTunerLayer._get_base_layer_device_and_dtype``."""
    device, dtype = original(layer, base)
    return (execution_device(base) if is_offloaded(base) else device), dtype


def replace_module(
    original: Callable[..., Any], tuner: Any, parent: Any, name: str, new: Any, child: Any
) -> None:
    """Around ``_replace_module`` of tuners, which moves the adapters another time."""
    if isinstance(new, BaseTunerLayer) and is_offloaded(new.get_base_layer()):
        setattr(parent, name, new)
    else:
        original(tuner, parent, name, new, child)


def onload_layer(original: Callable[..., Any], layer: Any) -> AbstractContextManager[Any]:
    """Around PEFT's function of that name, which knows only files of dense weights."""
    if is_offloaded(base_of(layer)):
        return nullcontext()
    context: AbstractContextManager[Any] = original(layer)
    return context


def load_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``PeftModel.load_adapter``."""
    with _places_instead(model, None):
        return original(model, *args, **kwargs)


def from_pretrained(
    original: Callable[..., Any], kind: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``PeftModel.from_pretrained``."""
    with _places_instead(model, None):
        return original(kind, model, *args, **kwargs)


def load_adapter_of_transformers(
    original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``load_adapter`` of transformers' models, which reads tensors to the map's places."""
    places = {
        part: next(
            (
                execution_device(module)
                for name, module in model.named_modules()
                if is_offloaded(module) and f"{name}.".startswith(f"{part}." if part else "")
            ),
            place,
        )
        for part, place in (getattr(model, _PLACES, None) or {}).items()
    }
    with _places_instead(model, places):
        return original(model, *args, **kwargs)


@contextmanager
def _places_instead(model: nn.Module, places: Any) -> Iterator[None]:
    """Within it a model with offloaded 4-bit layers has these places for its device map, or none.

    Where there is a map, PEFT takes accelerate's hooks away and plans places anew, for which it
    would need the weights; without one all stays where it is.
    """
    hidden: list[tuple[Any, Any]] = []
    if any(is_offloaded(module) for module in model.modules()):
        holders = [module for module in model.modules() if _PLACES in vars(module)]
        hidden = [(module, vars(module).pop(_PLACES)) for module in holders]
    try:
        for module, _ in hidden if places is not None else ():
            setattr(module, _PLACES, places)
        yield
    finally:
        for module, before in hidden:
            setattr(module, _PLACES, before)
