"""LoRA adapters on frozen linear layers (arXiv 2106.09685), as PEFT defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkern.autograd import AddAdapter, as_dtype, as_matrix
from qkern.functional import (
    _cpu_matmul_dtype,
    as_input,
    batch_invariant_now,
    dequantize_4bit,
    lora_by_weight,
    quantize_4bit,
)
from qkern.nn import _sources
from qkern.nn._adapters import (
    LoRAConfig,
    LoRALayer,
    check_adapter_dtype,
    check_hyperparameters,
    has_own_forward,
    is_intercepted,
)
from qkern.nn._module import parameter
from qkern.nn.linear import Linear4bit
from qkern.ops import is_traced
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    pass


class LoRALinear(LoRALayer):
    """``y = base(x) + scaling · B A dropout(x)`` with the base frozen.

    ``lora_a`` is ``[r, in]``, drawn as ``nn.Linear`` draws its weight; ``lora_b`` is ``[out, r]``
    and starts at zero, so a fresh adapter changes nothing. ``base_layer`` is a
    :class:`Linear4bit` or an ``nn.Linear``. A and B are cast to the dtype of the base's result,
    which is x's or autocast's; their gradients arrive in their own. So float32 adapters on a
    bfloat16 model behave as under autocast with PEFT, with no float32 copy of x kept for backward.
    A base with a ``compute_dtype`` has x cast to that first, and the sum of both cast back.
    (On a CPU that only emulates matmuls in that dtype, the adapter is computed in float32.)

    Where somebody waits for the base to be called (hooks on it or on all modules, accelerate), it
    is called as a module, so that what they do to its input or result is done with an adapter too.
    A base that accelerate offloads gets its adapter on the device where it is computed.

    After :meth:`merge` the forward uses one merged weight, which lies beside the base's and has the
    base's hooks: the base and the state dict stay as they were, so :meth:`unmerge` is exact and
    saving is always of the unmerged model.

    Raises TypeError for a base of another class (a subclass may compute something else), ValueError
    for one whose weight is computed, as under weight norm, or was made under
    ``torch.inference_mode``; and for hyperparameters that do not fit.
    """

    base_layer: Linear4bit | nn.Linear
    _merged: tuple[nn.Linear] | None

    def __init__(
        self,
        base_layer: Linear4bit | nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_base(base_layer)
        check_hyperparameters(r, alpha, dropout)
        check_adapter_dtype(dtype)
        weight = base_layer.weight
        if dtype is None:
            # A 4-bit base has any of three dtypes, none wider than float32.
            dense_dtype = torch.float32 if isinstance(base_layer, Linear4bit) else weight.dtype
            dtype = torch.promote_types(dense_dtype, torch.float32)
        shapes = (r, base_layer.in_features), (base_layer.out_features, r)
        self._init_adapter(base_layer, *shapes, r, alpha, dropout, use_rslora, dtype)

    @classmethod
    def from_config(
        cls, base_layer: Linear4bit | nn.Linear, config: LoRAConfig, path: str
    ) -> LoRALinear:
        """The layer that ``config`` asks for at ``path``; its targets are not looked at."""
        return cls(
            base_layer,
            config.r_for(path),
            config.alpha_for(path),
            config.dropout,
            use_rslora=config.use_rslora,
            dtype=config.dtype,
        )

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
        """The base's weight, without the adapter: of a 4-bit base the packed codes."""
        return self.base_layer.weight

    @property
    def quantized(self) -> QuantizedTensor:
        """The base's 4-bit weight; TypeError on a dense base."""
        if not isinstance(self.base_layer, Linear4bit):
            raise TypeError("base_layer: got a dense layer; quantized takes a Linear4bit")
        return self.base_layer.quantized

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        # Sooner than by attribute, as in `parameter`.
        base: nn.Linear = self._modules["base_layer"]  # type: ignore[assignment]
        if not self.adapter_enabled:
            return base(x)
        if self._merged is not None:
            return self._call_merged(x)
        dropout = self.dropout if self.training else 0.0
        if isinstance(base, Linear4bit):
            if is_intercepted(base):
                return self._plus_adapter(base(x), x, dropout, base.compute_dtype)
            lora_a, lora_b = parameter(self, "lora_a"), parameter(self, "lora_b")
            dtype = base.compute_dtype
            cast = x if dtype is None else as_input(x, dtype)
            weight, shape, bias = base.as_operand(), base._weight_shape, base.bias_for(cast)
            adapter = (lora_a, lora_b, self.scaling)
            y = lora_by_weight(cast, weight, shape, *adapter, bias, dropout)
            return y if dtype is None else as_dtype(y, x.dtype)
        y = base(x)
        hidden = F.linear(F.dropout(x, dropout).to(y.dtype), self.lora_a.to(y.dtype))
        return y + F.linear(hidden, self.lora_b.to(y.dtype)) * self.scaling

    def _call_merged(self, x: Tensor) -> Tensor:
        assert self._merged is not None
        merged, base = self._merged[0], self.base_layer
        placed = _sources.follows_placement(base, merged)
        if has_own_forward(base) and not (placed and "_hf_hook" in vars(base)):
            raise RuntimeError(
                "base_layer: its forward was replaced after merging, as accelerate does, so the "
                "merged weight would not be used; unmerge first"
            )
        if is_intercepted(base):
            _sources.share_hooks(base, merged)  # these may be younger than the merged weight
        y: Tensor = merged(x)
        return y

    def _plus_adapter(
        self, y: Tensor, x: Tensor, dropout: float, compute_dtype: torch.dtype | None
    ) -> Tensor:
        """The base's result and the adapter's, as exact as `lora_linear` gives them.

        On a CPU that begins the base's sums with the adapter's term, so the last bits may differ.
        A base that has a ``compute_dtype`` wider than x gave a result that is rounded already.
        """
        given = y.dtype
        if compute_dtype is not None:
            y, x = y.to(compute_dtype), x.to(compute_dtype)
        return as_dtype(self._sum(y, x, dropout), given)

    def _sum(self, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        dtype = y.dtype
        if y.is_cpu and not torch.is_autocast_enabled("cpu"):
            dtype = _cpu_matmul_dtype(dtype)
        rows, kept = as_matrix(y), as_matrix(F.dropout(x, dropout))
        lora_a, lora_b = self.lora_a.to(dtype), self.lora_b.to(dtype)
        if not is_traced():
            invariant = batch_invariant_now()
            total: Tensor = AddAdapter.apply(rows, kept, lora_a, lora_b, self.scaling, invariant)
            return total.view(y.shape)
        hidden = F.linear(kept.to(dtype), lora_a)
        if dtype == y.dtype:
            return torch.addmm(rows, hidden, lora_b.mT, alpha=self.scaling).view(y.shape)
        return torch.add(rows, hidden @ lora_b.mT, alpha=self.scaling).to(y.dtype).view(y.shape)

    @torch.no_grad()
    def to_merged(self) -> nn.Linear:
        """A new layer of the base's kind with weight ``W + scaling · B A``; it shares the bias.

        The sum is taken in at least float32. A dense weight is then rounded to its dtype. A 4-bit
        weight is quantised anew in its own format, which loses much of a small update: generate
        from the unmerged layer where that matters.

        Raises ValueError where the merged weight is not finite, RuntimeError where a weight is on
        the meta device, as when accelerate offloads it.
        """
        base = self.base_layer
        if base.weight.is_meta or self.lora_a.is_meta:
            raise RuntimeError(
                "weight: is on the meta device, where there is nothing to merge; load the model "
                "first, or merge before offloading"
            )
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        delta = (self.lora_b.to(wide) @ self.lora_a.to(wide)) * self.scaling
        if isinstance(base, Linear4bit):
            qw = base.quantized
            merged = quantize_4bit(
                dequantize_4bit(qw, dtype=torch.float32) + delta.float(),
                format=qw.format,
                block_size=qw.block_size,
                double_quant=qw.double_quant,
                codebook=qw.codebook,
            ).to(dtype=qw.dtype)
            quantized = Linear4bit.from_quantized(merged, base.bias)
            quantized._take_settings(base)
            layer: nn.Linear = quantized
        else:
            dense = (base.weight.to(wide) + delta).to(base.weight.dtype)
            if not torch.isfinite(dense).all():
                raise ValueError("lora_a, lora_b: the merged weight is not finite")
            layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            layer.weight = nn.Parameter(dense, requires_grad=False)
            layer.bias = base.bias
        return layer.train(base.training)


def _check_base(base: nn.Module) -> None:
    if isinstance(base, Linear4bit):
        known = type(base).forward is Linear4bit.forward
    else:
        known = _sources.is_linear(base)
    if not known:
        raise TypeError(
            f"base_layer: got {type(base).__name__}; takes Linear4bit or nn.Linear, no subclass "
            "with a forward of its own"
        )
    if not isinstance(base, Linear4bit):
        reason = _sources.strange_parameters(base)
        if reason is not None:
            raise ValueError(f"base_layer: {reason}")
    for name, held in base.named_parameters():
        if held.is_inference():
            raise ValueError(
                f"base_layer: its {name} was made under torch.inference_mode, so nothing can be "
                "trained with it"
            )
