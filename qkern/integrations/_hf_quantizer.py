"""transformers' quantizers that load, save and describe models with qkern's layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from qkern.integrations import _hf_checks, _hf_plan, _hf_saving, _hf_versions
from qkern.integrations._hf_config import as_dtype
from qkern.integrations._hf_experts import (
    BitsAndBytesExperts,
    ExpertsConverter,
    ExpertsRenaming,
    has_quantized_experts,
)
from qkern.integrations._hf_loading import Converter, Loading, Quantize, ReadBitsAndBytes
from qkern.integrations._launch import refuse_fsdp1
from qkern.integrations._peft_auto import register_where_installed
from qkern.nn import dequantize_model
from qkern.nn.experts import Experts4bit


def _is_ours(conversion: Any) -> bool:
    """Whether a conversion is of tensors that are in 4 bits now, of which it knows nothing."""
    if isinstance(conversion, ExpertsConverter):
        return conversion.of_quantized
    return isinstance(conversion, Converter | ExpertsRenaming)


class QKernQuantizer(HfQuantizer):
    """Loads with a `QKernConfig`; see `QKernConfig`."""

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: Loading | None = None
        self._device_map: dict[str, Any] | None = None
        self._storage = torch.uint8

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Leave it as it was asked for."""
        return dtype

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Note where modules go; transformers asks once more when it has worked that out.

        Raises ValueError where accelerate is about to shard with FSDP1.
        """
        refuse_fsdp1()
        if isinstance(device_map, dict):
            self._device_map = device_map

    def _on_disk(self, name: str) -> bool:
        """Whether the tensor of this name is offloaded to a file."""
        from transformers.integrations.accelerate import get_device

        places = self._device_map or {}
        return "disk" in places.values() and get_device(places, name) == "disk"

    # ---- before the weights

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = self._plan(model)
        self._loading = Loading(plan, self._on_disk)
        files = kwargs.get("checkpoint_files") or ()
        self._loading.from_files = bool(files)
        reads = self.pre_quantized and self._reads_bitsandbytes()
        self._loading.experts_in_4_bits = reads and has_quantized_experts(files)
        self._quantize_structure(model, plan)
        if _hf_versions.CASTS_TO_PLACEHOLDERS:
            if self.pre_quantized and self._stored_as().is_floating_point:
                _hf_plan.hold_codes_as(model, plan, self._stored_as())
            elif not self.pre_quantized or self._reads_bitsandbytes():
                # Codes in bytes are not cast, but a weight may be dense where they are awaited.
                _hf_plan.hold_codes_as(model, plan, model.dtype)
        new = self._new_modules() if self.pre_quantized else None
        _hf_checks.watch(model, self._loading, new)
        return model

    def _stored_as(self) -> torch.dtype:
        """The dtype that codes have in the directory."""
        fields = self.quantization_config.read_from or {}
        name = str(fields.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
        found: torch.dtype = getattr(torch, name)
        return found

    def _plan(self, model: Any) -> _hf_plan.Plan:
        config = self.quantization_config
        fields = config.format, config.block_size, config.double_quant
        return _hf_plan.Plan(*fields, self._compute_dtype(model))

    def _new_modules(self) -> Iterable[str]:
        """Names of modules that a directory in 4 bits need not have."""
        new: list[str] = self.quantization_config.new
        return new

    def _compute_dtype(self, model: Any) -> torch.dtype | None:
        config = self.quantization_config
        found: torch.dtype | None = config.compute_dtype
        # A directory of bitsandbytes' names one always.
        return None if config.read_from is not None and found == model.dtype else found

    def _quantize_structure(self, model: Any, plan: _hf_plan.Plan) -> None:
        config = self.quantization_config
        if config.read_from is not None:
            skip = config.read_from.get("llm_int8_skip_modules")
            new = config.new
            options = {"new": new, "experts": self._has_quantized_experts()}
            _hf_plan.quantize_like_bitsandbytes(model, plan, skip, spare_heads=True, **options)
        else:
            embeddings = config.quantize_embeddings
            _hf_plan.quantize_structure(model, plan, config.skip, embeddings=embeddings)

    def _has_quantized_experts(self) -> bool:
        return self._loading is not None and self._loading.experts_in_4_bits

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the dense tensor of this name is to be one of a 4-bit module."""
        if self._loading is None or self.pre_quantized or not param_name.endswith(".weight"):
            return False
        return self._loading.plan.owner(param_name) is not None

    def get_quantize_ops(self) -> Any:
        """What turns a dense weight into its 4-bit tensors."""
        assert self._loading is not None
        return Quantize(self._loading)

    def get_weight_conversions(self) -> list[Any]:
        """What turns bitsandbytes' tensors into a 4-bit module's."""
        if not self.pre_quantized or not self._reads_bitsandbytes():
            return []
        assert self._loading is not None
        return [Converter(self._loading)]

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Those of the model, with experts that become 4-bit ones read one by one."""
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)
        loading = self._loading
        if loading is None or not any(
            isinstance(m, Experts4bit) for m in loading.plan.paths.values()
        ):
            return found
        kind = BitsAndBytesExperts if self._has_quantized_experts() else ExpertsConverter
        found = [kind(loading, each) if type(each) is WeightConverter else each for each in found]
        return [*found, ExpertsRenaming(loading)]

    def _reads_bitsandbytes(self) -> bool:
        return self.quantization_config.read_from is not None

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Nothing is cast on its way to an operation of ours, which casts what is dense."""
        if isinstance(converter, BitsAndBytesExperts):
            return None
        for op in getattr(converter, "operations", ()):
            if isinstance(op, ReadBitsAndBytes):
                op.dtype = dtype if dtype is not None and dtype.is_floating_point else op.dtype
                return None
        found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return found

    # ---- after them

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._loading is not None
        _hf_checks.unwatch(model)
        self._loading.name_offloaded(model)
        _hf_checks.check_described(self._loading)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            # Saving would undo it, of tensors that have bitsandbytes' names already.
            # transformers copies and reverses the others by their own class.
            model._weight_conversions = [
                c.original if isinstance(c, ExpertsConverter) else c
                for c in conversions
                if not _is_ours(c)
            ]
        # Gate and up together have plain scales, where layers by themselves have double-quantised
        # ones: such a model has no config, and saving it says so.
        has_mixed_scales = self._has_quantized_experts()
        self._loading = None
        model.is_loaded_in_4bit = True
        register_where_installed()
        if not has_mixed_scales:
            self._describe(model)
        return model

    def _describe(self, model: Any) -> bool:
        """Have config.json say how ``model`` is saved; whether as bitsandbytes'."""
        config = self.quantization_config
        config.found(*_hf_saving.common_format(model))
        config.compute_dtype = _hf_saving.compute_dtype(model, config.compute_dtype)
        skipped = _hf_saving.as_bitsandbytes(model)
        if skipped is None:
            if config.read_from is not None:
                # What that config named as dense; ours names it by its own rules.
                config.skip = _hf_saving.dense_layers(model)
            config.written_as(None)
            return False
        config.written_as(_hf_saving.bitsandbytes_dict(model, skipped, config.compute_dtype))
        return True

    # ---- saving, and what else one asks

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """What ``save_pretrained`` writes."""
        bitsandbytes = self._describe(model)
        tensors = _hf_saving.state_dict(model, bitsandbytes=bitsandbytes, storage=self._storage)
        return tensors, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Saving writes the name of the dtype into the config, where this comes from by default.
        had_experts = any(isinstance(module, Experts4bit) for module in model.modules())
        dequantize_model(model, as_dtype("dtype", dtype))
        if had_experts and hasattr(model, "_weight_conversions"):
            model._weight_conversions = None  # so that saving asks for all that the model has
        _hf_plan.untie_parts(model)
        model.is_loaded_in_4bit = False
        return model

    def is_serializable(self) -> bool:
        """Yes: any number of times, with the same bits."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, with adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes: the layers are one op each."""
        return True
