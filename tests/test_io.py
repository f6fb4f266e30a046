from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qkern import io
from qkern import nn as qnn


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).eval()


def lora_llama(**options) -> LlamaForCausalLM:
    """The tiny model in 4 bits with adapters that do something."""
    config = qnn.LoRAConfig(**({"r": 4, "alpha": 8} | options))
    return randomised(qnn.quantize_model(tiny_llama(), lora=config))


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for _, layer in qnn.lora_layers(model):
        nn.init.normal_(layer.lora_a, std=0.2)
        nn.init.normal_(layer.lora_b, std=0.2)
    return model


def dequantised_llama() -> LlamaForCausalLM:
    dense = tiny_llama()
    with torch.no_grad():
        for name, module in qnn.quantize_model(tiny_llama()).named_modules():
            if isinstance(module, qnn.Linear4bit):
                dense.get_submodule(name).weight.copy_(module.weight.dequantize())
    return dense


def peft_llama(**options) -> peft.PeftModel:
    """PEFT on the dequantised model, with adapters that do something."""
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | options)
    )
    model = peft.get_peft_model(dequantised_llama(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


IDS = torch.arange(32).view(2, 16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def files(directory: Path) -> tuple[dict, dict]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def rewrite(directory: Path, config: dict | None = None, tensors: dict | None = None) -> None:
    """Change a saved adapter: None as a value removes the key."""
    old_config, old_tensors = files(directory)
    for old, new in ((old_config, config), (old_tensors, tensors)):
        for key, value in (new or {}).items():
            if value is None:
                del old[key]
            else:
                old[key] = value
    (directory / "adapter_config.json").write_text(json.dumps(old_config))
    save_file(old_tensors, directory / "adapter_model.safetensors")


class TestSaveAdapter:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"targets": ["q_proj", "down_proj"]},
            {"targets": ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
            {"use_rslora": True},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
            {"dtype": torch.bfloat16},
        ],
        ids=["all", "names", "paths", "rslora", "patterns", "bf16"],
    )
    def test_peft_loads_it_and_gives_the_same_logits(self, options, tmp_path):
        model = lora_llama(**options)
        io.save_adapter(model, tmp_path, "some/base", task_type="CAUSAL_LM")
        loaded = peft.PeftModel.from_pretrained(dequantised_llama(), tmp_path).eval()
        expected = logits(model)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
        assert (expected - logits(dequantised_llama())).abs().max() > 0.05
        wrapped = {
            name.removeprefix("base_model.model.")
            for name, module in loaded.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        assert wrapped == {name for name, _ in qnn.lora_layers(model)}

    def test_files_are_as_peft_writes_them(self, tmp_path):
        targets = ["q_proj", "up_proj"]
        io.save_adapter(
            lora_llama(targets=targets, dropout=0.1), tmp_path / "own", task_type="CAUSAL_LM"
        )
        peft_llama(lora_dropout=0.1, task_type="CAUSAL_LM").save_pretrained(tmp_path / "peft")
        own_config, own = files(tmp_path / "own")
        peft_config, other = files(tmp_path / "peft")
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}
        assert sorted(peft_config["target_modules"]) == targets
        peft_config["target_modules"] = targets
        peft_config["base_model_name_or_path"] = own_config["base_model_name_or_path"]
        for name, value in own_config.items():
            assert peft_config[name] == value, name

    def test_shorthand_that_would_match_more_is_not_used(self, tmp_path):
        io.save_adapter(lora_llama(targets=["layers.0.self_attn.q_proj"]), tmp_path)
        assert files(tmp_path)[0]["target_modules"] == ["model.layers.0.self_attn.q_proj"]
        io.save_adapter(lora_llama(targets=["q_proj"]), tmp_path)
        assert files(tmp_path)[0]["target_modules"] == ["q_proj"]

    def test_merged_adapters_are_saved_unmerged(self, tmp_path):
        model = lora_llama()
        io.save_adapter(model, tmp_path / "before")
        qnn.merge_lora(model)
        io.save_adapter(model, tmp_path / "merged")
        before, merged = files(tmp_path / "before")[1], files(tmp_path / "merged")[1]
        assert before.keys() == merged.keys()
        assert all(torch.equal(before[name], merged[name]) for name in before)

    def test_wrappers_leave_no_trace_in_the_names(self, tmp_path):
        model = lora_llama(targets=["q_proj"])
        io.save_adapter(model, tmp_path / "plain")
        model.model.layers[0] = torch.compile(model.model.layers[0])
        io.save_adapter(nn.DataParallel(torch.compile(model)), tmp_path / "wrapped")
        plain, wrapped = files(tmp_path / "plain"), files(tmp_path / "wrapped")
        assert plain[0] == wrapped[0]
        assert plain[1].keys() == wrapped[1].keys()

    def test_interruption_leaves_the_old_files(self, tmp_path, monkeypatch):
        io.save_adapter(lora_llama(), tmp_path)
        before = files(tmp_path)

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            io.save_adapter(lora_llama(r=8), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        after = files(tmp_path)
        assert after[0] == before[0]
        assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="has no LoRA layers"):
            io.save_adapter(tiny_llama(), tmp_path)
        model = lora_llama()
        next(qnn.lora_layers(model))[1].dropout = 0.5
        with pytest.raises(ValueError, match="differ in dropout"):
            io.save_adapter(model, tmp_path)


class TestLoadAdapter:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
            {"target_modules": r".*layers\.1\..*_proj"},
            {"use_rslora": True, "r": 9},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 32}},
            {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        ],
        ids=["names", "all", "regex", "rslora", "patterns", "gaussian"],
    )
    @pytest.mark.parametrize("quantized", [True, False])
    def test_reads_what_peft_saved(self, options, quantized, tmp_path):
        source = peft_llama(**options)
        source.save_pretrained(tmp_path)
        model = qnn.quantize_model(tiny_llama()) if quantized else dequantised_llama()
        assert io.load_adapter(model, tmp_path) is model
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-5)
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in qnn.lora_parameters(model)}

    @pytest.mark.parametrize("fresh", [True, False])
    def test_round_trip(self, fresh, tmp_path):
        options = {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "dropout": 0.25}
        model = lora_llama(**options)
        io.save_adapter(model, tmp_path)
        other = qnn.quantize_model(
            tiny_llama(),
            lora=None if fresh else qnn.LoRAConfig(**({"r": 4, "alpha": 8} | options)),
        )
        io.load_adapter(other, tmp_path)
        assert torch.equal(logits(other), logits(model))
        for (name, own), (_, layer) in zip(
            qnn.lora_layers(model), qnn.lora_layers(other), strict=True
        ):
            assert (own.r, own.alpha, own.dropout) == (layer.r, layer.alpha, layer.dropout), name

    def test_dtype_of_new_adapters(self, tmp_path):
        io.save_adapter(lora_llama(dtype=torch.bfloat16), tmp_path)
        for dtype in (None, torch.bfloat16):
            model = io.load_adapter(qnn.quantize_model(tiny_llama()), tmp_path, dtype=dtype)
            assert {p.dtype for p in qnn.lora_parameters(model)} == {dtype or torch.float32}

    def test_shared_layer_gets_one_adapter(self, tmp_path):
        def make() -> nn.ModuleDict:
            torch.manual_seed(0)
            linear = nn.Linear(32, 32)
            return nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})

        io.save_adapter(randomised(qnn.add_lora(make(), qnn.LoRAConfig(r=2))), tmp_path)
        model = io.load_adapter(make(), tmp_path)
        assert isinstance(model["a"], qnn.LoRALinear)
        assert model["a"] is model["b"][0]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"use_dora": True}, "use_dora=True is not supported"),
            ({"bias": "all"}, "bias: got 'all'"),
            ({"lora_bias": True}, "lora_bias=True is not supported"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
            ({"peft_type": "LOHA"}, "peft_type: got 'LOHA'"),
            ({"init_lora_weights": "pissa"}, "'pissa' changes the base weight"),
            ({"some_new_field": {"x": 1}}, "some_new_field=.* is not supported"),
            ({"r": None}, "'r' is missing"),
            ({"r": 0}, "r: got 0"),
            ({"lora_alpha": float("inf")}, "alpha: got inf"),
            ({"r": 5}, r"lora_A: got shape \[4, 96\]; takes \[5, 96\]"),
        ],
    )
    def test_configuration_errors(self, config, message, tmp_path):
        io.save_adapter(lora_llama(), tmp_path)
        rewrite(tmp_path, config)
        model = qnn.quantize_model(tiny_llama())
        with pytest.raises(ValueError, match=message):
            io.load_adapter(model, tmp_path)
        assert not list(qnn.lora_layers(model))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"Q.lora_A.weight": None}, "q_proj has lora_B but not the other half"),
            ({"Q.lora_A.weight": torch.zeros(4, 63)}, r"q_proj.lora_A: got shape \[4, 63\]"),
            ({"Q.lora_B.weight": torch.zeros(64, 3)}, r"q_proj.lora_B: got shape \[64, 3\]"),
            ({"Q.lora_magnitude_vector": torch.zeros(1)}, "unknown key .*magnitude"),
            (
                {"Xq.lora_A.weight": torch.zeros(4, 64), "Xq.lora_B.weight": torch.zeros(64, 4)},
                "no linear layer model.Xq",
            ),
        ],
    )
    def test_key_and_shape_errors(self, tensors, message, tmp_path):
        io.save_adapter(lora_llama(), tmp_path)
        prefix = "base_model.model.model."
        names = {"Q": prefix + "layers.0.self_attn.q_proj", "Xq": prefix + "Xq"}
        rewrite(
            tmp_path,
            tensors={
                names[key.partition(".")[0]] + "." + key.partition(".")[2]: tensor
                for key, tensor in tensors.items()
            },
        )
        model = qnn.quantize_model(tiny_llama())
        with pytest.raises(ValueError, match=message):
            io.load_adapter(model, tmp_path)
        assert not list(qnn.lora_layers(model))

    def test_model_with_other_adapters(self, tmp_path):
        io.save_adapter(lora_llama(targets=["q_proj"]), tmp_path)
        for options, message in (
            ({"targets": ["q_proj", "v_proj"]}, "missing .*v_proj.*; unknown nothing"),
            ({"targets": ["v_proj"]}, "missing .*v_proj.* unknown .*q_proj"),
            ({"targets": ["q_proj"], "alpha": 9}, r"got \(r, alpha, use_rslora\) \(4, 8, False\)"),
            ({"targets": ["q_proj"], "use_rslora": True}, "the model has .*True"),
        ):
            model = lora_llama(**options)
            before = logits(model)
            with pytest.raises(ValueError, match=message):
                io.load_adapter(model, tmp_path)
            assert torch.equal(logits(model), before)

    def test_merged_model_is_refused(self, tmp_path):
        model = lora_llama()
        io.save_adapter(model, tmp_path)
        qnn.merge_lora(model)
        with pytest.raises(ValueError, match="its adapter is merged"):
            io.load_adapter(model, tmp_path)

    def test_missing_and_damaged_files(self, tmp_path):
        model = qnn.quantize_model(tiny_llama())
        with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
            io.load_adapter(model, tmp_path)
        io.save_adapter(lora_llama(), tmp_path)
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is not read"):
            io.load_adapter(model, tmp_path)
        (tmp_path / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="not JSON"):
            io.load_adapter(model, tmp_path)
        (tmp_path / "adapter_config.json").write_text("[]")
        with pytest.raises(ValueError, match="got list; takes a JSON object"):
            io.load_adapter(model, tmp_path)
