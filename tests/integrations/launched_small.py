"""The least that ``accelerate launch`` can run: two 4-bit layers, without transformers.

``python -m tests.integrations.launched_small RESULTS``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from qkern import nn as qnn
from qkern.integrations.accelerate import enable_fsdp_on_cpu


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    qnn.quantize_model(model, lora=qnn.LoRAConfig(r=4))
    for parameter in qnn.lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs() -> torch.Tensor:
    """``[2, 3, 64]``: of each rank its rows."""
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))


def main() -> None:
    torch.set_num_threads(1)
    enable_fsdp_on_cpu()
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(qnn.lora_parameters(model), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank = accelerator.process_index
    weight = model[0].base_layer.weight
    result = {"fsdp2": accelerator.is_fsdp2, "held": weight.to_local().numel()}
    accelerator.backward(model(inputs()[rank]).square().mean())
    optimizer.step()
    result["state"] = {n: t.full_tensor().clone() for n, t in model.state_dict().items()}
    torch.save(result, Path(sys.argv[1]) / f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
