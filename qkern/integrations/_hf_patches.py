"""The few places where transformers would treat a model with 4-bit layers as what it is not.

Each wraps one method, and does what that did wherever qkern has no part in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from qkern.integrations._hf_config import METHOD, QKernConfig
from qkern.nn import count_parameters
from qkern.nn._module import QuantizedModule

logger = logging.get_logger(__name__)


def _has_4_bit(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def _num_parameters(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        if not _has_4_bit(self):
            return original(self, only_trainable, exclude_embeddings)
        return count_parameters(self, only_trainable, exclude_embeddings=exclude_embeddings)

    return num_parameters


def _adjust_bias(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def adjust(self: Any, output_embeddings: Any, input_embeddings: Any) -> None:
        # It pads the bias to the first size of the weight, which is bytes of codes in 4 bits.
        if not isinstance(output_embeddings, QuantizedModule):
            original(self, output_embeddings, input_embeddings)

    return adjust


def merged(found: Any, asked: Any) -> Any:
    """What to load a directory with that says ``found``, where ``asked`` was passed.

    None where that is transformers' to say.
    """
    if isinstance(found, QKernConfig) and asked is None:
        asked = found  # of a model in memory, whose files may be bitsandbytes'
    fields = found if isinstance(found, dict) else found.to_dict()
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    in_4_bits = fields.get("load_in_4bit") or fields.get("_load_in_4bit")
    if not isinstance(asked, QKernConfig) or not (method == METHOD or in_4_bits):
        return None
    if in_4_bits:
        fields = {**fields, "quant_method": "bitsandbytes"}
    config = QKernConfig.from_dict(fields)
    names = ["format", "double_quant", "quantize_embeddings"]
    if config.read_from is None:
        names.append("block_size")
    differing = [name for name in names if getattr(config, name) != getattr(asked, name)]
    differing += ["skip"] if asked.skip and asked.skip != config.skip else []
    if differing:
        logger.warning(
            f"qkern: the directory is in 4 bits already, and its own {', '.join(differing)} "
            "count; what was passed as quantization_config says otherwise"
        )
    if asked.compute_dtype is not None:
        config.compute_dtype = asked.compute_dtype
    return config


def apply() -> None:
    """Wrap the methods, once."""
    _wrap(PreTrainedModel, "num_parameters", _num_parameters)
    _wrap(PreTrainedModel, "_adjust_bias", _adjust_bias)
    original = AutoHfQuantizer.merge_quantization_configs
    if getattr(original, "_of_qkern", False):
        return

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        config = merged(quantization_config, quantization_config_from_args)
        if config is not None:
            return config
        return original.__func__(cls, quantization_config, quantization_config_from_args)

    functools.update_wrapper(merge, original.__func__)
    merge._of_qkern = True  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)


def _wrap(
    kind: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    original = getattr(kind, name)
    if not getattr(original, "_of_qkern", False):
        replacement = wrapper(original)
        replacement._of_qkern = True  # type: ignore[attr-defined]
        setattr(kind, name, replacement)
