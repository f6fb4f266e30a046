"""Models of transformers and PEFT that bitsandbytes quantised, computing by qkern's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qkern.integrations import bitsandbytes as integration
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights."""
    path = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **options: Any) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | options,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def with_adapters(model: Any) -> Any:
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14
    return model


def loss_and_gradients(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("nested", [False, True])
def test_training_is_what_it_was(nested, folder, tokens, monkeypatch):
    """Losses and gradients of bitsandbytes' own code, up to rounding, without a dense weight."""
    model = with_adapters(load(folder, bnb_4bit_use_double_quant=nested)).train()
    for module in model.modules():  # as on any processor
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    expected = loss_and_gradients(model, tokens)
    with integration.enable():
        monkeypatch.setattr(functional, "dequantize_4bit", None)
        loss, gradients = loss_and_gradients(model, tokens)
        torch.testing.assert_close((loss, gradients), expected, rtol=1e-3, atol=1e-5)
        model.eval()
        with torch.no_grad():
            model(tokens)
        model.train()
        again = loss_and_gradients(model, tokens)
        torch.testing.assert_close(again, (loss, gradients), rtol=0, atol=0)


def test_steps_lower_the_loss_through_evaluations(folder, tokens):
    with integration.enable():
        model = with_adapters(load(folder, bnb_4bit_use_double_quant=True))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        losses = []
        for _ in range(6):
            model.train()
            _, gradients = loss_and_gradients(model, tokens)
            assert all(g.isfinite().all() and g.any() for g in gradients.values())
            optimizer.step()
            model.eval()
            with torch.no_grad():
                losses.append(model(tokens, labels=tokens).loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_an_adapter(dtype, folder, tokens):
    with integration.enable():
        model = with_adapters(load(folder, bnb_4bit_compute_dtype=dtype)).eval()
        with torch.no_grad():
            with_adapter = model(tokens).logits
            with model.disable_adapter():
                without = model(tokens).logits
            merged = model.merge_and_unload()(tokens).logits
    # Merging quantises again: nearer to the adapted model than the base is, by far.
    assert (merged - with_adapter).norm() < 0.5 * (without - with_adapter).norm()


def test_a_checkpoint_of_its_is_saved_and_loaded(folder, tokens, tmp_path):
    with integration.enable():
        model = load(folder, bnb_4bit_use_double_quant=True)
        with torch.no_grad():
            logits = model(tokens).logits
        model.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    states = model.state_dict(), own.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        if "quant_state" not in name:
            assert torch.equal(tensor, states[1][name]), name
    with integration.enable(), torch.no_grad():
        assert torch.equal(own(tokens).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_compiled_model(backend, folder, tokens):
    torch._dynamo.reset()
    with integration.enable():
        model = with_adapters(load(folder, bnb_4bit_use_double_quant=True)).train()
        expected = loss_and_gradients(model, tokens)
        compiled = torch.compile(model, backend=backend)
        loss = compiled(tokens, labels=tokens).loss
        model.zero_grad()
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close((loss.detach(), found), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_generation_is_what_it_was(folder, tokens):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model = load(folder).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    expected = model.generate(tokens, **options)
    with integration.enable():
        assert torch.equal(model.generate(tokens, **options), expected)
