"""Adapters in PEFT's file format."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkern.io._common import Layer, linear_layers, plain, some, unwrapped, write_file
from qkern.nn.lora import LoRAConfig, LoRALinear, lora_layers
from qkern.nn.model import replace_module

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")

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
        "task_type",
    }
)
_READ_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
# The initialisations that leave the base weight as it is; others (pissa, olora, loftq, ...) change
# it, and their adapter means nothing on the original base.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    *,
    task_type: str | None = None,
) -> None:
    """Write the LoRA layers of ``model`` as PEFT does, for ``PeftModel.from_pretrained``.

    ``directory`` (made if missing) gets ``adapter_model.safetensors`` and ``adapter_config.json``,
    each written beside its place and renamed into it, so that an interruption leaves the old file
    or the new one. Tensors keep their dtype; merged or not, A and B are saved.

    Args:
        model: a model with :class:`~qkern.nn.LoRALinear` layers.
        directory: where to write.
        base_model_name_or_path: what PEFT shall say the base was; by default what a transformers
            model says of itself.
        task_type: PEFT's name of the task, such as ``"CAUSAL_LM"``; None makes PEFT load a plain
            ``PeftModel``.

    Raises:
        ValueError: ``model`` has no LoRA, or layers that differ in dropout or in ``use_rslora``,
            which PEFT's configuration cannot say.
    """
    from safetensors.torch import save_file

    layers = {plain(path): layer for path, layer in lora_layers(unwrapped(model))}
    if not layers:
        raise ValueError("model: has no LoRA layers to save")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    r, rank_pattern = _common({path: layer.r for path, layer in layers.items()})
    alpha, alpha_pattern = _common({path: layer.alpha for path, layer in layers.items()})
    config = {
        "auto_mapping": None,
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _same(layers, "dropout"),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": _target_modules(unwrapped(model), layers),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": _same(layers, "use_rslora"),
    }
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(
        directory / WEIGHTS_FILE,
        lambda file: save_file(tensors, file, metadata={"format": "pt"}),
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_file(directory / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Read a LoRA adapter written by PEFT or :func:`save_adapter` into ``model``, in place.

    A model without LoRA gets it on the layers the file names, 4-bit or dense, and everything else
    is frozen; the new A and B are trainable, in ``dtype`` or as :class:`~qkern.nn.LoRALinear`
    chooses. A model with LoRA must carry it on exactly those layers with the same rank and
    scaling, and keeps its dtype and dropout. ``model`` is changed only after all checks passed.

    Returns ``model``. Raises FileNotFoundError for a missing file; ValueError for a configuration
    that asks for more than plain LoRA on linear layers (DoRA, trained biases, ...), and for keys
    or shapes that do not fit the model.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE, dtype)
    adapters = _read_weights(directory / WEIGHTS_FILE)
    inner = unwrapped(model)
    layers = linear_layers(inner)
    _check_paths(directory, adapters, layers)
    for path, (a, b) in adapters.items():
        _check_fits(path, a, b, layers[path][0], config)
    if not any(isinstance(layer, LoRALinear) for layer, _ in layers.values()):
        inner.requires_grad_(False)
    for path, (a, b) in adapters.items():
        layer, paths = layers[path]
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear.from_config(layer, config, path)
            replace_module(inner, paths, layer)
        with torch.no_grad():
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
    return model


def _check_paths(
    directory: Path, adapters: Iterable[str], layers: Mapping[str, tuple[Layer, list[str]]]
) -> None:
    """The file's layers are the model's LoRA layers or, where it has none, any linear layers."""
    found = set(adapters)
    existing = {plain(paths[0]) for la, paths in layers.values() if isinstance(la, LoRALinear)}
    if existing and found != existing:
        raise ValueError(
            f"{directory}: its layers are not the model's LoRA layers: "
            f"missing {some(existing - found)}; unknown {some(found - existing)}"
        )
    if unknown := found - layers.keys():
        raise ValueError(f"{directory}: the model has no linear layer {some(unknown)}")
    for path in found:
        if twice := found & {plain(p) for p in layers[path][1]} - {path}:
            raise ValueError(f"{directory}: {path} and {some(twice)} are one layer of the model")


def _check_fits(path: str, a: Tensor, b: Tensor, layer: Layer, config: LoRAConfig) -> None:
    r = config.r_for(path)
    for name, tensor, shape in (
        ("lora_A", a, [r, layer.in_features]),
        ("lora_B", b, [layer.out_features, r]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{path}.{name}: got shape {list(tensor.shape)}; takes {shape}")
    if not isinstance(layer, LoRALinear):
        return
    if layer.merged:
        raise ValueError(f"{path}: its adapter is merged; unmerge it before loading another")
    of_file = (r, config.alpha_for(path), config.use_rslora)
    if of_file != (of_model := (layer.r, layer.alpha, layer.use_rslora)):
        raise ValueError(f"{path}: got (r, alpha, use_rslora) {of_file}; the model has {of_model}")


def _read_config(file: Path, dtype: torch.dtype | None) -> LoRAConfig:
    """PEFT's configuration, refused when it is not plain LoRA on linear layers."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: got {type(config).__name__}; takes a JSON object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f'{file}: peft_type: got {config.get("peft_type")!r}; takes "LORA"')
    if config.get("bias", "none") != "none":
        raise ValueError(f'{file}: bias: got {config["bias"]!r}; takes "none"')
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{file}: init_lora_weights: {initialisation!r} changes the base weight; "
            "let PEFT convert the adapter to plain LoRA"
        )
    for name, value in config.items():
        # Anything else that is set asks for something this package does not compute.
        if name not in _NEUTRAL_FIELDS | _READ_FIELDS and value:
            raise ValueError(f"{file}: {name}={value!r} is not supported; takes plain LoRA")
    try:
        return LoRAConfig(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            dtype=dtype,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except KeyError as error:
        raise ValueError(f"{file}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error


def _read_weights(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``{path: (A, B)}``."""
    from safetensors.torch import load_file

    if not file.is_file():
        pickled = file.with_suffix(".bin")
        hint = f"; {pickled.name} is not read, convert it" if pickled.exists() else ""
        raise FileNotFoundError(f"{file} is missing{hint}")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{file}: unknown key {key}; takes {_PREFIX}<layer>.lora_A.weight, lora_B"
            )
        halves.setdefault(match["path"], {})[match["part"]] = tensor
    for path, parts in halves.items():
        if len(parts) != 2:
            raise ValueError(f"{file}: {path} has lora_{next(iter(parts))} but not the other half")
    if not halves:
        raise ValueError(f"{file}: holds no LoRA weights")
    return {path: (parts["A"], parts["B"]) for path, parts in halves.items()}


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Last components of the layers' paths, or whole paths where those would match more."""
    names = {path.rpartition(".")[2] for path in layers}
    inside = tuple(f"{path}." for path in layers)
    for path, _ in model.named_modules():
        own = plain(path)
        if own.rpartition(".")[2] in names and own not in layers and not own.startswith(inside):
            return sorted(layers)
    return sorted(names)


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by path."""
    (common, _), *_ = Counter(values.values()).most_common(1)
    return common, {path: value for path, value in values.items() if value != common}


def _same(layers: Mapping[str, LoRALinear], name: str) -> Any:
    values = {getattr(layer, name) for layer in layers.values()}
    if len(values) != 1:
        raise ValueError(f"model: LoRA layers differ in {name}; PEFT's files hold one for all")
    return values.pop()
