"""GPT-2, whose layers are ``Conv1D``, with weights the other way round."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qkern import nn as qnn
from tests.integrations.models_of_transformers import assert_same_files, load, logits


def test_conv1d_is_quantised_saved_and_made_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    expected = qnn.quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, qnn.Linear4bit)
    assert (layer.out_features, layer.in_features) == (192, 64)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "other")
    assert_same_files(tmp_path / "one", tmp_path / "other")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(theirs.transformer.h[0].attn.c_attn, bnb.nn.Linear4bit)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    dense = again.dequantize()
    assert type(dense.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(logits(dense), logits(model))
