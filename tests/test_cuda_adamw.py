"""The optimizer's CUDA kernel, emulated, where the op table does not reach: see `cuda_adamw`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cuda_adamw
from cuda_emulator import backend, build

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)


@pytest.fixture(scope="session")
def library() -> ModuleType:
    return build.load(build.build("plain"))


@pytest.mark.parametrize(
    ("step", "schedule"),
    [
        pytest.param(step, schedule, id=f"{step}-{schedule}", marks=marks)
        for step in cuda_adamw.STEPS
        for i, schedule in enumerate(backend.SCHEDULES)
        for marks in [[] if i == 0 and step != "several_rounds" else [pytest.mark.slow]]
    ],
)
def test_a_step_is_the_references(
    step: str, schedule: backend.Schedule, library: ModuleType
) -> None:
    cuda_adamw.STEPS[step](backend.EmulatedTarget(library, schedule))


@pytest.mark.parametrize("name", ["params", "grads", "exp_avg_sqs", "exp_avg_absmaxes", "factors"])
def test_a_tensor_elsewhere_is_refused(name: str, library: ModuleType) -> None:
    tensors = cuda_adamw.parameters([(300, torch.float32)] * 2, 8)
    rows = cuda_adamw.factors(2)
    if name == "factors":
        rows = rows.to("meta")
    else:
        tensors[name][1] = tensors[name][1].to("meta")
    with pytest.raises(ValueError, match="got a tensor on meta; takes one on cpu"):
        backend.backend(library).adamw_step(*tensors.values(), rows)
