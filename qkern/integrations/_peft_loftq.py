"""LoftQ's factors for a model that is quantised already, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkern.integrations._peft_inits import low_rank
from qkern.integrations._peft_layers import QKernLinear
from qkern.integrations._peft_originals import Originals, Source
from qkern.nn import Linear4bit


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: Source | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set an adapter to what quantising lost, as PEFT's function of this name does.

    ``peft_model``
        a model with LoRA on 4-bit layers of qkern, on any device.
    ``model_path``
        the weights before quantisation: a directory or a file of safetensors; here also the dense
        model or its tensors by name. By default what the model's configuration names.
    ``callback``
        called with the model and a layer's name after each; False puts the layer's factors back.

    The 4-bit weights stay. The factors are divided by the adapter's scaling, so that what the layer
    adds is the nearest matrix of that rank to the loss (PEFT's function leaves the scaling out).
    Raises ValueError where the model has no such layer or merged ones, KeyError where a weight is
    missing, FileNotFoundError where the files are; then no layer is changed but those before.
    """
    found = [
        (name, layer)
        for name, layer in peft_model.named_modules()
        if isinstance(layer, QKernLinear)
        and adapter_name in layer.lora_A
        and isinstance(layer.get_base_layer(), Linear4bit)
    ]
    if not found:
        raise ValueError(
            f"peft_model: has no LoRA named {adapter_name!r} on a 4-bit layer of qkern; takes a "
            "model of qkern.nn.quantize_model or QKernConfig, then get_peft_model"
        )
    for name, layer in found:
        if layer.merged:
            raise ValueError(f"{name}: is merged; unmerge the adapters first")
    originals = Originals(_default_path(peft_model) if model_path is None else _shards(model_path))
    for name, layer in found:
        path = name.removeprefix("base_model.model.")
        base = layer.get_base_layer()
        lost = originals.weight(base, path) - base.quantized.dequantize(torch.float32)
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        before = a.data, b.data
        layer.set_factors(adapter_name, *low_rank(lost, layer.r[adapter_name]))
        if callback is not None and not callback(peft_model, path):
            a.data, b.data = before


def _shards(source: Source) -> Source:
    """The directory, where a ``model.safetensors`` is named that is there in shards only."""
    if isinstance(source, str) and source.endswith("model.safetensors"):
        path = Path(source)
        return path if path.exists() else path.parent
    return source


def _default_path(peft_model: Any) -> str:
    name = getattr(getattr(peft_model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError(
            "model_path: got None, and the model's configuration names no path; takes one"
        )
    if Path(name).is_dir():
        return str(name)
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, local_files_only=True))
