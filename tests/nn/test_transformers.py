"""transformers on models with 4-bit weights: its Trainer, its loader's assignment, its sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.core_model_loading import set_param_for_module

from qkern import nn as qnn
from qkern import testing
from tests.models import tiny_llama


def llama(lora: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return qnn.quantize_model(tiny_llama(), lora=qnn.LoRAConfig(r=4) if lora else None)


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.is_floating_point()]


@pytest.mark.unpoisoned
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["qkern", "peft"])
def test_trainer_trains_the_adapters(adapter: str, tmp_path: Path) -> None:
    model = llama(lora=adapter == "qkern")
    if adapter == "peft":
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    before = codes(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ids = torch.randint(4, (24, 16), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for one, other in zip(codes(model), before, strict=True):
        testing.assert_bitwise(one, other)


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 96}
    config = T5Config(**sizes, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("wrap", [False, True])
def test_t5_keeps_the_layer_whose_dtype_it_asks_for(wrap: bool) -> None:
    model = tiny_t5()
    whole = nn.ModuleDict({"inner": model}) if wrap else model
    qnn.quantize_model(whole, lora=qnn.LoRAConfig(r=4))
    dense = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}
    assert dense == {"lm_head", "base_layer"}
    for block in (*model.encoder.block, *model.decoder.block):
        assert type(block.layer[-1].DenseReluDense.wo.base_layer) is nn.Linear
        assert isinstance(block.layer[0].SelfAttention.q.base_layer, qnn.Linear4bit)
    ids = torch.arange(1, 9).view(1, 8)
    optimizer = torch.optim.AdamW(qnn.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_named_targets_win_over_what_transformers_keeps() -> None:
    model = qnn.quantize_model(tiny_t5(), targets=["wo"])
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, qnn.Linear4bit)
    with pytest.raises(TypeError, match=r"x: got torch.uint8; takes float32"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4).long())


@pytest.mark.parametrize("tie", [True, False])
def test_tie_weights_with_a_4_bit_table(tie: bool) -> None:
    """The head gets the packed codes and raises, unless the config no longer asks for it."""
    model = qnn.quantize_model(tiny_llama(tie_word_embeddings=True))
    model.set_input_embeddings(qnn.Embedding4bit.from_embedding(model.get_input_embeddings()))
    model.config.tie_word_embeddings = tie
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    model.tie_weights()
    if tie:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(ids)
    else:
        testing.assert_bitwise(model(ids).logits, expected)


def test_sizes() -> None:
    model, dense = llama(), tiny_llama()
    held = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == held + buffers
    # transformers' own counts packed bytes until qkern.integrations.transformers is imported.
    assert qnn.count_parameters(model) == dense.num_parameters()
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"


def test_the_loader_assigns_packed_codes() -> None:
    model, other = llama(), llama()
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set())
    layer, source = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.down_proj
    prefix = "model.layers.0.mlp.up_proj."
    for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
        value = getattr(source, name).detach().clone()
        set_param_for_module(model, prefix + name, value, report, None)
        assert getattr(layer, name).data_ptr() == value.data_ptr()
    assert not report.mismatched_keys
    dense = source.quantized.dequantize().view(96, 64)
    testing.assert_bitwise(layer.quantized.dequantize(), dense)
    set_param_for_module(model, prefix + "weight", torch.zeros(96, 64), report, None)
    assert [key for key, *_ in report.mismatched_keys] == [prefix + "weight"]
    testing.assert_bitwise(layer.quantized.dequantize(), dense)
