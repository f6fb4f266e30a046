"""`dequantize_model` and `count_parameters`: back to dense layers, and sizes without packing."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qkern import nn as qnn
from qkern import testing
from tests.models import tiny_llama

F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(12).view(2, 6)


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_whole_model(dtype: torch.dtype | None) -> None:
    dense = tiny_llama()
    model = qnn.quantize_model(copy.deepcopy(dense))
    weights = {
        name: layer.quantized.dequantize(dtype)
        for name, layer in model.named_modules()
        if isinstance(layer, qnn.Linear4bit)
    }
    assert weights
    with torch.no_grad():
        logits = model(IDS).logits
    qnn.dequantize_model(model, dtype)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        testing.assert_bitwise(layer.weight.detach(), weight)
        assert not layer.weight.requires_grad
    assert model.state_dict().keys() == dense.state_dict().keys()
    if dtype is None:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits)
    with pytest.raises(ValueError, match="no layer in 4 bits"):
        qnn.dequantize_model(model)


def test_biases_hooks_and_modes() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    seen: list[int] = []
    handle = model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    qnn.quantize_model(model)
    for layer in model:
        layer.bias.requires_grad_(True)
    bias = model[0].bias
    qnn.dequantize_model(model, BF16)
    assert model[0].bias is not bias
    assert (model[0].bias.dtype, model[0].bias.requires_grad) == (BF16, True)
    assert not model[0].training
    model(torch.randn(1, 64, dtype=BF16))
    handle.remove()
    model(torch.randn(1, 64, dtype=BF16))
    assert seen == [1]
    # Nothing is left of what kept torch's fused encoder from reading packed codes.
    assert [len(layer._forward_pre_hooks) for layer in model] == [0, 0]


def test_adapters_stay_and_merge_into_the_dense_weight() -> None:
    model = qnn.quantize_model(nn.ModuleDict({"fc": nn.Linear(64, 48)}), lora=qnn.LoRAConfig(r=2))
    nn.init.normal_(model["fc"].lora_b)
    x = torch.randn(3, 64)
    expected = model["fc"](x)
    weight = model["fc"].quantized.dequantize()
    delta = model["fc"].scaling * (model["fc"].lora_b @ model["fc"].lora_a)
    qnn.merge_lora(model)
    with pytest.raises(ValueError, match="adapter at fc is merged"):
        qnn.dequantize_model(model)
    qnn.unmerge_lora(model)
    qnn.dequantize_model(model)
    assert type(model["fc"].base_layer) is nn.Linear
    torch.testing.assert_close(model["fc"](x), expected)
    merged = model["fc"].to_merged()
    torch.testing.assert_close(merged.weight.detach(), (weight + delta).detach())


def test_tables() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(33, 48, padding_idx=3).eval()
    table.noted = "kept"
    model = nn.ModuleDict({"table": qnn.Embedding4bit.from_embedding(table)})
    ids = torch.arange(33)
    expected = model["table"](ids)
    qnn.dequantize_model(model)
    back = model["table"]
    assert type(back) is nn.Embedding
    assert (back.padding_idx, back.training, back.noted, repr(back)) == (
        3,
        False,
        "kept",
        repr(table),
    )
    testing.assert_bitwise(back(ids).detach(), expected)
    assert not back.weight.requires_grad


def test_scaled_tables_of_transformers() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for table in (
        BartScaledWordEmbedding(16, 64, 0, embed_scale=7.3),
        Gemma3TextScaledWordEmbedding(16, 64, 0, embed_scale=7.3).bfloat16(),
    ):
        layer = qnn.Embedding4bit.from_embedding(table)
        back = layer.to_embedding()
        assert type(back) is type(table)
        assert back.state_dict().keys() == table.state_dict().keys()
        ids = torch.arange(16)
        testing.assert_bitwise(back(ids).detach(), layer(ids))


def test_what_cannot_be_dequantised() -> None:
    layer = qnn.Linear4bit(64, 64)
    model = nn.ModuleDict({"fc": layer})
    with pytest.raises(TypeError, match="got a single layer"):
        qnn.dequantize_model(layer)
    with pytest.raises(TypeError, match=r"dtype: got torch.int8"):
        qnn.dequantize_model(model, torch.int8)
    with pytest.raises(TypeError, match=r"dtype: got torch.int8"):
        layer.to_linear(torch.int8)
    model.also = [layer]
    with pytest.raises(ValueError, match="also is a list that holds a layer"):
        qnn.dequantize_model(model)
    assert model["fc"] is layer


def test_on_meta() -> None:
    model = qnn.quantize_model(nn.ModuleDict({"fc": nn.Linear(64, 32, device="meta")}))
    layer = qnn.dequantize_model(model)["fc"]
    assert (layer.weight.is_meta, list(layer.weight.shape)) == (True, [32, 64])


# Sizes


def test_a_quantised_model_has_as_many_parameters_as_the_dense_one() -> None:
    dense = tiny_llama()
    model = qnn.quantize_model(copy.deepcopy(dense))
    assert elements(model) < elements(dense)
    assert qnn.count_parameters(model) == elements(dense) == dense.num_parameters()
    without = dense.num_parameters(exclude_embeddings=True)
    assert qnn.count_parameters(model, exclude_embeddings=True) == without
    assert qnn.count_parameters(model, trainable_only=True) == 0
    qnn.add_lora(model, qnn.LoRAConfig(r=2))
    added = sum(p.numel() for p in qnn.lora_parameters(model))
    assert qnn.count_parameters(model) == elements(dense) + added
    assert qnn.count_parameters(model, trainable_only=True) == added


def test_shared_padded_and_other_weights() -> None:
    first = qnn.Linear4bit(64, 64, bias=False)
    table = qnn.Embedding4bit.from_embedding(nn.Embedding(3, 33))
    model = nn.ModuleDict({"a": first, "b": first.with_same_weight(None), "table": table})
    assert qnn.count_parameters(model) == 64 * 64 + 99
    assert qnn.count_parameters(model, exclude_embeddings=True) == 64 * 64
    assert qnn.count_parameters(bnb.nn.LinearNF4(64, 32, bias=False).to("cpu")) == 64 * 32
