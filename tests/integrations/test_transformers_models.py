"""Models that transformers loads in ways of their own: experts, layers in float32, tied layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from tests.integrations.architectures import ARCHITECTURES, HEADS, T5
from tests.integrations.models_of_transformers import (
    assert_same_files,
    load,
    logits,
    tensors,
)
from tests.models import tiny_llama

EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


def saved_experts(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = HEADS | {"vocab_size": 128} | EXPERTS[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def notices(caplog: pytest.LogCaptureFixture, folder: Path, **options: Any) -> tuple[Any, str]:
    """The model there, and what was said while it was loaded."""
    caplog.clear()
    transformers.utils.logging.enable_propagation()
    try:
        model = load(folder, **options)
    finally:
        transformers.utils.logging.disable_propagation()
    return model, caplog.text


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_skipped_experts_stay_dense_where_files_have_them_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, method: str
) -> None:
    dense = saved_experts(name, tmp_path / "dense")
    assert any(".experts.3." in key for key in tensors(tmp_path / "dense"))
    config = QKernConfig(skip=["experts"], quantize_embeddings=method == "qkern")
    model, said = notices(caplog, tmp_path / "dense", config=config)
    stacked = {n: p for n, p in dense.named_parameters() if p.dim() == 3}
    assert stacked
    assert "WARNING" not in said  # they were named
    weights = next(w for w in qnn.quantization_report(dense).dense if set(w.names) <= set(stacked))
    assert str(weights) in str(qnn.quantization_report(model))
    for key, expected in stacked.items():
        assert torch.equal(model.get_parameter(key), expected)
    rest = {n for n, m in dense.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    assert {n for n, m in model.named_modules() if isinstance(m, qnn.Linear4bit)} == rest
    assert rest
    model.save_pretrained(tmp_path / "one", max_shard_size="100KB")
    assert any(".experts.3." in key for key in tensors(tmp_path / "one"))
    again = load(tmp_path / "one", config)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    assert_same_files(tmp_path / "one", tmp_path / "other")


def test_kernels_of_convolutions_are_no_experts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mamba = ARCHITECTURES["Mamba"]
    model, said = notices(caplog, mamba.save(tmp_path), kind=mamba.auto)
    assert any(p.dim() == 3 for p in model.parameters())
    assert any(isinstance(m, qnn.Linear4bit) for m in model.modules())
    unexpected = said.partition("In all")[0]
    assert ".conv1d." not in unexpected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_model_keeps_in_float32_stays_so(tmp_path: Path, dtype: torch.dtype) -> None:
    config = transformers.T5Config(**T5)
    kind = transformers.T5ForConditionalGeneration
    dense = kind(config)
    dense.save_pretrained(tmp_path / "dense")
    expected = kind.from_pretrained(tmp_path / "dense", dtype=dtype)
    model = load(tmp_path / "dense", kind=kind, dtype=dtype)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one", kind=kind)
    for found in (model, again):
        outs = {n: m for n, m in found.named_modules() if n.endswith(".wo")}
        assert len(outs) == 2
        for name, out in outs.items():
            assert type(out) is nn.Linear
            assert out.weight.dtype == expected.get_submodule(name).weight.dtype
            assert torch.equal(out.weight, expected.get_submodule(name).weight)
        assert isinstance(found.encoder.block[0].layer[1].DenseReluDense.wi, qnn.Linear4bit)
    again.save_pretrained(tmp_path / "other")
    assert_same_files(tmp_path / "one", tmp_path / "other")


class Tied(LlamaForCausalLM):
    """Two layers of its own have one weight."""

    _tied_weights_keys = {  # noqa: RUF012
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"
    }


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_tied_layers_share_their_4_bits(tmp_path: Path, method: str) -> None:
    dense = tmp_path / "dense"
    Tied(tiny_llama(tie_word_embeddings=True).config).save_pretrained(dense)
    config = QKernConfig(quantize_embeddings=method == "qkern")
    model = load(dense, config, kind=Tied)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one", config, kind=Tied)
    for found in (model, again):
        one, other = (found.model.layers[index].mlp.up_proj for index in (0, 1))
        assert isinstance(other, qnn.Linear4bit)
        for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
            assert getattr(one, name) is getattr(other, name)
    assert torch.equal(logits(again), logits(model))
    assert not [key for key in tensors(dense) if "layers.1.mlp.up_proj" in key]
    plain = Tied.from_pretrained(dense)
    assert torch.equal(logits(qnn.quantize_model(plain)), logits(load(dense, kind=Tied)))
    again.save_pretrained(tmp_path / "other")
    assert_same_files(tmp_path / "one", tmp_path / "other")
