"""A warning on saving tells that PEFT computes something else, and comes only then."""

from __future__ import annotations

import copy
import sys
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from qkern import io
from qkern import nn as qnn
from tests.io.llamas import randomised, tiny_llama

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
DENSE_FIRST = {"first_k_dense_replace": 1, "n_shared_experts": 1}
LORA_SIZES = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MODELS = {
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**SIZES, **GROUPS, **DENSE_FIRST, **LORA_SIZES)
    ),
    "glm4_moe": lambda: transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(**SIZES, **GROUPS, **DENSE_FIRST, head_dim=32)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, head_dim=32)
    ),
    "llama": tiny_llama,
}
MESSAGE = "the adapter computes something else in PEFT"


@pytest.mark.parametrize(
    ("kind", "targets", "differs"),
    [
        ("deepseek_v3", "all-linear", True),
        ("deepseek_v3", ["o_proj", "kv_a_proj_with_mqa"], False),
        ("glm4_moe", ["layers.0.mlp.down_proj"], True),
        ("glm4_moe", ["q_proj"], False),
        ("qwen3_moe", "all-linear", False),
        ("llama", "all-linear", False),
    ],
)
def test_models_whose_targets_peft_rewrites(kind, targets, differs, tmp_path):
    torch.manual_seed(0)
    base = MODELS[kind]().eval()
    model = randomised(qnn.add_lora(copy.deepcopy(base), qnn.LoRAConfig(r=2, targets=targets)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        io.save_adapter(model, tmp_path)
    told = [str(w.message) for w in seen if str(w.message).startswith(MESSAGE)]
    assert len(told) == differs
    if differs:
        assert kind in told[0]
        assert "gate_up_proj" in told[0] or "down_proj" in told[0]
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4) != differs
        own = io.load_adapter(copy.deepcopy(base), tmp_path)
        assert torch.equal(own(ids).logits, model(ids).logits)


def test_a_layer_at_two_places(tmp_path):
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        linear = nn.Linear(32, 32)
        return nn.Sequential(linear, nn.Tanh(), linear)

    model = randomised(qnn.add_lora(make(), qnn.LoRAConfig(r=2)))
    with pytest.warns(UserWarning, match=f"{MESSAGE}: the layer 0 is also 2"):
        io.save_adapter(model, tmp_path)
    x = torch.randn(3, 32)
    assert not torch.allclose(peft.PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
    assert torch.equal(io.load_adapter(make(), tmp_path)(x), model(x))


def test_without_peft_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = randomised(qnn.add_lora(MODELS["glm4_moe"](), qnn.LoRAConfig(r=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.save_adapter(model, tmp_path)
