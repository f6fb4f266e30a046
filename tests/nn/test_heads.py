"""Heads stay dense unless they are meant, and a task's own stay trainable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from qkern import nn as qnn
from tests.models import tiny_llama

CONFIG = qnn.LoRAConfig(r=2)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}


def small(model: str, config: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(hf, model)(getattr(hf, config)(**fields))


def bart(model: str) -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ffn = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
    return small(model, "BartConfig", **sizes, **heads, **ffn)


def whisper(model: str) -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return small(model, "WhisperConfig", **sizes, **heads, **tokens)


def t5(model: str) -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1}
    return small(model, "T5Config", **sizes, num_heads=2, tie_word_embeddings=False)


def vit() -> nn.Module:
    sizes = SIZES | {"image_size": 8, "patch_size": 4}
    del sizes["vocab_size"]
    return small("ViTForImageClassification", "ViTConfig", **sizes)


OUTPUTS: list[tuple[Callable[[], nn.Module], set[str]]] = [
    (lambda: small("LlamaForCausalLM", "LlamaConfig", **LLAMA), {"lm_head"}),
    (lambda: small("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES), {"lm_head"}),
    (
        lambda: small("BertForMaskedLM", "BertConfig", **SIZES, tie_word_embeddings=False),
        {"cls.predictions.decoder", "cls.predictions.transform.dense"},
    ),
    (lambda: t5("T5ForConditionalGeneration"), {"lm_head"}),
    (lambda: whisper("WhisperForConditionalGeneration"), {"proj_out"}),
]
TASKS: list[tuple[Callable[[], nn.Module], set[str]]] = [
    (lambda: small("LlamaForSequenceClassification", "LlamaConfig", **LLAMA), {"score"}),
    (lambda: small("LlamaForTokenClassification", "LlamaConfig", **LLAMA), {"score"}),
    (lambda: small("LlamaForQuestionAnswering", "LlamaConfig", **LLAMA), {"qa_outputs"}),
    (lambda: small("BertForSequenceClassification", "BertConfig", **SIZES), {"classifier"}),
    (
        lambda: small("RobertaForSequenceClassification", "RobertaConfig", **SIZES),
        {"classifier.dense", "classifier.out_proj"},
    ),
    (
        lambda: bart("BartForSequenceClassification"),
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    (
        lambda: t5("T5ForSequenceClassification"),
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    (lambda: t5("T5ForTokenClassification"), {"classifier"}),
    (lambda: whisper("WhisperForAudioClassification"), {"projector", "classifier"}),
    (vit, {"classifier"}),
]


def dense_layers(model: nn.Module) -> set[str]:
    """Paths of what is an ``nn.Linear`` outside of adapters."""
    return {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not path.endswith("base_layer") and ".wo" not in path
    }


def trained(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained and are no adapters."""
    return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


@pytest.mark.parametrize("dense_model", [False, True])
@pytest.mark.parametrize(("make", "heads"), OUTPUTS)
def test_output_embeddings_stay_dense_and_frozen(
    make: Callable[[], nn.Module], heads: set[str], dense_model: bool
) -> None:
    model = make()
    if dense_model:
        qnn.add_lora(model, CONFIG)
    else:
        qnn.quantize_model(model, lora=CONFIG)
    assert dense_layers(model) == heads
    assert not trained(model)
    for path in heads:
        assert type(model.get_submodule(path)) is nn.Linear


@pytest.mark.parametrize("way", ["at_once", "after", "dense"])
@pytest.mark.parametrize(("make", "heads"), TASKS)
def test_heads_of_a_task_stay_dense_and_trained(
    make: Callable[[], nn.Module], heads: set[str], way: str
) -> None:
    model = make()
    if way == "at_once":
        qnn.quantize_model(model, lora=CONFIG)
    else:
        if way == "after":
            qnn.quantize_model(model)
        qnn.add_lora(model, CONFIG)
    assert dense_layers(model) == heads
    assert {name.rpartition(".")[0] for name in trained(model)} == heads


def test_a_trained_head_learns_and_a_frozen_one_stays_so() -> None:
    model = TASKS[0][0]()
    qnn.quantize_model(model, lora=CONFIG)
    qnn.prepare_for_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, before, losses = torch.arange(1, 9).view(2, 4), model.score.weight.clone(), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert not torch.equal(model.score.weight, before)
    model = TASKS[0][0]()
    model.score.requires_grad_(False)
    assert not trained(qnn.quantize_model(model, lora=CONFIG))


def test_adapters_are_where_peft_puts_them() -> None:
    """With "all-linear", for a language model and for a classifier."""
    for make, task in ((OUTPUTS[0][0], "CAUSAL_LM"), (TASKS[0][0], "SEQ_CLS")):
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type=task)
        theirs = peft.get_peft_model(make(), config)
        ours = qnn.add_lora(make(), CONFIG)
        prefix = "base_model.model."
        assert {name for name, _ in qnn.lora_layers(ours)} == {
            name.removeprefix(prefix)
            for name, module in theirs.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        saved = {
            name.removeprefix(prefix).replace(".modules_to_save.default", "")
            for name, p in theirs.named_parameters()
            if p.requires_grad and "lora_" not in name
        }
        assert trained(ours) == saved


# Targets and skip


def test_a_head_is_taken_where_it_is_targeted_itself() -> None:
    for targets in (["lm_head"], ["q_proj", "lm_head"], r".*\.q_proj|lm_head"):
        model = qnn.quantize_model(tiny_llama(), targets=targets)
        assert isinstance(model.lm_head, qnn.Linear4bit)
        model = qnn.add_lora(tiny_llama(), qnn.LoRAConfig(r=2, targets=targets))
        assert isinstance(model.lm_head, qnn.LoRALinear)
    model = TASKS[0][0]()
    qnn.quantize_model(model, targets=["score"])
    assert isinstance(model.score, qnn.Linear4bit)
    assert not trained(model)
    model = qnn.add_lora(TASKS[0][0](), qnn.LoRAConfig(r=2, targets=["score"]))
    assert isinstance(model.score, qnn.LoRALinear)
    assert not trained(model)


def test_a_name_of_the_body_does_not_mean_the_head() -> None:
    """RoBERTa's head has a ``dense``, as its layers do, and BERT's too."""
    model = small("RobertaForSequenceClassification", "RobertaConfig", **SIZES)
    qnn.quantize_model(model, targets=["dense"], lora=qnn.LoRAConfig(r=2, targets=["dense"]))
    assert type(model.classifier.dense) is nn.Linear
    assert model.classifier.dense.weight.requires_grad
    assert isinstance(model.roberta.encoder.layer[0].output.dense, qnn.LoRALinear)
    model = small("RobertaForSequenceClassification", "RobertaConfig", **SIZES)
    qnn.quantize_model(model, targets=["classifier.dense"])
    assert isinstance(model.classifier.dense, qnn.Linear4bit)


def test_skip_adds_to_the_heads() -> None:
    for skip in ([], ["down_proj"]):
        model = qnn.quantize_model(tiny_llama(), skip=skip, lora=CONFIG)
        assert type(model.lm_head) is nn.Linear
        layer = model.model.layers[0].mlp.down_proj
        assert isinstance(layer, nn.Linear if skip else qnn.LoRALinear)
        model = qnn.add_lora(tiny_llama(), CONFIG, skip=skip)
        assert type(model.lm_head) is nn.Linear


# Models that are not one of transformers


class Net(nn.Module):
    """A backbone and what somebody put on it."""

    def __init__(self, backbone: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.backbone(input_ids=ids).last_hidden_state[:, -1])


def test_what_is_put_around_a_model_is_a_task() -> None:
    backbone = tiny_llama().model
    model = Net(backbone, head=nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 2)))
    qnn.quantize_model(model, lora=CONFIG)
    assert dense_layers(model) == {"head.1"}
    assert trained(model) == {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    model(torch.arange(4).view(1, 4)).sum().backward()
    assert model.head[1].weight.grad is not None


def test_a_large_model_around_a_small_one_is_no_head() -> None:
    body = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    model = Net(tiny_llama().model, head=body)
    qnn.quantize_model(model)
    assert not dense_layers(model)
    assert not trained(model)


def test_a_head_in_a_model_in_a_model() -> None:
    inner = OUTPUTS[0][0]()
    model = nn.ModuleDict({"policy": inner, "value": nn.Linear(32, 1)})
    qnn.quantize_model(model, lora=CONFIG)
    assert dense_layers(model) == {"policy.lm_head", "value"}
    assert trained(model) == {"value.weight", "value.bias"}
    compiled = torch.compile(TASKS[0][0](), backend="eager")
    qnn.quantize_model(compiled, lora=CONFIG)
    assert trained(compiled) == {"_orig_mod.score.weight"}


def test_a_model_of_ones_own_on_a_base_of_transformers() -> None:
    """As reward models are written."""

    class Reward(hf.LlamaPreTrainedModel):
        def __init__(self, config: hf.LlamaConfig) -> None:
            super().__init__(config)
            self.model = hf.LlamaModel(config)
            self.value = nn.Linear(config.hidden_size, 1)

    model = qnn.quantize_model(Reward(hf.LlamaConfig(**LLAMA)), lora=CONFIG)
    assert dense_layers(model) == {"value"}
    assert trained(model) == {"value.weight", "value.bias"}


def test_what_was_trained_before_is_no_new_head() -> None:
    """The heads of pretraining stay dense and frozen; parts of a base model are no heads."""
    model = small("BertForPreTraining", "BertConfig", **SIZES, tie_word_embeddings=False)
    qnn.quantize_model(model, lora=CONFIG)
    assert "cls.seq_relationship" in dense_layers(model)
    assert not trained(model)
    fields = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    model = small("ViTMAEForPreTraining", "ViTMAEConfig", **fields, image_size=8, patch_size=4)
    assert not trained(qnn.quantize_model(model))

    kind = type(
        "CombinedModel", (hf.LlamaPreTrainedModel,), {"__module__": "transformers.models.x"}
    )
    model = kind(hf.LlamaConfig(**LLAMA))
    model.model, model.text = hf.LlamaModel(model.config), nn.Linear(32, 32)
    qnn.quantize_model(model)
    assert isinstance(model.text, qnn.Linear4bit)


def test_names_of_heads_in_models_without_structure() -> None:
    for name in ("score", "classifier", "qa_outputs", "lm_head", "embed_out"):
        model = nn.ModuleDict({"body": nn.Linear(32, 32), name: nn.Linear(32, 4)})
        qnn.quantize_model(model, lora=CONFIG)
        assert dense_layers(model) == {name}
        outputs = name in ("lm_head", "embed_out")
        assert trained(model) == (set() if outputs else {f"{name}.weight", f"{name}.bias"})
    # As the name of a part it says nothing, and within a model of transformers neither.
    model = nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))})
    assert not dense_layers(qnn.quantize_model(model))


def test_a_model_tells_its_classifier() -> None:
    """As those of timm do, whatever it is called."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(32, 32), nn.Linear(32, 4)

        def get_classifier(self) -> nn.Module:
            return self.fc

    class Other(Vision):
        def get_classifier(self, name: str) -> nn.Module:
            raise AssertionError("is not called")

    assert dense_layers(qnn.quantize_model(Vision())) == {"fc"}
    assert not dense_layers(qnn.quantize_model(Other()))


def test_a_head_tied_to_the_table_stays_so() -> None:
    model = qnn.quantize_model(tiny_llama(tie_word_embeddings=True), lora=CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not trained(model)
    # A head of a task that shares a weight with the frozen base is frozen with it.
    model = Net(tiny_llama().model, head=nn.Linear(64, 128, bias=False))
    model.head.weight = model.backbone.embed_tokens.weight
    assert not trained(qnn.quantize_model(model, lora=CONFIG))


def test_layers_that_their_module_reads_stay_dense() -> None:
    """Mamba computes with three weights itself: an adapter would be passed by."""
    model = small(
        "MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=32, num_hidden_layers=1
    ).eval()
    twin = copy.deepcopy(model)
    ids = torch.arange(6).view(1, 6)
    qnn.quantize_model(model, lora=CONFIG)
    mixer = "backbone.layers.0.mixer."
    read = {f"{mixer}{name}" for name in ("dt_proj", "x_proj", "out_proj")}
    assert dense_layers(model) == {"lm_head"} | read
    assert model(ids).logits.shape == twin(ids).logits.shape
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in qnn.lora_parameters(model))
    for change in (
        lambda: qnn.quantize_model(twin, targets=["in_proj", "dt_proj"]),
        lambda: qnn.add_lora(twin, qnn.LoRAConfig(targets=["in_proj", "dt_proj"])),
    ):
        with pytest.raises(ValueError, match=rf"{mixer}dt_proj is read by its module"):
            change()
    assert type(twin.backbone.layers[0].mixer.in_proj) is nn.Linear
