"""PEFT's adapters on models in 4 bits, on qkern and on bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.integrations.record import Side, cases, feature

GROUP = "Adapters"
IDS = torch.arange(3, 67).view(4, 16)
BATCH = {"input_ids": IDS, "labels": IDS}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **inputs).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, of the expected one's norm."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def train(model: Any, steps: int = 3) -> None:
    """The loss falls, and every trained parameter has a gradient in the end."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained, "nothing is trained"
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**BATCH).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    dead = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead, f"no gradient at {dead[0]}"
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"


@cases(
    group=GROUP,
    names={
        "LoRA": {},
        "rsLoRA": {"use_rslora": True},
        "LoRA with `lora_dropout`": {"lora_dropout": 0.1},
        'LoRA with `bias="lora_only"`': {"bias": "lora_only"},
        "LoRA with `rank_pattern` and `alpha_pattern`": {
            "rank_pattern": {"up_proj": 8},
            "alpha_pattern": {"down_proj": 16},
        },
        "LoRA with `modules_to_save`": {"modules_to_save": ["lm_head"]},
        "LoRA on a 4-bit layer and its dense head": {"target_modules": ["up_proj", "lm_head"]},
        "LoRA with `trainable_token_indices`": {"trainable_token_indices": [3, 5]},
        "DoRA": {"use_dora": True},
        "PiSSA": {"init_lora_weights": "pissa"},
        "OLoRA": {"init_lora_weights": "olora"},
        "orthogonal initialisation": {"init_lora_weights": "orthogonal"},
    },
    argument="options",
)
def test_lora(side: Side, options: dict[str, Any], dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = side.load(dense_llama)
    before = logits(base)
    model = side.adapt(base, **options)
    moved = distance(logits(model), before)
    dense = AutoModelForCausalLM.from_pretrained(dense_llama, dtype=torch.float32)
    # What takes its factors out of the weight quantises the rest anew.
    limit = 2 * distance(before, logits(dense))
    assert moved < limit, f"the new adapter moves the logits by {moved:.2f} of their size"
    train(model)
    trained = logits(model)
    assert distance(trained, before) > 1e-3, "training changed nothing"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(side.load(dense_llama), tmp_path)
    error = distance(logits(again), trained)
    assert error < 1e-5, f"logits of the saved adapter differ by {error:.1e} of their size"


@feature("EVA", group=GROUP)
def test_eva(side: Side, dense_llama: Path) -> None:
    torch.manual_seed(0)
    base = side.load(dense_llama)
    before = logits(base)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    model = side.adapt(base, config)
    peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 4)
    assert distance(logits(model), before) < 1e-5, "the new adapter moves the logits"
    train(model)


@feature("LoftQ, by `replace_lora_weights_loftq`", group=GROUP)
def test_loftq(side: Side, dense_llama: Path) -> None:
    model = side.adapt(side.load(dense_llama), target_modules=["q_proj", "up_proj"])
    peft.replace_lora_weights_loftq(model, str(dense_llama / "model.safetensors"))
    dense = load_file(dense_llama / "model.safetensors")
    ratios = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            base = layer.base_layer
            theirs = dequantize_module_weight
            held = base.quantized.dequantize() if side.is_qkern else theirs(base)
            rest = dense[f"{name}.weight"] - held
            ratios.append(distance(layer.get_delta_weight("default"), rest))
    mean = sum(ratios) / len(ratios)
    assert mean < 0.98, f"{mean:.3f} of the error of 4 bits is left"
    side.note(f"{mean:.2f} of the error of 4 bits is left, at rank 4 of random 64 × 64")


@feature("`merge_and_unload()` into 4 bits", group=GROUP)
def test_merged(side: Side, dense_llama: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    train(model, 12)
    expected, base = logits(model), logits(side.load(dense_llama))
    merged = model.merge_and_unload()
    assert any(isinstance(module, side.linear) for module in merged.modules()), "not in 4 bits"
    error, change = distance(logits(merged), expected), distance(base, expected)
    assert error < change, (
        f"merging moves the logits by {error:.2f}, the adapter did by {change:.2f}"
    )
    side.note(f"the logits move by {error:.2f} of their size, {change:.2f} is the adapter's work")


@feature("`merge_adapter()`, then `unmerge_adapter()`: the base as it was", group=GROUP)
def test_unmerged(side: Side, dense_llama: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    train(model)
    expected = logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), expected), "merging changed no bit"
    model.unmerge_adapter()
    error = distance(logits(model), expected)
    assert error == 0, f"the logits differ by {error:.1e} of their size"


@feature("merging into a dense model after `dequantize()`", group=GROUP)
def test_merged_dense(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = side.load(dense_llama)
    dense = dense.dequantize() or dense
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    error = distance(logits(plain), expected)
    assert error < 1e-4, f"the logits differ by {error:.1e} of their size"


@feature("an adapter trained here, in plain PEFT on the dense model", group=GROUP)
def test_on_the_dense_model(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(dense_llama, dtype=torch.float32)
    values = side.load(dense_llama)
    values = values.dequantize() or values
    dense.load_state_dict(values.state_dict())
    error = distance(logits(peft.PeftModel.from_pretrained(dense, tmp_path)), expected)
    assert error < 1e-4, f"the logits differ by {error:.1e} of their size"


def two_adapters(side: Side, path: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model with the adapters "default" and "other", and the logits with none and with each."""
    torch.manual_seed(0)
    base = side.load(path)
    before = logits(base)
    model = side.adapt(base)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    found = []
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model)
        found.append(logits(model))
    return model, before, *found


@feature("two adapters: switched, disabled, deleted", group=GROUP)
def test_two_adapters(side: Side, dense_llama: Path) -> None:
    model, none, first, second = two_adapters(side, dense_llama)
    assert torch.equal(logits(model), second), "not the one that was set"
    model.set_adapter("default")
    assert torch.equal(logits(model), first), "not the one that was set"
    with model.disable_adapter():
        assert torch.equal(logits(model), none), "not the base's while disabled"
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), second), "not the one that is left"


@feature("a batch of mixed adapters, `adapter_names=`", group=GROUP)
def test_mixed_batch(side: Side, dense_llama: Path) -> None:
    model, none, first, second = two_adapters(side, dense_llama)
    found = logits(model, adapter_names=["__base__", "default", "other", "default"])
    for i, expected in enumerate((none, first, second, first)):
        error = distance(found[i], expected[i])
        assert error < 1e-5, f"row {i} differs by {error:.1e} of its size"


@feature("`add_weighted_adapter`", group=GROUP)
def test_weighted(side: Side, dense_llama: Path) -> None:
    model, *_ = two_adapters(side, dense_llama)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    found = logits(model)
    sums = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            sums[name] = layer.get_delta_weight("default").clone()
            if "other" in layer.lora_A:
                sums[name] += 0.5 * layer.get_delta_weight("other")
    dense = side.load(dense_llama)
    dense = dense.dequantize() or dense
    with torch.no_grad():
        for name, change in sums.items():
            dense.get_submodule(name).weight += change
    error = distance(logits(dense), found)
    assert error < 1e-4, f"the logits differ by {error:.1e} of their size"


@cases(
    group=GROUP,
    names={
        "AdaLoRA": peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
        "IA3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    },
    argument="config",
)
def test_other_tuners(side: Side, config: Any, dense_llama: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama), config)
    train(model, 6)


@cases(
    group=GROUP,
    names={
        "LoHa": peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "LoKr": peft.LoKrConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    },
    argument="config",
    refused=True,
)
def test_tuners_that_multiply_the_dense_weight(side: Side, config: Any, dense_llama: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama), config)
    train(model, 6)
