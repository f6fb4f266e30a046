"""The weights that a model had before it was quantised, for initialisations that start there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from qkern.io.bnb import shards_of
from qkern.nn import Linear4bit, _sources

Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

_current: ContextVar[Originals | None] = ContextVar("originals", default=None)


class Originals:
    """Dense tensors by name, read when asked for.

    Names may have a prefix more or less than the model that asks (``model.``), where only one fits.
    """

    def __init__(self, source: Source) -> None:
        self._read, self._names = _reader(source)

    def weight(self, layer: Linear4bit, path: str) -> Tensor:
        """The weight of the linear layer at ``path``, float32 ``[out_features, in_features]``.

        It lies on the device of the layer's own. KeyError where no tensor has that name, or more
        than one may be meant; ValueError where it has another shape.
        """
        name = self._name_of(f"{path}.weight")
        found = self._read(name).detach().to(layer.weight.device).float()
        shape = (layer.out_features, layer.in_features)
        if _sources.is_conv1d(layer.source_class) and found.shape == shape[::-1]:
            found = found.t().contiguous()
        if found.shape != shape:
            raise ValueError(f"{name}: got shape {list(found.shape)}; takes {list(shape)}")
        return found

    def _name_of(self, wanted: str) -> str:
        if wanted in self._names:
            return wanted
        near = [n for n in self._names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        near.sort()
        if len(near) != 1:
            which = " and ".join(near) or "none"
            raise KeyError(f"{wanted}: the original weights have {which} of that name; takes one")
        return near[0]


def _reader(source: Any) -> tuple[Callable[[str], Tensor], frozenset[str]]:
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return source.__getitem__, frozenset(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: got {type(source).__name__}; takes a path, tensors by name, or a model"
        )
    files = _files(Path(source))

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read, frozenset(files)


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor in a safetensors file, or in the shards of a directory."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            paths = sorted(set(shards_of(index).values()))
        else:
            paths = [path / "model.safetensors"]
    else:
        paths = [path]
    found: dict[str, Path] = {}
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(f"source: {file} does not exist; takes safetensors files")
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


@contextmanager
def original_weights(source: Source) -> Iterator[None]:
    """Within the block, adapters are initialised from the weights before quantisation.

    ``source``
        a directory or file of safetensors, tensors by name, or the dense model itself.

    ``init_lora_weights="loftq"`` needs them, for LoftQ makes an adapter of what quantising lost.
    PiSSA, OLoRA and the like decompose them instead of the dequantised weights, and so quantise
    once instead of twice. Raises TypeError or FileNotFoundError for a source that cannot be read.
    """
    token = _current.set(Originals(source))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Originals | None:
    """What `original_weights` was given; None outside of it."""
    return _current.get()
