from __future__ import annotations

import os

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from qkern import io
from qkern import nn as qnn
from tests import models
from tests.io.llamas import (
    dequantised_llama,
    files,
    logits,
    lora_llama,
    peft_llama,
    randomised,
    rewrite,
    tiny_llama,
)


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

    def test_a_reader_of_the_old_file_keeps_it(self, tmp_path):
        io.save_adapter(lora_llama(), tmp_path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(tmp_path / name, tmp_path / f"{name}.old")
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.old")}
        io.save_adapter(lora_llama(r=8), tmp_path)
        assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.old")}

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

    @pytest.mark.filterwarnings("ignore:the adapter computes something else in PEFT")
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
            ({"bias": "some"}, "bias: got 'some'; takes"),
            ({"lora_bias": True}, "lora_bias=True is not supported"),
            ({"modules_to_save": ["lm_head"]}, r"has no lm_head.weight, of modules_to_save"),
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


BNB_CASES = [
    pytest.param("nf4", 64, True, torch.bfloat16, id="nf4-64-double-bf16"),
    pytest.param("nf4", 128, False, torch.float32, id="nf4-128-single-fp32"),
    pytest.param("fp4", 64, True, torch.float16, id="fp4-64-double-fp16"),
    pytest.param("fp4", 256, False, torch.float32, id="fp4-256-single-fp32"),
]
# More than 256 blocks of 64 and a short last block.
IN, OUT = 250, 101


def bnb_layer(kind: str, block_size: int, nested: bool, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A layer quantised by bitsandbytes itself."""
    torch.manual_seed(0)
    return models.bnb_layer(nn.Linear(IN, OUT, dtype=dtype), kind, block_size, nested)


def bnb_dequantize(weight: torch.Tensor) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def model_of(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.LayerNorm(OUT, dtype=layer.bias.dtype))


def quantised_model(
    kind: str = "nf4", block_size: int = 64, nested: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    return qnn.quantize_model(model_of(nn.Linear(IN, OUT, dtype=dtype)), kind, block_size, nested)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        # Bytes, since -0.0 equals +0.0.
        own, other = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(own, other), name


class TestBitsandbytes:
    @pytest.mark.parametrize(("kind", "block_size", "nested", "dtype"), BNB_CASES)
    def test_reads_and_rewrites_its_files_bit_for_bit(
        self, kind, block_size, nested, dtype, tmp_path
    ):
        source = model_of(bnb_layer(kind, block_size, nested, dtype))
        save_file(source.state_dict(), tmp_path / "theirs.safetensors")
        model = model_of(nn.Linear(IN, OUT, dtype=dtype))
        assert io.load_bnb(model, tmp_path / "theirs.safetensors") is model
        qw = model[0].quantized
        assert (qw.format, qw.block_size, qw.double_quant, qw.dtype) == (
            kind,
            block_size,
            nested,
            dtype,
        )
        assert torch.equal(qw.dequantize(), bnb_dequantize(source[0].weight))
        assert torch.equal(model[0].bias, source[0].bias)
        io.save_bnb(model, tmp_path / "ours.safetensors")
        assert_same_tensors(
            load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
        )

    @pytest.mark.parametrize(("kind", "block_size", "nested", "dtype"), BNB_CASES)
    def test_writes_what_it_reads(self, kind, block_size, nested, dtype, tmp_path):
        model = quantised_model(kind, block_size, nested, dtype)
        io.save_bnb(model, tmp_path / "model.safetensors")
        tensors = load_file(tmp_path / "model.safetensors")
        weight = bnb.nn.Params4bit.from_prequantized(
            tensors["0.weight"],
            {k.removeprefix("0."): v for k, v in tensors.items() if k.startswith("0.weight.")},
            device="cpu",
        )
        assert torch.equal(bnb_dequantize(weight), model[0].quantized.dequantize())
        again = io.load_bnb(quantised_model(dtype=dtype), tmp_path)
        assert_same_tensors(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize("tie", [True, False])
    def test_reads_a_transformers_checkpoint_onto_meta(self, tie, tmp_path):
        dense = models.tiny_llama(intermediate_size=128, tie_word_embeddings=tie)
        dense.save_pretrained(tmp_path / "dense")
        theirs = LlamaForCausalLM.from_pretrained(
            tmp_path / "dense",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )
        # Small shards, so that the index is read.
        theirs.save_pretrained(tmp_path / "4bit", max_shard_size="40KB")
        assert len(list((tmp_path / "4bit").glob("*.safetensors"))) > 1

        model = LlamaForCausalLM(dense.config).eval()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                held = nn.Parameter(parameter.to("meta"), requires_grad=False)
                setattr(module, name, held)
        model.tie_weights()
        io.load_bnb(model, tmp_path / "4bit")
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie

        dense = LlamaForCausalLM(dense.config).eval()
        state = {
            name: bnb_dequantize(parameter) if hasattr(parameter, "quant_state") else parameter
            for name, parameter in theirs.named_parameters()
        }
        missing, unexpected = dense.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"] if tie else [], [])
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)

    def test_another_storage_dtype_is_the_same_bytes(self, tmp_path):
        source = qnn.quantize_model(nn.Sequential(nn.Linear(64, 32)))
        io.save_bnb(source, tmp_path / "source.safetensors")
        tensors = load_file(tmp_path / "source.safetensors")
        tensors["0.weight"] = tensors["0.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
        save_file(tensors, tmp_path / "source.safetensors")
        again = io.load_bnb(nn.Sequential(nn.Linear(64, 32)), tmp_path / "source.safetensors")
        assert_same_tensors(again.state_dict(), source.state_dict())

    def test_tied_weights_are_written_once(self, tmp_path):
        def make() -> nn.ModuleDict:
            parts = {
                "table": nn.Embedding(32, 64),
                "up": nn.Linear(64, 64),
                "head": nn.Linear(64, 32, bias=False),
            }
            parts["head"].weight = parts["table"].weight
            return nn.ModuleDict(parts)

        model = qnn.quantize_model(make())
        io.save_bnb(model, tmp_path / "model.safetensors")
        assert "head.weight" not in load_file(tmp_path / "model.safetensors")
        again = io.load_bnb(make(), tmp_path)
        assert_same_tensors(again.state_dict(), model.state_dict())

    def test_lora_is_left_out_of_the_file(self, tmp_path):
        model = quantised_model()
        io.save_bnb(model, tmp_path / "base.safetensors")
        qnn.add_lora(model, qnn.LoRAConfig(r=2))
        io.save_bnb(model, tmp_path / "lora.safetensors")
        assert_same_tensors(
            load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "base.safetensors")
        )
        with pytest.raises(ValueError, match="has LoRA already, at 0"):
            io.load_bnb(model, tmp_path / "base.safetensors")

    def test_only_an_adapters_own_component_is_left_out_of_names(self, tmp_path):
        def make() -> nn.ModuleDict:
            torch.manual_seed(0)
            inner = {
                "base_layers": nn.ModuleList([nn.Linear(64, 64)]),
                "base_layer": nn.Linear(64, 64),
            }
            inner["base_layer_norm"] = nn.LayerNorm(64)
            return nn.ModuleDict({"a": nn.ModuleDict(inner)})

        model = qnn.quantize_model(make())
        names = {name.partition(".weight.")[0] for name in model.state_dict()}
        for lora in (False, True):
            if lora:
                qnn.add_lora(model, qnn.LoRAConfig(r=2))
            io.save_bnb(model, tmp_path / "model.safetensors")
            again = io.load_bnb(make(), tmp_path)
            assert {name.partition(".weight.")[0] for name in again.state_dict()} == names
        assert_same_tensors(again.state_dict(), qnn.quantize_model(make()).state_dict())

    @pytest.mark.parametrize("lora", [False, True])
    def test_a_layer_that_is_the_root(self, lora, tmp_path):
        layer = qnn.Linear4bit.from_linear(nn.Linear(64, 64))
        io.save_bnb(qnn.LoRALinear(layer, 4, 8) if lora else layer, tmp_path / "layer.safetensors")
        tensors = load_file(tmp_path / "layer.safetensors")
        again = qnn.Linear4bit(64, 64)
        again.load_state_dict(tensors)
        assert_same_tensors(again.state_dict(), layer.state_dict())

    def test_shared_weights_are_written_once_for_each_layer(self, tmp_path):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        qnn.quantize_model(model)
        io.save_bnb(model, tmp_path / "model.safetensors")
        again = io.load_bnb(
            nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tmp_path / "model.safetensors"
        )
        assert_same_tensors(again.state_dict(), model.state_dict())

    def test_what_it_has_no_layout_for(self, tmp_path):
        custom = qnn.quantize_model(
            nn.Sequential(nn.Linear(64, 32)), "custom", codebook=torch.linspace(-1, 1, 16)
        )
        with pytest.raises(ValueError, match=r"0.weight: .* custom codebook"):
            io.save_bnb(custom, tmp_path / "model.safetensors")
        embedding = nn.Sequential(qnn.Embedding4bit.from_embedding(nn.Embedding(8, 64)))
        with pytest.raises(ValueError, match=r"0: .* embeddings"):
            io.save_bnb(embedding, tmp_path / "model.safetensors")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"1.bias": None}, "has no 1.bias"),
            ({"2.bias": torch.zeros(1)}, "the model has no 2.bias"),
            ({"1.bias": torch.zeros(3)}, r"1.bias: got shape \[3\]; takes \[101\]"),
            ({"0.weight.absmax": None}, "has no 0.weight.absmax"),
            ({"0.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, "0.weight: absmax: got shape"),
            ({"0.weight.quant_map": torch.zeros(16)}, "0.weight.quant_map: differs"),
            ({"0.weight.nested_quant_map": torch.zeros(256)}, "nested_quant_map: differs"),
            ({"quant_type": "fp4"}, "quant_type: got 'fp4'"),
            ({"shape": [IN, OUT]}, r"0.weight: got shape \(250, 101\); takes \(101, 250\)"),
            ({"blocksize": 48}, "0.weight: block_size: got 48"),
            ({"dtype": "float64"}, "0.weight: dtype: got torch.float64"),
            ({"dtype": None}, "has no dtype"),
            ({"nested_blocksize": 128}, "got 128, float32; takes 256 and float32, bfloat16"),
        ],
    )
    def test_files_that_do_not_fit(self, change, message, tmp_path):
        io.save_bnb(quantised_model(), tmp_path / "model.safetensors")
        tensors = load_file(tmp_path / "model.safetensors")
        models.change_bnb_state(tensors, change)
        save_file(tensors, tmp_path / "model.safetensors")
        model = model_of(nn.Linear(IN, OUT))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            io.load_bnb(model, tmp_path)
        assert_same_tensors(model.state_dict(), before)

    def test_no_file_and_no_4bit_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
            io.load_bnb(nn.Sequential(nn.Linear(64, 32)), tmp_path)
        save_file(nn.Linear(64, 32).state_dict(), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="holds no weight that bitsandbytes"):
            io.load_bnb(nn.Sequential(nn.Linear(64, 32)), tmp_path)
        io.save_bnb(quantised_model(), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="the model has no linear layer 0"):
            io.load_bnb(nn.Sequential(nn.LayerNorm(8)), tmp_path)
