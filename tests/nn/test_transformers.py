"""transformers on models with 4-bit weights: its Trainer, its loader's assignment, its sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
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


def test_sizes() -> None:
    model, dense = llama(), tiny_llama()
    held = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == held + buffers
    # Packed bytes and scales are counted as they are, not the weights that they hold.
    assert model.num_parameters() < dense.num_parameters()
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
