"""transformers' Trainer with PEFT and the paged optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qkern.optim import PagedAdamW, parameter_groups
from tests.integrations.twins import quantized

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")


def trainer(path: Path, steps: int, optimizer: dict[str, Any], **arguments: Any) -> Any:
    """A Trainer of an adapter on a 4-bit model, on eight fixed sequences."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    model = peft.get_peft_model(quantized(), config)
    overrides = optimizer.pop("overrides", None)
    if overrides is not None:
        optimizer["params"] = parameter_groups(model, overrides)
    data = torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(0))
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(path),
            max_steps=steps,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_steps=2,
            lr_scheduler_type="constant",
            **arguments,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in data],
        optimizer_cls_and_kwargs=(PagedAdamW, optimizer),
    )


def test_options_by_name_reach_the_optimizer(tmp_path: Path) -> None:
    overrides = {"lora_B": {"lr": 2e-2}, "down_proj": {"bits": 8}}
    made = trainer(tmp_path, 1, {"lr": 1e-2, "overrides": overrides, "min_8bit_size": 256})
    made.train()
    optimizer = getattr(made.optimizer, "optimizer", made.optimizer)
    assert isinstance(optimizer, PagedAdamW)
    found = {(group["lr"], group["bits"]) for group in optimizer.param_groups}
    assert found == {(1e-2, 32), (2e-2, 32), (1e-2, 8), (2e-2, 8)}
    down = made.model.get_base_model().model.layers[0].mlp.down_proj
    assert optimizer.state[down.lora_B.default.weight]["exp_avg"].dtype == torch.uint8
    assert down.lora_B.default.weight.any()


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "bits": 8, "min_8bit_size": 256}
    whole = trainer(tmp_path / "whole", 4, dict(options))
    whole.train()
    trainer(tmp_path / "parts", 2, dict(options)).train()
    rest = trainer(tmp_path / "parts", 4, dict(options))
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert rest.state.global_step == 4
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), rest.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
