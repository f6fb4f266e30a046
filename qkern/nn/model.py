"""Whole models: quantise their linear layers, add LoRA, prepare for training."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from qkern import _errors
from qkern.nn import _experts, _sources, _statistics
from qkern.nn._adapters import LoRAConfig, LoRALayer, lora_layers
from qkern.nn._experts import Stack
from qkern.nn._heads import find_heads
from qkern.nn._module import QuantizedModule
from qkern.nn._names import plain_paths
from qkern.nn._options import (
    Options,
    by_weight,
    check_done,
    check_layers,
    check_stacks,
    naming,
    replace_module,
    stays_dense,
    use_padded_batches,
)
from qkern.nn._targets import Targets, is_own, select, select_stacks
from qkern.nn.dense import FrozenLinear
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear
from qkern.nn.lora_experts import LoRAExperts
from qkern.nn.report import QuantizationReport, log_dense, quantization_report


@overload
def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    codebook: Tensor | None = None,
    targets: Targets = "all-linear",
    skip: Iterable[str] = (),
    lora: LoRAConfig | None = None,
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    codebook: Tensor | None = None,
    targets: Targets = "all-linear",
    skip: Iterable[str] = (),
    lora: LoRAConfig | None = None,
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    return_report: Literal[True],
) -> tuple[nn.Module, QuantizationReport]: ...


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    codebook: Tensor | None = None,
    targets: Targets = "all-linear",
    skip: Iterable[str] = (),
    lora: LoRAConfig | None = None,
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, QuantizationReport]:
    """Replace linear layers of ``model`` by 4-bit ones, in place, and freeze everything else.

    Each dense weight is released before the next layer is quantised, so memory peaks at the model
    plus one layer (unless the caller holds the weights elsewhere). A layer found in two places
    stays one layer, and layers that share a weight share its 4-bit form. A weight that is shared
    with anything else, such as an output head tied to the embedding, stays dense: quantising it
    would take memory and untie it. Biases, hooks, attributes, and train/eval mode are kept. On the
    meta device only the structure is made, for ``load_state_dict(..., assign=True)``.

    **Heads stay dense**, whatever ``skip`` holds: a model's output embeddings (``lm_head``,
    ``embed_out``, what ``get_output_embeddings()`` gives), and what a task adds: whatever a model
    of transformers has beside its base model, or somebody put around it, if that is the smaller
    part; in other models layers called ``score``, ``classifier`` or ``qa_outputs``. Output
    embeddings are frozen. What a task added stays as trainable as it was, since it is random at
    first: give an optimizer ``[p for p in model.parameters() if p.requires_grad]``, not only
    :func:`lora_parameters`. A head is quantised, and frozen, where it is targeted itself: by a name
    that matches nothing but heads, or by a regular expression.

    **Layers are taken by their exact class**: ``nn.Linear``, subclasses that are known to compute
    the same (``FalconLinear`` of transformers), and transformers' ``Conv1D`` (GPT-2), whose weight
    ``[in, out]`` is transposed and which :func:`dequantize_model` makes again. Others may
    compute something else; if one would be taken, the call raises. So does a layer of which
    something would be lost: a weight
    that is computed (parametrisations, weight norm, pruning), a ``forward`` of its own, a tensor
    subclass as its weight. ``skip`` leaves such a layer as it is. Passed over without an error are
    the layers that ``nn.MultiheadAttention`` computes with itself, and routers of experts.

    **Experts** that a model of transformers keeps in tensors of three dimensions (Mixtral,
    Qwen3-MoE, DeepSeek-V3, OLMoE, GLM-4-MoE, gpt-oss, Llama 4 and others) become
    :class:`Experts4bit`, each expert quantised by itself; ``config._experts_implementation`` is
    then ``"qkern"``, whose forward reads only experts that have tokens. A target or ``skip`` may
    name such a tensor, as ``"experts.down_proj"``, or with ``skip`` the module around it.

    With the targets ``"all-linear"`` other weights of more than 1 % of the model's bytes that stay
    dense are logged once, as a warning of the logger ``qkern.nn`` unless all are of embeddings,
    heads, convolutions and routers, or in ``skip``; ``return_report`` returns what is logged.

    **All or nothing**: all checks come before the first change, those of ``lora`` too, so after
    such an error the corrected call works on the same model. What stops the call later, such as a
    lack of memory or Ctrl-C, leaves a model that works, with some layers in 4 bits and nothing
    frozen yet; the same call then does the rest.

    Args:
        model: any module that contains such layers.
        format: ``"nf4"``, ``"fp4"`` or ``"custom"``.
        block_size: elements that share a scale: a power of two from 32 to 16384.
        double_quant: whether the scales are quantised to 8 bits.
        codebook: the 16 values of the format ``"custom"``.
        targets: ``"all-linear"``, which leaves out heads, and layers of transformers' models whose
            weight is asked for its dtype (``_keep_in_fp32_modules``, as for bitsandbytes: ``wo`` of
            T5) or read by their module (Mamba); or names, each matching the layers whose path is it
            or ends in ``"." + it``; or one regular expression for the whole path. Paths are without
            what ``torch.compile`` and wrappers for checkpointing put into them.
        skip: names of layers, or of modules around them, to leave alone beside the heads; they win
            over targets.
        lora: adapters to add afterwards, by :func:`add_lora` with the same ``skip``.
        check_finite: whether a NaN or infinite weight raises.
        compute_dtype: what the layers cast their input to, see :class:`Linear4bit`; None computes
            in the input's dtype.
        return_report: whether to return what is in 4 bits and what stays dense, too: the
            :func:`quantization_report` of the quantised model.

    Returns:
        ``model``, or ``(model, report)``.

    Raises:
        ValueError: a target matches nothing, is tied to a weight that stays dense, or is in 4 bits
            in another format already; a layer carries what would be lost; ``model`` has adapters,
            is wrapped for data parallelism, was made under ``torch.inference_mode``, or is on the
            meta device in part; and the errors of :func:`qkern.quantize_4bit`, naming the layer.
        TypeError: a target is not of a class that is taken.
    """
    skip = _names("skip", skip)
    if isinstance(model, nn.Linear) or _sources.is_transposed(model):
        raise TypeError("model: got a single layer; use Linear4bit.from_linear")
    if lora is not None and not isinstance(lora, LoRAConfig):
        raise TypeError(f"lora: got {type(lora).__name__}; takes a LoRAConfig")
    _sources.check_model(model)
    _check_no_lora(model)
    if compute_dtype is not None:
        _errors.check_float_dtype("compute_dtype", compute_dtype)
    options = Options(format, block_size, double_quant, codebook, check_finite, compute_dtype)
    dense = stays_dense(model) if targets == "all-linear" else ()
    stacks = tuple(_experts.stacks(model))
    paths, done = select(model, targets, (*skip, *dense), "targets", quantized=False, stacks=stacks)
    if targets != "all-linear" or not paths:
        check_done(model, done, options)
    groups = by_weight(model, paths, explicit=targets != "all-linear")
    chosen = select_stacks(model, stacks, targets, (*skip, *dense))
    if not groups and not done and not chosen:
        raise ValueError("targets: every linear layer found is tied to a weight that stays dense")
    check_layers(model, groups, options)
    check_stacks(model, chosen, options)
    if lora is not None:
        soon = {id(model.get_submodule(paths[0])) for group in groups for paths in group}
        _lora_targets(model, lora, skip, soon, chosen)
    _quantize(model, groups, chosen, options)
    _freeze(model)
    use_padded_batches(model)
    report = quantization_report(model)
    if targets == "all-linear":
        log_dense(report, (*skip, *dense))
    if lora is not None:
        add_lora(model, lora, skip=skip)
    return (model, report) if return_report else model


def _check_no_lora(model: nn.Module) -> None:
    for name, _ in lora_layers(model):
        raise ValueError(f"model: has LoRA already, at {name}; quantise first")


def _quantize(
    model: nn.Module, groups: list[list[list[str]]], stacks: list[Stack], options: Options
) -> None:
    taken, total = 0, sum(map(len, groups)) + len(stacks)
    try:
        for group in groups:
            shared: Linear4bit | None = None
            for layer_paths in group:
                linear = model.get_submodule(layer_paths[0])
                with naming(layer_paths[0]):
                    if shared is None:
                        replacement = shared = Linear4bit.from_linear(linear, **options._asdict())
                    else:
                        bias: Any = linear.bias
                        replacement = shared.with_same_weight(bias)
                        replacement.take_over(linear)
                replace_module(model, layer_paths, replacement)
                taken += 1
        for stack in stacks:
            with naming(stack.whole_name):
                _experts.use_4_bits(stack, _experts.quantized(stack, **options._asdict()))
            taken += 1
    except BaseException as error:
        if sys.version_info >= (3, 11):
            error.add_note(
                f"quantize_model: {taken} of {total} weights are in 4 bits, nothing is frozen; "
                "the same call does the rest"
            )
        raise


def _freeze(model: nn.Module) -> None:
    """Freeze all but what a task added to the model, outside of its 4-bit layers."""
    added = find_heads(model).added
    kept: set[int] = set()
    frozen: set[int] = set()
    for module in model.modules():
        inside = id(module) in added and not isinstance(module, QuantizedModule)
        ids = {id(parameter) for parameter in module.parameters(recurse=False)}
        (kept if inside else frozen).update(ids)
    for parameter in model.parameters():
        if id(parameter) in frozen or id(parameter) not in kept:
            parameter.requires_grad_(False)


def add_lora(model: nn.Module, config: LoRAConfig, *, skip: Iterable[str] = ()) -> nn.Module:
    """Put adapters around linear layers of ``model``, in place; freeze the rest.

    Linear layers get a :class:`LoRALinear`, experts in 4 bits a :class:`LoRAExperts`.
    Works on 4-bit and on dense layers, but not on a dense ``Conv1D`` of transformers.
    ``config.targets`` and ``skip`` are read as by
    :func:`quantize_model`: heads get no adapter unless they are targeted themselves, and what a
    task added stays as trainable as it was. Hooks of a layer, and accelerate's, stay on it and are
    called with it. Nothing changes before all checks are done. Returns ``model``.

    Raises ValueError when a target matches nothing, ``model`` carries LoRA already, or a layer's
    weight is computed (weight norm, pruning); TypeError when a target is not a linear layer.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: got {type(config).__name__}; takes a LoRAConfig")
    for name, _ in lora_layers(model):
        raise ValueError(f"model: has LoRA already, at {name}")
    _sources.check_model(model)
    names = plain_paths(model)
    made: list[tuple[list[str], LoRALayer]] = []
    for layer_paths in _lora_targets(model, config, _names("skip", skip), ()):
        base, name = model.get_submodule(layer_paths[0]), names[layer_paths[0]]
        layer: LoRALayer
        if isinstance(base, Experts4bit):
            layer = LoRAExperts.from_config(base, config, name)
        else:
            assert isinstance(base, nn.Linear)
            layer = LoRALinear.from_config(base, config, name)
        made.append((layer_paths, layer))
    _freeze(model)
    _statistics.remember(model)
    for layer_paths, adapted in made:
        replace_module(model, layer_paths, adapted)
    return model


def _lora_targets(
    model: nn.Module,
    config: LoRAConfig,
    skip: tuple[str, ...],
    soon: Collection[int],
    stacks: Sequence[Stack] = (),
) -> list[list[str]]:
    """The paths of each layer that gets an adapter, all checks done.

    ``soon`` has the ids of layers that will be in 4 bits by then, ``stacks`` such experts.
    """
    paths, _ = select(
        *(model, config.targets, skip, "lora.targets"), quantized=True, soon=soon, stacks=stacks
    )
    for layer_paths in paths:
        layer = model.get_submodule(layer_paths[0])
        reason = None if is_own(layer) else _sources.strange_parameters(layer)
        if reason is not None:
            raise ValueError(f"lora.targets: {layer_paths[0]} ({type(layer).__name__}) {reason}")
    _sources.check_held_elsewhere(model, (model.get_submodule(found[0]) for found in paths))
    return paths


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, use_reentrant: bool = False
) -> nn.Module:
    """Put ``model`` in train mode, ready for a training step with frozen embeddings.

    With ``gradient_checkpointing`` (models that have ``gradient_checkpointing_enable``, as those
    of transformers do) activations are recomputed in backward; ``use_reentrant`` chooses torch's
    older way, which needs an input that requires grad, so the embedding's output is made to.
    Frozen dense layers in 16 bits on the CPU become :class:`FrozenLinear`, sharing their
    parameters, hooks and attributes; subclasses and layers with a ``forward`` of their own do not.

    Unlike PEFT's ``prepare_model_for_kbit_training``, nothing is cast to float32: norms compute
    in float32 inside anyway, their frozen weights gain nothing, and a float32 norm weight would
    make every activation after it float32. Returns ``model``.

    Raises ValueError when no parameter is trainable, an adapter is merged, or a parameter is on the
    meta device or was made under ``torch.inference_mode``; TypeError when the model cannot
    checkpoint.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: no parameter is trainable; add LoRA first")
    for path, layer in lora_layers(model):
        if layer.merged:
            raise ValueError(
                f"model: the adapter at {path} is merged and would get no gradients; call "
                "unmerge_lora first"
            )
    _sources.check_tensors(model)
    _sources.check_trainable(model)
    if gradient_checkpointing:
        # transformers 5 renamed it; both take torch.utils.checkpoint's arguments first.
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
            model, "gradient_checkpointing_enable", None
        )
        if enable is None:
            raise TypeError(
                f"model: got {type(model).__name__}, which has no gradient_checkpointing_enable; "
                "takes a transformers model, or gradient_checkpointing=False"
            )
        if use_reentrant and not hasattr(model, "enable_input_require_grads"):
            raise TypeError(
                f"use_reentrant: got True for {type(model).__name__}, which has no "
                "enable_input_require_grads"
            )
        enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()  # type: ignore[operator]
    _widen_frozen_layers(model)
    return model.train()


def _widen_frozen_layers(model: nn.Module) -> None:
    layers: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and type(module) is nn.Linear and _sources.would_lose(module) is None:
            layers.setdefault(id(module), []).append(path)
    for paths in layers.values():
        linear = model.get_submodule(paths[0])
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        if weight.is_cpu and weight.element_size() == 2 and not weight.requires_grad:
            replace_module(model, paths, FrozenLinear.from_linear(linear))


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{argument}: got the string {names!r}; takes a list of names")
    return tuple(names)
