"""The few places where transformers would treat a model with 4-bit layers as what it is not.

Each wraps one method, and does what that did wherever qkern has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from qkern.integrations._hf_config import METHOD, QKernConfig
from qkern.integrations._wrapping import wrap
from qkern.nn import count_parameters
from qkern.nn._module import QuantizedModule, has_4_bit

logger = logging.get_logger(__name__)


def _num_parameters(
    original: Callable[..., int],
    model: Any,
    only_trainable: bool = False,
    exclude_embeddings: bool = False,
) -> int:
    if not has_4_bit(model):
        return original(model, only_trainable, exclude_embeddings)
    return count_parameters(model, only_trainable, exclude_embeddings=exclude_embeddings)


def _adjust_bias(
    original: Callable[..., None], model: Any, output_embeddings: Any, input_embeddings: Any
) -> None:
    # It pads the bias to the first size of the weight, which is bytes of codes in 4 bits.
    if not isinstance(output_embeddings, QuantizedModule):
        original(model, output_embeddings, input_embeddings)


def _merge(
    original: Callable[..., Any],
    kind: Any,
    quantization_config: Any,
    quantization_config_from_args: Any,
) -> Any:
    config = merged(quantization_config, quantization_config_from_args)
    if config is not None:
        return config
    return original(kind, quantization_config, quantization_config_from_args)


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
    if differing:
        logger.warning(
            f"qkern: the directory is in 4 bits already, and its own {', '.join(differing)} "
            "count; what was passed as quantization_config says otherwise"
        )
    config.add_new(asked.skip)
    if asked.compute_dtype is not None:
        config.compute_dtype = asked.compute_dtype
    return config


def apply() -> None:
    """Wrap the methods, once."""
    wrap(PreTrainedModel, "num_parameters", _num_parameters)
    wrap(PreTrainedModel, "_adjust_bias", _adjust_bias)
    wrap(AutoHfQuantizer, "merge_quantization_configs", _merge)
