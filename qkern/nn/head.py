"""A model's output embedding in 4 bits, with the input embedding that it is tied to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qkern import _errors
from qkern.nn import _sources
from qkern.nn._heads import output_embeddings
from qkern.nn._module import TENSORS, QuantizedModule, parameter, quantized_weight
from qkern.nn._options import replace_module
from qkern.nn.embedding import Embedding4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear


def quantize_head(
    model: nn.Module,
    format: str = "nf4",
    block_size: int = 32,
    double_quant: bool = False,
    *,
    codebook: Tensor | None = None,
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put the output embedding of ``model`` in 4 bits, in place, for faster generation.

    :func:`quantize_model` leaves it dense, because its rounding goes straight into the logits. But
    each token that is generated reads all of it: in a small model it can take as long as all other
    layers together. Call it before or after :func:`quantize_model`, and measure the loss of your
    text with it. Blocks are smaller than there and scales are not quantised: of a head that costs
    little memory, and otherwise it loses several times as much.

    The head is what ``get_output_embeddings()`` gives, otherwise the layer called ``lm_head`` or
    ``embed_out``. It becomes a :class:`Linear4bit`. Where its weight is also that of embeddings,
    each of them becomes an :class:`Embedding4bit` on the very same 4-bit parameters, so it stays
    tied and the dense weight is released. Hooks, attributes and modes are kept; weights are frozen,
    a bias stays as it is. :func:`dequantize_model` makes all of them dense again. A head that is in
    4 bits already stays as it is.

    Other arguments are those of :func:`quantize_model`. Returns ``model``.

    Raises, before anything is changed, ValueError where ``model`` has no such head; its weight is
    also that of a layer that is neither linear nor an embedding; a tied one has no whole number of
    blocks; a layer carries what would be lost; and the errors of :func:`qkern.quantize_4bit`.
    TypeError where a layer's class may compute something else, or the head has an adapter.
    """
    if compute_dtype is not None:
        _errors.check_float_dtype("compute_dtype", compute_dtype)
    _sources.check_model(model)
    head = output_embeddings(model)
    if head is None:
        raise ValueError(
            f"model: got {type(model).__name__}, which has no output embedding "
            "(get_output_embeddings, lm_head or embed_out)"
        )
    if isinstance(head, Linear4bit):
        return model
    if isinstance(head, LoRALinear):
        raise TypeError("model: its head has an adapter; quantise the head first")
    layers = _holders(model, head)
    if not any(layer is head for layer, _ in layers):
        raise ValueError(
            f"model: got {type(model).__name__}, whose get_output_embeddings() gives a module that "
            "is none of its own"
        )
    weight = _checked(model, head, layers, block_size)
    with torch.inference_mode(False):  # its tensors could not be trained with
        qw = quantized_weight(weight, format, block_size, double_quant, codebook, check_finite)
    first: QuantizedModule | None = None
    for layer, paths in layers:
        new: Linear4bit | Embedding4bit
        if isinstance(layer, nn.Embedding):
            new = Embedding4bit._around(qw, layer)
        else:
            bias = layer.bias
            assert bias is None or isinstance(bias, nn.Parameter)
            new = Linear4bit.from_quantized(qw, bias, compute_dtype=compute_dtype)
            new.take_over(layer)
        if first is None:
            first = new
        else:
            new._parameters.update((name, parameter(first, name)) for name in TENSORS)
        replace_module(model, paths, new)
    return model


def _holders(model: nn.Module, head: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module that has the head's weight, with its paths."""
    weight = head._parameters.get("weight")
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = module._parameters.values()
        if module is head or (weight is not None and any(_same(held, weight) for held in own)):
            found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def _same(held: Tensor | None, weight: Tensor) -> bool:
    """Whether both are one weight; two parameters may have one memory."""
    if held is None or held is weight or held.is_meta or weight.is_meta:
        return held is weight
    return held.shape == weight.shape and held.data_ptr() == weight.data_ptr()


def _checked(
    model: nn.Module,
    head: nn.Module,
    layers: list[tuple[nn.Module, list[str]]],
    block_size: int,
) -> Tensor:
    """The head's weight, if all of ``layers`` can be replaced."""
    tied = False
    for layer, paths in layers:
        is_table = isinstance(layer, nn.Embedding)
        tied = tied or is_table
        if not (is_table or isinstance(layer, nn.Linear)):
            raise ValueError(
                f"model: the head's weight is also that of {paths[0]}, a {type(layer).__name__}; "
                "takes one of linear layers and embeddings"
            )
        kind = _sources.EMBEDDING if is_table else _sources.LINEAR
        _sources.check_layer(paths[0] or "model", layer, kind)
        if isinstance(layer, nn.Embedding):
            Embedding4bit._check_norm(layer)
    _sources.check_held_elsewhere(model, (layer for layer, _ in layers))
    weight = head.weight
    assert isinstance(weight, Tensor)
    _errors.check_block_size(block_size)
    if tied and math.prod(weight.shape) % block_size:
        raise ValueError(
            f"block_size: got {block_size} for a tied head of shape {list(weight.shape)}; takes "
            "one that divides its number of elements"
        )
    return weight
