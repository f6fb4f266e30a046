"""What the rows on several processes launch: QLoRA on one of the two libraries.

``python -m tests.integrations.launched_features SIDE MODEL FOLDER RESULTS FIRST STEPS``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qkern.integrations.accelerate import enable_fsdp_on_cpu
from tests.integrations import launched
from tests.integrations.record import Side


def parts(side: Side, model: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with adapters, always the same, and its optimizer."""
    adapted = launched.adapted(side.load(model, device_map={"": "cpu"}).train())
    return adapted, launched.make_optimizer(adapted)


def codes(side: Side, model: nn.Module) -> tuple[int, int]:
    """Bytes of the 4-bit layers' packed weights in this process, and of the whole of them."""
    here = everywhere = 0
    for module in model.modules():
        if isinstance(module, side.linear):
            weight: Any = module.weight
            everywhere += weight.nbytes
            here += (weight.to_local() if hasattr(weight, "to_local") else weight).nbytes
    return here, everywhere


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, whole, by the names without what wraps the model."""
    return {
        name.removeprefix("module."): launched.whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def work(side: Side, model_folder: Path, folder: Path, first: int, steps: int) -> dict[str, Any]:
    """Train ``steps`` from the step ``first``, after what is saved in ``folder`` if not from 0."""
    enable_fsdp_on_cpu()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*parts(side, model_folder))
    if first:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        accelerator.load_state(str(folder / str(first)))
    losses = launched.train(accelerator, model, optimizer, first, steps)
    found = {"losses": torch.stack(losses), "adapters": adapters(model)}
    found |= {"codes": codes(side, model), "fsdp2": accelerator.is_fsdp2}
    accelerator.save_state(str(folder / str(first + steps)))
    accelerator.wait_for_everyone()
    return found


def main() -> None:
    side, results = Side(sys.argv[1]), Path(sys.argv[4])
    model, folder = Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    try:
        found = work(side, model, folder, int(sys.argv[5]), int(sys.argv[6]))
    except Exception as error:
        # In one line, for the table has the first.
        text = " ".join(str(error).split())
        (results / "error").write_text(f"{type(error).__name__}: {text}")
        raise
    started = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if started else 0
    torch.save(found, results / f"{rank}.pt")
    if started:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
