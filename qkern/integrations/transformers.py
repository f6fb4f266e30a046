"""qkern in transformers: ``from_pretrained(..., quantization_config=QKernConfig())``.

Importing this module makes the method known to transformers, so that directories that say
``"quant_method": "qkern"`` load.
"""

from __future__ import annotations

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qkern.integrations import _hf_patches, _hf_versions
from qkern.integrations._hf_config import METHOD, QKernConfig
from qkern.integrations._hf_quantizer import QKernQuantizer
from qkern.integrations._hf_takeover import give_back_bitsandbytes, take_over_bitsandbytes

__all__ = ["QKernConfig", "give_back_bitsandbytes", "take_over_bitsandbytes"]

# Assigned, for transformers' functions refuse a name that is there, as after a reload.
AUTO_QUANTIZATION_CONFIG_MAPPING[str(METHOD)] = QKernConfig
AUTO_QUANTIZER_MAPPING[str(METHOD)] = QKernQuantizer
_hf_versions.check()
_hf_patches.apply()
