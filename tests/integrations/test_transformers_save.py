"""Directories of 4-bit models: written again and again, and read by bitsandbytes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from transformers import AutoModelForCausalLM

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from tests.integrations.models_of_transformers import (
    assert_same_files,
    load,
    logits,
    saved_llama,
    tensors,
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
@pytest.mark.parametrize(("shard", "tied"), [("30KB", True), ("1GB", False)])
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


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_a_model_that_was_cast_comes_back_as_it_is(tmp_path: Path, method: str) -> None:
    load(
        saved_llama(tmp_path / "dense"), QKernConfig(quantize_embeddings=method == "qkern")
    ).save_pretrained(tmp_path / "q")
    model = load(tmp_path / "q").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert again.dtype == torch.bfloat16
    for (name, tensor), found in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), name
    for module in again.modules():
        if isinstance(module, qnn.Linear4bit):
            assert module.compute_dtype is None
            assert module.quantized.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "other")
    assert_same_files(tmp_path / "one", tmp_path / "other")


def test_the_config_says_what_layers_compute_in(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path / "dense"))
    for module in model.modules():
        if isinstance(module, qnn.Linear4bit):
            module.compute_dtype = torch.float16
    model.save_pretrained(tmp_path / "q")
    layer = load(tmp_path / "q").model.layers[0].mlp.up_proj
    assert layer.compute_dtype is torch.float16


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_a_config_of_a_model_in_memory_loads_files_and_tensors(tmp_path: Path, method: str) -> None:
    model = load(
        saved_llama(tmp_path / "dense"), QKernConfig(quantize_embeddings=method == "qkern")
    )
    model.save_pretrained(tmp_path / "q")
    for options in ({}, {"quantization_config": QKernConfig()}):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "q", config=model.config, **options)
        assert torch.equal(logits(found), logits(model))
    found = type(model).from_pretrained(
        None, config=model.config, state_dict=tensors(tmp_path / "q")
    )
    assert isinstance(found.model.layers[0].mlp.up_proj, qnn.Linear4bit)
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_what_is_pushed_to_a_hub_is_loaded_from_it(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **options: Any) -> None:
        for each in operations:
            (hub / each.path_in_repo).write_bytes(Path(each.path_or_fileobj).read_bytes())

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(
        transformers.utils.hub, "create_and_tag_model_card", lambda *args, **options: ModelCard("-")
    )
    model = load(
        saved_llama(tmp_path / "dense"), QKernConfig(quantize_embeddings=method == "qkern")
    )
    model.push_to_hub("somebody/model", max_shard_size="30KB")
    said = json.loads((hub / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == method
    assert len(list(hub.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(hub)), logits(model))
