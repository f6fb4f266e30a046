"""transformers' Trainer under ``accelerate launch``: QLoRA in two processes, resumed in others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations import launched
from tests.integrations.launching import ALONE, DDP, FSDP2, launch

pytestmark = pytest.mark.slow

STEPS = 8
Result = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trainer")
    launched.save_dense(root / "models")
    return root


def train(
    root: Path,
    name: str,
    config: dict[str, Any],
    processes: int,
    optimizer: str,
    until: int = STEPS,
    resume: tuple[str, int] | None = None,
) -> list[Result]:
    """Train to the step ``until``; after the checkpoint of a training and step, where there is one.

    A checkpoint is written every two steps.
    """
    folder = root / name
    if resume is not None:
        checkpoint = Path("checkpoints") / f"checkpoint-{resume[1]}"
        shutil.copytree(root / resume[0] / checkpoint, folder / checkpoint)
    folder.mkdir(exist_ok=True)
    places = [str(root / "models"), str(folder / "checkpoints"), str(folder)]
    rest = (str(until), optimizer, str(resume is not None))
    launch(config, processes, "tests.integrations.launched_trainer", *places, *rest, folder=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def assert_near(results: list[Result], expected: Result) -> None:
    """The losses are rounded to six digits by the Trainer, and summed in another order."""
    for result in results:
        assert len(result["losses"]) == len(expected["losses"]) == STEPS
        assert result["losses"] == pytest.approx(expected["losses"], abs=2e-4)
        assert result["state"].keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            if tensor.is_floating_point():
                torch.testing.assert_close(result["state"][name], tensor, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(result["state"][name], tensor), name


@pytest.mark.parametrize(
    ("way", "config", "optimizer"), [("ddp", DDP, "torch"), ("fsdp2", FSDP2, "paged")]
)
def test_the_trainer_trains_in_two_processes_and_goes_on_in_others(
    root: Path, way: str, config: dict[str, Any], optimizer: str
) -> None:
    one = ALONE if way == "ddp" else FSDP2
    alone = train(root, f"{way}-alone", ALONE, 1, optimizer)[0]
    two = train(root, f"{way}-two", config, 2, optimizer)
    assert [result["fsdp2"] for result in two] == [way == "fsdp2"] * 2
    assert_near(two, alone)
    adapter = load_file(root / f"{way}-two" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28
    for key, tensor in adapter.items():
        held = two[0]["state"][key.replace(".weight", ".default.weight")]
        assert torch.equal(tensor, held), key
    train(root, f"{way}-fewer", one, 1, optimizer, until=6, resume=(f"{way}-two", 4))
    more = train(root, f"{way}-more", config, 2, optimizer, resume=(f"{way}-fewer", 6))
    assert_near(more, alone)
