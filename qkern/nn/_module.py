"""What every module with a 4-bit weight shares: its buffers, their dtypes, and the state dict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkern import _errors
from qkern.functional import quantize_4bit
from qkern.tensor import QuantizedTensor

_TENSORS = ("packed", "absmax", "nested_absmax", "nested_offset", "codebook")


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, sooner: torch looks everywhere else before it looks among parameters.

    Elsewhere it is where the module was parametrised or sharded.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


class QuantizedModule(nn.Module):
    """A module whose frozen weight is a :class:`~qkern.QuantizedTensor`.

    The tensors of the weight are buffers: ``packed`` (uint8), ``absmax`` (float32, or uint8 when
    double-quantised), ``nested_absmax`` and ``nested_offset`` (float32, double-quantised only),
    ``codebook`` (float32, custom formats only). They move with the module, and a cast such as
    ``.half()`` leaves them alone: it only changes ``weight.dtype``, as it casts the bias.

    A further buffer, ``quant_meta``, holds format, block size and shape as JSON in uint8. A plain
    tensor survives whatever carries a state dict (safetensors, sharding, distributed checkpoints);
    ``get_extra_state`` and keys made up on saving do not, since such tools look names up among
    parameters and buffers. Loading compares it with the module, so a checkpoint in another format
    is refused rather than read as the wrong numbers. As with other modules, ``weight.dtype`` is
    the module's own and not loaded.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: Tensor | None
    quant_meta: Tensor

    def _set_quantized(self, qw: QuantizedTensor) -> None:
        self._format = qw.format
        self._block_size = qw.block_size
        self._weight_shape = tuple(qw.shape)
        self._weight_dtype = qw.dtype
        self._kept_weight: QuantizedTensor | None = None
        for name in _TENSORS:
            self.register_buffer(name, getattr(qw, name))
        self.register_buffer("quant_meta", self._encode_meta(qw.packed.device))

    @property
    def weight(self) -> QuantizedTensor:
        """The frozen weight. Its tensors are the module's buffers, not copies."""
        if torch.compiler.is_compiling():
            return self._quantized(self.packed)
        # Checking and building one takes as long as a small matmul, so the last one is kept. It
        # stands for the buffers as long as they are the same objects.
        kept, buffers = self._kept_weight, self._buffers
        if (
            kept is None
            or kept.packed is not buffers["packed"]
            or kept.absmax is not buffers["absmax"]
            or kept.nested_absmax is not buffers["nested_absmax"]
            or kept.nested_offset is not buffers["nested_offset"]
            or kept.codebook is not buffers["codebook"]
            or kept.dtype is not self._weight_dtype
        ):
            kept = self._kept_weight = self._quantized(self.packed)
        return kept

    def _quantized(self, packed: Tensor) -> QuantizedTensor:
        return QuantizedTensor(
            packed=packed,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            codebook=self.codebook,
            format=self._format,
            block_size=self._block_size,
            shape=self._weight_shape,
            dtype=self._weight_dtype,
        )

    def _format_repr(self) -> str:
        return (
            f"format={self._format}, block_size={self._block_size}, "
            f"double_quant={self.nested_absmax is not None}"
        )

    def _meta(self) -> dict[str, Any]:
        return {
            "block_size": self._block_size,
            "double_quant": self.nested_absmax is not None,
            "format": self._format,
            "shape": list(self._weight_shape),
        }

    def _encode_meta(self, device: torch.device) -> Tensor:
        text = json.dumps(self._meta(), sort_keys=True).encode()
        return torch.tensor(list(text), dtype=torch.uint8, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        before = {name: self._buffers[name] for name in (*_TENSORS, "quant_meta")}
        was_meta = self.packed.is_meta
        # It would keep the tensors of the old device alive.
        self._kept_weight = None
        applied = False
        try:
            # A cast applies to every floating buffer, and in 16 bits the scales would lose their
            # meaning: they pass as integers of the same size.
            for name, buffer in before.items():
                if buffer is not None and buffer.dtype == torch.float32:
                    self._buffers[name] = buffer.view(torch.int32)
            super()._apply(fn, recurse)
            for name, buffer in before.items():
                if buffer is not None and buffer.dtype == torch.float32:
                    self._buffers[name] = self._buffers[name].view(torch.float32)  # type: ignore[union-attr]
                elif buffer is not None and self._buffers[name].dtype != buffer.dtype:  # type: ignore[union-attr]
                    raise TypeError(f"{name}: holds packed codes and cannot be cast")
            applied = True
        finally:
            if not applied:
                self._buffers.update(before)
        if was_meta and not self.packed.is_meta:
            self.quant_meta.copy_(self._encode_meta(self.packed.device))
        dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=before["packed"].device)).dtype  # type: ignore[union-attr]
        if dtype in _errors.FLOAT_DTYPES:
            self._weight_dtype = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._refuse_state(state_dict, prefix)
        if problem is not None:
            error_msgs.append(f"{prefix}weight: {problem}")
            return
        self._kept_weight = None
        if prefix + "quant_meta" in state_dict:
            # Equal in meaning by now, and loaded in the module's own spelling.
            device = state_dict[prefix + "quant_meta"].device
            state_dict[prefix + "quant_meta"] = self._encode_meta(device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refuse_state(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why ``state_dict`` does not hold this module's weight, or None."""
        if prefix + "weight.absmax" in state_dict:
            return "the checkpoint is in bitsandbytes' layout; read it with qkern.io.load_bnb"
        if prefix + "weight" in state_dict and prefix + "packed" not in state_dict:
            return (
                "the checkpoint holds a dense weight; load it before quantising, "
                "or load a state dict saved from a quantised module"
            )
        meta = state_dict.get(prefix + "quant_meta")
        if meta is not None:
            try:
                found = json.loads(bytes(meta.tolist()).decode())
            except (ValueError, TypeError):
                return "quant_meta is not the JSON that qkern writes; the checkpoint is damaged"
            if found != self._meta():
                return f"the checkpoint holds {found}; this module takes {self._meta()}"
        for name in _TENSORS:
            own, loaded = getattr(self, name), state_dict.get(prefix + name)
            # Module loading copies across dtypes, which would turn uint8 codes into float scales.
            if own is not None and loaded is not None and own.dtype != loaded.dtype:
                return f"{name}: got {loaded.dtype}; takes {own.dtype}"
        return None


def zeros_quantized(
    shape: tuple[int, ...],
    *,
    format: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> QuantizedTensor:
    """A weight of zeros in the right sizes, to be filled by a state dict."""
    sizes = quantize_4bit(
        torch.empty(shape, dtype=dtype, device="meta"),
        format,
        block_size,
        double_quant,
        codebook=torch.empty(16, device="meta") if format == "custom" else None,
    )
    zeros: dict[str, Any] = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in sizes.tensors().items()
    }
    return replace(sizes, **zeros)
