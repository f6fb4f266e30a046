"""How large a model is, by what its weights stand for."""

from __future__ import annotations

import math

from torch import Tensor, nn

from qkern.nn._module import TENSORS, QuantizedModule, parameter
from qkern.nn.embedding import Embedding4bit


def count_parameters(
    model: nn.Module, trainable_only: bool = False, *, exclude_embeddings: bool = False
) -> int:
    """The number of elements of all parameters of ``model``, of 4-bit weights those they stand for.

    A weight ``[out, in]`` in 4 bits counts ``out * in``, and nothing for its scales; every other
    parameter its own elements, and of bitsandbytes' 4-bit ones those of the dense weight. What is
    shared counts once, a sharded parameter whole. So a quantised model has as many as the dense
    one, and with adapters these more.

    Args:
        model: any module, also a single layer.
        trainable_only: whether to count only what requires grad; 4-bit weights never do.
        exclude_embeddings: whether to leave out the weights of ``nn.Embedding`` and
            :class:`Embedding4bit`; a dense head that is tied to one goes with it.

    Returns:
        the number of elements.
    """
    elements: dict[int, int] = {}
    embeddings: set[int] = set()
    for module in model.modules():
        if exclude_embeddings and isinstance(module, nn.Embedding | Embedding4bit):
            embeddings.add(id(parameter(module, "weight")))
        if isinstance(module, QuantizedModule):
            elements.update((id(held), 0) for held in map(module._parameters.get, TENSORS[1:]))
            elements[id(parameter(module, "weight"))] = math.prod(module._weight_shape)
    total = 0
    for held in model.parameters():
        if id(held) not in embeddings and (held.requires_grad or not trainable_only):
            total += elements.get(id(held), _elements(held))
    return total


def _elements(held: Tensor) -> int:
    # bitsandbytes' packed weight has the dense one's shape in its state.
    shape = getattr(getattr(held, "quant_state", None), "shape", None)
    return held.numel() if shape is None else math.prod(shape)
