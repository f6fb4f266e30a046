"""Adapters go between qkern's 4-bit models, bitsandbytes', dense ones and qkern's own files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkern.io
from qkern.nn import quantize_model
from tests.integrations.twins import IDS, dense, error, in_bitsandbytes, quantized, shake
from tests.models import tiny_llama

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "dora": {"use_dora": True},
}


def bases() -> dict[str, Any]:
    """One set of 4-bit weights in qkern's layers, in bitsandbytes' and in dense ones."""
    source = tiny_llama(num_hidden_layers=1).eval()
    mine = quantize_model(copy.deepcopy(source), double_quant=False)
    return {"qkern": mine, "bitsandbytes": in_bitsandbytes(source), "dense": dense(mine)}


def adapted(model: nn.Module, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 8} | options)
    return shake(get_peft_model(model, config)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", ["qkern", "bitsandbytes", "dense"])
def test_an_adapter_of_one_is_one_of_all(kind: str, writer: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(bases()[writer], **KINDS[kind])
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    for reader, base in bases().items():
        read = PeftModel.from_pretrained(base, tmp_path)
        kinds = {type(m).__name__ for m in read.modules() if hasattr(m, "lora_A")}
        names = {"qkern": "QKernLinear", "bitsandbytes": "Linear4bit", "dense": "Linear"}
        assert kinds == {names[reader]}
        assert error(read(IDS).logits, logits) < 1e-4, reader


@pytest.mark.parametrize("kind", ["plain", "rslora"])
def test_qkerns_own_functions_read_and_write_them(kind: str, tmp_path: Path) -> None:
    model = adapted(quantized(), **KINDS[kind])
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "one")
    own = qkern.io.load_adapter(quantized(), tmp_path / "one")
    assert torch.equal(own(IDS).logits, logits)
    qkern.io.save_adapter(own, tmp_path / "two")
    again = PeftModel.from_pretrained(quantized(), tmp_path / "two")
    assert torch.equal(again(IDS).logits, logits)


def test_saved_merged_or_not_the_adapter_is_the_same(tmp_path: Path) -> None:
    model = adapted(quantized())
    logits = model(IDS).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(again(IDS).logits, logits)


def test_an_inner_layer_that_ends_like_an_outer_one(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(64, 64)
            self.block = nn.ModuleDict({"fc": nn.Linear(64, 64)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.block["fc"](x))

    options = {"target_modules": ["fc"], "rank_pattern": {"^fc": 8}, "alpha_pattern": {"^fc": 32}}
    model = adapted(quantize_model(Net()), **options)
    x = torch.randn(3, 64)
    model.save_pretrained(tmp_path)
    assert model.base_model.model.fc.r == {"default": 8}
    assert model.base_model.model.block["fc"].r == {"default": 4}
    for read in (PeftModel.from_pretrained, qkern.io.load_adapter):
        assert error(read(quantize_model(Net()), tmp_path)(x), model(x)) < 1e-6


def test_a_model_that_transformers_loaded_needs_no_registering(
    tmp_path: Path, qkern_peft: Any
) -> None:
    from transformers import AutoModelForCausalLM

    from qkern.integrations.transformers import QKernConfig

    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    qkern_peft.unregister()
    config = QKernConfig()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )
    assert qkern_peft.registered()
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared.is_gradient_checkpointing
    tuned = adapted(prepared).train()
    assert {type(m).__name__ for m in tuned.modules() if hasattr(m, "lora_A")} == {"QKernLinear"}
    loss = tuned(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
