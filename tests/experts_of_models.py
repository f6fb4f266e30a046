"""Small models of transformers with experts, in 4 bits and as its own eager code has them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from qkern import nn as qnn
from qkern.nn import Experts4bit

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPS = {"n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
LATENT = GROUPS | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
NARROW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "head_dim": 16, "output_router_logits": True} | NARROW,
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1}
        | NARROW
        | LATENT,
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {"n_routed_experts": 8, "head_dim": 16, "first_k_dense_replace": 1} | NARROW,
    ),
}
IDS = torch.tensor([[5, 9, 77, 3, 120, 64, 9, 5, 31], [8, 8, 1, 99, 100, 2, 45, 46, 47]])


def dense(name: str = "mixtral", **changes: Any) -> Any:
    """With experts and biases that are drawn: some models start them at zeros or leave them."""
    config, kind, sizes = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = getattr(hf, kind)(getattr(hf, config)(**SMALL | sizes | changes)).float().eval()
    for path, parameter in model.named_parameters():
        if ".experts." in path:
            nn.init.normal_(parameter, std=0.1)
    return model


def quantised(name: str = "mixtral", **options: Any) -> Any:
    return qnn.quantize_model(dense(name), block_size=32, **options)


def eager(model: Any) -> Any:
    """transformers' own code on dense copies of the weights."""
    other = qnn.dequantize_model(copy.deepcopy(model))
    for module in other.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    assert not any(isinstance(module, Experts4bit) for module in other.modules())
    return other


def experts_of(model: nn.Module) -> dict[str, Experts4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts4bit)}


def experts_path(name: str) -> str:
    """Where a layer of the model has its experts."""
    return "feed_forward.experts" if name == "llama4" else "mlp.experts"


def near(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
