"""The small language model with adapters of qkern and of PEFT, and adapters' files."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from qkern import nn as qnn
from tests import models


def tiny_llama() -> LlamaForCausalLM:
    return models.tiny_llama().eval()


def lora_llama(**options) -> LlamaForCausalLM:
    """The tiny model in 4 bits with adapters that do something."""
    config = qnn.LoRAConfig(**({"r": 4, "alpha": 8} | options))
    return randomised(qnn.quantize_model(tiny_llama(), lora=config))


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for _, layer in qnn.lora_layers(model):
        nn.init.normal_(layer.lora_a, std=0.2)
        nn.init.normal_(layer.lora_b, std=0.2)
    return model


def dequantised_llama() -> LlamaForCausalLM:
    dense = tiny_llama()
    with torch.no_grad():
        for name, module in qnn.quantize_model(tiny_llama()).named_modules():
            if isinstance(module, qnn.Linear4bit):
                dense.get_submodule(name).weight.copy_(module.quantized.dequantize())
    return dense


def peft_llama(**options) -> peft.PeftModel:
    """PEFT on the dequantised model, with adapters that do something."""
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | options)
    )
    model = peft.get_peft_model(dequantised_llama(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


IDS = torch.arange(32).view(2, 16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def files(directory: Path) -> tuple[dict, dict]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def rewrite(directory: Path, config: dict | None = None, tensors: dict | None = None) -> None:
    """Change a saved adapter: None as a value removes the key."""
    old_config, old_tensors = files(directory)
    for old, new in ((old_config, config), (old_tensors, tensors)):
        for key, value in (new or {}).items():
            if value is None:
                del old[key]
            else:
                old[key] = value
    (directory / "adapter_config.json").write_text(json.dumps(old_config))
    save_file(old_tensors, directory / "adapter_model.safetensors")
