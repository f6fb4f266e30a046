"""What differs between the versions of transformers that are taken, and which those are."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from qkern.nn._module import QuantizedModule, frozen

_NEEDED = (
    (HfQuantizer, "param_needs_quantization"),
    (HfQuantizer, "get_quantize_ops"),
    (HfQuantizer, "get_weight_conversions"),
    (HfQuantizer, "get_state_dict_and_metadata"),
    (HfQuantizer, "validate_environment"),
    (AutoHfQuantizer, "merge_quantization_configs"),
    (PreTrainedModel, "_adjust_missing_and_unexpected_keys"),
    (PreTrainedModel, "get_expanded_tied_weights_keys"),
)
"""What the quantizers here are called by, or wrap."""

CASTS_TO_PLACEHOLDERS = not hasattr(HfQuantizer, "get_new_dtype")
"""Whether a floating tensor is cast to the dtype of the parameter on meta, also one to quantise."""


LOADS_EXPERTS = hasattr(HfQuantizer, "update_weight_conversions")
"""Whether the names of tensors can be changed for experts in 4 bits; else they stay dense."""


_OLDEST, _NEWEST = "5.5", "5.24"
"""Before, tied layers are loaded one by one, and codes are cast as if they were dense."""


def check() -> None:
    """ImportError unless transformers is new enough, and has all hooks that are used."""
    if Version(transformers.__version__) < Version(_OLDEST):
        raise ImportError(f"transformers: got {transformers.__version__}; takes {_OLDEST} or later")
    for kind, name in _NEEDED:
        if not hasattr(kind, name):
            raise ImportError(
                f"transformers: got {transformers.__version__}, which has no "
                f"{kind.__name__}.{name}; takes {_OLDEST} to {_NEWEST}"
            )


def hold_as(layer: QuantizedModule, dtype: torch.dtype) -> None:
    """Let the codes on meta be of a floating ``dtype`` while tensors of that come for them."""
    codes = layer._parameters["weight"]
    assert codes is not None
    size = -(-codes.numel() // dtype.itemsize), 1
    layer._parameters["weight"] = frozen(torch.empty(size, dtype=dtype, device="meta"))


def hold_codes(layer: QuantizedModule, codes: torch.Tensor) -> None:
    """Undo `hold_as`, for ``codes`` that are about to come."""
    held = layer._parameters["weight"]
    if held is not None and held.is_floating_point():
        layer._parameters["weight"] = frozen(torch.empty_like(codes, device="meta"))
