"""transformers' Trainer as ``accelerate launch`` runs it in the tests: QLoRA, stopped and resumed.

``python -m tests.integrations.launched_trainer MODELS CHECKPOINTS RESULTS STEPS OPTIMIZER RESUME``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from qkern import optim
from qkern.integrations.accelerate import enable_fsdp_on_cpu
from tests.integrations import launched

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "torch": (torch.optim.AdamW, {"lr": 1e-2, "foreach": False}),
    "paged": (optim.PagedAdamW, {"lr": 1e-2}),
}


def dataset() -> list[dict[str, torch.Tensor]]:
    """A sequence each; two of them are a step."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(launched.VOCABULARY, (16, 6), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def main() -> None:
    models, checkpoints, results = map(Path, sys.argv[1:4])
    steps, optimizer, resume = int(sys.argv[4]), sys.argv[5], sys.argv[6] == "True"
    torch.set_num_threads(1)
    enable_fsdp_on_cpu()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=steps,
        save_steps=2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    arguments.gradient_accumulation_steps = 2 // arguments.world_size
    model = launched.make_model(models)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=OPTIMIZERS[optimizer],
    )
    trainer.train(resume_from_checkpoint=resume)
    accelerator: Accelerator = trainer.accelerator
    found = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "state": launched.state(trainer.model),
        "fsdp2": accelerator.is_fsdp2,
    }
    if accelerator.is_fsdp2:
        # Of shards the Trainer writes no adapter's file.
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(results / "adapter"))
    torch.save(found, results / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
