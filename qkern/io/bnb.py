"""4-bit weights in the layout of bitsandbytes' safetensors checkpoints, bit for bit both ways.

``qkern.nn._layouts`` says how a weight lies there. Such files are written by transformers for a
model loaded with ``BitsAndBytesConfig(load_in_4bit=True)``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkern.io._common import Layer, linear_layers, plain, some, unwrapped, write_file
from qkern.nn._layouts import bnb_names, from_bnb, to_bnb
from qkern.nn._module import TENSORS
from qkern.nn.embedding import Embedding4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear, lora_layers
from qkern.nn.model import replace_module

_STATE_KEY = re.compile(r"(?P<path>.+)\.weight\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"


def save_bnb(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write ``model`` as one safetensors file with its 4-bit weights as bitsandbytes keeps them.

    All other parameters and buffers are written as they are, a tied one once. LoRA adapters are
    left out and leave no trace in the names; :func:`qkern.io.save_adapter` writes them. The file
    appears by a rename.

    Raises ValueError for 4-bit weights that bitsandbytes has no layout for: custom codebooks and
    embeddings.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    tensors: dict[str, Tensor] = {}
    done: set[str] = set()
    bases: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Embedding4bit):
            raise ValueError(f"{path}: bitsandbytes has no file layout for 4-bit embeddings")
        prefix = f"{path}." if path else ""
        if isinstance(module, LoRALinear):
            bases.append(f"{prefix}base_layer.")
            done.update(prefix + name for name in ("lora_a", "lora_b"))
        if isinstance(module, Linear4bit):
            done.update(prefix + name for name in TENSORS)
            for suffix, tensor in to_bnb(path, module.quantized).items():
                tensors[_without_adapter(f"{prefix}weight{suffix}", bases)] = tensor
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in done and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[_without_adapter(name, bases)] = tensor.detach()
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda target: save_file(_unshared(tensors), target, {"format": "pt"}))


def load_bnb(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a bitsandbytes 4-bit checkpoint into ``model``, in place, and freeze it.

    Linear layers whose weight is 4-bit in the file become :class:`~qkern.nn.Linear4bit` with the
    very same codes and scales, on the layer's device; the other tensors are copied. Parameters on
    the meta device take the file's tensors on the CPU, so the dense model never has to exist.

    Args:
        model: the architecture, with dense or 4-bit linear layers and without LoRA.
        path: a safetensors file, or a directory with ``model.safetensors`` or with shards and
            their ``model.safetensors.index.json``.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: ``path`` holds no such file.
        ValueError: names or shapes that do not fit the model (found before it is changed), or a
            quantisation that differs from bitsandbytes' own tables.
    """
    inner = unwrapped(model)
    for name, _ in lora_layers(inner):
        raise ValueError(f"model: has LoRA already, at {name}; load the base first")
    with _checkpoint(Path(path)) as tensors:
        quantized = {
            match["path"]: match[0] for match in map(_STATE_KEY.fullmatch, tensors) if match
        }
        if not quantized:
            raise ValueError(f"{path}: holds no weight that bitsandbytes quantised to 4 bits")
        layers = linear_layers(inner)
        if unknown := quantized.keys() - layers.keys():
            raise ValueError(f"{path}: the model has no linear layer {some(unknown)}")
        rest = tensors.keys() - {
            name
            for layer, state in quantized.items()
            for name in bnb_names(f"{layer}.weight", state)
        }
        slots = _dense_slots(inner, {layer: layers[layer] for layer in quantized})
        _check_names(path, rest, slots)
        for name in rest:
            if (got := tensors.shape(name)) != (takes := list(slots[name].shape)):
                raise ValueError(f"{name}: got shape {got}; takes {takes}")
        weights = {
            layer: from_bnb(f"{layer}.weight", state, tensors) for layer, state in quantized.items()
        }
        for layer, qw in weights.items():
            shape = (layers[layer][0].out_features, layers[layer][0].in_features)
            if qw.shape != shape:
                raise ValueError(f"{layer}.weight: got shape {qw.shape}; takes {shape}")
        for name in rest:
            _fill(inner, slots[name], tensors[name])
    inner.requires_grad_(False)
    for layer, qw in weights.items():
        old, paths = layers[layer]
        assert not isinstance(old, LoRALinear)
        device = old.weight.device
        moved = qw if device.type == "meta" else qw.to(device)
        replace_module(inner, paths, Linear4bit.from_quantized(moved, old.bias).train(old.training))
    return model


def _dense_slots(
    model: nn.Module, quantized: Mapping[str, tuple[Layer, list[str]]]
) -> dict[str, Tensor]:
    """What the file must fill besides the 4-bit weights, by plain name."""
    replaced = {
        f"{actual}.{name}"
        for _, paths in quantized.values()
        for actual in paths
        for name in TENSORS
    }
    state = model.state_dict(keep_vars=True)
    return {plain(name): tensor for name, tensor in state.items() if name not in replaced}


def _check_names(path: str | os.PathLike[str], rest: set[str], slots: Mapping[str, Tensor]) -> None:
    if unknown := rest - slots.keys():
        raise ValueError(f"{path}: the model has no {some(unknown)}")
    # A tied tensor is stored under one of its names.
    filled = {id(slots[name]) for name in rest}
    if missing := [name for name, slot in slots.items() if id(slot) not in filled]:
        raise ValueError(f"{path}: has no {some(missing)}")


def _fill(model: nn.Module, slot: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer its value; one on meta is replaced wherever it is held."""
    if not slot.is_meta:
        with torch.no_grad():
            slot.copy_(value)
        return
    value = value.to(slot.dtype)
    if isinstance(slot, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is slot:
                    held[name] = value  # type: ignore[assignment]


def _without_adapter(name: str, bases: Iterable[str]) -> str:
    """The plain name without the component that adapters, whose base is at ``bases``, put in."""
    for base in bases:
        if name.startswith(base):
            name = base.removesuffix("base_layer.") + name.removeprefix(base)
            break
    return plain(name)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that own their memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


class _Checkpoint(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when asked for."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._path = ", ".join(str(path) for path in files)
        self._files = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"{self._path}: has no {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> list[int]:
        """Known without reading the tensor."""
        return list(self._files[name].get_slice(name).get_shape())


@contextmanager
def _checkpoint(path: Path) -> Iterator[_Checkpoint]:
    from safetensors import safe_open

    if path.is_dir():
        index = path / _INDEX_FILE
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({path / shard for shard in shards})
        else:
            files = [path / _WEIGHTS_FILE]
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    with ExitStack() as stack:
        yield _Checkpoint({f: stack.enter_context(safe_open(f, framework="pt")) for f in files})
