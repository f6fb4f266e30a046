"""4-bit weights in the layout of bitsandbytes' safetensors checkpoints, bit for bit both ways.

``qkern._bnb`` says how a weight lies there. Such files are written by transformers for a
model loaded with ``BitsAndBytesConfig(load_in_4bit=True)``.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from qkern import _bnb, _json
from qkern.io._common import check_fits, layers_for_4bit, named_tensors, some, unshared
from qkern.io._files import write_file
from qkern.nn._adapters import lora_layers
from qkern.nn._module import TENSORS
from qkern.nn._names import plain_paths, unwrapped
from qkern.nn._options import replace_module
from qkern.nn._sources import matrix, would_lose
from qkern.nn.embedding import Embedding4bit
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear

_STATE_KEY = re.compile(r"(?P<path>.+)\.weight\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"


def save_bnb(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write ``model`` as one safetensors file with its 4-bit weights as bitsandbytes keeps them.

    All other parameters and buffers are written as they are, a tied one once, and without a trace
    of adapters and wrappers in the names. What is written is what the model computes: of a merged
    adapter (:func:`qkern.nn.merge_lora`) the merged weight, within
    :func:`~qkern.nn.disable_lora` the base. The file appears by a rename, whole.

    Raises ValueError for an adapter that is neither merged nor off nor still zero, which
    :func:`qkern.io.save_adapter` writes; and for 4-bit weights that bitsandbytes has no layout
    for: custom codebooks, blocks of more than 4096, embeddings, and experts in one tensor.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    tensors: dict[str, Tensor] = {}
    done: set[int] = set()
    paths = plain_paths(model)
    own = named_tensors(model)
    for actual, module in model.named_modules(remove_duplicate=False):
        path = paths[actual]
        layer = module
        if isinstance(module, Embedding4bit):
            raise ValueError(f"{path}: bitsandbytes has no file layout for 4-bit embeddings")
        if isinstance(module, Experts4bit):
            raise ValueError(
                f"{path}: bitsandbytes has no file layout for experts in one tensor; "
                "QuantizedExperts.to_bnb gives those of each expert"
            )
        if isinstance(module, LoRALinear):
            done.update((id(module.lora_a), id(module.lora_b)))
            layer = _computed(path, module)
            if layer is not module.base_layer and not isinstance(layer, Linear4bit):
                _check_untied(path, module, own)
                tensors[_join(path, "weight")] = layer.weight.detach()
        # A merged adapter wrote the weight of its base, which comes after it.
        if isinstance(layer, Linear4bit) and _join(path, "weight") not in tensors:
            tensors |= _bnb.to_bnb(_join(path, "weight"), layer.quantized)
        if isinstance(module, Linear4bit):
            done.update(id(module._parameters[name]) for name in TENSORS)
    seen: set[int] = set()
    for name, tensor in own.items():
        if name not in tensors and id(tensor) not in done and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    write_file(Path(file), lambda target: save_file(unshared(tensors), target, {"format": "pt"}))


def _computed(path: str, layer: LoRALinear) -> nn.Linear:
    """The layer without adapter that computes what ``layer`` does."""
    if not layer.adapter_enabled:
        return layer.base_layer
    if layer._merged is not None:
        return layer._merged[0]
    if layer.lora_a.any() and layer.lora_b.any():
        raise ValueError(
            f"{path}: has an adapter that is not merged; merge_lora writes it into the weight, "
            "within disable_lora the base is saved, and save_adapter saves the adapter"
        )
    return layer.base_layer


def _check_untied(path: str, layer: LoRALinear, tensors: Mapping[str, Tensor]) -> None:
    """The weight that was merged into is nobody else's: who reads the file would tie them again."""
    weight = layer.base_layer.weight
    names = [name for name, tensor in tensors.items() if tensor is weight]
    if others := set(names) - {_join(path, "weight")}:
        raise ValueError(
            f"{path}: its merged weight is no longer that of {some(others)}, to which it is tied"
        )


def load_bnb(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a bitsandbytes 4-bit checkpoint into ``model``, in place, and freeze it.

    Linear layers whose weight is 4-bit in the file, those of class ``Conv1D`` of transformers too,
    become :class:`~qkern.nn.Linear4bit` with the very same codes and scales, on the layer's device;
    the other tensors are copied. Scales that only the file's own map of 256 values restores, or
    that bitsandbytes rounded to 16 bits for inference, are restored and kept in float32, see
    :meth:`qkern.QuantizedTensor.from_bnb`. Parameters on the meta device get tensors on the CPU, so
    the dense model never has to exist. Nothing stays mapped to the file, which may change or go
    afterwards.

    Args:
        model: the architecture, with dense or 4-bit linear layers and without LoRA.
        path: a safetensors file; the index of several (``.json``), which lie beside it; or a
            directory with ``model.safetensors`` or ``model.safetensors.index.json``.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: ``path`` holds no such file.
        ValueError: names, shapes or dtypes that do not fit the model, values that are not finite,
            files that contradict one another, or a quantisation that differs from bitsandbytes'
            own tables; all found before the model is changed.
    """
    inner = unwrapped(model)
    for name, _ in lora_layers(inner):
        raise ValueError(f"model: has LoRA already, at {name}; load the base first")
    with _checkpoint(Path(path)) as tensors:
        quantized: dict[str, str] = {}
        for match in filter(None, map(_STATE_KEY.fullmatch, tensors)):
            if match["path"] in quantized:
                states = f"{quantized[match['path']]} and {match[0]}"
                raise ValueError(f"{path}: has {states}; takes one of them")
            quantized[match["path"]] = match[0]
        if not quantized:
            raise ValueError(f"{path}: holds no weight that bitsandbytes quantised to 4 bits")
        layers = layers_for_4bit(inner)
        if unknown := quantized.keys() - layers.keys():
            raise ValueError(f"{path}: the model has no linear layer {some(unknown)}")
        rest = tensors.keys() - {
            name
            for layer, state in quantized.items()
            for name in _bnb.names(f"{layer}.weight", state)
        }
        slots = _dense_slots(inner, {layer: layers[layer] for layer in quantized})
        _check_names(path, rest, slots)
        try:
            _check_values(tensors, rest, slots)
            for layer, state in quantized.items():
                reason = would_lose(layers[layer][0])
                if reason is not None and not isinstance(layers[layer][0], Linear4bit):
                    raise ValueError(f"{layer} {reason}")
                qw = _bnb.read(f"{layer}.weight", state, tensors)
                if qw.shape != (shape := _shape(layers[layer][0])):
                    raise ValueError(f"{layer}.weight: got shape {qw.shape}; takes {shape}")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name in rest:
            _fill(inner, slots[name], tensors[name])
        inner.requires_grad_(False)
        for layer, state in quantized.items():
            old, paths = layers[layer]
            bias: Any = old.bias
            device = old._parameters["weight"].device  # type: ignore[union-attr]
            qw = _bnb.read(f"{layer}.weight", state, tensors)
            # Copied, since what safetensors gives stays mapped to the file: whoever writes to it
            # would change the model.
            if device.type in ("meta", "cpu"):
                copies: dict[str, Any] = {name: t.clone() for name, t in qw.tensors().items()}
                qw = replace(qw, **copies)
            else:
                qw = qw.to(device)
            new = Linear4bit.from_quantized(qw, bias)
            new.take_over(old)
            replace_module(inner, paths, new)
    return model


def _dense_slots(
    model: nn.Module, quantized: Mapping[str, tuple[nn.Module, list[str]]]
) -> dict[str, Tensor]:
    """What the file must fill besides the 4-bit weights, by plain name."""
    plain = plain_paths(model)
    replaced = {
        _join(plain[path], name)
        for _, paths in quantized.values()
        for path in paths
        for name in TENSORS
    }
    return {k: tensor for k, tensor in named_tensors(model).items() if k not in replaced}


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """``[out, in]``, dense or in 4 bits."""
    return layer._weight_shape if isinstance(layer, Linear4bit) else tuple(matrix(layer).shape)


def _check_values(
    tensors: Mapping[str, Tensor], names: set[str], slots: Mapping[str, Tensor]
) -> None:
    """The file's tensors fit the model's, and those of a tied one are equal."""
    of_slot: dict[int, list[str]] = defaultdict(list)
    for name in names:
        check_fits(name, tensors[name], slots[name])
        of_slot[id(slots[name])].append(name)
    for first, *others in of_slot.values():
        for other in others:
            if not torch.equal(tensors[first], tensors[other]):
                raise ValueError(f"{first}: differs from {other}, which the model ties to it")


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
    value = value.to(slot.dtype, copy=True)
    if isinstance(slot, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is slot:
                    held[name] = value  # type: ignore[assignment]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Checkpoint(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when asked for, and mapped to its file."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._path = ", ".join(str(path) for path in files)
        self._files: dict[str, Any] = {}
        found: dict[str, Path] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise ValueError(
                        f"{name}: is in {found[name]} and in {path}; takes one of them"
                    )
                found[name], self._files[name] = path, file
        self.found = found

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"{self._path}: has no {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def _checkpoint(path: Path) -> Iterator[_Checkpoint]:
    if path.is_dir():
        weights, index = path / _WEIGHTS_FILE, path / _INDEX_FILE
        if weights.is_file() and index.is_file():
            raise ValueError(f"{path}: holds {weights.name} and {index.name}; name one of them")
        path = index if index.is_file() else weights
    shards = shards_of(path) if path.suffix == ".json" and path.is_file() else {}
    files = sorted(set(shards.values())) or [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    with ExitStack() as stack:
        tensors = _Checkpoint({file: stack.enter_context(_opened(file)) for file in files})
        for name, shard in shards.items():
            if tensors.found.get(name) != shard:
                raise ValueError(f"{path}: says that {name} is in {shard.name}, where it is not")
        yield tensors


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: is not a safetensors file: {error}") from error


def shards_of(index: Path) -> dict[str, Path]:
    """The file of each tensor, all of them in the folder of ``index``.

    ValueError for an index that is damaged, or names a file elsewhere.
    """
    found = _json.read_object(str(index), index.read_bytes())
    if "weight_map" not in found:
        raise ValueError(f"{index}: has no weight_map")
    kind = _json.map_of(_json.TEXT, "file names")
    _json.check_fields(str(index), found, {"weight_map": kind})
    shards = {}
    for name, file in found["weight_map"].items():
        shard = PurePosixPath(file)
        if shard.is_absolute() or ".." in shard.parts or not shard.name:
            raise ValueError(f"{index}: {name}: got {file!r}; takes a file beside the index")
        shards[name] = index.parent / shard
    return shards
