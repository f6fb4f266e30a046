"""Whole models: quantise their linear layers, add LoRA, prepare for training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from qkern.nn.dense import FrozenLinear
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRAConfig, LoRALinear, lora_layers

Targets = str | Sequence[str]


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    codebook: Tensor | None = None,
    targets: Targets = "all-linear",
    skip: Iterable[str] = ("lm_head",),
    lora: LoRAConfig | None = None,
    check_finite: bool = True,
) -> nn.Module:
    """Replace linear layers of ``model`` by 4-bit ones, in place, and freeze everything else.

    Each dense weight is released before the next layer is quantised, so memory peaks at the model
    plus one layer (unless the caller holds the weights elsewhere). A layer found in two places
    stays one layer, and layers that share a weight share its 4-bit form. A weight that is shared
    with anything else, such as an output head tied to the embedding, stays dense: quantising it
    would take memory and untie it. Biases, hooks, and train/eval mode are kept. On the meta device
    only the structure is made, for ``load_state_dict(..., assign=True)``.

    Args:
        model: any module that contains ``nn.Linear`` layers (exactly that class).
        format: ``"nf4"``, ``"fp4"`` or ``"custom"``.
        block_size: elements that share a scale: a power of two from 32 to 4096.
        double_quant: whether the scales are quantised to 8 bits.
        codebook: the 16 values of the format ``"custom"``.
        targets: ``"all-linear"``, which leaves out what a transformers model names in
            ``_keep_in_fp32_modules``, as for bitsandbytes (T5: ``wo``, of whose weight the model
            asks the dtype); or names, each matching the layers whose path is it or ends in
            ``"." + it``; or one regular expression for the whole path.
        skip: names of layers, or of modules around them, to leave alone; they win over targets.
        lora: adapters to add afterwards, by :func:`add_lora` with the same ``skip``.
        check_finite: whether a NaN or infinite weight raises.

    Returns:
        ``model``.

    Raises:
        ValueError: a target matches nothing, or is tied to a weight that stays dense; and the
            errors of :func:`qkern.quantize_4bit`, naming the layer. Layers done before it stay
            quantised.
        TypeError: a target is not an ``nn.Linear``.
    """
    skip = _names("skip", skip)
    if isinstance(model, nn.Linear):
        raise TypeError("model: got a single layer; use Linear4bit.from_linear")
    dense = _kept_by_transformers(model) if targets == "all-linear" else ()
    paths = _select(model, targets, (*skip, *dense), (nn.Linear,), "targets")
    groups = _by_weight(model, paths, explicit=targets != "all-linear")
    if not groups:
        raise ValueError("targets: every linear layer found is tied to a weight that stays dense")
    model.requires_grad_(False)
    for group in groups:
        shared: Linear4bit | None = None
        for layer_paths in group:
            linear = model.get_submodule(layer_paths[0])
            assert isinstance(linear, nn.Linear)
            if shared is None:
                try:
                    replacement = shared = Linear4bit.from_linear(
                        linear,
                        format,
                        block_size,
                        double_quant,
                        codebook=codebook,
                        check_finite=check_finite,
                    )
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{layer_paths[0]}: {error}") from error
            else:
                replacement = shared.with_same_weight(linear.bias).train(linear.training)
            _move_hooks(linear, replacement)
            replace_module(model, layer_paths, replacement)
    _use_padded_batches(model)
    if lora is not None:
        add_lora(model, lora, skip=skip)
    return model


def _kept_by_transformers(model: nn.Module) -> tuple[str, ...]:
    """Names of modules that models of transformers want in float32, those of inner models too."""
    names = (getattr(module, "_keep_in_fp32_modules", None) for module in model.modules())
    return tuple(sorted({name for some in names for name in some or ()}))


def _use_padded_batches(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from nested tensors, which only its dense kernel takes."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, Linear4bit) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False


def add_lora(
    model: nn.Module, config: LoRAConfig, *, skip: Iterable[str] = ("lm_head",)
) -> nn.Module:
    """Put a :class:`LoRALinear` around linear layers of ``model``, in place; freeze the rest.

    Works on 4-bit and on dense layers. ``config.targets`` and ``skip`` are read as by
    :func:`quantize_model`. Returns ``model``.

    Raises ValueError when a target matches nothing or ``model`` carries LoRA already, TypeError
    when a target is not a linear layer.
    """
    for name, _ in lora_layers(model):
        raise ValueError(f"model: has LoRA already, at {name}")
    paths = _select(
        model,
        config.targets,
        _names("skip", skip),
        (nn.Linear, FrozenLinear, Linear4bit),
        "lora.targets",
    )
    model.requires_grad_(False)
    for layer_paths in paths:
        name = layer_paths[0]
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        replace_module(model, layer_paths, LoRALinear.from_config(base, config, name))
    return model


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, use_reentrant: bool = False
) -> nn.Module:
    """Put ``model`` in train mode, ready for a training step with frozen embeddings.

    With ``gradient_checkpointing`` (models that have ``gradient_checkpointing_enable``, as those
    of transformers do) activations are recomputed in backward; ``use_reentrant`` chooses torch's
    older way, which needs an input that requires grad, so the embedding's output is made to.
    Frozen dense layers in 16 bits on the CPU become :class:`FrozenLinear`, sharing their
    parameters.

    Unlike PEFT's ``prepare_model_for_kbit_training``, nothing is cast to float32: norms compute
    in float32 inside anyway, their frozen weights gain nothing, and a float32 norm weight would
    make every activation after it float32. Returns ``model``.

    Raises ValueError when no parameter is trainable, TypeError when the model cannot checkpoint.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: no parameter is trainable; add LoRA first")
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
        enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()  # type: ignore[operator]
    _widen_frozen_layers(model)
    return model.train()


def _widen_frozen_layers(model: nn.Module) -> None:
    layers: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and type(module) is nn.Linear:
            layers.setdefault(id(module), []).append(path)
    for paths in layers.values():
        linear = model.get_submodule(paths[0])
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        if weight.is_cpu and weight.element_size() == 2 and not weight.requires_grad:
            replacement = FrozenLinear.from_linear(linear)
            _move_hooks(linear, replacement)
            replace_module(model, paths, replacement)


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{argument}: got the string {names!r}; takes a list of names")
    return tuple(names)


def _select(
    model: nn.Module,
    targets: Targets,
    skip: tuple[str, ...],
    kinds: tuple[type[nn.Module], ...],
    argument: str,
) -> list[list[str]]:
    """Paths of the chosen layers of exactly these kinds, all paths of one layer together."""
    layers: dict[int, list[str]] = {}
    others: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not path:
            continue
        if type(module) in kinds:
            layers.setdefault(id(module), []).append(path)
        else:
            others[path] = type(module).__name__
    # One skipped place is enough: the layer is the same everywhere.
    kept = [paths for paths in layers.values() if not any(_inside(path, skip) for path in paths)]
    if targets == "all-linear":
        if kept:
            return kept
        hint = " (its Conv1D layers are not supported)" if "Conv1D" in others.values() else ""
        raise ValueError(f"model: has no nn.Linear outside skip={list(skip)}{hint}")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    matches = _is_whole if isinstance(targets, str) else _is_or_ends_in
    chosen: dict[int, list[str]] = {}
    for pattern in patterns:
        matched = [paths for paths in kept if any(matches(pattern, path) for path in paths)]
        if not matched:
            wrong = {path: kind for path, kind in others.items() if matches(pattern, path)}
            skipped = [p for paths in layers.values() for p in paths if matches(pattern, p)]
            raise _no_match(argument, pattern, wrong, skipped, kept)
        chosen.update((id(paths), paths) for paths in matched)
    return list(chosen.values())


def _no_match(
    argument: str,
    pattern: str,
    wrong: dict[str, str],
    skipped: list[str],
    kept: list[list[str]],
) -> Exception:
    if skipped:
        return ValueError(f"{argument}: {pattern!r} matches {skipped[0]}, which is in skip")
    if wrong:
        path, kind = next(iter(wrong.items()))
        why = ", whose weight is transposed" if kind == "Conv1D" else ""
        return TypeError(f"{argument}: {path} is a {kind}{why}; takes exactly nn.Linear")
    names = sorted({paths[0].rpartition(".")[2] for paths in kept})
    return ValueError(
        f"{argument}: {pattern!r} matches no linear layer; the model has {', '.join(names[:20])}"
    )


def _is_whole(pattern: str, path: str) -> bool:
    return re.fullmatch(pattern, path) is not None


def _is_or_ends_in(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def _inside(path: str, names: tuple[str, ...]) -> bool:
    """Whether one of ``names`` is the path or a run of whole components of it."""
    return any(f".{name}." in f".{path}." for name in names)


def _by_weight(
    model: nn.Module, layers: list[list[str]], *, explicit: bool
) -> list[list[list[str]]]:
    """Group layers that share a weight, leaving out weights that anything else holds too.

    Only paths and ids are kept: a reference here would keep every dense weight alive.
    """
    groups: dict[int, list[list[str]]] = {}
    chosen = {path for paths in layers for path in paths}
    for paths in layers:
        groups.setdefault(id(model.get_submodule(paths[0]).weight), []).append(paths)
    for path, module in model.named_modules(remove_duplicate=False):
        if path in chosen:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            tied = groups.pop(id(parameter), None)
            if tied is not None and explicit:
                raise ValueError(
                    f"targets: the weight of {tied[0][0]} is also {path}.{name}, which stays dense"
                )
    return list(groups.values())


def replace_module(model: nn.Module, paths: list[str], replacement: nn.Module) -> None:
    """Put ``replacement`` at every one of ``paths``."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    # The dictionaries themselves, so that handles given out before can still remove their hooks.
    for name in _HOOKS:
        if hooks := getattr(source, name):
            setattr(target, name, hooks)
    target._is_full_backward_hook = source._is_full_backward_hook
    if source._forward_pre_hooks and isinstance(target, Linear4bit):
        # The dictionary took the place of the layer's own, which tells of hooks when it is empty.
        target.register_forward_pre_hook(_no_change)


def _no_change(module: nn.Module, args: object) -> None:
    """A hook that stays when the others are removed: see ``_NamedHooks``."""
