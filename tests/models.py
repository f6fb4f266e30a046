"""A small language model for tests that want a whole one, made offline."""

from __future__ import annotations

from typing import Any

import pytest
import torch


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
