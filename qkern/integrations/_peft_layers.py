"""PEFT's LoRA on 4-bit weights: computed by the fused op, merged by quantising anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from qkern.autograd import as_dtype
from qkern.functional import as_input, lora_by_weight
from qkern.integrations import _peft_originals as originals
from qkern.integrations._peft_dora import Dora, DoraLayer
from qkern.integrations._peft_inits import check_loftq, dense_base, loftq, requantize
from qkern.nn import Linear4bit, _sources
from qkern.nn._adapters import is_intercepted
from qkern.nn._module import QuantizedModule


class _Merging:
    """Merging into a 4-bit weight, and back to the very codes of before.

    The weight with all merged adapters is quantised once, from the codes without any: merging a
    second adapter adds no second error. Those codes are kept until `unmerge`, so a merged layer
    holds two 4-bit weights.
    """

    merged_adapters: list[str]
    get_base_layer: Callable[[], Any]
    _kept: dict[str, nn.Parameter | None] | None = None
    """The parameters of the base layer without adapters, while some are merged."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters, by default the active ones, into the base layer's 4-bit weight.

        It is quantised anew in its own format. Raises ValueError where the sum is not finite, with
        ``safe_merge`` and without; RuntimeError where the weight is on the meta device, and for a
        ``lora_bias`` where the layer has no bias. Then nothing is merged.
        """
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantizedModule):
            self._merge_dense(safe_merge, adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if self._has_adapter(name)]
        if not names:
            return
        if base.weight.is_meta:
            raise RuntimeError(
                "weight: is on the meta device, where there is nothing to merge; load the model "
                "first, or merge before offloading"
            )
        merged = base._parameters.copy()
        if self._kept is not None:
            base._parameters.update(self._kept)
        before = base._parameters.copy()
        try:
            every = [*self.merged_adapters, *names]
            bias = self._merged_bias(every)
            dense = base.quantized.dequantize(torch.float32)
            for name in every:
                dense = self._with_adapter(dense, name)
                if not torch.isfinite(dense).all():
                    raise ValueError(f"{name}: the merged weight is not finite")
            base._set_quantized(requantize(dense.contiguous(), base.quantized))
        except BaseException:
            base._parameters.update(merged)
            raise
        if bias is not None:
            base.bias = bias
        self._kept = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer the parameters that it had before any adapter was merged."""
        if self._kept is None:
            super().unmerge()  # type: ignore[misc]
            return
        base = self.get_base_layer()
        if not isinstance(base, QuantizedModule):
            raise RuntimeError(
                f"base_layer: is a {type(base).__name__} now, with the adapters in its weight; "
                "unmerge before dequantising"
            )
        base._parameters.update(self._kept)
        self._kept = None
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self._kept is not None:
            own = self.get_base_layer()._parameters
            for name, kept in self._kept.items():
                if kept is None or kept is own.get(name):
                    continue
                moved = fn(kept.data)
                if torch._has_compatible_shallow_copy_type(kept, moved):
                    kept.data = moved
                else:
                    self._kept[name] = nn.Parameter(moved, kept.requires_grad)
        return self

    def _merge_dense(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def _has_adapter(self, name: str) -> bool:
        raise NotImplementedError

    def _with_adapter(self, dense: Tensor, name: str) -> Tensor:
        raise NotImplementedError

    def _merged_bias(self, names: list[str]) -> nn.Parameter | None:
        return None


class QKernLinear(_Merging, Linear):
    """LoRA on a `qkern.nn.Linear4bit`: ``qkern.lora_linear`` for what is active.

    It has all of PEFT's ``lora.Linear``. One Function computes base and adapter where neither is
    merged nor disabled and nobody waits for one of the modules to be called (hooks, accelerate,
    tensor parallelism). All else, such as mixed batches and variants, goes PEFT's way on the 4-bit
    base.

    PiSSA, OLoRA, CorDA and LoRA-GA take a part out of the base weight: the rest is quantised anew.
    LoftQ needs the original weight: see `original_weights`.
    """

    _path: str = ""
    """Where the layer is in its model."""

    _unrepeatable: dict[str, str]
    """Adapters whose base cannot be made again of the plainly quantised weight, and what it was
    made of."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base's weight is ``[in, out]``: a dense layer that was a Conv1D."""
        return _sources.is_transposed(self.get_base_layer())

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        """PEFT sets it from the configuration, where it is a layer's before quantisation."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Those that do without the numbers of the weight, and DoRA."""
        return {
            (): None,
            ("use_dora",): Dora,
            ("arrow_config",): variants.ArrowLinearVariant,
            ("alora_invocation_tokens",): variants.ALoraLinearVariant,
            ("mica",): variants.MiCALinearVariant,
        }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            y = self._fused(x)
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        """Base and the active adapters by one Function; None where PEFT's way must be taken."""
        modules = self._modules
        base: Any = modules["base_layer"]
        if type(base) is not Linear4bit or is_intercepted(base):
            return None
        names = self._active_adapter
        if type(names) is not str:
            if len(names) != 1:
                return self._fused_several(x, base, names)
            names = names[0]
        a: Any = modules["lora_A"]._modules.get(names)
        if a is None:
            return base(x)
        b: Any = modules["lora_B"]._modules[names]
        dropout: Any = modules["lora_dropout"]._modules[names]
        scaling = self.scaling[names]
        if self.lora_variant and names in self.lora_variant:
            return None
        if not (_is_plain(a) and _is_plain(b) and type(scaling) is float):
            return None
        p = 0.0
        if type(dropout) is nn.Dropout:
            if dropout.training:
                p = dropout.p
                if p >= 1:
                    return None
        elif type(dropout) is not nn.Identity:
            return None
        dtype = base.compute_dtype
        cast = x if dtype is None else as_input(x, dtype)
        bias = base.bias_for(cast)
        own_bias = b._parameters["bias"]
        if own_bias is not None:
            own_bias = (own_bias * scaling).to(cast.dtype)
            bias = own_bias if bias is None else bias + own_bias
        weight, shape = base.as_operand(), base._weight_shape
        lora_a, lora_b = a._parameters["weight"], b._parameters["weight"]
        y = lora_by_weight(cast, weight, shape, lora_a, lora_b, scaling, bias, p)
        return y if dtype is None else as_dtype(y, x.dtype)

    def _fused_several(self, x: Tensor, base: Any, names: list[str]) -> Tensor | None:
        """Several adapters as one, of the sum of their ranks; None with dropout or variants."""
        parts: list[tuple[Tensor, Tensor]] = []
        for name in names:
            if name not in self.lora_A:
                continue
            a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            scaling = self.scaling[name]
            drops = type(dropout) is not nn.Identity and (
                type(dropout) is not nn.Dropout or (dropout.training and dropout.p)
            )
            if drops or name in self.lora_variant or b.bias is not None:
                return None
            if not (_is_plain(a) and _is_plain(b) and type(scaling) is float):
                return None
            parts.append((a.weight, b.weight * scaling))
        if not parts:
            return base(x)
        lora_a = torch.cat([a for a, _ in parts])
        lora_b = torch.cat([b for _, b in parts], 1)
        dtype = base.compute_dtype
        cast = x if dtype is None else as_input(x, dtype)
        weight, shape, bias = base.as_operand(), base._weight_shape, base.bias_for(cast)
        y = lora_by_weight(cast, weight, shape, lora_a, lora_b, 1.0, bias, 0.0)
        return y if dtype is None else as_dtype(y, x.dtype)

    # Merging.

    def _has_adapter(self, name: str) -> bool:
        return name in self.lora_A

    def _with_adapter(self, dense: Tensor, name: str) -> Tensor:
        variant = self.lora_variant.get(name)
        if variant is not None and not isinstance(variant, Dora):
            return variant.merge_safe(self, name, dense)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        delta = (b.float() @ a.float()) * self.scaling[name]
        if variant is not None:
            return variant.merged(self, name, self.get_base_layer(), dense, delta)
        return dense + delta

    def _merged_bias(self, names: list[str]) -> nn.Parameter | None:
        added = [name for name in names if self.lora_bias[name]]
        if not added:
            return None
        bias = self.get_base_layer().bias
        if bias is None:
            raise RuntimeError(
                f"{added[0]}: has a bias (lora_bias), and the base layer has none to merge it into"
            )
        total = bias.float()
        for name in added:
            total = total + self.lora_B[name].bias.float() * self.scaling[name]
            if not torch.isfinite(total).all():
                raise ValueError(f"{name}: the merged bias is not finite")
        return nn.Parameter(total.to(bias.dtype), bias.requires_grad)

    def _merge_dense(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        for layer in self.lora_magnitude_vector.values():
            if isinstance(layer, DoraLayer):
                layer.fan_in_fan_out = self.fan_in_fan_out
        super()._merge_dense(safe_merge, adapter_names)

    # Initialisation.

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        """Add an adapter; as in PEFT.

        Raises ValueError for a variant that takes the weight for dense numbers.
        """
        self._path = kwargs.get("target_name") or self._path
        for name in ("kasa_config", "velora_config", "monteclora_config", "use_bdlora"):
            if getattr(config, name, None):
                raise ValueError(f"{name}: cannot be used with the 4-bit weight of {self._path}")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _note_source(self, adapter_name: str, source: str) -> None:
        """Remember that the base of an adapter was made of ``source``, for `unrepeatable`."""
        self._unrepeatable = {**vars(self).get("_unrepeatable", {}), adapter_name: source}

    def unrepeatable(self, adapter_name: str) -> str | None:
        """What its base was made of that loading the adapter alone does not have; None if nothing.

        Then a saved adapter does not find its base again.
        """
        known: dict[str, str] = vars(self).get("_unrepeatable", {})
        return known.get(adapter_name)

    def _by_numbers(
        self, changes: bool, adapter_name: str = "", source: str | None = None
    ) -> AbstractContextManager[None]:
        """Within it the base layer is dense, for PEFT's initialisations.

        Where it ``changes`` the base for an adapter, ``source`` is what it is made of beside the
        base's weight.
        """
        parent: Any = self
        while hasattr(parent.base_layer, "base_layer"):
            parent = parent.base_layer
        base = parent.base_layer
        if not isinstance(base, Linear4bit):
            raise TypeError(f"base_layer: got {type(base).__name__}; takes a Linear4bit")
        if changes and self.merged_adapters:
            raise RuntimeError(
                "init_lora_weights: changes the base weight, in which adapters are merged; "
                "unmerge first"
            )
        if base.weight.is_meta:
            raise RuntimeError(
                f"init_lora_weights: needs the weight of {self._path}, which is on the meta device"
            )
        if changes and self.lora_A[adapter_name].weight.is_meta:
            raise ValueError(
                "low_cpu_mem_usage: got True with an init_lora_weights that changes the base "
                f"weight of {self._path}; takes False"
            )
        known = originals.current()
        if changes and known is not None:
            source = "the original weights"
        if changes and source is not None:
            self._note_source(adapter_name, source)
        if known is None:
            weight = base.quantized.dequantize(torch.float32)
        else:
            weight = known.weight(base, self._path).clone()  # PEFT may write into it
        return dense_base(parent, base, weight, changes)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Principal singular values and vectors (arXiv 2404.02948); the rest is the new base."""
        with self._by_numbers(True, adapter_name), _same_numbers(self.weight):
            super().pissa_init(adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        """Orthonormal factors (arXiv 2406.01775); the rest is the new base."""
        with self._by_numbers(True, adapter_name):
            super().olora_init(adapter_name)

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Context-oriented factors (arXiv 2406.05223); the rest is the new base."""
        with self._by_numbers(True, adapter_name, "CorDA's covariances"):
            super().corda_init(adapter_name, init_lora_weights)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        """Factors of a gradient (arXiv 2407.05000); the rest is the new base."""
        prepared = hasattr(self.get_base_layer(), "_peft_loraga_grad")
        with self._by_numbers(prepared, adapter_name, "LoRA-GA's gradients"):
            super().lora_ga_init(adapter_name, lora_ga_config)

    def mica_init(self, adapter_name: str) -> None:
        """Minor singular vectors (arXiv 2604.01694); the base stays."""
        with self._by_numbers(changes=False):
            super().mica_init(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        """Orthogonal random factors, in float32; the base stays."""
        with self._by_numbers(changes=False):
            super().orthogonal_init(adapter_name)

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """LoftQ from the original weight: base and adapter together are near it.

        ValueError outside of `original_weights`; but an adapter that is loaded for inference, of
        one iteration, needs none: its base is the plainly quantised weight.
        """
        iterations = check_loftq(config)
        known = originals.current()
        if known is None:
            if iterations == 1 and config.inference_mode:
                self.reset_lora_parameters(adapter_name, True)
                return
            raise ValueError(
                'init_lora_weights: got "loftq" on a 4-bit weight, of which the original is not '
                "known; takes it within qkern.integrations.peft.original_weights(...)"
            )
        if self.merged_adapters:
            raise RuntimeError('init_lora_weights: got "loftq" with merged adapters; unmerge first')
        base = self.get_base_layer()
        original = known.weight(base, self._path)
        made = loftq(original, base.quantized, self.r[adapter_name], iterations)
        base._set_quantized(made[0])
        if iterations > 1:
            self._note_source(adapter_name, "the original weights")
        self.set_factors(adapter_name, made[1], made[2])

    def set_factors(self, adapter_name: str, a: Tensor, b: Tensor) -> None:
        """Take A ``[r, in]`` and B ``[out, r]`` such that the adapter adds ``b @ a``."""
        self.lora_A[adapter_name].weight.data = a.contiguous()
        self.lora_B[adapter_name].weight.data = (b / self.scaling[adapter_name]).contiguous()


@contextmanager
def _same_numbers(weight: Tensor) -> Iterator[None]:
    """Within it random numbers are always the same, and those outside are as without it.

    A loaded adapter finds its base again only where the decomposition is the same.
    """
    with torch.random.fork_rng(
        [] if weight.is_cpu else [weight.device], device_type=weight.device.type
    ):
        torch.manual_seed(0)
        yield


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer that nobody waits to see called."""
    return type(module) is nn.Linear and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class QKernEmbedding(_Merging, Embedding):
    """LoRA on a `qkern.nn.Embedding4bit`: PEFT's, and merged by quantising anew."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """None: they compute with the numbers of the table."""
        return {(): None}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _get_embed_scale(self) -> Any:
        """What the table's rows are multiplied by, and the adapter's with them; None for 1."""
        scale = getattr(self.get_base_layer(), "_embed_scale", None)
        return scale if scale is None else torch.tensor(scale, device=self.weight.device)

    def _embed(
        self, input: Tensor, weight: Tensor, input_fn: Any = None, output_fn: Any = None
    ) -> Any:
        if input_fn is not None:
            input = input_fn((input,))
        output = F.embedding(input, weight, padding_idx=self.get_base_layer().padding_idx)
        return output if output_fn is None else output_fn(output)

    def loftq_init(self, adapter_name: str, *args: Any) -> None:
        """Refuse: PEFT has no LoftQ of embeddings that could be loaded."""
        raise ValueError('init_lora_weights: got "loftq" for an embedding; takes linear layers')

    def _has_adapter(self, name: str) -> bool:
        return name in self.lora_embedding_A

    def _with_adapter(self, dense: Tensor, name: str) -> Tensor:
        a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
        return dense + (b.float() @ a.float()).t() * self.scaling[name]
