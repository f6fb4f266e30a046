"""DeepSpeed's ZeRO, stages 2 and 3, on QLoRA: the numbers of DDP, and 4-bit weights in parts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lab.processes import environment
from qkern import nn as qnn
from qkern import testing
from tests.integrations import launched


def partitioned() -> qnn.Linear4bit:
    """A layer as ZeRO-3 leaves it between calls: every parameter is empty."""
    layer = qnn.Linear4bit.from_linear(nn.Linear(64, 32))
    for parameter in layer.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return layer


def test_a_partitioned_layer_takes_the_state_of_one() -> None:
    layer = partitioned()
    layer.load_state_dict(partitioned().state_dict())
    assert all(parameter.numel() == 0 for parameter in layer.parameters())


def test_a_whole_layer_refuses_the_state_of_a_partitioned_one() -> None:
    layer = qnn.Linear4bit.from_linear(nn.Linear(64, 32))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="quant_meta"):
        layer.load_state_dict(partitioned().state_dict())
    for name, tensor in before.items():
        testing.assert_bitwise(layer.state_dict()[name], tensor, name)


def run(models: Path, folder: Path, stage: int, dtype: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", port, "-m", "tests.integrations.launched_deepspeed"]
    done = subprocess.run(
        [*command, str(models), str(folder), str(stage), dtype],
        env=environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"), [(3, "float32"), (3, "bfloat16"), (2, "float32")], ids=str
)
def test_zero_trains_as_one_process(stage: int, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    launched.save_dense(tmp_path)
    found = run(tmp_path, tmp_path / "results", stage, dtype)
    model = launched.make_model(tmp_path)
    codes = {name: p for name, p in model.named_parameters() if not p.is_floating_point()}
    optimizer = launched.make_optimizer(model)
    losses = []
    for ids in launched.batches(0, launched.STEPS):
        optimizer.zero_grad()
        both = [model(input_ids=half, labels=half).loss for half in ids]
        (sum(both) / 2).backward()
        optimizer.step()
        losses.append(torch.stack(both).detach())
    expected = torch.stack(losses)
    tolerance = {"rtol": 0, "atol": 2e-2 if dtype == "bfloat16" else 1e-5}
    for rank, result in enumerate(found):
        torch.testing.assert_close(result["losses"].float(), expected[:, rank], **tolerance)
        for name, tensor in codes.items():
            testing.assert_bitwise(result["state"][name], tensor.detach(), name)
        if dtype == "float32":
            for name, tensor in model.named_parameters():
                torch.testing.assert_close(result["state"][name], tensor.detach())
        assert result["loaded"].keys() == result["state"].keys()
        for name, tensor in result["state"].items():
            testing.assert_bitwise(result["loaded"][name], tensor, name)
        if stage == 3:
            whole = sum(p.numel() for p in codes.values() if p.dtype == torch.uint8)
            assert result["bytes"] <= whole // 2 + len(codes)
    if stage == 3:
        for name, tensor in found[0]["saved"].items():
            testing.assert_bitwise(tensor, found[0]["state"][name], name)
        assert codes.keys() <= found[0]["saved"].keys()
