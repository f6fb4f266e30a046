"""What reading and writing model files have in common: names, layers, atomic writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear

Layer = LoRALinear | Linear4bit | nn.Linear

# Path components that wrappers of a module insert and that are no part of the model's own names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def linear_layers(model: nn.Module) -> dict[str, tuple[Layer, list[str]]]:
    """``{plain path: (layer, all its actual paths)}`` of the layers an adapter can be on."""
    paths: dict[int, list[str]] = {}
    layers: dict[str, tuple[Layer, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear | Linear4bit) or type(module) is nn.Linear:
            paths.setdefault(id(module), []).append(path)
            layers[plain(path)] = (module, paths[id(module)])
    return layers


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plain(path: str) -> str:
    """``path`` as it is without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3] or ["nothing"]) + more


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``target``, then rename it into place."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
