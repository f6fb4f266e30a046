"""An output embedding in 4 bits: tied to its table or not, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import nn as qnn
from qkern import testing
from tests.models import tiny_llama

IDS = torch.arange(40).view(2, 20)


def tied(**options: Any) -> nn.Module:
    return qnn.quantize_head(tiny_llama(tie_word_embeddings=True), **options)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["head_first", "head_last"])
def test_the_model_computes_as_with_the_dequantised_weights(tie: bool, first: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tie).eval()
    steps = [qnn.quantize_head, qnn.quantize_model]
    for step in steps if first else reversed(steps):
        assert step(model) is model
    table, head = model.model.embed_tokens, model.lm_head
    assert type(head) is qnn.Linear4bit
    assert isinstance(table, qnn.Embedding4bit) == tie
    logits = model(IDS).logits
    qnn.dequantize_model(model)
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    torch.testing.assert_close(logits, model(IDS).logits)


def test_a_tied_head_is_the_table_itself() -> None:
    dense = tiny_llama(tie_word_embeddings=True)
    expected = qkern.quantize_4bit(dense.lm_head.weight.detach(), block_size=32, double_quant=False)
    before = sum(p.numel() * p.itemsize for p in dense.parameters())
    size = dense.lm_head.weight.numel() * 4
    model = qnn.quantize_head(dense)
    table, head = model.model.embed_tokens, model.lm_head
    for name, held in head.named_parameters():
        assert held is table.get_parameter(name), name
        assert not held.requires_grad
    testing.assert_bitwise(head.quantized.dequantize(), expected.dequantize())
    testing.assert_bitwise(table(IDS), expected.dequantize()[IDS])
    assert sum(p.numel() * p.itemsize for p in model.parameters()) < before - 0.8 * size


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "tie_weights", "half"])
def test_it_stays_tied(how: str) -> None:
    model = tied().eval()
    expected = model(IDS).logits
    match how:
        case "deepcopy":
            model = copy.deepcopy(model)
        case "pickle":
            model = pickle.loads(pickle.dumps(model))
        case "tie_weights":
            model.tie_weights()
        case "half":
            model = model.bfloat16()
            expected = expected.bfloat16()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0.1, atol=0.1)


def test_a_state_dict_goes_into_another_model() -> None:
    model, other = tied().eval(), tied().eval()
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(model.state_dict())
    testing.assert_bitwise(other(IDS).logits, model(IDS).logits)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_gradients_pass_it_and_reach_adapters() -> None:
    model = qnn.quantize_model(tied(), lora=qnn.LoRAConfig(r=2))
    model(IDS, labels=IDS).loss.backward()
    gradients = [layer.lora_b.grad for _, layer in qnn.lora_layers(model)]
    assert gradients
    assert all(g is not None and bool(g.any()) for g in gradients)
    assert not isinstance(model.lm_head, qnn.LoRALinear)


def test_generation_goes_by_it() -> None:
    model = qnn.quantize_model(tied()).eval()
    dense = qnn.dequantize_model(copy.deepcopy(model))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **options), dense.generate(IDS[:1], **options))


def test_biases_hooks_and_modes_stay() -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(64, 48).eval()
    bias, seen = model.lm_head.bias, []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    qnn.quantize_head(model, compute_dtype=torch.bfloat16)
    assert model.lm_head.bias is bias
    assert bias.requires_grad
    assert not model.lm_head.training
    assert model.lm_head.compute_dtype is torch.bfloat16
    model.lm_head(torch.randn(1, 64))
    assert seen == [1]


def test_what_is_done_stays() -> None:
    model = tied()
    head = model.lm_head
    assert qnn.quantize_head(model, block_size=128).lm_head is head


class Other(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_norm() -> nn.Module:
    model = tiny_llama(tie_word_embeddings=True)
    model.model.embed_tokens.max_norm = 1.0
    return model


def with_other() -> nn.Module:
    model = tiny_llama(tie_word_embeddings=True)
    model.other = Other(model.lm_head.weight)
    return model


def with_adapter() -> nn.Module:
    model = tiny_llama()
    return qnn.add_lora(model, qnn.LoRAConfig(r=2, targets=["lm_head"]))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64)), {}, ValueError, "model: got Sequential, which"),
        (with_norm, {}, ValueError, "max_norm: got 1.0"),
        (with_other, {}, ValueError, "also that of other, a Other; takes one of linear layers"),
        (with_adapter, {}, TypeError, "head has an adapter"),
        (tiny_llama, {"block_size": 48}, ValueError, "block_size: got 48"),
        (tiny_llama, {"format": "int4"}, ValueError, "format: got 'int4'"),
        (tiny_llama, {"compute_dtype": torch.int8}, TypeError, "compute_dtype: got torch.int8"),
        (
            lambda: tiny_llama(tie_word_embeddings=True, vocab_size=129),
            {"block_size": 128},
            ValueError,
            r"block_size: got 128 for a tied head of shape \[129, 64\]",
        ),
    ],
    ids=["none", "max_norm", "other", "adapter", "block_size", "format", "compute_dtype", "blocks"],
)
def test_errors_come_before_any_change(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        qnn.quantize_head(model, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
