"""All that was trained is saved and comes back, in PEFT and here, or saving refuses by name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qkern import io
from qkern import nn as qnn
from tests import models
from tests.io.llamas import files, logits, lora_llama, peft_llama, randomised, tiny_llama


def dense_of(model: nn.Module, dense: nn.Module) -> nn.Module:
    """``dense`` with the values of the 4-bit weights of ``model``, which has the same names."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, qnn.Linear4bit):
                dense.get_submodule(name).weight.copy_(module.quantized.dequantize())
    return dense


def train(*tensors: torch.Tensor) -> None:
    """What an optimizer does to them, and leaves behind."""
    for tensor in tensors:
        tensor.requires_grad_(True)
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor) * 0.3)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def through_peft(dense: nn.Module, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: their values are right
        return peft.PeftModel.from_pretrained(copy.deepcopy(dense), directory).eval()


def make_llama(**config: object) -> transformers.LlamaForCausalLM:
    return models.tiny_llama(**config).eval()


def make_qwen() -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    config = transformers.Qwen2Config(
        **sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def make_classifier() -> transformers.LlamaForSequenceClassification:
    config = make_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).eval()


def tiny_bert(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    return kind(config).eval()


def make_bert_classifier() -> nn.Module:
    return tiny_bert(transformers.BertForSequenceClassification)


def weights(*names: str):
    """A function that trains these parameters of a model."""
    return lambda model: train(*(model.get_parameter(name) for name in names))


def biases_under_adapters(model: nn.Module) -> None:
    train(*(la.base_layer.bias for _, la in qnn.lora_layers(model) if la.bias is not None))


def bias_of_a_plain_layer(model: nn.Module) -> None:
    train(model.model.layers[0].self_attn.v_proj.bias)


CASES = {
    "head": (make_llama, {}, weights("lm_head.weight"), {"modules_to_save": ["lm_head"]}),
    "embedding and norms": (
        make_llama,
        {},
        weights("model.embed_tokens.weight", "model.norm.weight"),
        # Not "norm", which is also the end of "input_layernorm".
        {"modules_to_save": ["embed_tokens", "model.norm"]},
    ),
    "tied": (
        lambda: make_llama(tie_word_embeddings=True),
        {},
        weights("lm_head.weight"),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "biases under adapters": (make_qwen, {}, biases_under_adapters, {"bias": "lora_only"}),
    "bias of a 4-bit layer": (
        make_qwen,
        {"targets": ["q_proj"]},
        bias_of_a_plain_layer,
        {"bias": "all"},
    ),
    "classifier": (
        make_classifier,
        {"task_type": "SEQ_CLS", "targets": ["q_proj", "up_proj"]},
        weights("score.weight"),
        {"modules_to_save": ["score"]},
    ),
    "frozen classifier": (
        make_classifier,
        {"task_type": "SEQ_CLS", "targets": ["q_proj", "up_proj"]},
        lambda _: None,
        {"modules_to_save": ["score"]},
    ),
    "classifier without a task": (
        make_classifier,
        {"targets": ["q_proj", "up_proj"]},
        weights("score.weight"),
        {"modules_to_save": ["score"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_trained_comes_back(case: str, tmp_path: Path) -> None:
    make, options, train_it, config = CASES[case]
    task_type = options.get("task_type")
    targets = options.get("targets", "all-linear")

    def quantised() -> nn.Module:
        return qnn.quantize_model(make(), skip=("lm_head", "score"))

    model = qnn.add_lora(
        quantised(), qnn.LoRAConfig(r=4, targets=targets), skip=("lm_head", "score")
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in qnn.lora_parameters(model):
        parameter.requires_grad_(True)
    randomised(model)
    without = logits(model)
    train_it(model)
    io.save_adapter(model, tmp_path, task_type=task_type)
    assert files(tmp_path)[0] == files(tmp_path)[0] | config
    expected = logits(model)
    assert case == "frozen classifier" or (expected - without).abs().max() > 0.01
    theirs = through_peft(dense_of(quantised(), make()), tmp_path)
    # In float64: PEFT's own logits in float32 are up to 7e-5 off, of 12.
    exact = logits(copy.deepcopy(theirs).double())
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=1e-4)
    # Read into a model without adapters, and into one with them.
    fresh = io.load_adapter(quantised(), tmp_path)
    again = qnn.add_lora(
        quantised(), qnn.LoRAConfig(r=4, targets=targets), skip=("lm_head", "score")
    )
    for loaded in (fresh, io.load_adapter(again, tmp_path)):
        assert torch.equal(logits(loaded), expected)
        assert trained(loaded) >= trained(model)
    # And what was read is saved again.
    io.save_adapter(fresh, tmp_path / "again", task_type=task_type)
    first, second = files(tmp_path)[1], files(tmp_path / "again")[1]
    assert first.keys() <= second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
        (make_llama, {"modules_to_save": ["norm"]}),
        (make_qwen, {"bias": "all"}),
        (make_qwen, {"bias": "lora_only"}),
        (make_classifier, {"task_type": "SEQ_CLS"}),
        (make_bert_classifier, {"task_type": "SEQ_CLS", "bias": "all"}),
    ],
    ids=["modules", "several by one name", "all biases", "biases under adapters", "task", "both"],
)
def test_reads_what_peft_trained(make, options, tmp_path):
    targets = ["q_proj", "up_proj", "query"]
    config = peft.LoraConfig(r=4, target_modules=targets, **options)
    theirs = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    model = io.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_reads_biases_of_layers_with_adapters_as_old_versions_of_peft_name_them(tmp_path):
    model = lora_qwen = qnn.add_lora(make_qwen(), qnn.LoRAConfig(r=4, targets=["q_proj"]))
    biases_under_adapters(randomised(lora_qwen))
    io.save_adapter(model, tmp_path)
    config, tensors = files(tmp_path)
    renamed = {name.replace(".base_layer.bias", ".bias"): t for name, t in tensors.items()}
    assert config["bias"] == "lora_only"
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / io.adapters.WEIGHTS_FILE)
    assert torch.equal(logits(io.load_adapter(make_qwen(), tmp_path)), logits(model))


@pytest.mark.parametrize("in_4_bits", [True, False])
def test_reads_an_adapter_of_peft_on_the_head(in_4_bits, tmp_path):
    """PEFT writes the weight of the head too, which was not trained."""

    def make() -> nn.Module:
        return qnn.quantize_model(make_llama(), targets=["lm_head"]) if in_4_bits else make_llama()

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    name = "base_model.model.lm_head.base_layer.weight"
    weight = files(tmp_path)[1][name]
    model = io.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert all("lora_" in name for name in trained(model))
    # The file's counts, as after a vocabulary that was resized, unless it is of codes.
    other = files(tmp_path)[1] | {name: weight + 1}
    save_file(other, tmp_path / io.adapters.WEIGHTS_FILE)
    if in_4_bits:
        with pytest.raises(ValueError, match=r"lm_head.weight: the adapter comes with another"):
            io.load_adapter(make(), tmp_path)
    else:
        loaded = io.load_adapter(model, tmp_path).lm_head.base_layer.weight
        assert torch.equal(loaded, weight + 1)
        assert not loaded.requires_grad


def test_a_frozen_weight_of_a_trained_module_may_be_tied_to_another(tmp_path):
    """The decoder of BERT's head is the table of its embeddings."""

    def make() -> nn.Module:
        return qnn.quantize_model(tiny_bert(transformers.BertForMaskedLM))

    model = randomised(qnn.add_lora(make(), qnn.LoRAConfig(r=4)))
    head = model.cls.predictions
    train(head.bias, *head.transform.parameters())
    io.save_adapter(model, tmp_path)
    loaded = io.load_adapter(make(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert trained(loaded) == trained(model)
    theirs = through_peft(make(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        head.decoder.weight.add_(1)
    io.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"decoder.weight: was trained apart from bert.embeddings"):
        io.load_adapter(make(), tmp_path)


@pytest.mark.parametrize("tied_again", [True, False])
def test_tied_weights_that_peft_trained(tied_again, tmp_path):
    """PEFT trains a copy of the embedding; only with ``ensure_weight_tying`` the head follows."""

    def make() -> nn.Module:
        return make_llama(tie_word_embeddings=True)

    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": tied_again}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
        theirs = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(3)
    table = theirs.base_model.model.model.embed_tokens.modules_to_save["default"]
    with torch.no_grad():
        table.weight.add_(torch.randn_like(table.weight) * 0.2)
    theirs.save_pretrained(tmp_path)
    if tied_again:
        model = io.load_adapter(make(), tmp_path)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(
            ValueError, match=r"embed_tokens.weight: was trained apart from lm_head"
        ):
            io.load_adapter(make(), tmp_path)
        model = make()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        io.load_adapter(model, tmp_path)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_reads_a_resized_vocabulary(tmp_path):
    def make(vocabulary: int) -> nn.Module:
        model = tiny_llama()
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    torch.manual_seed(3)
    theirs = peft.get_peft_model(make(140), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = io.load_adapter(make(140), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert all("lora_" in name for name in trained(model))
    with pytest.raises(ValueError, match=r"got shape \[140, 64\].*another vocabulary: resize"):
        io.load_adapter(tiny_llama(), tmp_path)


def test_reads_a_vocabulary_that_more_modules_are_tied_to(tmp_path):
    """Of T5's one table PEFT writes two names, and the model has four."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 128, "d_model": 64, "d_ff": 96, "d_kv": 16}
        config = transformers.T5Config(
            **sizes, num_layers=1, num_heads=4, decoder_start_token_id=0, tie_word_embeddings=True
        )
        return transformers.T5ForConditionalGeneration(config).eval()

    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        theirs.base_model.model.shared.weight.mul_(2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = io.load_adapter(make(), tmp_path)
    ids = torch.arange(16).view(2, 8)
    ours, expected = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_come_back_where_they_moved(tmp_path):
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.moved, self.still = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Module()
            self.still.norm = nn.BatchNorm1d(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.still.norm(self.moved(self.fc(x)))

    def make() -> nn.Module:
        return qnn.quantize_model(Norms())

    model = randomised(qnn.add_lora(make(), qnn.LoRAConfig(r=4))).train()
    model.still.eval()
    x = torch.randn(32, 64)
    for _ in range(3):
        model(3 * x + 1)
    io.save_adapter(model.eval(), tmp_path)
    assert files(tmp_path)[0]["modules_to_save"] == ["moved"]
    expected = model(x)
    loaded = io.load_adapter(make().eval(), tmp_path)
    assert torch.equal(loaded(x), expected)
    theirs = through_peft(dense_of(make(), Norms()), tmp_path)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    # What took the norm's place since then has not seen the count before.
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    io.save_adapter(other, tmp_path / "other")
    assert "moved" in files(tmp_path / "other")[0]["modules_to_save"]
    # Also where nothing moved since it was loaded.
    io.save_adapter(loaded, tmp_path / "again")
    assert files(tmp_path / "again")[0]["modules_to_save"] == ["moved"]


class Net(nn.Module):
    """What PEFT's format has no place for, at hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(64))
        self.fc = nn.Linear(64, 64)
        self.block = nn.Module()
        self.block.gate = nn.Parameter(torch.ones(64))
        self.block.fc = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.other = nn.ModuleDict({"xnorm": nn.LayerNorm(64)})
        self.head = nn.ModuleDict({"my_score": nn.Linear(64, 64), "table": nn.Embedding(4, 64)})


def net() -> Net:
    return qnn.quantize_model(Net(), skip=("my_score",), lora=qnn.LoRAConfig(r=2, targets=["fc"]))


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        (["scale"], {}, "scale: is trained, .* is the model itself"),
        (["block.gate"], {}, r"block.gate: is trained, .* block is around block.fc"),
        (["dense.base_layer.weight"], {}, "dense.weight: is trained, .* a layer with an adapter"),
        ([], {"modules_to_save": ["fc"]}, "modules_to_save: fc is a layer with an adapter"),
        ([], {"modules_to_save": ["head"]}, "modules_to_save: head is a ModuleDict"),
        ([], {"modules_to_save": ["no"]}, "modules_to_save: the model has no module 'no'"),
        ([], {"task_type": "SEQ_CLS"}, r"head.score: PEFT takes it for .*'score'.* an adapter"),
    ],
)
def test_what_has_no_place_is_refused_by_name(parameters, options, message, tmp_path):
    model = net()
    if "dense" in message:
        model.dense = qnn.LoRALinear(nn.Linear(64, 64), 2, 4)
    if "head.score" in message:
        model.head["score"] = qnn.LoRALinear(nn.Linear(64, 64), 2, 4)
    weights(*parameters)(model)
    with pytest.raises(ValueError, match=message):
        io.save_adapter(model, tmp_path / "adapter", **options)
    assert not list(tmp_path.iterdir())


def test_a_name_that_names_more_brings_it_along(tmp_path):
    """PEFT takes "norm" for "other.xnorm" too, and then wants the weights of both."""
    model = net()
    weights("norm.weight")(model)
    io.save_adapter(model, tmp_path)
    config, tensors = files(tmp_path)
    assert config["modules_to_save"] == ["norm"]
    names = {
        f"base_model.model.{p}.{k}" for p in ("norm", "other.xnorm") for k in ("weight", "bias")
    }
    assert names == {name for name in tensors if "lora" not in name}
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(theirs.base_model.model.norm.weight, model.norm.weight)


def test_frozen_modules_are_saved_on_demand(tmp_path):
    model = net()
    with torch.no_grad():
        model.head["table"].weight.mul_(3)
    io.save_adapter(model, tmp_path, modules_to_save=["head.table"])
    assert files(tmp_path)[0]["modules_to_save"] == ["table"]
    again = io.load_adapter(qnn.quantize_model(Net(), skip=("my_score",)), tmp_path)
    assert torch.equal(again.head["table"].weight, model.head["table"].weight)
    with pytest.raises(TypeError, match="modules_to_save: got the string"):
        io.save_adapter(model, tmp_path, modules_to_save="table")


def test_what_is_tied_to_a_frozen_module_comes_along(tmp_path):
    model = make_llama(tie_word_embeddings=True)
    qnn.add_lora(model, qnn.LoRAConfig(r=2, targets=["q_proj"]))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    io.save_adapter(model, tmp_path, modules_to_save=["lm_head"])
    assert files(tmp_path)[0]["modules_to_save"] == ["embed_tokens", "lm_head"]
    theirs = through_peft(make_llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_head_in_4_bits_does_not_take_a_dense_one(tmp_path):
    peft_llama(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = tiny_llama()
    model.lm_head = qnn.Linear4bit.from_linear(model.lm_head)
    with pytest.raises(
        ValueError, match=r"lm_head whole and dense, .* a layer with a 4-bit weight"
    ):
        io.load_adapter(model, tmp_path)
    assert not list(qnn.lora_layers(model))


def test_nothing_is_loaded_where_there_is_no_memory(tmp_path):
    io.save_adapter(lora_llama(), tmp_path)
    with pytest.raises(ValueError, match="is on the meta device in the model"):
        io.load_adapter(tiny_llama().to("meta"), tmp_path)


class TestSaveBnb:
    """What is written is what the model computes."""

    @staticmethod
    def make(quantised: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        qnn.quantize_model(model, targets=["0", "1"] if quantised else ["2"])
        return model

    @pytest.mark.parametrize("quantised", [True, False])
    def test_merged_weights_are_written(self, quantised, tmp_path):
        model = self.make(quantised)
        x = torch.randn(3, 64)
        base = model(x)
        randomised(qnn.add_lora(model, qnn.LoRAConfig(r=4, targets=["0"])))
        qnn.merge_lora(model)
        io.save_bnb(model, tmp_path / "merged.safetensors")
        loaded = io.load_bnb(self.make(quantised), tmp_path / "merged.safetensors")
        assert torch.equal(loaded(x), model(x))
        with qnn.disable_lora(model):
            io.save_bnb(model, tmp_path / "base.safetensors")
        loaded = io.load_bnb(self.make(quantised), tmp_path / "base.safetensors")
        assert torch.equal(loaded(x), base)
        assert not torch.equal(model(x), base)

    @pytest.mark.parametrize("quantised", [True, False])
    def test_adapters_at_work_are_refused(self, quantised, tmp_path):
        model = randomised(qnn.add_lora(self.make(quantised), qnn.LoRAConfig(r=4, targets=["0"])))
        file = tmp_path / "model.safetensors"
        with pytest.raises(ValueError, match=r"^0: has an adapter that is not merged; merge_lora"):
            io.save_bnb(model, file)
        assert not list(tmp_path.iterdir())
        with qnn.disable_lora(model):
            io.save_bnb(model, file)
        assert not any("lora" in name for name in load_file(file))

    def test_a_merged_weight_that_is_tied_is_refused(self, tmp_path):
        model = self.make(True)
        model.append(nn.Embedding(64, 64))
        model[3].weight = model[2].weight
        randomised(qnn.add_lora(model, qnn.LoRAConfig(r=4, targets=["2"])))
        qnn.merge_lora(model)
        with pytest.raises(ValueError, match=r"2: its merged weight is no longer that of 3.weight"):
            io.save_bnb(model, tmp_path / "model.safetensors")
