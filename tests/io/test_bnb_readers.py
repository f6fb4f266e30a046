"""What `save_bnb` writes is a bitsandbytes checkpoint: bitsandbytes and transformers read it."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from qkern import io, testing
from qkern import nn as qnn
from tests.models import tiny_llama

CASES = pytest.mark.parametrize(
    ("kind", "block_size", "double_quant", "dtype"),
    [
        ("nf4", 64, True, torch.bfloat16),
        ("nf4", 128, False, torch.float32),
        ("fp4", 64, True, torch.float32),
        ("fp4", 32, False, torch.float16),
    ],
)


def assert_same_values(weight: bnb.nn.Params4bit, own: qnn.Linear4bit) -> None:
    """Bit for bit, but for the sign of zero: bitsandbytes has both, by kernel."""
    theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    testing.assert_bitwise(theirs + 0.0, own.quantized.dequantize() + 0.0)


@CASES
def test_bitsandbytes_layers_read_it(
    kind: str, block_size: int, double_quant: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(250, 101, dtype=dtype), nn.LayerNorm(101, dtype=dtype))
    qnn.quantize_model(model, kind, block_size, double_quant)
    io.save_bnb(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    stats = {k.removeprefix("0."): v for k, v in tensors.items() if k.startswith("0.weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(tensors["0.weight"], stats, device="cpu")
    assert_same_values(weight, model[0])
    assert weight.quant_state.dtype == dtype
    # A layer of theirs around it, and what that layer saves, are the same again.
    layer = bnb.nn.Linear4bit(250, 101, quant_type=kind)
    layer.weight, layer.bias = weight, nn.Parameter(tensors["0.bias"])
    saved = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert saved.keys() == {name for name in tensors if name.startswith("0.")}
    for name, tensor in saved.items():
        testing.assert_bitwise(tensor, tensors[name], name)
    # Which load_state_dict takes as it is.
    own = nn.Sequential(nn.Linear(250, 101, dtype=dtype), nn.LayerNorm(101, dtype=dtype))
    qnn.quantize_model(own, kind, block_size, double_quant)
    own.load_state_dict(tensors)
    testing.assert_bitwise(own[0].quantized.dequantize(), model[0].quantized.dequantize())


@CASES
def test_transformers_reads_it(
    kind: str, block_size: int, double_quant: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    # Rows of whole blocks: of others bitsandbytes' CPU kernel misreads its own weights too.
    model = tiny_llama(hidden_size=128, intermediate_size=256).to(dtype).eval()
    qnn.quantize_model(model, kind, block_size, double_quant, lora=qnn.LoRAConfig(r=2))
    io.save_bnb(model, tmp_path / "model.safetensors")
    settings = model.config.to_dict()
    settings["architectures"] = ["LlamaForCausalLM"]
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs, report = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    count = 0
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert_same_values(module.weight, model.get_submodule(name))
            count += 1
    assert count == 14
    testing.assert_bitwise(theirs.lm_head.weight, model.lm_head.weight)
