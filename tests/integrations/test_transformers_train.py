"""Models that transformers loaded in 4 bits: generated with, trained, saved and resumed."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from tests.integrations.models_of_transformers import (
    IDS,
    assert_same_files,
    load,
    logits,
    saved_llama,
)


def with_adapter(model: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))


def dataset(count: int = 12) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 120, (count, 9), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**fixed | options)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_copies_and_pickles_compute_the_same(tmp_path: Path, method: str) -> None:
    model = load(saved_llama(tmp_path), QKernConfig(quantize_embeddings=method == "qkern"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert other.num_parameters() == model.num_parameters()
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {p.data_ptr() for p in other.parameters()}
        other.save_pretrained(tmp_path / "other")
        said = json.loads((tmp_path / "other" / "config.json").read_text())
        assert said["quantization_config"]["quant_method"] == method


@pytest.mark.parametrize("tied", [True, False])
def test_dequantize_gives_the_dense_model_back(tmp_path: Path, tied: bool) -> None:
    folder = saved_llama(tmp_path / "dense", tie_word_embeddings=tied)
    model = load(folder, QKernConfig(quantize_embeddings=True))
    values = {
        n: m.quantized.dequantize() for n, m in model.named_modules() if hasattr(m, "quantized")
    }
    before = logits(model)
    dense = model.dequantize()
    assert dense is model
    for name, value in values.items():
        assert torch.equal(dense.get_submodule(name).weight, value)
    assert not dense.is_quantized
    assert not dense.is_loaded_in_4bit
    torch.testing.assert_close(logits(dense), before)
    dense.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense)
    )


def test_generate_with_every_cache(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(IDS, **options)
    assert dynamic.shape[1] == IDS.shape[1] + 6
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), dynamic)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), dynamic)


@pytest.mark.slow
def test_generate_compiled(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)


@pytest.mark.parametrize(
    "bf16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "bf16"]
)
def test_trainer_learns_with_accumulation_and_checkpointing(tmp_path: Path, bf16: bool) -> None:
    folder = saved_llama(tmp_path / "dense")
    found: dict[object, list[float]] = {}
    for kind in (None, False, True):
        model = peft.prepare_model_for_kbit_training(
            load(folder),
            use_gradient_checkpointing=kind is not None,
            gradient_checkpointing_kwargs={"use_reentrant": kind},
        )
        trainer = Trainer(
            with_adapter(model),
            arguments(
                tmp_path / str(kind),
                bf16=bf16,
                gradient_accumulation_steps=2,
                gradient_checkpointing=kind is not None,
                gradient_checkpointing_kwargs=None if kind is None else {"use_reentrant": kind},
            ),
            train_dataset=dataset(),
        )
        trainer.train()
        found[kind] = losses(trainer)
    assert found[None][-1] < found[None][0]
    for kind in (False, True):
        torch.testing.assert_close(found[kind], found[None], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_training_is_resumed_and_the_best_model_loaded(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "dense")

    def trainer(out: str, **options: Any) -> Trainer:
        settings = arguments(
            tmp_path / out,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            **options,
        )
        return Trainer(
            with_adapter(load(folder)), settings, train_dataset=dataset(), eval_dataset=dataset(4)
        )

    whole = trainer("whole")
    whole.train()
    begun = trainer("begun")
    begun.train()
    resumed = trainer("begun")
    resumed.train(resume_from_checkpoint=str(tmp_path / "begun" / "checkpoint-2"))
    torch.testing.assert_close(losses(resumed), losses(whole))
    assert resumed.state.best_metric == pytest.approx(whole.state.best_metric)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric)


def test_the_base_under_an_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    model = load(saved_llama(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "one")
    wrapped = with_adapter(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = wrapped.unload()
    base.save_pretrained(tmp_path / "other")
    assert_same_files(tmp_path / "one", tmp_path / "other")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "other"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_model_without_adapters_is_not_trained_by_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(saved_llama(tmp_path)), arguments(tmp_path), train_dataset=dataset())


def test_tables_are_resized(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    model = load(folder)
    before = logits(model)
    model.resize_token_embeddings(140)
    assert model.get_output_embeddings().weight.shape == (140, 64)
    assert torch.equal(logits(model)[..., :128], before)
    assert isinstance(model.model.layers[0].mlp.up_proj, qnn.Linear4bit)
    model = load(folder, QKernConfig(quantize_embeddings=True))
    with pytest.raises(TypeError, match="Embedding4bit"):
        model.resize_token_embeddings(140)
    assert torch.equal(logits(model), logits(load(folder, QKernConfig(quantize_embeddings=True))))


@pytest.mark.slow
@pytest.mark.parametrize("taken_over", [False, True])
def test_sft_trainer(tmp_path: Path, taken_over: bool) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from transformers import BitsAndBytesConfig

    from qkern.integrations.transformers import give_back_bitsandbytes, take_over_bitsandbytes

    folder = saved_llama(tmp_path / "dense", vocab_size=384)
    config: Any = QKernConfig()
    if taken_over:
        take_over_bitsandbytes()
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    try:
        model = load(folder, config)
    finally:
        give_back_bitsandbytes()
    rows = [{"input_ids": dataset(1)[0]["input_ids"].tolist()}] * 8
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_steps=4,
            bf16=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    assert (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").exists()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 384)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
