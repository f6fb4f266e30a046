"""Scripts written for bitsandbytes on qkern's layers: the quantizer that takes its config."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qkern import _errors
from qkern.integrations import _hf_plan, _hf_saving
from qkern.integrations._hf_quantizer import QKernQuantizer

_NAME = "bitsandbytes_4bit"
_BLOCK_SIZE = 64
"""Of all that bitsandbytes quantises while transformers loads."""

_original: Any = None


class BitsAndBytesQuantizer(QKernQuantizer):
    """Loads with a ``BitsAndBytesConfig(load_in_4bit=True)``, as bitsandbytes would.

    The same layers are in 4 bits, in the same format, and compute in the same dtype.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # What is found out on saving is noted in it, and it is the user's.
        config = copy.deepcopy(quantization_config)
        super().__init__(config, **kwargs)
        kind = config.bnb_4bit_quant_type
        if kind not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type: got {kind!r}; takes 'nf4' or 'fp4'")
        _errors.check_float_dtype("bnb_4bit_compute_dtype", config.bnb_4bit_compute_dtype)
        self._storage = config.bnb_4bit_quant_storage

    def update_device_map(self, device_map: Any) -> Any:
        """Where none is given, the GPU at hand, as with bitsandbytes; else the CPU."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def _stored_as(self) -> torch.dtype:
        return self._storage

    def _plan(self, model: Any) -> _hf_plan.Plan:
        config = self.quantization_config
        fields = config.bnb_4bit_quant_type, _BLOCK_SIZE, config.bnb_4bit_use_double_quant
        return _hf_plan.Plan(*fields, config.bnb_4bit_compute_dtype)

    def _quantize_structure(self, model: Any, plan: _hf_plan.Plan) -> None:
        skip = self.quantization_config.llm_int8_skip_modules
        _hf_plan.quantize_like_bitsandbytes(
            model,
            plan,
            skip,
            self._dense_off_the_gpu(),
            spare_heads=self.pre_quantized,
            experts=self._has_quantized_experts(),
        )
        if not self.pre_quantized:
            for path, layer in plan.paths.items():
                _hf_saving.check_storage(path, layer._parameters["weight"], self._storage)

    def _new_modules(self) -> Iterable[str]:
        return ()

    def _dense_off_the_gpu(self) -> Iterable[str]:
        """What ``llm_int8_enable_fp32_cpu_offload`` leaves dense."""
        places = self._device_map
        if not self.quantization_config.llm_int8_enable_fp32_cpu_offload or places is None:
            return ()
        return [name for name, place in places.items() if place in ("cpu", "disk")]

    def _reads_bitsandbytes(self) -> bool:
        return True

    def _describe(self, model: Any) -> bool:
        skipped = _hf_saving.as_bitsandbytes(model)
        if skipped is None:
            raise ValueError("model: its 4-bit layers are not all such as bitsandbytes can save")
        config = self.quantization_config
        if _hf_saving.quantized_modules(model):
            kind, _, double_quant = _hf_saving.common_format(model)
            config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant = kind, double_quant
        config.llm_int8_skip_modules = skipped
        return True


def take_over_bitsandbytes() -> None:
    """From now on, load 4-bit models by qkern where transformers would load them by bitsandbytes.

    A script with ``BitsAndBytesConfig(load_in_4bit=True)`` stays as it is, and so does one that
    loads a directory in bitsandbytes' 4 bits. bitsandbytes need not be installed. The same layers
    are in 4 bits as with bitsandbytes, and a directory's weights have the same values; of dense
    weights a code may differ where a value lies between two. Of its config

    - ``bnb_4bit_quant_type``, ``bnb_4bit_use_double_quant``, ``bnb_4bit_compute_dtype``,
      ``llm_int8_skip_modules`` and ``llm_int8_enable_fp32_cpu_offload`` mean what they do there;
    - ``bnb_4bit_quant_storage`` is the dtype in saved files; in memory codes are uint8, which
      frameworks shard as they are;
    - ``load_in_8bit`` stays bitsandbytes'.

    Affects the whole process, and models loaded afterwards. Calling it again changes nothing;
    :func:`give_back_bitsandbytes` ends it.
    """
    global _original
    if AUTO_QUANTIZER_MAPPING.get(_NAME) is not BitsAndBytesQuantizer:
        _original = AUTO_QUANTIZER_MAPPING.get(_NAME)
        # transformers' function refuses a name that is there.
        AUTO_QUANTIZER_MAPPING[_NAME] = BitsAndBytesQuantizer


def give_back_bitsandbytes() -> None:
    """Undo :func:`take_over_bitsandbytes`, for models loaded afterwards."""
    if AUTO_QUANTIZER_MAPPING.get(_NAME) is BitsAndBytesQuantizer:
        AUTO_QUANTIZER_MAPPING[_NAME] = _original
