"""How layers are quantised, and all that is checked before the first is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qkern.experts import quantize_experts
from qkern.functional import quantize_4bit
from qkern.nn import _experts, _sources
from qkern.nn._experts import Stack
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit
from qkern.tensor import QuantizedTensor, Stored


class Options(NamedTuple):
    """How layers are quantised: the arguments of `quantize_4bit` after the weight, then another."""

    format: str
    block_size: int
    double_quant: bool
    codebook: Tensor | None
    check_finite: bool
    compute_dtype: torch.dtype | None

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """``weight`` in 4 bits."""
        return quantize_4bit(weight, *self[:5])

    def check(self, weight: Tensor) -> None:
        """Raise what quantising it would; three dimensions are those of experts."""
        if weight.dim() == 3:
            quantize_experts(weight, *self[:5])
        else:
            self.quantize(weight)

    def made(self, layer: Linear4bit | Experts4bit) -> bool:
        """Whether ``layer`` is as they would make it."""
        found: Stored = layer.quantized
        same = found.format, found.block_size, found.double_quant, layer.compute_dtype
        if same != (self.format, self.block_size, self.double_quant, self.compute_dtype):
            return False
        if found.codebook is None or found.codebook.is_meta or self.codebook is None:
            return True
        return torch.equal(found.codebook.cpu(), self.codebook.detach().cpu())


def check_done(model: nn.Module, done: list[str], options: Options) -> None:
    """ValueError unless all of ``done``, in 4 bits already, are as this call would make them."""
    for path in done:
        layer = model.get_submodule(path)
        assert isinstance(layer, Linear4bit | Experts4bit)
        if not options.made(layer):
            raise ValueError(
                f"targets: {path} is in 4 bits already, in another format ({layer.extra_repr()})"
            )


def check_layers(model: nn.Module, groups: list[list[list[str]]], options: Options) -> None:
    """All that can be wrong with a layer, before the first is changed."""
    chosen = (model.get_submodule(paths[0]) for group in groups for paths in group)
    _sources.check_held_elsewhere(model, chosen)
    fine: set[tuple[torch.Size, torch.dtype]] = set()
    for group in groups:
        for paths in group:
            layer = model.get_submodule(paths[0])
            if (reason := _sources.would_lose(layer)) is not None:
                raise ValueError(f"targets: {paths[0]} ({type(layer).__name__}) {reason}")
        with naming(group[0][0]):
            weight = _sources.matrix(model.get_submodule(group[0][0]))
            _check_weight(weight, options, fine)


def check_stacks(model: nn.Module, stacks: Sequence[Stack], options: Options) -> None:
    """The same of tensors of experts."""
    fine: set[tuple[torch.Size, torch.dtype]] = set()
    for stack in stacks:
        _experts.check_stack(model, stack)
        with naming(stack.whole_name):
            assert stack.parameter is not None
            _check_weight(stack.parameter.detach(), options, fine)


def _check_weight(
    weight: Tensor, options: Options, fine: set[tuple[torch.Size, torch.dtype]]
) -> None:
    """Raise where ``weight`` cannot be quantised; ``fine`` is of which sizes it is known."""
    if (weight.shape, weight.dtype) not in fine:
        # On meta all arguments are checked and nothing is computed.
        options.check(torch.empty_like(weight, device="meta"))
        fine.add((weight.shape, weight.dtype))
    if options.check_finite:
        check_finite_weight(weight, options)


_SURELY_FINE = 2.0**14
"""Of weights up to here, no scale and no sum of scales overflows in any dtype or format."""


def check_finite_weight(weight: Tensor, options: Options) -> None:
    """Raise as `quantize_4bit` would, which is called for suspects only."""
    if weight.is_meta or weight.numel() == 0:
        return
    if weight.dtype == torch.float16:
        low, high = torch.aminmax(weight)
        largest = max(-float(low), float(high))
    else:
        # No less than the largest, and torch has it in two thirds of the time.
        largest = float(torch.linalg.vector_norm(weight))
    # Not so of a NaN either, which stays one in both.
    if not largest <= _SURELY_FINE:
        options.check(weight)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the layer's name before what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


_DTYPE_ASKED = {
    "LongT5DenseActDense": "wo",
    "LongT5DenseGatedActDense": "wo",
    "SwitchTransformersDenseActDense": "wo",
    "Pix2StructVisionMlp": "wo",
    "Pix2StructTextDenseGatedActDense": "wo",
    "Kosmos2_5VisionMlp": "wo",
    "Pop2PianoDenseActDense": "wo",
    "Pop2PianoDenseGatedActDense": "wo",
    "NllbMoeDenseActDense": "fc2",
    "SeamlessM4TFeedForwardNetwork": "fc2",
    "SeamlessM4Tv2FeedForwardNetwork": "fc2",
}
"""Layers of transformers to whose weight's dtype their module casts the input, by its class."""


def stays_dense(model: nn.Module) -> tuple[str, ...]:
    """What is no use in 4 bits: names that models of transformers keep in float32, and paths.

    Among these are routers: a token's way hangs on a rounding there, for a few bytes.
    """
    names = set(_experts.routers(model))
    for path, module in model.named_modules():
        for kept in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names.update(getattr(module, kept, None) or ())
        if child := _DTYPE_ASKED.get(type(module).__name__):
            names.add(f"{path}.{child}" if path else child)
    return tuple(sorted(names))


def use_padded_batches(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from nested tensors, which only its dense kernel takes."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, Linear4bit) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False


def by_weight(
    model: nn.Module, layers: list[list[str]], *, explicit: bool
) -> list[list[list[str]]]:
    """Group layers that share a weight, leaving out weights that anything else holds too.

    Only paths and ids are kept: a reference here would keep every dense weight alive.
    """
    groups: dict[int, list[list[str]]] = {}
    chosen = {path for paths in layers for path in paths}
    transposed: dict[int, bool] = {}
    for paths in layers:
        layer = model.get_submodule(paths[0])
        groups.setdefault(key := id(layer.weight), []).append(paths)
        if transposed.setdefault(key, _sources.is_transposed(layer)) != _sources.is_transposed(
            layer
        ):
            raise ValueError(
                f"targets: the weight of {paths[0]} is also that of {groups[key][0][0]}, for which "
                "it is the transposed one; skip both"
            )
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
