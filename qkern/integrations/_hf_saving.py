"""What `save_pretrained` writes of a model with 4-bit layers: tensors, and config.json.

bitsandbytes' layout where it has one for all of them, so that whatever reads that reads the
directory; else the layers' own tensors.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qkern import _bnb, formats
from qkern.nn import _experts, _sources
from qkern.nn._module import TENSORS, QuantizedModule
from qkern.nn.linear import Linear4bit


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The 4-bit modules by path, one in two places by both."""
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if isinstance(module, QuantizedModule)}


def common_format(model: nn.Module) -> tuple[str, int, bool]:
    """Format, block size and double quantisation of the 4-bit modules.

    Raises ValueError where they are not all alike, for a directory has one config.
    """
    found: dict[tuple[str, int, bool], str] = {}
    for path, module in quantized_modules(model).items():
        found.setdefault((module._format, module._block_size, module._double_quant()), path)
    if len(found) > 1:
        (one, a), (other, b), *_ = found.items()
        raise ValueError(f"model: {a} is in {one} and {b} in {other}; takes one format to save")
    if not found:
        raise ValueError("model: has no 4-bit layer any more; takes one that has, to save")
    return next(iter(found))


def compute_dtype(model: nn.Module, otherwise: torch.dtype | None) -> torch.dtype | None:
    """What the 4-bit linear layers compute in, or ``otherwise`` where they are not alike."""
    layers = quantized_modules(model).values()
    found = {layer.compute_dtype for layer in layers if isinstance(layer, Linear4bit)}
    return found.pop() if len(found) == 1 else otherwise


def as_bitsandbytes(model: Any) -> list[str] | None:
    """Names for ``llm_int8_skip_modules``, or None where bitsandbytes has no layout for the model.

    They make transformers put bitsandbytes' layers exactly where 4-bit ones are.
    """
    layers = quantized_modules(model)
    kinds = {(m._format, m._double_quant()) for m in layers.values()}
    if len(kinds) > 1 or any(kind == "custom" for kind, _ in kinds):
        return None
    if any(layer._block_size not in formats.BNB_BLOCK_SIZES for layer in layers.values()):
        return None
    if not all(map(_taken_there, layers.values())):
        return None
    return _skipped(model, layers)


def _taken_there(layer: nn.Module) -> bool:
    if type(layer) is not Linear4bit:
        return False
    return layer.source_class is nn.Linear or _sources.is_conv1d(layer.source_class)


def _skipped(model: Any, layers: dict[str, QuantizedModule]) -> list[str] | None:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    skipped: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            hits = [p for p in layers if not should_convert_module(p, [path])]
            skipped.append(f"^{re.escape(path)}$" if hits else path)
    if any(not should_convert_module(path, [*skipped, *kept]) for path in layers):
        return None
    return skipped


def dense_layers(model: nn.Module) -> list[str]:
    """The paths of linear layers and of tensors of experts that are dense."""
    found = [path for path, module in model.named_modules() if _sources.is_linear(module)]
    return [*found, *(stack.whole_name for stack in _experts.stacks(model))]


def bitsandbytes_dict(
    model: Any, skipped: list[str], compute_dtype: torch.dtype | None
) -> dict[str, Any]:
    """What ``BitsAndBytesConfig`` writes for this model, as plain JSON."""
    kind, _, double_quant = common_format(model)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype or model.dtype,
        llm_int8_skip_modules=skipped,
    )
    return plain(config.to_dict())


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with names of transformers' enumerations as strings."""
    return {k: getattr(value, "value", value) for k, value in fields.items()}


def state_dict(model: nn.Module, *, bitsandbytes: bool, storage: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``model`` by the names they are saved under."""
    tensors: dict[str, Tensor] = model.state_dict()
    done: set[int] = set()
    for path, layer in quantized_modules(model).items():
        held = _held(model, path, layer)
        names = {f"{path}.{name}": name for name in TENSORS if layer._parameters[name] is not None}
        if not bitsandbytes:
            found = {full: held[name] for full, name in names.items()}
            tensors.update({k: tensor for k, tensor in found.items() if tensor is not None})
            continue
        for full in names:
            del tensors[full]
        qw = _with(layer, held).quantized
        # Of tied layers each has its own: a state without its weight could not be read.
        again = id(layer._parameters["weight"]) in done
        done.add(id(layer._parameters["weight"]))
        for name, tensor in _bnb.to_bnb(f"{path}.weight", qw).items():
            tensors[name] = tensor.clone() if again else tensor
        if storage is not torch.uint8:
            check_storage(path, tensors[f"{path}.weight"], storage)
            packed = tensors[f"{path}.weight"].reshape(-1)
            tensors[f"{path}.weight"] = packed.view(storage).view(-1, 1)
    return tensors


def check_storage(path: str, codes: Any, storage: torch.dtype) -> None:
    """ValueError unless the bytes of ``codes`` are whole elements of ``storage``."""
    if codes.numel() % storage.itemsize:
        raise ValueError(
            f"bnb_4bit_quant_storage: got {storage}; {path}.weight has {codes.numel()} bytes, "
            "takes a dtype that divides them"
        )


def _held(model: Any, path: str, layer: QuantizedModule) -> dict[str, Tensor | None]:
    """The tensors of a weight, from wherever accelerate has put them."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    held: dict[str, Tensor | None] = {}
    for name in TENSORS:
        tensor = layer._parameters[name]
        if tensor is not None and tensor.is_meta:
            tensor = load_offloaded_parameter(model, f"{path}.{name}")
        held[name] = None if tensor is None else tensor.detach()
    return held


def _with(layer: QuantizedModule, held: dict[str, Tensor | None]) -> Any:
    """A layer like it with these tensors."""
    found = copy.copy(layer)
    found._parameters = {k: held.get(k, v) for k, v in layer._parameters.items()}  # type: ignore[misc]
    return found
