"""Training models in 4 bits by transformers' and TRL's trainers, on qkern and on bitsandbytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

import qkern.optim
from tests.integrations.record import Side, cases, feature

GROUP = "Training"
DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(0))
]
BATCH = {name: torch.stack([sample[name] for sample in DATA[:4]]) for name in DATA[0]}


def arguments(path: Path, **options: Any) -> TrainingArguments:
    given = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    return TrainingArguments(str(path), **given | options)


def adapters(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def losses(trainer: Any) -> list[float]:
    return [state["loss"] for state in trainer.state.log_history if "loss" in state]


def assert_learned(trainer: Any, before: dict[str, Tensor]) -> None:
    found = losses(trainer)
    assert all(map(math.isfinite, found)), f"losses {found}"
    after = adapters(trainer.model)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still, f"{len(still)} of {len(before)} adapters unchanged"


@cases(
    group=GROUP,
    names={
        "Trainer in float32": {},
        "Trainer with `bf16=True`": {"bf16": True},
        "Trainer with gradient accumulation": {"gradient_accumulation_steps": 2},
        "Trainer with gradient checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        "Trainer with reentrant gradient checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    },
    argument="options",
)
def test_trainer(side: Side, options: dict[str, Any], dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    before = adapters(model)
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=DATA)
    trainer.train()
    assert_learned(trainer, before)


@feature("accumulated gradients are those of one large batch", group=GROUP)
def test_accumulation(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = side.adapt(side.load(dense_llama))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        # One step of SGD shows the gradients.
        options |= {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
        before = adapters(model)
        Trainer(model, arguments(tmp_path, **options), train_dataset=DATA).train()
        found.append({name: p - before[name] for name, p in adapters(model).items()})
    for name, change in found[0].items():
        torch.testing.assert_close(found[1][name], change, rtol=1e-3, atol=1e-6)


@cases(
    group=GROUP,
    names={
        "gradients with checkpointing are those without": False,
        "gradients with reentrant checkpointing are those without": True,
    },
    argument="reentrant",
)
def test_checkpointing(side: Side, reentrant: bool, dense_llama: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama)).train()
    model(**BATCH).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    options = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in expected) if parameter.is_floating_point() else None
    model(**BATCH).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


@feature("`prepare_model_for_kbit_training` of a bfloat16 model", group=GROUP)
def test_prepared(side: Side, dense_llama: Path) -> None:
    options = {"compute_dtype": torch.bfloat16}
    model = side.load(dense_llama, dtype=torch.bfloat16, options=options)
    model = prepare_model_for_kbit_training(model)
    assert not [n for n, p in model.named_parameters() if p.requires_grad], "not frozen"
    dtypes = {p.dtype for n, p in model.named_parameters() if "norm" in n}
    assert dtypes == {torch.float32}, f"norms in {dtypes}"
    model = side.adapt(model).train()
    model(**BATCH).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead, f"no gradient at {dead[0]}"


@feature("evaluation, saving and resuming: bits of a run without a break", group=GROUP)
def test_resumed(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    runs = []
    for resume in (False, True):
        torch.manual_seed(0)
        model = side.adapt(side.load(dense_llama), lora_dropout=0.1)
        options = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
        options |= {"eval_strategy": "steps", "eval_steps": 2}
        trainer = Trainer(
            model, arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA[:4]
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        runs.append(adapters(model))
    different = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
    assert not different, f"{len(different)} adapters differ"


@feature("`load_best_model_at_end`", group=GROUP)
def test_best_model(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    options = {"load_best_model_at_end": True, "learning_rate": 0.1, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    # It learns one token and is asked for another, so its loss there rises.
    train, test = ([row | {"labels": torch.full((16,), i)} for row in DATA] for i in (5, 9))
    args = arguments(tmp_path, eval_steps=1, **options)
    trainer = Trainer(model, args, train_dataset=train, eval_dataset=test[:4])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-3"), "the last is the best"
    fresh = PeftModel.from_pretrained(side.load(dense_llama), best, is_trainable=True)
    expected = adapters(fresh)
    different = [n for n, p in adapters(model).items() if not torch.equal(p, expected[n])]
    assert not different, f"{len(different)} adapters are not the best checkpoint's"


@feature("TRL's `SFTTrainer`", group=GROUP)
def test_sft(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft import LoraConfig

    side.registered()
    torch.manual_seed(0)
    data = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t * 2}]}
            for t in ("one", "two", "three", "four") * 4
        ]
    )
    args = trl.SFTConfig(**arguments(tmp_path).to_dict() | {"max_length": 64, "bf16": False})
    trainer = trl.SFTTrainer(
        side.load(dense_llama),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(dense_llama),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = adapters(trainer.model)
    assert before, "no adapters"
    trainer.train()
    assert_learned(trainer, before)


@feature("Trainer with paged AdamW in 8 bits", group=GROUP)
def test_paged_optimizer(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = side.adapt(side.load(dense_llama))
    before = adapters(model)
    options: dict[str, Any] = {}
    if side.is_qkern:
        options["optimizer_cls_and_kwargs"] = (
            qkern.optim.PagedAdamW,
            {"lr": 1e-2, "bits": 8, "path": str(tmp_path / "state"), "budget_bytes": 1 << 16},
        )
    args = arguments(tmp_path, optim="adamw_torch" if side.is_qkern else "paged_adamw_8bit")
    trainer = Trainer(model, args, train_dataset=DATA, **options)
    trainer.train()
    assert_learned(trainer, before)


@feature("training after an evaluation in bfloat16", group=GROUP)
def test_trained_after_evaluation(side: Side, dense_llama: Path) -> None:
    options = {"compute_dtype": torch.bfloat16}
    model = side.adapt(side.load(dense_llama, dtype=torch.bfloat16, options=options))
    with torch.no_grad():
        model.eval()(**BATCH)
    model.train()(**BATCH).loss.backward()
    dead = [n for n, p in model.named_parameters() if "lora_B" in n and not p.grad.any()]
    assert not dead, f"no gradient at {dead[0]}"
