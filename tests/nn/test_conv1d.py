"""Transformers' Conv1D, whose weight is ``[in, out]``: in 4 bits, with adapters, and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import qkern
from qkern import io, testing
from qkern import nn as qnn

IDS = torch.arange(12).view(2, 6)
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def test_a_layer_there_and_back() -> None:
    torch.manual_seed(0)
    dense = Conv1D(96, 64)
    seen: list[str] = []
    handle = dense.register_forward_hook(lambda *_: seen.append("hook"))
    dense.noted = "kept"
    layer = qnn.Linear4bit.from_linear(dense)
    assert layer.source_class is Conv1D
    assert layer.bias is dense.bias
    assert (layer.out_features, layer.in_features, layer.quantized.shape) == (96, 64, (96, 64))
    expected = qkern.quantize_4bit(dense.weight.detach().T.contiguous())
    for name, tensor in expected.tensors().items():
        testing.assert_bitwise(layer.quantized.tensors()[name], tensor)

    back = layer.to_linear()
    assert type(back) is Conv1D
    assert (back.nf, back.nx, back.noted) == (96, 64, "kept")
    assert back.bias is dense.bias
    assert back.weight.is_contiguous()
    assert not back.weight.requires_grad
    testing.assert_bitwise(back.weight.detach(), expected.dequantize().T.contiguous())
    x = torch.randn(3, 64)
    torch.testing.assert_close(back(x), layer(x))
    assert seen == ["hook", "hook"]
    handle.remove()
    back(x)
    assert len(seen) == 2


def test_a_model_there_and_back() -> None:
    model, dense = gpt2(), gpt2()
    qnn.quantize_model(model)
    layers = [n for n, m in model.named_modules() if type(m) is qnn.Linear4bit]
    assert layers == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in LAYERS]
    for name in layers:
        own = model.get_submodule(name).quantized.dequantize()
        dense.get_submodule(name).weight.data = own.T.contiguous()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
    assert qnn.dequantize_model(model) is model
    assert model.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        testing.assert_bitwise(model.state_dict()[name], tensor)
    assert {type(model.get_submodule(name)) for name in layers} == {Conv1D}


def test_transformers_does_not_draw_the_weights_anew() -> None:
    model = qnn.quantize_model(gpt2())
    before = {n: p.clone() for n, p in model.named_parameters() if p.dtype != torch.float32}
    layer = model.transformer.h[0].mlp.c_fc
    layer.bias.data.fill_(3.0)
    model._initialize_weights(layer)
    model.init_weights()
    assert layer.bias.eq(3.0).all()
    model.apply(model._init_weights)  # of what is asked so, the dense parameters
    assert before
    for name, tensor in before.items():
        testing.assert_bitwise(model.get_parameter(name).detach(), tensor)


def test_targets_and_skip() -> None:
    model = qnn.quantize_model(gpt2(), targets=["c_attn"])
    assert type(model.transformer.h[0].attn.c_attn) is qnn.Linear4bit
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    model = qnn.quantize_model(gpt2(), skip=["mlp"])
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    with pytest.raises(TypeError, match=r"use Linear4bit.from_linear"):
        qnn.quantize_model(Conv1D(64, 64))


def test_a_weight_shared_by_two_layers_is_one() -> None:
    a, b = Conv1D(64, 32), Conv1D(64, 32)
    b.weight = a.weight
    model = qnn.quantize_model(nn.ModuleDict({"a": a, "b": b}))
    assert model["a"].weight is model["b"].weight
    assert model["b"].source_class is Conv1D
    assert model["b"].bias is b.bias
    qnn.dequantize_model(model)
    assert model["a"].weight is model["b"].weight
    assert type(model["b"]) is Conv1D


def test_a_weight_read_both_ways_is_refused() -> None:
    """Square, it fits a linear layer too, for which it is the transposed one."""
    conv, linear = Conv1D(64, 64), nn.Linear(64, 64)
    linear.weight = conv.weight
    model = nn.ModuleDict({"conv": conv, "linear": linear})
    with pytest.raises(ValueError, match=r"weight of linear is also that of conv.*transposed"):
        qnn.quantize_model(model)
    assert model["conv"] is conv
    assert model["linear"] is linear


def test_adapters() -> None:
    """On 4-bit layers they train; on dense ones they are refused by name."""
    model = qnn.quantize_model(gpt2(), lora=qnn.LoRAConfig(r=2))
    assert len(list(qnn.lora_layers(model))) == 8
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in qnn.lora_parameters(model))
    with pytest.raises(ValueError, match=r"h.0.attn.c_attn has an adapter.*dense Conv1D"):
        qnn.dequantize_model(model)
    wrong = r"lora.targets: transformer.h.0.attn.c_attn is a dense Conv1D.*takes it in 4 bits"
    for targets in ("all-linear", ["c_attn"]):
        model = gpt2()
        with pytest.raises(TypeError, match=wrong):
            qnn.add_lora(model, qnn.LoRAConfig(targets=targets))
        assert not list(qnn.lora_layers(model))
    # Also where others are in 4 bits, and before anything is quantised.
    model = gpt2()
    with pytest.raises(TypeError, match=r"lora.targets: .*mlp.c_fc is a dense Conv1D"):
        qnn.quantize_model(model, targets=["c_attn"], lora=qnn.LoRAConfig(targets=["c_fc"]))
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    qnn.quantize_model(model, targets=["c_attn"], lora=qnn.LoRAConfig(targets=["c_attn"]))


def test_copies_and_pickles_know_their_class(tmp_path: Path) -> None:
    layer = qnn.Linear4bit.from_linear(Conv1D(64, 32), compute_dtype=torch.bfloat16)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (copy.deepcopy(layer), loaded, layer.with_same_weight(layer.bias)):
        assert (other.source_class, other.compute_dtype) == (Conv1D, torch.bfloat16)
        assert type(other.to_linear()) is Conv1D


def test_a_checkpoint_of_bitsandbytes(tmp_path: Path) -> None:
    """It holds the transposed weight of such a layer, as transformers has it made."""
    model = qnn.quantize_model(gpt2())
    io.save_bnb(model, tmp_path / "model.safetensors")
    read = io.load_bnb(gpt2(), tmp_path)
    with torch.no_grad():
        testing.assert_bitwise(read(IDS).logits, model(IDS).logits)
    assert read.transformer.h[0].attn.c_attn.source_class is Conv1D
    # A weight that is the other way round is not read as if it were this one.
    small = nn.ModuleDict({"fc": qnn.Linear4bit.from_linear(nn.Linear(64, 32, bias=False))})
    tensors = small["fc"].quantized.to_bnb("fc.weight")
    save_file(tensors | {"fc.bias": torch.zeros(64)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"fc.weight: got shape \(32, 64\); takes \(64, 32\)"):
        io.load_bnb(nn.ModuleDict({"fc": Conv1D(64, 32)}), tmp_path / "other.safetensors")
