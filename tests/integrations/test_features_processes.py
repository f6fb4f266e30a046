"""Training in several processes, on qkern and on bitsandbytes, under ``accelerate launch``.

Two processes take the halves of each batch. What they should come to is what a plain loop of the
same library does in one process, without accelerate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import launched, launched_features
from tests.integrations.launching import ALONE, DDP, FSDP2, launch
from tests.integrations.record import Side, cases, feature

GROUP = "Several devices"
WAYS: dict[str, dict[str, Any]] = {"DDP": DDP, "FSDP2": FSDP2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    launched.save_dense(tmp_path)
    return tmp_path / "untied"


def processes(
    side: Side, config: dict[str, Any], count: int, model: Path, first: int = 0, steps: int = 2
) -> list[dict[str, Any]]:
    """What each of ``count`` processes found."""
    results = model.parent / f"{count}-{first}"
    places = (str(model), str(model.parent / "saved"), str(results))
    numbers = (str(first), str(steps))
    program = "tests.integrations.launched_features"
    try:
        launch(config, count, program, side.name, *places, *numbers, folder=results)
    except AssertionError:
        if not (results / "error").exists():
            raise
        raise AssertionError((results / "error").read_text()) from None
    return [torch.load(results / f"{rank}.pt") for rank in range(count)]


def plainly(side: Side, folder: Path, steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses ``[steps, 2]`` and the adapters of a loop in this process."""
    model, optimizer = launched_features.parts(side, folder)
    before, losses = launched_features.adapters(model), []
    for ids in launched.batches(0, steps):
        optimizer.zero_grad()
        both = torch.stack([model(input_ids=half, labels=half).loss for half in ids])
        both.mean().backward()
        optimizer.step()
        losses.append(both.detach())
    after = launched_features.adapters(model)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    return torch.stack(losses), after


def assert_losses(ranks: list[dict[str, Any]], losses: torch.Tensor) -> None:
    for rank, found in enumerate(ranks):
        mine = slice(None) if len(ranks) == 1 else slice(rank, rank + 1)
        difference = (found["losses"][:, mine] - losses[:, mine]).abs().max()
        assert difference < 1e-4, f"the losses differ by {difference:.1e}"


def assert_adapters(ranks: list[dict[str, Any]], adapters: dict[str, torch.Tensor]) -> None:
    for found in ranks:
        assert found["adapters"].keys() == adapters.keys(), "other adapters"
        for name, tensor in adapters.items():
            difference = (found["adapters"][name] - tensor).abs().max()
            assert difference < 1e-4, f"the adapters differ by {difference:.1e}"


@cases(
    group=GROUP,
    names={f"{way} in two processes, training as one does": way for way in WAYS},
    argument="way",
    slow=tuple(f"{way} in two processes, training as one does" for way in WAYS),
)
def test_two_processes(side: Side, way: str, model: Path) -> None:
    ranks = processes(side, WAYS[way], 2, model)
    assert [found["fsdp2"] for found in ranks] == [way == "FSDP2"] * 2
    losses, adapters = plainly(side, model, 2)
    assert_losses(ranks, losses)
    assert_adapters(ranks, adapters)


@feature(
    "FSDP2, each process with its part of the 4-bit weights, no storage dtype chosen",
    group=GROUP,
    slow=True,
)
def test_sharded(side: Side, model: Path) -> None:
    ranks = processes(side, FSDP2, 2, model)
    (here, everywhere), other = ranks[0]["codes"], ranks[1]["codes"]
    assert other == (here, everywhere)
    assert everywhere
    assert 2 * here == everywhere, f"each process holds {here} of {everywhere} bytes"


@cases(
    group=GROUP,
    names={f"{way}, resumed in one process, and in two again": way for way in WAYS},
    argument="way",
    slow=tuple(f"{way}, resumed in one process, and in two again" for way in WAYS),
)
def test_resumed(side: Side, way: str, model: Path) -> None:
    losses, adapters = plainly(side, model, 6)
    for first, count in ((0, 2), (2, 1), (4, 2)):
        config = ALONE if (way, count) == ("DDP", 1) else WAYS[way]
        ranks = processes(side, config, count, model, first)
        assert [found["fsdp2"] for found in ranks] == [way == "FSDP2"] * count
        assert_losses(ranks, losses[first : first + 2])
    assert_adapters(ranks, adapters)
