"""Adapters in PEFT's file format."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkern import _json
from qkern.io import _peft, _peft_experts
from qkern.io._common import (
    Layer,
    check_finite,
    check_fits,
    check_floating,
    linear_layers,
    named_tensors,
    some,
    unshared,
    whole,
)
from qkern.io._files import commit, locked, staged
from qkern.nn import _statistics
from qkern.nn._adapters import LoRAConfig, LoRALayer
from qkern.nn._module import QuantizedModule, is_sharded
from qkern.nn._names import plain_name, plain_paths, unwrapped
from qkern.nn._options import replace_module
from qkern.nn.embedding import Embedding4bit
from qkern.nn.experts import Experts4bit
from qkern.nn.lora import LoRALinear
from qkern.nn.lora_experts import LoRAExperts

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_KEY = re.compile(re.escape(_peft.PREFIX) + r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
# In the metadata of the weights: the configuration that they were saved with.
_CONFIG_KEY = "adapter_config"

# Fields of PEFT's LoraConfig that do not change what loaded weights compute on a Linear.
_NEUTRAL_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    }
)
_READ_FIELDS = {
    "alpha_pattern": _json.map_of(_json.NUMBER, "numbers") | _json.NULL,
    "bias": _json.Kind('"none", "all" or "lora_only"', ("none", "all", "lora_only").__contains__),
    "ensure_weight_tying": _json.FLAG | _json.NULL,
    "init_lora_weights": _json.FLAG | _json.TEXT | _json.NULL,
    "lora_alpha": _json.NUMBER,
    "lora_dropout": _json.NUMBER,
    "modules_to_save": _json.list_of(_json.TEXT, "names") | _json.NULL,
    "peft_type": _json.TEXT,
    "r": _json.INTEGER,
    "rank_pattern": _json.map_of(_json.INTEGER, "integers") | _json.NULL,
    "target_parameters": _json.list_of(_json.TEXT, "names") | _json.NULL,
    "task_type": _json.TEXT | _json.NULL,
    "use_rslora": _json.FLAG | _json.NULL,
}
# Of these, what the weights compute depends on.
_COMPUTING_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# The initialisations that leave the base weight as it is; others (pissa, olora, loftq, ...) change
# it, and their adapter means nothing on the original base.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT cannot put its wrapper around these.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    *,
    task_type: str | None = None,
    modules_to_save: Iterable[str] = (),
) -> None:
    """Write all that was trained in ``model`` as PEFT does, for ``PeftModel.from_pretrained``.

    That is A and B of the LoRA layers, merged or not, and every other parameter that requires grad:
    as whole modules (PEFT's ``modules_to_save``), or as the biases of layers with adapters or with
    4-bit weights (PEFT's ``bias``). Batch norms whose running statistics moved since the adapters
    were added are such modules too. Tensors keep their dtype; sharded ones are gathered, so all
    processes have to call this. Wrappers such as DDP's leave no trace in the names.

    ``directory`` (made if missing) gets ``adapter_model.safetensors`` and ``adapter_config.json``.
    They are written beside their places and renamed. :func:`load_adapter` finds the old adapter or
    the new one, whenever an interruption comes; other readers may find no configuration.

    Warns where the installed PEFT would compute something else from the files, with the reason.

    Args:
        model: a model with :class:`~qkern.nn.LoRALinear` layers or
            :class:`~qkern.nn.LoRAExperts`, which PEFT calls ``target_parameters``; an adapter that
            experts share is written for each of them.
        directory: where to write.
        base_model_name_or_path: what PEFT shall say the base was; by default what a transformers
            model says of itself.
        task_type: PEFT's name of the task, such as ``"CAUSAL_LM"``; None makes PEFT load a plain
            ``PeftModel``. For ``"SEQ_CLS"`` and others PEFT expects the head in the file, so it is
            written too.
        modules_to_save: paths of more modules to write whole, though they are frozen now.

    Raises:
        ValueError: ``model`` has no LoRA; layers differ in dropout or in ``use_rslora``, which
            PEFT's configuration cannot say; or PEFT's format has no place for something that was
            trained, such as a parameter of the model itself. Nothing is written then.
    """
    from safetensors.torch import save_file

    inner = unwrapped(model)
    contents = _Contents.of(inner)
    if not contents.lora:
        raise ValueError("model: has no LoRA layers to save")
    if "" in contents.lora:
        raise ValueError("model: is a single layer, which has no name; takes a model around it")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    layers = contents.lora
    linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}
    r, rank_pattern = _peft.by_pattern({path: layer.r for path, layer in layers.items()})
    alpha, alpha_pattern = _peft.by_pattern({path: layer.alpha for path, layer in layers.items()})
    entries, modules = _whole_modules(contents, modules_to_save, task_type)
    bias, biases = _biases(contents, modules)
    config = {
        "auto_mapping": None,
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _same(layers, "dropout"),
        "modules_to_save": entries or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": _peft.target_modules(linear.keys(), contents.once) if linear else [],
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": _same(layers, "use_rslora"),
    }
    if experts := layers.keys() - linear.keys():
        others = _peft_experts.names_of_experts(contents.modules)
        config["target_parameters"] = _peft_experts.target_parameters(
            experts, (*contents.tensors, *others)
        )
    named: dict[str, Tensor] = {}
    of_experts: _peft_experts.Factors = {}
    for path, layer in layers.items():
        lead = () if path in linear or layer.shared else (layer.num_experts,)
        a = _part(contents, path, "lora_a", *lead, layer.r, layer.in_features)
        b = _part(contents, path, "lora_b", *lead, layer.out_features, layer.r)
        if path in linear:
            named |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        else:
            of_experts[path] = tuple(layer.of_each(whole(path, t.detach())) for t in (a, b))
    for path, (a, b) in _peft_experts.to_peft(contents.modules, of_experts).items():
        named |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    inside_whole = tuple(f"{path}." for path in modules)
    named |= {k: tensor for k, tensor in contents.tensors.items() if k.startswith(inside_whole)}
    for path in biases:
        inside = ".base_layer" if path in layers else ""
        named[f"{path}{inside}.bias"] = contents.tensors[f"{path}.bias"]
    tensors = {_peft.PREFIX + name: whole(name, tensor) for name, tensor in named.items()}
    reason = contents.shared_adapter() or _peft.computed_otherwise(inner, config, tensors)
    if experts and config["lora_dropout"]:
        reason = "it takes no dropout in adapters on experts"
    if reason:
        warnings.warn(
            f"the adapter computes something else in PEFT: {reason}; "
            "qkern.io.load_adapter reads it as it is",
            stacklevel=2,
        )
    _write(Path(directory), config, unshared(tensors), save_file)


def _part(contents: _Contents, path: str, name: str, *shape: int) -> Tensor:
    tensor = contents.tensors[f"{path}.{name}"]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{path}.{name}: got shape {list(tensor.shape)}; takes {list(shape)}. A framework that "
            "keeps shards in its place has to gather them first"
        )
    return tensor


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], save: Any) -> None:
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", _CONFIG_KEY: json.dumps(config, sort_keys=True)}
    writes = {
        WEIGHTS_FILE: lambda file: save(tensors, file, metadata=metadata),
        CONFIG_FILE: lambda file: file.write_text(text, encoding="utf-8"),
    }
    with staged(directory, "adapter", writes) as files, locked(directory):
        old = directory / CONFIG_FILE
        # New weights never lie beside an old configuration: PEFT would take another scaling.
        if old.exists() and old.read_bytes() != text.encode():
            old.unlink()
        commit(files, directory)


class _Contents(NamedTuple):
    """A model's parts by plain path: without wrappers, a base layer at its adapter's path."""

    modules: dict[str, nn.Module]
    lora: dict[str, Any]
    tensors: dict[str, Tensor]
    trained: dict[str, str]
    """Names of parameters that require grad, but of A and B, and the paths of their modules."""
    once: set[str]
    """Of modules at several paths only the first, where PEFT finds them."""

    @classmethod
    def of(cls, model: nn.Module) -> _Contents:
        plain = plain_paths(model)
        modules: dict[str, nn.Module] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            # Of a wrapper and what it wraps, the latter; of an adapter and its base, the former.
            if not isinstance(modules.get(plain[path]), LoRALayer):
                modules[plain[path]] = module
        lora: dict[str, LoRALayer] = {}
        seen: set[int] = set()
        for path, module in modules.items():
            if isinstance(module, LoRALayer) and id(module) not in seen:
                seen.add(id(module))
                lora[path] = module
        of_lora = {id(t) for layer in lora.values() for t in (layer.lora_a, layer.lora_b)}
        # Not of the state dict, which some frameworks fill with gathered copies.
        trained = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and id(parameter) not in of_lora:
                own = plain_name(model, name)
                trained[own] = own.rpartition(".")[0]
        # Experts are no modules in the model that PEFT sees, but a tensor of the one around them.
        once = {
            plain[path]
            for path, module in model.named_modules()
            if not _peft_experts.is_experts(module)
        }
        return cls(modules, lora, named_tensors(model), trained, once)

    def tied_to(self, path: str) -> set[str]:
        """Paths of modules outside that hold a tensor of this one too."""
        inside = {id(t) for name, t in self.tensors.items() if name.startswith(f"{path}.")}
        holders = {n.rpartition(".")[0] for n, t in self.tensors.items() if id(t) in inside}
        return {other for other in holders if other != path and not other.startswith(f"{path}.")}

    def shared_adapter(self) -> str | None:
        """A layer with an adapter that PEFT would find at one of its places only, in words."""
        places = {id(layer): path for path, layer in self.lora.items()}
        for path, module in self.modules.items():
            if (first := places.get(id(module), path)) != path:
                return f"the layer {first} is also {path}, where PEFT puts no adapter"
        return None

    def holds_bias(self, path: str) -> bool:
        """Whether the layer's bias can only be written for itself."""
        return isinstance(self.modules.get(path), LoRALayer | QuantizedModule)

    def cannot_be_whole(self, path: str) -> str | None:
        """Why PEFT could not keep the module at ``path`` as a whole, if it could not."""
        if not path:
            return "the model itself"
        if path not in self.modules:
            return "no module of the model"
        if isinstance(self.modules[path], _CONTAINERS):
            return f"a {type(self.modules[path]).__name__}"
        for other, module in self.modules.items():
            if other == path or other.startswith(f"{path}."):
                if isinstance(module, LoRALayer):
                    return "a layer with an adapter" if other == path else f"around {other}"
                if isinstance(module, QuantizedModule):
                    return "a layer with a 4-bit weight" if other == path else f"around {other}"
        return None


def _whole_modules(
    contents: _Contents, more: Iterable[str], task_type: str | None
) -> tuple[list[str], set[str]]:
    """PEFT's ``modules_to_save``, and the paths of all modules that it takes for these."""
    if isinstance(more, str):
        raise TypeError(f"modules_to_save: got the string {more!r}; takes a list of paths")
    wanted: set[str] = set()
    for path in more:
        if path not in contents.modules:
            raise ValueError(f"modules_to_save: the model has no module {path!r}")
        for owner in {path, *contents.tied_to(path)}:
            if why := contents.cannot_be_whole(owner):
                raise ValueError(f"modules_to_save: {owner} is {why}, which PEFT cannot save whole")
            wanted.add(owner)
    for name, owner in contents.trained.items():
        path = owner
        if contents.holds_bias(path) and name == f"{path}.bias":
            continue
        while isinstance(contents.modules.get(path), _CONTAINERS):
            path = path.rpartition(".")[0]
        if why := contents.cannot_be_whole(path):
            raise ValueError(
                f"{name}: is trained, and PEFT's format has no place for it: it saves whole "
                f"modules, and {path or 'its owner'} is {why}; freeze it, or save a state dict"
            )
        wanted.add(path)
    wanted |= {path for path, module in contents.modules.items() if _statistics.moved(module)}
    # A task's head that is of several layers is saved as one module, as PEFT takes it.
    heads = _peft.modules_of_task(task_type)
    wanted |= {
        path
        for path in contents.modules
        if _peft.is_saved_whole(path, heads)
        and any(other.startswith(f"{path}.") for other in wanted)
        and contents.cannot_be_whole(path) is None
    }
    wanted = {path for path in wanted if not any(path.startswith(f"{other}.") for other in wanted)}
    paths = _peft.paths_in_peft(contents.modules, contents.lora)
    entries = _peft.entries_to_save(wanted, paths, contents.lora)
    taken = (*entries, *heads)
    found = {path for path in paths if _peft.is_saved_whole(path, taken)}
    for path in sorted(found - wanted):
        if why := contents.cannot_be_whole(path):
            raise ValueError(
                f"{path}: PEFT takes it for one of modules_to_save={list(taken)} by the end of its "
                f"path, and it is {why}; with task_type=None, or other names, it does not"
            )
    for path in found:
        if inner := [other for other in found if other.startswith(f"{path}.")]:
            raise ValueError(f"{inner[0]}: is inside of {path}, and PEFT would save both whole")
    of_task = {p for p in found - wanted if not _peft.is_saved_whole(p, entries)}
    return sorted({*entries, *(p.rpartition(".")[2] for p in of_task)}), found


def _biases(contents: _Contents, modules: Iterable[str]) -> tuple[str, list[str]]:
    """PEFT's ``bias``, and the layers whose biases it writes for that."""
    inside = tuple(f"{path}." for path in modules)
    trained = [
        path
        for name, path in contents.trained.items()
        if name == f"{path}.bias" and not name.startswith(inside)
    ]
    if not trained:
        return "none", []
    layers = [
        name.removesuffix(".bias")
        for name in contents.tensors
        if name.endswith(".bias") and not name.startswith(inside)
    ]
    if all(path in contents.lora for path in trained):
        return "lora_only", [path for path in layers if path in contents.lora]
    return "all", layers


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Read an adapter written by PEFT or :func:`save_adapter` into ``model``, in place.

    A model without LoRA gets it on the layers the file names, 4-bit or dense, and everything else
    is frozen; the new A and B are trainable, in ``dtype`` or as :class:`~qkern.nn.LoRALinear`
    chooses. A model with LoRA must carry it on exactly those layers with the same rank and
    scaling, and keeps its dtype and dropout. Modules that the file holds whole (PEFT's
    ``modules_to_save``) and biases are copied into the model's own, in its dtype, and become
    trainable too. Resized embeddings, and the weight of a head below its adapter, are copied and
    stay as frozen as they are. ``model`` is changed only after all checks passed, and nothing
    stays mapped to the file.

    Returns ``model``. Raises FileNotFoundError for a missing file; ValueError for a configuration
    that asks for more than that (DoRA, ...), that is not the one the weights were saved with, or
    whose values are of another kind; and for keys, shapes, dtypes or values that do not fit the
    model or are not finite.
    """
    directory = Path(directory)
    inner = unwrapped(model)
    file = directory / WEIGHTS_FILE
    adapter = _read(directory, dtype)
    layers = linear_layers(inner)
    config = adapter.config
    try:
        modules = _Contents.of(inner).modules
        found = _peft_experts.from_peft(modules, adapter.lora, adapter.target_parameters)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    adapter = adapter._replace(lora=found)
    _check_paths(directory, adapter.lora, layers)
    try:
        for path, (a, b) in adapter.lora.items():
            _check_fits(path, a, b, layers[path][0], config)
        values = _values(adapter, inner)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    adapters: dict[str, LoRALayer] = {}
    for path in adapter.lora:
        layer = layers[path][0]
        if isinstance(layer, Experts4bit):
            adapters[path] = LoRAExperts.from_config(layer, config, path)
        elif isinstance(layer, LoRALayer):
            adapters[path] = layer
        else:
            adapters[path] = LoRALinear.from_config(layer, config, path)
        _check_has_values(f"{file}: {path}", adapters[path].lora_a)
    if not any(isinstance(layer, LoRALayer) for layer, _ in layers.values()):
        inner.requires_grad_(False)
        _statistics.remember(inner)
        for new in adapters.values():
            new.requires_grad_(True).base_layer.requires_grad_(False)
    for path, (a, b) in adapter.lora.items():
        adapted = adapters[path]
        if layers[path][0] is not adapted:
            replace_module(inner, layers[path][1], adapted)
        shared = isinstance(adapted, LoRAExperts) and adapted.shared
        with torch.no_grad():
            adapted.lora_a.copy_(a[0] if shared else a)
            adapted.lora_b.copy_(b[0] if shared else b)
    for slot, value, trained in values:
        with torch.no_grad():
            slot.copy_(value)
        if trained and isinstance(slot, nn.Parameter) and slot.is_floating_point():
            slot.requires_grad_(True)
    return model


class _Adapter(NamedTuple):
    config: LoRAConfig
    modules_to_save: tuple[str, ...]
    modules_of_task: tuple[str, ...]
    bias: str
    ties: bool
    target_parameters: tuple[str, ...]
    lora: dict[str, tuple[Tensor, Tensor]]
    others: dict[str, Tensor]


def _read(directory: Path, dtype: torch.dtype | None) -> _Adapter:
    with locked(directory, shared=True) if directory.is_dir() else contextlib.nullcontext():
        fields = _read_fields(directory / CONFIG_FILE, directory / WEIGHTS_FILE)
        config = _config(directory / CONFIG_FILE, fields, dtype)
        lora, others = _read_weights(directory / WEIGHTS_FILE)
    modules = tuple(fields.get("modules_to_save") or ())
    of_task = _peft.modules_of_task(fields.get("task_type"))
    ties = bool(fields.get("ensure_weight_tying"))
    parameters = tuple(fields.get("target_parameters") or ())
    bias = fields.get("bias", "none")
    return _Adapter(config, modules, of_task, bias, ties, parameters, lora, others)


class _Value(NamedTuple):
    slot: Tensor
    value: Tensor
    trained: bool


def _values(adapter: _Adapter, model: nn.Module) -> list[_Value]:
    """The model's tensors that the file has besides A and B, and their values; all checked."""
    contents = _Contents.of(model)
    slots = contents.tensors
    embeddings = _embeddings(contents, model)
    named = {p for p in contents.modules if _peft.is_saved_whole(p, adapter.modules_to_save)}
    of_task = {p for p in contents.modules if _peft.is_saved_whole(p, adapter.modules_of_task)}
    found: dict[str, Tensor] = {}
    # PEFT writes the weight of an output head on which there is an adapter, and that of a resized
    # vocabulary; they were not trained.
    bases: dict[str, Tensor] = {}
    for key, tensor in adapter.others.items():
        name = key.removeprefix(_peft.PREFIX)
        path, _, last = name.rpartition(".")
        if path.endswith(".base_layer") and path.removesuffix(".base_layer") in adapter.lora:
            path = path.removesuffix(".base_layer")
            if last == "bias" and adapter.bias != "none":
                found[f"{path}.bias"] = tensor
                continue
            if path in embeddings:
                bases[f"{path}.{last}"] = tensor
                continue
        owner = next((p for p in named | of_task if name.startswith(f"{p}.")), None)
        if owner is not None or path in embeddings:
            why = contents.cannot_be_whole(owner or path)
            if why is not None:
                raise ValueError(
                    f"{key}: the adapter holds {owner or path} whole and dense, and in the model "
                    f"it is {why}"
                )
            if owner and adapter.bias == "all" and _is_second_copy(name, owner, slots):
                continue
            if owner is None:
                bases[name] = tensor
                continue
        elif last != "bias" or not (
            adapter.bias == "all" or (adapter.bias == "lora_only" and path in adapter.lora)
        ):
            raise ValueError(
                f"unknown key {key}; takes {_peft.PREFIX}<layer>.lora_A.weight, lora_B, and what "
                "modules_to_save and bias of the configuration name"
            )
        found[name] = tensor
    inside = tuple(f"{path}." for path in named)
    if missing := {name for name in slots if name.startswith(inside) and name not in found}:
        raise ValueError(f"has no {some(missing)}, of modules_to_save")
    if not adapter.ties:
        _check_alone(found, bases, slots)
    _check_bases(bases, slots)
    return _checked(found | bases, slots, embeddings, bases)


def _is_second_copy(name: str, owner: str, slots: Mapping[str, Tensor]) -> bool:
    """Whether it is what PEFT's ``bias="all"`` writes of its wrapper around a whole module."""
    inside = name.removeprefix(f"{owner}.")
    return name not in slots and inside.startswith(("modules_to_save.", "original_module."))


def _check_alone(
    found: dict[str, Tensor], bases: Container[str], slots: Mapping[str, Tensor]
) -> None:
    """PEFT gives each module a weight of its own, tied or not; a model's tied ones are one.

    Takes those out of ``found`` that are as the model's: they came along with their module.
    """
    names: dict[int, set[str]] = {}
    for name, slot in slots.items():
        names.setdefault(id(slot), set()).add(name)
    for name in sorted(set(found) & slots.keys()):
        slot = slots[name]
        if others := {n for n in names[id(slot)] if n not in found and n not in bases}:
            _check_has_values(name, slot)
            if torch.equal(found[name].to(slot.device, slot.dtype), slot):
                continue
            raise ValueError(
                f"{name}: was trained apart from {some(others)}, to which the model ties it; "
                "untie them first"
            )
    for tied in names.values():
        if any(name not in found and name not in bases for name in tied):
            for name in tied & set(found):
                del found[name]


def _check_bases(bases: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """What was not trained may come in other values, but not in 4 bits."""
    for name, tensor in bases.items():
        slot = slots.get(name)
        if slot is None or slot.is_floating_point():
            continue
        _check_has_values(name, slot)
        if tensor.dtype != slot.dtype or not torch.equal(tensor.to(slot.device), slot):
            raise ValueError(
                f"{name}: the adapter comes with another weight of its layer than the model has, "
                "where it is in 4 bits"
            )


def _checked(
    found: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    embeddings: Iterable[str],
    frozen: Container[str],
) -> list[_Value]:
    of_slot: dict[int, str] = {}
    for name, tensor in found.items():
        if name not in slots:
            raise ValueError(f"the model has no {name}")
        slot = slots[name]
        _check_has_values(name, slot)
        try:
            check_fits(name, tensor, slot)
        except ValueError as error:
            resized = list(tensor.shape) != list(slot.shape)
            if resized and name.rpartition(".")[0] in embeddings:
                raise ValueError(
                    f"{error}; it was trained with another vocabulary: resize the model's first"
                ) from error
            raise
        first = of_slot.setdefault(id(slot), name)
        if not torch.equal(found[first], tensor):
            raise ValueError(f"{first}: differs from {name}, which the model ties to it")
    return [_Value(slots[name], tensor, name not in frozen) for name, tensor in found.items()]


def _embeddings(contents: _Contents, model: nn.Module) -> set[str]:
    """Paths of the tables, and of the output head, which PEFT writes for a resized vocabulary."""
    head = None
    if callable(get := getattr(model, "get_output_embeddings", None)):
        head = get()
    return {
        path
        for path, module in contents.modules.items()
        if isinstance(module, nn.Embedding | Embedding4bit) or (head is not None and module is head)
    }


def _check_has_values(name: str, slot: Tensor) -> None:
    if slot.is_meta or is_sharded(slot):
        where = "on the meta device" if slot.is_meta else "sharded"
        raise ValueError(f"{name}: is {where} in the model; load the adapter before that")


def _check_paths(
    directory: Path, adapters: Iterable[str], layers: Mapping[str, tuple[Layer, list[str]]]
) -> None:
    """The file's layers are the model's LoRA layers or, where it has none, any linear layers."""
    found = set(adapters)
    aliases: dict[int, list[str]] = {}
    for path, (layer, _) in layers.items():
        aliases.setdefault(id(layer), []).append(path)
    existing = {aliases[id(la)][0] for la, _ in layers.values() if isinstance(la, LoRALayer)}
    if existing and found != existing:
        raise ValueError(
            f"{directory}: its layers are not the model's LoRA layers: "
            f"missing {some(existing - found)}; unknown {some(found - existing)}"
        )
    if unknown := found - layers.keys():
        raise ValueError(f"{directory}: the model has no linear layer {some(unknown)}")
    for path in found:
        if twice := found & set(aliases[id(layers[path][0])]) - {path}:
            raise ValueError(f"{directory}: {path} and {some(twice)} are one layer of the model")


def _check_fits(path: str, a: Tensor, b: Tensor, layer: Layer, config: LoRAConfig) -> None:
    r = config.r_for(path)
    lead = [layer.num_experts] if isinstance(layer, Experts4bit | LoRAExperts) else []
    for name, tensor, shape in (
        ("lora_A", a, [*lead, r, layer.in_features]),
        ("lora_B", b, [*lead, layer.out_features, r]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{path}.{name}: got shape {list(tensor.shape)}; takes {shape}")
        check_floating(f"{path}.{name}", tensor)
        if (dtype := _adapter_dtype(layer, config)) != tensor.dtype:
            check_finite(f"{path}.{name}", tensor.to(dtype))
    if not isinstance(layer, LoRALayer):
        return
    if isinstance(layer, LoRAExperts) and layer.shared and not all(map(_is_one, (a, b))):
        raise ValueError(f"{path}: its experts share an adapter; the file has others for each")
    if layer.merged:
        raise ValueError(f"{path}: its adapter is merged; unmerge it before loading another")
    of_file = (r, config.alpha_for(path), config.use_rslora)
    if of_file != (of_model := (layer.r, layer.alpha, layer.use_rslora)):
        raise ValueError(f"{path}: got (r, alpha, use_rslora) {of_file}; the model has {of_model}")


def _is_one(factors: Tensor) -> bool:
    """Whether all experts have the same factor."""
    return bool((factors == factors[:1]).all())


def _adapter_dtype(layer: Layer, config: LoRAConfig) -> torch.dtype:
    if isinstance(layer, LoRALayer):
        return layer.lora_a.dtype
    return config.dtype or torch.float32


def _read_fields(file: Path, weights: Path) -> dict[str, Any]:
    """PEFT's configuration, or what the weights were saved with where an interruption left none."""
    saved = _saved_fields(weights)
    if not file.is_file():
        if saved is None:
            raise FileNotFoundError(f"{file} is missing")
        return saved
    fields = _json.read_object(str(file), file.read_bytes())
    _json.check_fields(str(file), fields, _READ_FIELDS)
    for name in _COMPUTING_FIELDS if saved else ():
        if saved and (fields.get(name) or None) != (saved.get(name) or None):
            raise ValueError(
                f"{file}: {name}: got {fields.get(name)!r}; {weights.name} was saved with "
                f"{saved.get(name)!r}, so they are of two saves. To change what an adapter "
                "computes, set alpha of its layers after loading"
            )
    return fields


def _saved_fields(weights: Path) -> dict[str, Any] | None:
    """The configuration in the weights' own metadata; None for files of others."""
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get(_CONFIG_KEY)
    except SafetensorError as error:
        raise ValueError(f"{weights}: is not a safetensors file: {error}") from error
    if text is None:
        return None
    name = f"{weights}: {_CONFIG_KEY}"
    fields = _json.read_object(name, text)
    _json.check_fields(name, fields, _READ_FIELDS)
    return fields


def _config(file: Path, fields: Mapping[str, Any], dtype: torch.dtype | None) -> LoRAConfig:
    """What PEFT's configuration says, refused when it is not plain LoRA on linear layers."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f'{file}: peft_type: got {fields.get("peft_type")!r}; takes "LORA"')
    initialisation = fields.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{file}: init_lora_weights: {initialisation!r} changes the base weight; "
            "let PEFT convert the adapter to plain LoRA"
        )
    for name, value in fields.items():
        # Anything else that is set asks for something this package does not compute.
        if name not in _NEUTRAL_FIELDS | _READ_FIELDS.keys() and value:
            raise ValueError(f"{file}: {name}={value!r} is not supported; takes plain LoRA")
    try:
        return LoRAConfig(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            use_rslora=fields.get("use_rslora") or False,
            dtype=dtype,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
        )
    except KeyError as error:
        raise ValueError(f"{file}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error


def _read_weights(file: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """``{path: (A, B)}``, and all other tensors by key."""
    from safetensors.torch import load_file

    if not file.is_file():
        pickled = file.with_suffix(".bin")
        hint = f"; {pickled.name} is not read, convert it" if pickled.exists() else ""
        raise FileNotFoundError(f"{file} is missing{hint}")
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in load_file(file).items():
        if match := _KEY.fullmatch(key):
            halves.setdefault(match["path"], {})[match["part"]] = tensor
        else:
            others[key] = tensor
    for path, parts in halves.items():
        if len(parts) != 2:
            raise ValueError(f"{file}: {path} has lora_{next(iter(parts))} but not the other half")
    if not halves:
        raise ValueError(
            f"{file}: holds no LoRA weights, but {some(others)}; takes "
            f"{_peft.PREFIX}<layer>.lora_A.weight, lora_B"
        )
    return {path: (parts["A"], parts["B"]) for path, parts in halves.items()}, others


def _same(layers: Mapping[str, LoRALayer], name: str) -> Any:
    values = {getattr(layer, name) for layer in layers.values()}
    if len(values) != 1:
        raise ValueError(f"model: LoRA layers differ in {name}; PEFT's files hold one for all")
    return values.pop()
