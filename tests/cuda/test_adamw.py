"""AdamW's CUDA kernel, emulated, where the op table does not reach: see `lab.cuda.adamw`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lab.cuda import adamw
from lab.cuda.emulator import backend, build

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)


@pytest.mark.parametrize(
    ("step", "schedule"),
    [
        pytest.param(step, schedule, id=f"{step}-{schedule}", marks=marks)
        for step in adamw.STEPS
        for i, schedule in enumerate(backend.SCHEDULES)
        for marks in [[] if i == 0 and step != "several_rounds" else [pytest.mark.slow]]
    ],
)
def test_a_step_is_the_references(
    step: str, schedule: backend.Schedule, library: ModuleType
) -> None:
    adamw.STEPS[step](backend.EmulatedTarget(library, schedule))


@pytest.mark.parametrize("name", ["params", "grads", "exp_avg_sqs", "exp_avg_absmaxes", "factors"])
def test_a_tensor_elsewhere_is_refused(name: str, library: ModuleType) -> None:
    tensors = adamw.parameters([(300, torch.float32)] * 2, 8)
    rows = adamw.factors(2)
    if name == "factors":
        rows = rows.to("meta")
    else:
        tensors[name][1] = tensors[name][1].to("meta")
    with pytest.raises(ValueError, match="got a tensor on meta; takes one on cpu"):
        backend.backend(library).adamw_step(*tensors.values(), rows, None, [], [])
