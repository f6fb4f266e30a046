"""PEFT's other tuners on 4-bit layers, and its ways to put adapters in without a `PeftModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qkern.nn import Linear4bit
from tests.integrations.twins import IDS, dense, error, quantized, shake

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")

REFUSED = {
    "DeloraConfig": {"r": 4},
    "HRAConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "LNTuningConfig": {},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OSFConfig": {"effective_rank": 4},
    "PsoftConfig": {"r": 4},
    "ShiraConfig": {"r": 4},
    "TinyLoraConfig": {},
    "UniLoraConfig": {},
}
RUN: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BOFTConfig": {"boft_block_size": 16},
    "C3AConfig": {"block_size": 16},
    "FourierFTConfig": {"n_frequency": 16},
    "GraloraConfig": {},
    "LilyConfig": {},
    "MissConfig": {},
    "OFTConfig": {"oft_block_size": 16},
    "PveraConfig": {},
    "RandLoraConfig": {},
    "RoadConfig": {},
    "VBLoRAConfig": {"vector_length": 32},
    "VeraConfig": {},
    "WaveFTConfig": {"n_frequency": 16},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tuners_that_compute_with_the_dense_weight_are_refused(kind: str) -> None:
    model = quantized()
    message = r"q_proj: got \w+, which (computes with|trains) the dense weight"
    for targets in (["q_proj"], "all-linear"):
        config = getattr(peft, kind)(target_modules=targets, **REFUSED[kind])
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config)
        assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)


@pytest.mark.parametrize("kind", RUN)
def test_other_tuners_train_as_on_the_dense_model(kind: str) -> None:
    model = quantized()
    gradients: list[dict[str, Any]] = []
    losses = []
    for base in (model, dense(model)):
        torch.manual_seed(0)
        config = getattr(peft, kind)(target_modules=["q_proj"], **RUN[kind])
        tuned = get_peft_model(base, config).train()
        losses.append(tuned(IDS, labels=IDS).loss)
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    assert torch.allclose(*losses, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(g.any() for g in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, rtol=1e-3, atol=1e-6), name


def config(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, target_modules="all-linear")


def test_adapters_are_swapped_while_the_model_runs(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = shake(get_peft_model(quantized(), config(8)), seed=4).eval()
    other.save_pretrained(tmp_path)
    model = shake(get_peft_model(quantized(), config())).eval()
    before = model(IDS).logits
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
    assert error(model(IDS).logits, before) < 1e-5
    hotswap_adapter(model, tmp_path, "default")
    assert error(model(IDS).logits, other(IDS).logits) < 1e-5


def test_adapters_are_injected_without_a_model_of_peft(qkern_peft: Any) -> None:
    first, second = quantized(), quantized()
    base = first(IDS).logits
    peft.inject_adapter_in_model(config(), first)
    peft.inject_adapter_in_model(config(), second, low_cpu_mem_usage=True)
    assert sum(isinstance(m, qkern_peft.QKernLinear) for m in first.modules()) == 7
    state = peft.get_peft_model_state_dict(shake(first))
    peft.set_peft_model_state_dict(second, state, low_cpu_mem_usage=True)
    assert torch.equal(second.eval()(IDS).logits, first.eval()(IDS).logits)
    assert error(first(IDS).logits, base) > 1e-3
