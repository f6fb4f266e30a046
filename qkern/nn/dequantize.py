"""Back to dense layers: a whole model's 4-bit weights dequantised."""

from __future__ import annotations

import torch
from torch import nn

from qkern import _errors
from qkern.nn import _experts, _sources
from qkern.nn._module import QuantizedModule, frozen, is_sharded, parameter
from qkern.nn._options import replace_module
from qkern.nn.embedding import Embedding4bit
from qkern.nn.linear import Linear4bit, without_named_hooks
from qkern.nn.lora import LoRALinear
from qkern.nn.lora_experts import LoRAExperts


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace the 4-bit layers of ``model`` by dense ones, in place.

    They are of the class that the 4-bit ones were made of: ``nn.Linear``, ``Conv1D`` of
    transformers with its transposed weight, ``nn.Embedding`` or a scaled one of transformers. Their
    weights are the dequantised ones, frozen, in ``dtype``
    (float32, bfloat16 or float16), by default the one that each was quantised from. Biases, hooks,
    attributes and train/eval mode are kept, and layers that shared a 4-bit weight share the dense
    one. Experts that a model keeps in one tensor are one tensor again. Adapters stay on their
    layers: merging them afterwards gives ``W + scaling · B A`` in the dense dtype. Each 4-bit
    weight is released before the next is dequantised.

    Returns ``model``; of a single layer, which cannot be replaced in place, there is
    :meth:`Linear4bit.to_linear`.

    Raises ValueError, before anything is changed, where ``model`` has no 4-bit layer; an adapter is
    merged, or is on experts, or on a layer that would become a ``Conv1D``; a weight is sharded or
    offloaded by accelerate; or a 4-bit layer is held in an attribute that is no submodule.
    TypeError for another dtype, and for a single layer.
    """
    if dtype is not None:
        _errors.check_float_dtype("dtype", dtype)
    if isinstance(model, QuantizedModule):
        raise TypeError("model: got a single layer; use its to_linear or to_embedding")
    groups: dict[tuple[int, bool], dict[int, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRAExperts):
            raise ValueError(
                f"model: {path} has adapters, and its experts would become one dense tensor, on "
                "which there are none; save the adapter and dequantise the model without it"
            )
        if isinstance(module, LoRALinear):
            _check_adapter(path, module)
        elif isinstance(module, Linear4bit | Embedding4bit):
            _check_weight(path, module)
            transposed = _sources.is_conv1d(module.source_class)
            group = groups.setdefault((id(parameter(module, "weight")), transposed), {})
            group.setdefault(id(module), []).append(path)
    stacks = list(_experts.quantized_stacks(model))
    for path, _, experts in stacks:
        _check_weight(path, experts)
    if not groups and not stacks:
        raise ValueError("model: has no layer in 4 bits")
    found = (model.get_submodule(p[0]) for group in groups.values() for p in group.values())
    _sources.check_held_elsewhere(model, found)
    for group in groups.values():
        weight: nn.Parameter | None = None
        for paths in group.values():
            layer = model.get_submodule(paths[0])
            assert isinstance(layer, Linear4bit | Embedding4bit)
            if weight is None:
                weight = layer._dense_weight(dtype)
            dense = layer._dense_around(weight)
            without_named_hooks(dense)
            replace_module(model, paths, dense)
    for path, module, experts in stacks:
        _experts.use_dense(module, path.rpartition(".")[2], frozen(experts.to_dense(dtype)))
    return model


def _check_weight(path: str, layer: QuantizedModule) -> None:
    weight = parameter(layer, "weight")
    if is_sharded(weight):
        raise ValueError(f"model: {path} is sharded; takes a model before fully_shard")
    if weight.is_meta and "_hf_hook" in vars(layer):
        raise ValueError(f"model: {path} is offloaded by accelerate; remove its hooks first")


def _check_adapter(path: str, layer: LoRALinear) -> None:
    base = layer.base_layer
    if not isinstance(base, Linear4bit):
        return
    if layer.merged:
        raise ValueError(
            f"model: the adapter at {path} is merged, into 4 bits; call unmerge_lora first, and "
            "merge_lora afterwards"
        )
    if _sources.is_conv1d(base.source_class):
        raise ValueError(
            f"model: {path} has an adapter, and its layer would become a dense Conv1D, on which "
            "there are none; save the adapter and dequantise the model without it"
        )
