"""A small language model, made offline, and a layer of bitsandbytes'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def tiny_llama(**config: Any) -> Any:
    """A float32 `LlamaForCausalLM` with the weights of seed 0; ``config`` are fields to change."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | config))


def bnb_layer(
    dense: nn.Linear,
    kind: str = "nf4",
    block_size: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
) -> Any:
    """The layer in 4 bits, quantised by bitsandbytes itself, with the same bias."""
    bnb = pytest.importorskip("bitsandbytes")
    options = {"compress_statistics": nested, "quant_type": kind}
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, **options)
    layer.weight = bnb.nn.Params4bit(
        dense.weight.data,
        requires_grad=False,
        blocksize=block_size,
        quant_storage=storage,
        **options,
    )
    layer.bias = dense.bias
    return layer.to("cpu")
