"""Where PEFT, whose dispatch is a fixed list, is told of 4-bit layers."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import other
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from qkern.integrations import _peft_offload as offload
from qkern.integrations._peft_inits import needs_weight
from qkern.integrations._peft_layers import QKernEmbedding, QKernLinear
from qkern.integrations._peft_loftq import replace_lora_weights_loftq
from qkern.integrations._wrapping import is_wrapped, wrap
from qkern.nn import Embedding4bit, Experts4bit, Linear4bit, count_parameters
from qkern.nn._module import TENSORS, QuantizedModule, has_4_bit

DENSE_ONLY = frozenset(
    ("DELORA", "HIRA", "HRA", "LN_TUNING", "LOHA", "LOKR")
    + ("OSF", "PSOFT", "SHIRA", "TINYLORA", "UNILORA")
)
"""Tuners that compute with the dense weight or its dtype, or train it."""

_NO_EXPERTS = (
    "PEFT adds its product to the dense weight; takes qkern.nn.add_lora or qkern.io.load_adapter, "
    "which read and write the same files"
)

_replaced: list[tuple[Any, str, Any]] = []
"""What was put where, and PEFT's own in its place."""


def is_installed() -> bool:
    """Whether PEFT makes layers of qkern's for 4-bit weights."""
    return is_wrapped(lora_model.dispatch_default)


def install() -> None:
    """Put a function of ours around each place; again, it does nothing.

    Each first looks whether it is about a 4-bit layer of qkern, and otherwise calls PEFT's own.
    """
    _around(lora_model, "dispatch_default", _dispatch)
    _around(BaseTuner, "_check_merge_allowed", _check_merge)
    _around(BaseTuner, "_check_new_adapter_config", _check_config)
    _around(other.AuxiliaryTrainingWrapper, "__init__", _check_wrapped)
    _around(peft.PeftModel, "get_nb_trainable_parameters", _count)
    _around(peft.PeftMixedModel, "get_nb_trainable_parameters", _count)
    _around(BaseTunerLayer, "_get_base_layer_device_and_dtype", offload.device_and_dtype)
    _around(BaseTuner, "_replace_module", offload.replace_module)
    _around(lora_model.LoraModel, "_replace_module", offload.replace_module)
    _around(tuners_utils, "onload_layer", offload.onload_layer)
    _around(peft.PeftModel, "load_adapter", offload.load_adapter)
    _around(peft.PeftModel, "from_pretrained", offload.from_pretrained)
    _around(peft.PeftModel, "save_pretrained", _save)
    _around(PeftAdapterMixin, "load_adapter", offload.load_adapter_of_transformers)
    for name, function in (
        ("replace_lora_weights_loftq", _loftq),
        ("prepare_model_for_kbit_training", _prepare),
    ):
        for module in _holders(name):
            _around(module, name, function)


def remove() -> None:
    """Put PEFT's own functions back."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


def _holders(name: str) -> list[Any]:
    """PEFT's modules that hold the function; code that imported it before keeps the old one."""
    loaded = [sys.modules[m] for m in sorted(sys.modules) if m.split(".")[0] == "peft"]
    return [module for module in loaded if name in vars(module)]


def _around(owner: Any, name: str, function: Callable[..., Any]) -> None:
    if (held := wrap(owner, name, function)) is not None:
        _replaced.append((owner, name, held))


def _dispatch(
    original: Callable[..., Any],
    target: nn.Module,
    adapter_name: str,
    config: Any,
    parameter_name: str | None = None,
    **kwargs: Any,
) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, QuantizedModule):
        return original(
            target, adapter_name, config=config, parameter_name=parameter_name, **kwargs
        )
    if parameter_name is not None:
        if parameter_name in TENSORS:
            raise ValueError(
                f"target_parameters: got {parameter_name} of a {type(base).__name__}, which holds "
                "4-bit codes; takes the layer's name in target_modules"
            )
        return original(
            target, adapter_name, config=config, parameter_name=parameter_name, **kwargs
        )
    if isinstance(base, Linear4bit):
        return QKernLinear(target, adapter_name, config=config, **kwargs)
    if isinstance(base, Embedding4bit):
        return QKernEmbedding(target, adapter_name, config=config, **kwargs)
    if isinstance(base, Experts4bit):
        raise ValueError(f"target_modules: got experts in 4 bits; {_NO_EXPERTS}")
    return original(target, adapter_name, config=config, **kwargs)


def _check_merge(original: Callable[..., Any], tuner: Any) -> Any:
    """ValueError for layers of other tuners on 4-bit weights, before any of them is merged.

    RuntimeError where a 4-bit weight is offloaded, into which nothing can be merged.
    """
    for name, layer in tuner.model.named_modules():
        if offload.is_offloaded(offload.base_of(layer)) and isinstance(layer, BaseTunerLayer):
            raise RuntimeError(
                f"{name}: is offloaded by accelerate, so that nothing can be merged into it; load "
                "the model without offloading"
            )
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, QKernLinear | QKernEmbedding):
            continue
        base = layer.get_base_layer()
        if isinstance(base, QuantizedModule):
            raise ValueError(
                f"{name}: got a {type(layer).__module__}.{type(layer).__name__} on a 4-bit weight, "
                "into which LoRA alone can be merged; call qkern.nn.dequantize_model first"
            )
    return original(tuner)


def _check_config(original: Callable[..., Any], tuner: Any, config: Any) -> Any:
    """ValueError for a tuner that would compute with codes, before the model is changed."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    for target in getattr(config, "target_parameters", None) or ():
        for name, module in tuner.model.named_modules():
            if isinstance(module, Experts4bit) and f".{name}".endswith(f".{target}"):
                raise ValueError(
                    f"target_parameters: got {target!r}, experts in 4 bits; {_NO_EXPERTS}"
                )
    if kind in DENSE_ONLY:
        does = "trains" if kind == "LN_TUNING" else "computes with"
        for name, _ in _targets(tuner, config):
            raise ValueError(
                f"{name}: got {kind}, which {does} the dense weight, on a 4-bit weight; "
                "takes LoRA (DoRA, PiSSA and OLoRA too), or a tuner of the list in "
                "docs/huggingface.md"
            )
    elif (option := needs_weight(config)) is not None:
        for name, base in _targets(tuner, config):
            if offload.is_offloaded(base):
                raise ValueError(
                    f"{option} needs the weight of {name}, which accelerate offloads; load the "
                    "model without offloading, or take plain LoRA"
                )
    return original(tuner, config)


def _targets(tuner: Any, config: Any) -> Iterator[tuple[str, QuantizedModule]]:
    """The 4-bit layers that ``config`` is for, by name."""
    wanted = getattr(config, "target_modules", None)
    if wanted is None:
        return
    every = isinstance(wanted, str) and wanted == "all-linear"
    for name, module in tuner.model.named_modules():
        base = offload.base_of(module)
        if not isinstance(base, QuantizedModule) or name.endswith(".base_layer"):
            continue
        if every or tuner._check_target_module_exists(config, name):
            yield name, base


def _check_wrapped(
    original: Callable[..., Any], wrapper: Any, module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """ValueError where a 4-bit module is to be trained as a whole, or rows of it are."""
    for name, part in module.named_modules():
        if isinstance(part, QuantizedModule):
            where = f" ({name})" if name else ""
            raise ValueError(
                f"{type(wrapper).__name__}: got a 4-bit {type(part).__name__}{where}, whose weight "
                "cannot be trained; takes a dense module: name it in skip when quantising"
            )
    return original(wrapper, module, *args, **kwargs)


def _count(original: Callable[..., Any], model: nn.Module) -> Any:
    """What is trained, and all elements: of a 4-bit weight those that it stands for."""
    if not has_4_bit(model):
        return original(model)
    return count_parameters(model, trainable_only=True), count_parameters(model)


def _save(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Warn where an adapter, loaded again, would not find the base that it was trained on."""
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    result = original(model, *args, **kwargs)
    if given.get("path_initial_model_for_weight_conversion") is None:
        _warn_of_bases(model, given.get("selected_adapters") or list(model.peft_config))
    return result


def _warn_of_bases(model: nn.Module, adapters: list[str]) -> None:
    for name, layer in model.named_modules():
        for adapter in adapters if isinstance(layer, QKernLinear) else ():
            if (source := layer.unrepeatable(adapter)) is not None:
                warnings.warn(
                    f"{adapter}: is saved without its base: the 4-bit weight of {name} was "
                    f"quantised anew from {source}, and loading makes another without them. Load "
                    "it in the same way (originals: within original_weights), or save with "
                    "path_initial_model_for_weight_conversion (not of LoftQ)",
                    stacklevel=4,
                )
                return


def _loftq(original: Callable[..., Any], peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(module, QKernLinear) for module in peft_model.modules()):
        return replace_lora_weights_loftq(peft_model, *args, **kwargs)
    return original(peft_model, *args, **kwargs)


def _prepare(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Have PEFT enable checkpointing and gradients of inputs, as for models that it knows."""
    known = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    if any(getattr(model, name, False) for name in known) or not has_4_bit(model):
        return original(model, *args, **kwargs)
    had = vars(model).get(known[0])
    model.is_loaded_in_4bit = True
    try:
        return original(model, *args, **kwargs)
    finally:
        if had is None:
            del model.is_loaded_in_4bit
        else:
            model.is_loaded_in_4bit = had
