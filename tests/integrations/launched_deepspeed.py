"""DeepSpeed's ZeRO on QLoRA, as a process among two: ``... MODELS RESULTS STAGE DTYPE``.

transformers knows of ZeRO-3 while it loads, as under its Trainer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from tests.integrations import launched


def config(stage: int, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,  # by default DeepSpeed clips to a norm of 1
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def whole(parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def main() -> None:
    models, results, stage, dtype = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
    )
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank = int(os.environ["RANK"])
    options = config(stage, dtype)
    seen = HfDeepSpeedConfig(options)  # transformers keeps no reference itself
    model = launched.make_model(models)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=launched.make_optimizer(model), config=options
    )
    assert seen.is_zero3() == (stage == 3)
    losses = []
    for ids in launched.batches(0, launched.STEPS):
        loss = engine(input_ids=ids[rank], labels=ids[rank]).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    found: dict[str, Any] = {
        "losses": torch.stack(losses),
        "state": {name: whole(p) for name, p in model.named_parameters()},
        "bytes": sum(
            p.ds_tensor.numel()
            for p in model.parameters()
            if p.dtype == torch.uint8 and hasattr(p, "ds_tensor")
        ),
    }
    if stage == 3:
        saved = engine._zero3_consolidated_16bit_state_dict()
        found["saved"] = {name: t.clone() for name, t in (saved or {}).items()}
    engine.save_checkpoint(str(results / "checkpoint"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            held = parameter.ds_tensor if stage == 3 else parameter
            held.data.zero_()
    engine.load_checkpoint(str(results / "checkpoint"))
    found["loaded"] = {name: whole(p) for name, p in model.named_parameters()}
    torch.save(found, results / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
