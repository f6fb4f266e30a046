"""`QKernConfig`: a model quantised while it is loaded is what `quantize_model` makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from qkern.nn._module import QuantizedModule
from tests.integrations.models_of_transformers import load, logits, saved_llama

CASES = pytest.mark.parametrize(
    "options",
    [
        {},
        {"format": "fp4", "block_size": 128, "double_quant": False},
        {"skip": ["layers.0.mlp", "q_proj"]},
    ],
    ids=["nf4", "fp4", "skip"],
)


def quantized_after(folder: Path, dtype: Any = "auto", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return qnn.quantize_model(model, **options)


@CASES
@pytest.mark.parametrize(
    ("dtype", "device_map"), [(torch.float32, None), (torch.bfloat16, "cpu"), ("auto", "auto")]
)
def test_it_is_what_quantize_model_makes(
    tmp_path: Path, options: dict[str, Any], dtype: Any, device_map: Any
) -> None:
    folder = saved_llama(tmp_path)
    found = load(folder, QKernConfig(**options), dtype=dtype, device_map=device_map)
    expected = quantized_after(folder, dtype, **options)
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
    own, its = found.state_dict(), expected.state_dict()
    assert own.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.equal(own[name], tensor), name
    for one, other in zip(found.modules(), expected.modules(), strict=True):
        if isinstance(one, qnn.Linear4bit):
            assert one.quantized.dtype == other.quantized.dtype
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_token_tables_in_4_bits_share_their_weight_with_a_tied_head(
    tmp_path: Path, tied: bool
) -> None:
    folder = saved_llama(tmp_path, tie_word_embeddings=tied)
    model = load(folder, QKernConfig(quantize_embeddings=True))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, qnn.Embedding4bit)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    expected = qnn.Embedding4bit.from_embedding(dense.get_input_embeddings())
    assert torch.equal(table.quantized.dequantize(), expected.quantized.dequantize())
    if not tied:
        assert type(head) is torch.nn.Linear
        return
    assert isinstance(head, qnn.Linear4bit)
    for name in ("weight", "absmax", "nested_absmax", "nested_offset", "quant_meta"):
        assert getattr(head, name) is getattr(table, name)
    model.tie_weights()
    assert head.weight is table.weight


def test_the_logical_number_of_parameters_is_told(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    model = load(folder)
    for exclude in (False, True):
        count = dense.num_parameters(exclude_embeddings=exclude)
        assert model.num_parameters(exclude_embeddings=exclude) == count
    assert model.num_parameters(only_trainable=True) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    tied = saved_llama(tmp_path / "tied", tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(tied).num_parameters()
    assert load(tied, QKernConfig(quantize_embeddings=True)).num_parameters() == expected


def test_frameworks_see_a_model_in_4_bits_that_can_be_trained(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path))
    assert model.is_quantized
    assert model.is_loaded_in_4bit
    assert model.quantization_method == "qkern"
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    assert model.get_memory_footprint() == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )


def test_initialising_leaves_4_bit_layers_alone(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path), QKernConfig(quantize_embeddings=True))
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    model._initialize_missing_keys(True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(before, assign=True)
    for other in (copy.deepcopy(model), moved):
        other.apply(other._init_weights)
        for path, module in other.named_modules():
            for name in (n for n in module.state_dict() if isinstance(module, QuantizedModule)):
                assert torch.equal(getattr(module, name), before[f"{path}.{name}"])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("format", "int4", ValueError),
        ("format", "custom", ValueError),
        ("block_size", 48, ValueError),
        ("double_quant", 1, TypeError),
        ("skip", "lm_head", TypeError),
        ("quantize_embeddings", None, TypeError),
        ("compute_dtype", "float8", TypeError),
        ("compute_dtype", torch.float64, TypeError),
    ],
)
def test_wrong_options_are_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{field}: got"):
        QKernConfig(**{field: value})


def test_a_config_is_json_and_comes_back(tmp_path: Path) -> None:
    config = QKernConfig("fp4", 128, False, ["a.b"], True, torch.bfloat16)
    fields = json.loads(config.to_json_string())
    assert fields == config.to_dict() == config.to_diff_dict() == dict(config)
    assert fields["compute_dtype"] == "bfloat16"
    again, rest = QKernConfig.from_dict(fields, return_unused_kwargs=True, other=1)
    assert again.to_dict() == fields
    assert rest == {"other": 1}
    assert QKernConfig.from_dict(fields, block_size=64).block_size == 64
    with pytest.raises(ValueError, match="layout: got 2"):
        QKernConfig.from_dict(fields | {"layout": 2})
    with pytest.raises(ValueError, match="got \\['bits'\\]"):
        QKernConfig.from_dict(fields | {"bits": 4})
