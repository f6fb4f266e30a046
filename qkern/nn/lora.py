"""LoRA adapters on frozen linear layers (arXiv 2106.09685), as PEFT defines them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

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
from qkern.nn._module import parameter, require_grad
from qkern.nn._patterns import check_pattern, pattern_matches
from qkern.nn.linear import Linear4bit
from qkern.ops import is_traced
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Self

_Number = TypeVar("_Number", int, float)


def _check_hyperparameters(r: object, alpha: object, dropout: object) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: got {type(r).__name__}; takes an int")
    if r < 1:
        raise ValueError(f"r: got {r}; takes a positive rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha: got {type(alpha).__name__}; takes a number")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha}; takes a positive finite number")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout: got {type(dropout).__name__}; takes a number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}; takes a probability in [0, 1)")


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get an adapter, and of what kind.

    Attributes:
        r: rank of the update B A.
        alpha: the update is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: probability of zeroing an input of A in training, in [0, 1).
        targets: ``"all-linear"``; or names, each matching the modules whose path is it or ends in
            ``"." + it``; or one regular expression for the whole path, as in PEFT.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        dtype: of A and B. None, as in PEFT, takes float32 even on a 16-bit base, for the sake of
            small updates.
        rank_pattern: rank by name, where it differs from ``r``. As in PEFT a name is a regular
            expression for the path or its last components, so ``"fc"`` is also ``"block.fc"`` and
            ``"^fc"`` is not; the first that matches counts. Backreferences, flags, and atomic or
            possessive parts are not taken, and any other expression is matched in bounded time.
        alpha_pattern: alpha by name, where it differs from ``alpha``; names as in rank_pattern.

    Raises TypeError or ValueError naming the field that does not fit.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: str | tuple[str, ...] | list[str] = "all-linear"
    use_rslora: bool = False
    dtype: torch.dtype | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_hyperparameters(self.r, self.alpha, self.dropout)
        for rank in self.rank_pattern.values():
            _check_hyperparameters(rank, self.alpha, self.dropout)
        for alpha in self.alpha_pattern.values():
            _check_hyperparameters(self.r, alpha, self.dropout)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                check_pattern(name, key)
        _check_adapter_dtype(self.dtype)

    def r_for(self, path: str) -> int:
        """The rank of the layer at ``path``."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_for(self, path: str) -> float:
        """The alpha of the layer at ``path``."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)


def _by_pattern(pattern: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    """The value of the first key that, as in PEFT, matches ``path`` or its last components."""
    for key, value in pattern.items():
        if pattern_matches(key, path):
            return value
    return default


def _check_adapter_dtype(dtype: object) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}; takes a torch.dtype")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; takes a floating dtype")


class LoRALinear(nn.Module):
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
        _check_hyperparameters(r, alpha, dropout)
        _check_adapter_dtype(dtype)
        weight = base_layer.weight
        if dtype is None:
            # A 4-bit base has any of three dtypes, none wider than float32.
            dense_dtype = torch.float32 if isinstance(base_layer, Linear4bit) else weight.dtype
            dtype = torch.promote_types(dense_dtype, torch.float32)
        self.base_layer = base_layer.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        place: torch.device | str | int = weight.device
        if weight.is_meta:
            place = _sources.execution_device(base_layer) or place
        with torch.inference_mode(False):  # its tensors could not be trained
            a = torch.empty(r, base_layer.in_features, device=place, dtype=dtype)
            b = torch.empty(base_layer.out_features, r, device=place, dtype=dtype)
            self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
            self.reset_parameters()
        self.adapter_enabled = True
        # In a tuple, since an attribute that is a module would enter the state dict.
        self._merged: tuple[nn.Linear] | None = None
        self.train(base_layer.training)

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

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def scaling(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` when rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

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

    @property
    def merged(self) -> bool:
        """Whether the forward uses merged weights."""
        return self._merged is not None

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
            if _is_intercepted(base):
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
        if _has_own_forward(base) and not (placed and "_hf_hook" in vars(base)):
            raise RuntimeError(
                "base_layer: its forward was replaced after merging, as accelerate does, so the "
                "merged weight would not be used; unmerge first"
            )
        if _is_intercepted(base):
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

    def merge(self) -> None:
        """Use merged weights in the forward from now on; memory grows by one weight.

        Later changes of A and B show only after :meth:`unmerge`. Raises RuntimeError when merged,
        and where the base's ``forward`` was replaced, as accelerate does where it offloads; errors
        of :meth:`to_merged`.
        """
        if self._merged is not None:
            raise RuntimeError("the adapter is merged already")
        if _has_own_forward(self.base_layer) and not _sources.is_only_placed(self.base_layer):
            raise RuntimeError(
                "base_layer: its forward was replaced, as accelerate does where it offloads, so a "
                "merged weight would not be used; remove accelerate's hooks first "
                "(remove_hook_from_module)"
            )
        merged = self.to_merged()
        _sources.share_hooks(self.base_layer, merged)
        _sources.share_placement(self.base_layer, merged)
        self._merged = (merged,)

    def unmerge(self) -> None:
        """Go back to base plus adapter, exactly as before; RuntimeError when not merged."""
        if self._merged is None:
            raise RuntimeError("the adapter is not merged")
        self._merged = None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of every module, except that a 4-bit weight stays frozen."""
        require_grad(self, requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged[0]._apply(fn)
            self._merged[0].bias = self.base_layer.bias
        return self

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return (
            f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, "
            f"use_rslora={self.use_rslora}, dtype={self.lora_a.dtype}"
        )


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


def _is_intercepted(module: nn.Module) -> bool:
    """Whether somebody waits for its call: hooks, or accelerate, which replaces ``forward``."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _global_forward_pre_hooks
        or _global_forward_hooks
        or _global_backward_pre_hooks
        or _global_backward_hooks
        or ("forward" in module.__dict__ and _has_own_forward(module))
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its ``forward`` was replaced by something else than its class's own."""
    replaced = module.__dict__.get("forward")
    return getattr(replaced, "__func__", replaced) not in (None, type(module).forward)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Path and layer of every :class:`LoRALinear` in ``model``, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every A and B in ``model``, for an optimizer.

    The head of a task, which :func:`quantize_model` leaves trainable, is not among them:
    ``[p for p in model.parameters() if p.requires_grad]`` has both.
    """
    for _, layer in lora_layers(model):
        yield layer.lora_a
        yield layer.lora_b


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` answers as its base does, merged or not."""
    before = [(layer, layer.adapter_enabled) for _, layer in lora_layers(model)]
    try:
        for layer, _ in before:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.adapter_enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """:meth:`LoRALinear.merge` on every adapter that is not merged; where one raises, on none."""
    done: list[LoRALinear] = []
    try:
        for _, layer in lora_layers(model):
            if not layer.merged:
                layer.merge()
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_lora(model: nn.Module) -> None:
    """:meth:`LoRALinear.unmerge` on every merged adapter."""
    for _, layer in lora_layers(model):
        if layer.merged:
            layer.unmerge()
