"""What LoRA adapters on any kind of layer have in common (arXiv 2106.09685), as PEFT has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from qkern.nn import _sources
from qkern.nn._module import parameter, require_grad
from qkern.nn._patterns import check_pattern, pattern_matches

if TYPE_CHECKING:
    from typing_extensions import Self

_Number = TypeVar("_Number", int, float)


def check_hyperparameters(r: object, alpha: object, dropout: object) -> None:
    """TypeError or ValueError naming what does not fit."""
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
        share_experts: whether the experts of a layer share one adapter, instead of one each.

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
    share_experts: bool = False

    def __post_init__(self) -> None:
        check_hyperparameters(self.r, self.alpha, self.dropout)
        for rank in self.rank_pattern.values():
            check_hyperparameters(rank, self.alpha, self.dropout)
        for alpha in self.alpha_pattern.values():
            check_hyperparameters(self.r, alpha, self.dropout)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                check_pattern(name, key)
        check_adapter_dtype(self.dtype)

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


def check_adapter_dtype(dtype: object) -> None:
    """TypeError or ValueError unless it is None or a floating dtype."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}; takes a torch.dtype")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; takes a floating dtype")


class LoRALayer(nn.Module):
    """What adapters on any kind of layer have in common."""

    base_layer: nn.Module
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    _merged: tuple[nn.Module] | None

    def _init_adapter(
        self,
        base_layer: nn.Module,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take the base and draw A and B, where the base's weight is or is computed."""
        self.base_layer = base_layer.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        weight = parameter(base_layer, "weight")
        place: torch.device | str | int = weight.device
        if weight.is_meta:
            place = _sources.execution_device(base_layer) or place
        with torch.inference_mode(False):  # its tensors could not be trained
            a = torch.empty(shape_a, device=place, dtype=dtype)
            b = torch.empty(shape_b, device=place, dtype=dtype)
            self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
            self.reset_parameters()
        self.adapter_enabled = True
        # In a tuple, since an attribute that is a module would enter the state dict.
        self._merged = None
        self.train(base_layer.training)

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def scaling(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` when rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the forward uses merged weights."""
        return self._merged is not None

    if TYPE_CHECKING:  # each kind has its own

        def to_merged(self) -> nn.Module: ...

    def merge(self) -> None:
        """Use merged weights in the forward from now on; memory grows by one weight.

        Later changes of A and B show only after :meth:`unmerge`. Raises RuntimeError when merged,
        and where the base's ``forward`` was replaced, as accelerate does where it offloads; errors
        of :meth:`to_merged`.
        """
        if self._merged is not None:
            raise RuntimeError("the adapter is merged already")
        if has_own_forward(self.base_layer) and not _sources.is_only_placed(self.base_layer):
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged[0]._apply(fn)
            self._merged[0].register_parameter("bias", parameter(self.base_layer, "bias"))
        return self

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return (
            f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, "
            f"use_rslora={self.use_rslora}, dtype={self.lora_a.dtype}"
        )


def is_intercepted(module: nn.Module) -> bool:
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
        or ("forward" in module.__dict__ and has_own_forward(module))
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether its ``forward`` was replaced by something else than its class's own."""
    replaced = module.__dict__.get("forward")
    return getattr(replaced, "__func__", replaced) not in (None, type(module).forward)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and layer of every adapter in ``model``, shared ones once.

    They are :class:`LoRALinear` and :class:`LoRAExperts`.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
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
    done: list[LoRALayer] = []
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
