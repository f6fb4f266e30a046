"""Families of transformers' models in 4 bits: forward, backward, generation, PEFT both ways.

Each is compared with itself in float32 on the dequantised weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from qkern import io
from qkern import nn as qnn

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = TOKENS | {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
T5 = TOKENS | {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 4,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Family(NamedTuple):
    """A class of transformers', the sizes of a small one, and how it is called."""

    model: str
    config: str
    sizes: dict[str, Any]
    task: str = "CAUSAL_LM"

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(hf, self.model)(getattr(hf, self.config)(**self.sizes))
        # Some families begin with zeros.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def inputs(self) -> dict[str, Tensor]:
        ids = torch.arange(3, 19).view(2, 8)
        if self.task == "SEQ_2_SEQ_LM":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        if self.task == "IMAGE":
            return {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
        return {"input_ids": ids}


QUICK = [
    Family("LlamaForCausalLM", "LlamaConfig", GROUPED),
    Family("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    Family("FalconForCausalLM", "FalconConfig", SMALL),
    Family("BertForSequenceClassification", "BertConfig", SMALL, "SEQ_CLS"),
    Family("T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM"),
]
SLOW = [
    Family("MistralForCausalLM", "MistralConfig", GROUPED),
    Family("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    Family("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    Family("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    Family("PhiForCausalLM", "PhiConfig", SMALL),
    Family("Phi3ForCausalLM", "Phi3Config", GROUPED),
    Family("OlmoForCausalLM", "OlmoConfig", GROUPED),
    Family("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    Family("StableLmForCausalLM", "StableLmConfig", GROUPED),
    Family("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    Family("CohereForCausalLM", "CohereConfig", GROUPED),
    Family("GraniteForCausalLM", "GraniteConfig", GROUPED),
    Family("GlmForCausalLM", "GlmConfig", HEADS),
    Family("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    Family("OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family("BloomForCausalLM", "BloomConfig", SMALL | {"n_layer": 1, "n_head": 4}),
    Family("MambaForCausalLM", "MambaConfig", SMALL | {"state_size": 8}),
    Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEADS | EXPERTS | {"num_experts": 4}),
    Family("OlmoeForCausalLM", "OlmoeConfig", GROUPED | EXPERTS | {"num_experts": 4}),
    Family("RobertaForSequenceClassification", "RobertaConfig", SMALL, "SEQ_CLS"),
    Family("LlamaForSequenceClassification", "LlamaConfig", GROUPED, "SEQ_CLS"),
    Family("BartForConditionalGeneration", "BartConfig", BART, "SEQ_2_SEQ_LM"),
    Family("MarianMTModel", "MarianConfig", BART, "SEQ_2_SEQ_LM"),
    Family(
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in SMALL.items() if k.startswith(("hidden", "inter", "num"))}
        | {"image_size": 8, "patch_size": 4},
        "IMAGE",
    ),
]
FAMILIES = [
    *(pytest.param(family, id=family.model) for family in QUICK),
    *(pytest.param(family, id=family.model, marks=pytest.mark.slow) for family in SLOW),
]
CONFIG = qnn.LoRAConfig(r=4, alpha=8)
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def quantised(family: Family) -> tuple[nn.Module, nn.Module]:
    """The model in 4 bits, and in float32 with the same weights."""
    model = family.make()
    twin = copy.deepcopy(model)
    qnn.quantize_model(model)
    count = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, qnn.Linear4bit):
                twin.get_submodule(name).weight.copy_(module.quantized.dequantize())
                count += 1
    assert count
    return model, twin


def with_adapters(model: nn.Module) -> nn.Module:
    qnn.add_lora(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in qnn.lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=2e-3, atol=2e-4 * float(expected.detach().abs().max())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: Family, tmp_path: Path) -> None:
    model, twin = quantised(family)
    again = copy.deepcopy(model)
    inputs = family.inputs()
    with torch.no_grad():
        assert_close(model(**inputs).logits, twin(**inputs).logits)

    # An adapter of qkern's, read by PEFT on the dense twin and on the 4-bit model itself.
    with_adapters(model)
    task = family.task if family.task in GENERATING else None
    io.save_adapter(model, tmp_path / "ours", task_type=task)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours", is_trainable=True).eval()
    y = model(**inputs).logits
    other = theirs(**inputs).logits
    assert_close(y, other)
    changed = float((y - again(**inputs).logits).detach().abs().max())
    assert changed > 1e-2 * float(y.detach().abs().max())
    on_4_bit = peft.PeftModel.from_pretrained(copy.deepcopy(again), tmp_path / "ours").eval()
    assert_close(on_4_bit(**inputs).logits, y)

    # Gradients.
    y.square().mean().backward()
    other.square().mean().backward()
    named = dict(theirs.named_parameters())
    for name, layer in qnn.lora_layers(model):
        for half, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
            expected = named[f"base_model.model.{name}.lora_{half}.default.weight"].grad
            if parameter.grad is None:
                assert expected is None  # a layer that this call does not reach
            else:
                assert_close(parameter.grad, expected)

    # PEFT's adapter, read by qkern.
    theirs.save_pretrained(tmp_path / "theirs")
    io.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert_close(again(**inputs).logits, y)
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert written["r"] == CONFIG.r

    if family.task in GENERATING:
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
        ids = inputs["input_ids"]
        found = model.generate(input_ids=ids, **options)
        expected = theirs.generate(input_ids=ids, **options)
        assert torch.equal(found, expected)
    qnn.prepare_for_training(model, gradient_checkpointing=model.supports_gradient_checkpointing)
    model(**inputs).logits.sum().backward()
