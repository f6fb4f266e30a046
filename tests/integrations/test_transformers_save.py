"""Directories of 4-bit models: written again and again, and read by bitsandbytes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from qkern.integrations.transformers import QKernConfig
from tests.integrations.models_of_transformers import (
    assert_same_files,
    load,
    logits,
    saved_llama,
)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "bitsandbytes"),
        ({"format": "fp4", "block_size": 256, "double_quant": False}, "bitsandbytes"),
        ({"skip": ["q_proj"], "compute_dtype": torch.bfloat16}, "bitsandbytes"),
        ({"quantize_embeddings": True}, "qkern"),
    ],
    ids=["nf4", "fp4", "skip", "embeddings"],
)
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_is_read_and_written_again_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], method: str, shard: str, tied: bool
) -> None:
    dense = saved_llama(tmp_path / "dense", tie_word_embeddings=tied)
    model = load(dense, QKernConfig(**options))
    one, other = tmp_path / "one", tmp_path / "other"
    model.save_pretrained(one, max_shard_size=shard)
    said = json.loads((one / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == method
    assert (one / "model.safetensors").exists() == (shard == "1GB")
    again = load(one, QKernConfig(**options))
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(other, max_shard_size=shard)
    assert_same_files(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"format": "fp4", "block_size": 32, "double_quant": False}, {"skip": ["q_proj"]}],
    ids=["nf4", "fp4", "skip"],
)
def test_bitsandbytes_loads_what_is_written(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = load(saved_llama(tmp_path / "dense"), QKernConfig(**options), dtype=dtype)
    model.save_pretrained(tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    layers = [n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    own = [n for n, m in model.named_modules() if type(m).__module__ == "qkern.nn.linear"]
    assert layers == own
    assert layers
    for name in layers:
        weight = theirs.get_submodule(name).weight
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(values, model.get_submodule(name).quantized.dequantize())
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(logits(theirs), logits(model), rtol=close, atol=close)


def test_its_config_is_what_bitsandbytes_config_writes(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    model = load(saved_llama(tmp_path / "dense"), QKernConfig(compute_dtype="bfloat16"))
    model.save_pretrained(tmp_path / "q")
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    expected = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    )
    assert said == json.loads(json.dumps(expected.to_dict()))


def test_what_bitsandbytes_wrote_loads_and_is_written_again(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    dense = saved_llama(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    own = load(tmp_path / "theirs", QKernConfig())
    assert own.quantization_method == "qkern"
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(values, own.get_submodule(name).quantized.dequantize())
    own.save_pretrained(tmp_path / "own")
    load(tmp_path / "own", QKernConfig()).save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "own", tmp_path / "again")
