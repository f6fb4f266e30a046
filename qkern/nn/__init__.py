"""Modules on 4-bit weights, LoRA, and whole models made of them."""

from qkern.nn._adapters import (
    LoRAConfig,
    disable_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)
from qkern.nn._from_bnb import from_bnb
from qkern.nn.counting import count_parameters
from qkern.nn.dense import FrozenLinear
from qkern.nn.dequantize import dequantize_model
from qkern.nn.embedding import Embedding4bit
from qkern.nn.experts import Experts4bit
from qkern.nn.head import quantize_head
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear
from qkern.nn.lora_experts import LoRAExperts
from qkern.nn.model import add_lora, prepare_for_training, quantize_model
from qkern.nn.report import DenseWeights, QuantizationReport, quantization_report

__all__ = [
    "DenseWeights",
    "Embedding4bit",
    "Experts4bit",
    "FrozenLinear",
    "Linear4bit",
    "LoRAConfig",
    "LoRAExperts",
    "LoRALinear",
    "QuantizationReport",
    "add_lora",
    "count_parameters",
    "dequantize_model",
    "disable_lora",
    "from_bnb",
    "lora_layers",
    "lora_parameters",
    "merge_lora",
    "prepare_for_training",
    "quantization_report",
    "quantize_head",
    "quantize_model",
    "unmerge_lora",
]
