"""Which modules of a model on the meta device become 4-bit ones, and the change itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qkern.integrations._hf_versions import LOADS_EXPERTS, hold_as
from qkern.nn import _experts, _sources
from qkern.nn._experts import Stack
from qkern.nn._heads import find_heads
from qkern.nn._module import TENSORS, QuantizedModule
from qkern.nn._names import is_inside
from qkern.nn._options import (
    Options,
    by_weight,
    check_layers,
    check_stacks,
    replace_module,
    stays_dense,
    use_padded_batches,
)
from qkern.nn._targets import _read_by_parent, select, select_stacks
from qkern.nn.embedding import Embedding4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.report import log_dense, quantization_report


@dataclass
class Plan:
    """What is to be in 4 bits, how, and what was loaded of it."""

    format: str
    block_size: int
    double_quant: bool
    compute_dtype: torch.dtype | None = None
    paths: dict[str, QuantizedModule] = field(default_factory=dict)
    """By each path of a 4-bit module."""
    dense: dict[str, nn.Module] = field(default_factory=dict)
    """What stood there, for a directory that has a dense weight after all."""

    def add(self, model: nn.Module, paths: list[str]) -> QuantizedModule:
        """Put a 4-bit module of meta tensors at ``paths``, where one dense module is."""
        dense: Any = model.get_submodule(paths[0])
        fields = self.format, self.block_size, self.double_quant
        layer: QuantizedModule
        if isinstance(dense, nn.Embedding):
            layer = Embedding4bit.from_embedding(dense, *fields)
        else:
            layer = Linear4bit.from_linear(dense, *fields, compute_dtype=self.compute_dtype)
        # transformers would initialise what it finds no flag on.
        layer._is_hf_initialized = True
        replace_module(model, paths, layer)
        self.paths.update(dict.fromkeys(paths, layer))
        self.dense.update(dict.fromkeys(paths, dense))
        return layer

    def add_stack(self, stack: Stack) -> None:
        """Put experts in 4 bits, of meta tensors, where a dense tensor of them is."""
        fields = self.format, self.block_size, self.double_quant
        experts = _experts.quantized(stack, *fields, compute_dtype=self.compute_dtype)
        _experts.use_4_bits(stack, experts)
        self.paths[stack.whole_name] = experts

    def owner(self, name: str) -> str | None:
        """The path of the 4-bit module whose weight has the tensor ``name``; None for no such."""
        path, _, tensor = name.rpartition(".")
        return path if tensor in TENSORS and path in self.paths else None


def quantize_structure(
    model: Any, plan: Plan, skip: Iterable[str], *, embeddings: bool = False
) -> None:
    """Replace the layers that `qkern.nn.quantize_model` takes, and token tables if asked.

    Its checks come first, and its errors, before anything is changed.
    """
    skip = tuple(skip)
    fields = plan.format, plan.block_size, plan.double_quant
    options = Options(*fields, None, True, plan.compute_dtype)
    ties = _ties(model)
    tables = _tables(model, skip, ties) if embeddings else {}
    dense = stays_dense(model)
    stacks = tuple(_experts.stacks(model)) if LOADS_EXPERTS else ()
    paths, _ = select(model, "all-linear", (*skip, *dense), "skip", quantized=False, stacks=stacks)
    stacks = tuple(select_stacks(model, stacks, "all-linear", (*skip, *dense)))
    groups = by_weight(model, paths, explicit=False)
    groups = [group for group in groups if not _tied_to_dense(group, ties, paths)]
    check_layers(model, groups, options)
    check_stacks(model, stacks, options)
    for table in tables.values():
        _check_table(table, model.get_submodule(table[0]), plan)
    for group in groups:
        for layer_paths in group:
            plan.add(model, layer_paths)
    for table in tables.values():
        plan.add(model, table)
    for stack in stacks:
        plan.add_stack(stack)
    _tie_in_4_bits(model, plan, ties)
    use_padded_batches(model)
    log_dense(quantization_report(model), (*skip, *dense))


def quantize_like_bitsandbytes(
    model: Any,
    plan: Plan,
    skip: Iterable[str] | None,
    more: Iterable[str] = (),
    *,
    spare_heads: bool,
    new: Iterable[str] = (),
    experts: bool = False,
) -> None:
    """Replace the layers that transformers replaces by bitsandbytes', but for ``more``.

    And experts, of which transformers has one tensor, if the files have layers of them in 4 bits.

    Names in ``skip`` and ``more`` mean what they mean there, and those in ``new`` what they mean in
    `QKernConfig`. ``spare_heads`` leaves heads dense that ``skip`` does not name: for a directory,
    which may have none for a new task's head, and has one in 4 bits where it is.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = HfQuantizer.get_modules_to_not_convert(
        model, None if skip is None else list(skip), model._keep_in_fp32_modules
    )
    spared = [*spared, *more]
    read: set[int] = {*_read_by_parent(model), *(find_heads(model).spared if spare_heads else ())}
    chosen: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Conv1D) and type(module) is not nn.Linear:
            continue
        if id(module) in read or is_inside(path, new):
            continue
        if should_convert_module(path, spared):
            chosen.setdefault(id(module), []).append(path)
    for paths in chosen.values():
        plan.add(model, paths)
    for stack in [*_experts.stacks(model)] if experts else ():
        plan.add_stack(stack)
    _tie_in_4_bits(model, plan, _ties(model))
    use_padded_batches(model)
    log_dense(quantization_report(model), skip or ())


def _ties(model: Any) -> dict[str, str]:
    """``{target: source}`` of the parameters that transformers will tie."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _weight_names(paths: Iterable[str]) -> set[str]:
    return {f"{path}.weight" for path in paths}


def _tied_to_dense(group: list[list[str]], ties: Mapping[str, str], paths: list[list[str]]) -> bool:
    """Whether a weight will be tied to one that stays dense."""
    chosen = _weight_names(path for layer in paths for path in layer)
    own = _weight_names(path for layer in group for path in layer)
    pairs = [{target, source} for target, source in ties.items()]
    return any(pair & own and not pair <= chosen for pair in pairs)


def _tables(model: Any, skip: tuple[str, ...], ties: Mapping[str, str]) -> dict[int, list[str]]:
    """Token tables, and what is tied to one: ``{id: paths}``.

    A token table is what a model of transformers gives as its input embeddings, and any other with
    as many rows as one of those, as the tables of each layer's inputs in Gemma 3n.
    """
    paths: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    inputs: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        modules[path] = module
        paths.setdefault(id(module), []).append(path)
        if callable(getattr(module, "get_input_embeddings", None)):
            try:
                inputs.add(id(module.get_input_embeddings()))
            except (AttributeError, NotImplementedError):
                continue  # a model without tokens
    rows = {
        m.num_embeddings
        for m in modules.values()
        if isinstance(m, nn.Embedding) and id(m) in inputs
    }
    found: dict[int, list[str]] = {}
    for module in modules.values():
        if isinstance(module, nn.Embedding) and module.num_embeddings in rows:
            found[id(module)] = paths[id(module)]
    found = {k: v for k, v in found.items() if not any(is_inside(path, skip) for path in v)}
    for target, source in ties.items():
        one, other = (modules.get(name.removesuffix(".weight")) for name in (target, source))
        if one is None or other is None or not {id(one), id(other)} & found.keys():
            continue
        for module in (one, other):
            path = paths[id(module)][0]
            if not isinstance(module, nn.Embedding) and not _sources.is_linear(module):
                raise TypeError(
                    f"quantize_embeddings: {path} is a {type(module).__name__} and tied to a token "
                    "table; takes an nn.Linear"
                )
            if any(is_inside(name, skip) for name in paths[id(module)]):
                raise ValueError(
                    f"skip: {path} is tied to a token table; skip the table too, or leave "
                    "quantize_embeddings off"
                )
            found[id(module)] = paths[id(module)]
    return found


def _check_table(paths: list[str], module: Any, plan: Plan) -> None:
    """Its class is known, nothing of it would be lost, and a head can have the same weight."""
    try:
        kind = _sources.EMBEDDING if isinstance(module, nn.Embedding) else _sources.LINEAR
        _sources.check_layer(paths[0], module, kind)
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantize_embeddings: {error}") from error
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"quantize_embeddings: {paths[0]} has a max_norm; skip it")
    if module.weight.numel() % plan.block_size:
        raise ValueError(
            f"block_size: got {plan.block_size}; {paths[0]} has {module.weight.numel()} elements, "
            "and takes a divisor of that in 4 bits, for a head may be tied to it"
        )


def _tie_in_4_bits(model: Any, plan: Plan, ties: Mapping[str, str]) -> None:
    """Have transformers tie all tensors of a weight where it ties the weight."""
    if not ties:
        return
    mine: dict[str, str] = {}
    for target, source in ties.items():
        one, other = plan.owner(target), plan.owner(source)
        if one is None or other is None:
            continue
        for name in TENSORS[1:]:
            if getattr(plan.paths[other], name, None) is not None:
                mine[f"{one}.{name}"] = f"{other}.{name}"
    if mine:
        model.all_tied_weights_keys = {**ties, **mine}
        # It is what saving goes by, and `tie_weights()` of a user.
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **mine}


def hold_codes_as(model: Any, plan: Plan, dtype: torch.dtype) -> None:
    """See `_hf_versions.hold_as`; not of weights that will be those of others."""
    ties = _ties(model)
    layers = {id(m): m for path, m in plan.paths.items() if f"{path}.weight" not in ties}
    for layer in layers.values():
        hold_as(layer, dtype)


def untie_parts(model: Any) -> None:
    """Forget what `_tie_in_4_bits` added, of a model that is dense again."""

    def rest(ties: Mapping[str, str]) -> dict[str, str]:
        return {k: v for k, v in ties.items() if k.rpartition(".")[2] not in TENSORS[1:]}

    model.all_tied_weights_keys = rest(_ties(model))
    if model._tied_weights_keys:
        model._tied_weights_keys = rest(model._tied_weights_keys)
