"""Small models in 4 bits, and the same numbers in dense layers and in bitsandbytes' layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkern.nn import Linear4bit, quantize_model
from tests.models import bnb_layer, tiny_llama

IDS = torch.tensor([[3, 17, 64, 5, 99, 120], [8, 1, 77, 30, 2, 41]])
"""Tokens for `tiny_llama`."""


def quantized(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """`tiny_llama` with one layer, its linear layers in 4 bits, in evaluation mode."""
    model = tiny_llama(num_hidden_layers=1).to(dtype).eval()
    quantize_model(model, **options)
    return model


def linears(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """The 4-bit layers of ``model`` by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def dense(model: nn.Module) -> Any:
    """A copy whose 4-bit layers are `nn.Linear` with the dequantised weights."""
    twin = copy.deepcopy(model)
    for name, layer in list(linears(twin)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.quantized.dequantize(), requires_grad=False)
        linear.bias = layer.bias
        twin.set_submodule(name, linear)
    return twin


def in_bitsandbytes(model: nn.Module) -> Any:
    """A copy of a dense model whose linear layers, but for the head, are bitsandbytes' in NF4."""
    twin: Any = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            twin.set_submodule(name, bnb_layer(layer, nested=False))
    twin.is_loaded_in_4bit = True
    return twin


def shake(model: nn.Module, std: float = 0.05, seed: int = 1) -> Any:
    """Draw every factor of LoRA in ``model`` anew, so that adapters are at work."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference by the norm of ``wanted``."""
    return float((got - wanted).detach().norm() / wanted.detach().norm())
