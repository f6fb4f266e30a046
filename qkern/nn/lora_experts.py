"""LoRA adapters on experts in 4 bits: one for each expert, or one for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from qkern.autograd import as_dtype
from qkern.experts import QuantizedExperts, grouped_lora_by_weight, quantize_each
from qkern.functional import as_input
from qkern.grouped import differentiable_product
from qkern.nn import _sources
from qkern.nn._adapters import (
    LoRAConfig,
    LoRALayer,
    check_adapter_dtype,
    check_hyperparameters,
    is_intercepted,
)
from qkern.nn._module import parameter
from qkern.nn.experts import Experts4bit


class LoRAExperts(LoRALayer):
    """``y = base(x) + scaling · B A dropout(x)`` with the A and B of each row's expert.

    ``base_layer`` is an :class:`Experts4bit`, and frozen. ``lora_a`` is ``[E, r, in]``, drawn as
    ``nn.Linear`` draws its weight; ``lora_b`` is ``[E, out, r]`` and starts at zero, so a fresh
    adapter changes nothing. With ``shared`` all experts have one, ``[r, in]`` and ``[out, r]``:
    fewer parameters, and each learns from all tokens. They are multiplied by the same sorted rows
    as the base, in float32 on a CPU, whatever x's dtype. Hooks on the base and a ``compute_dtype``
    of it count as in :class:`LoRALinear`, and so does :meth:`merge`.

    Raises TypeError for another base, ValueError for hyperparameters that do not fit.
    """

    base_layer: Experts4bit
    _merged: tuple[Experts4bit] | None

    def __init__(
        self,
        base_layer: Experts4bit,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        shared: bool = False,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, Experts4bit):
            raise TypeError(f"base_layer: got {type(base_layer).__name__}; takes an Experts4bit")
        check_hyperparameters(r, alpha, dropout)
        check_adapter_dtype(dtype)
        self.shared = bool(shared)
        lead = () if shared else (base_layer.num_experts,)
        shapes = (*lead, r, base_layer.in_features), (*lead, base_layer.out_features, r)
        dtype = torch.float32 if dtype is None else dtype
        self._init_adapter(base_layer, *shapes, r, alpha, dropout, use_rslora, dtype)

    @classmethod
    def from_config(cls, base_layer: Experts4bit, config: LoRAConfig, path: str) -> LoRAExperts:
        """The adapters that ``config`` asks for at ``path``; its targets are not looked at."""
        return cls(
            base_layer,
            config.r_for(path),
            config.alpha_for(path),
            config.dropout,
            shared=config.share_experts,
            use_rslora=config.use_rslora,
            dtype=config.dtype,
        )

    def reset_parameters(self) -> None:
        """Draw A anew, each expert's as that of a linear layer, and set B to zero."""
        with torch.no_grad():
            bound = 1 / math.sqrt(self.base_layer.in_features)
            self.lora_a.uniform_(-bound, bound)
            self.lora_b.zero_()

    @property
    def num_experts(self) -> int:
        """The base's."""
        return self.base_layer.num_experts

    @property
    def in_features(self) -> int:
        """The base's."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """The base's."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base's packed codes, without the adapter."""
        return self.base_layer.weight

    @property
    def quantized(self) -> QuantizedExperts:
        """The base's 4-bit weights."""
        return self.base_layer.quantized

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's biases."""
        return self.base_layer.bias

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        *,
        bias: Tensor | None = None,
        check_offsets: bool = False,
    ) -> Tensor:
        """``[rows, in_features]``, sorted by expert, to ``[rows, out_features]``.

        The arguments and the errors are those of :class:`Experts4bit`.
        """
        base: Experts4bit = self._modules["base_layer"]  # type: ignore[assignment]
        others = {"bias": bias, "check_offsets": check_offsets}
        if not self.adapter_enabled:
            y: Tensor = base(x, offsets, **others)
            return y
        if self._merged is not None:
            merged = self._merged[0]
            if is_intercepted(base):
                _sources.share_hooks(base, merged)  # these may be younger than the merged weight
            y = merged(x, offsets, **others)
        else:
            y = self._adapted(base, x, offsets, bias, check_offsets)
        return y

    def _adapted(
        self,
        base: Experts4bit,
        x: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        check_offsets: bool,
    ) -> Tensor:
        """The base's result and the adapter's."""
        dropped = self.dropout if self.training else 0.0
        lora_a, lora_b = parameter(self, "lora_a"), parameter(self, "lora_b")
        if is_intercepted(base):
            y: Tensor = base(x, offsets, bias=bias, check_offsets=check_offsets)
            kept = dropout(x, dropped) if dropped else x
            a, b = (self.of_each(t.float()).mT for t in (lora_a, lora_b))
            hidden = differentiable_product(kept, a, offsets)
            return y + as_dtype(differentiable_product(hidden, b, offsets, self.scaling), y.dtype)
        dtype = base.compute_dtype
        cast = x if dtype is None else as_input(x, dtype)
        y = grouped_lora_by_weight(
            *(cast, base.as_operand(), base._weight_shape, offsets, lora_a, lora_b, self.scaling),
            *(base.bias_for(cast, bias), dropped, check_offsets),
        )
        return y if dtype is None else as_dtype(y, x.dtype)

    def of_each(self, factor: Tensor) -> Tensor:
        """A factor of each expert, ``[E, ...]``, of an A or a B like this one's."""
        return factor.expand(self.num_experts, -1, -1) if self.shared else factor

    @torch.no_grad()
    def to_merged(self) -> Experts4bit:
        """New experts with weights ``W + scaling · B A``, quantised anew one by one.

        Raises ValueError where a merged weight is not finite, RuntimeError where a weight is on the
        meta device.
        """
        base = self.base_layer
        if base.weight.is_meta or self.lora_a.is_meta:
            raise RuntimeError(
                "weight: is on the meta device, where there is nothing to merge; load the model "
                "first, or merge before offloading"
            )
        qw = base.quantized
        lora_a, lora_b = (self.of_each(factor).float() for factor in (self.lora_a, self.lora_b))
        sums = (
            expert.dequantize(torch.float32) + self.scaling * (b @ a)
            for expert, a, b in zip(qw, lora_a, lora_b, strict=True)
        )
        options = qw.format, qw.block_size, qw.double_quant, qw.codebook
        merged = quantize_each(sums, len(qw), *options).to(dtype=qw.dtype)
        experts = Experts4bit.from_quantized(merged, base.bias, transposed=base.transposed)
        experts.compute_dtype = base.compute_dtype
        return experts.train(base.training)

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return f"{super().extra_repr()}, shared={self.shared}"
