"""A small language model and a tokenizer, made offline; layers of bitsandbytes', changed files."""

from __future__ import annotations

import json
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


def byte_tokenizer() -> Any:
    """One token a byte, <end> after a turn, and a chat template that says who speaks."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<end>",
        chat_template=(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        ),
    )


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


BNB_STATE_KEY = "0.weight.quant_state.bitsandbytes__nf4"


def change_bnb_state(state: dict[str, Any], change: dict[str, object]) -> None:
    """Change what bitsandbytes keeps of the weight ``0.weight``, in place; None removes.

    A name with a dot is a tensor's, any other a field of the JSON.
    """
    fields = json.loads(bytes(state[BNB_STATE_KEY].tolist()))
    text_is_given = BNB_STATE_KEY in change
    for name, value in change.items():
        target = state if "." in name else fields
        if value is None:
            del target[name]
        else:
            target[name] = value
    if not text_is_given:
        text = json.dumps(fields).encode()
        state[BNB_STATE_KEY] = torch.tensor(list(text), dtype=torch.uint8)
