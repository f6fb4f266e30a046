"""A copy of an optimizer adds its own moments to its state dict, as a loaded one does, once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from qkern.optim import PagedAdamW, _checkpointing


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PagedAdamW]:
    """Optimizers whose moments were to be added, in turn."""
    found: list[PagedAdamW] = []

    def note(optimizer: PagedAdamW, state_dict: dict[str, Any]) -> None:
        assert set(state_dict) == {"state", "param_groups"}
        found.append(optimizer)

    monkeypatch.setattr(_checkpointing, "add_moments", note)
    return found


def optimizer() -> PagedAdamW:
    param = torch.nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    made = PagedAdamW([param])
    made.step()
    return made


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_of_a_copy(how: Any, asked: list[PagedAdamW]) -> None:
    other = how(optimizer())
    other.state_dict()
    assert asked == [other]


def test_after_loading(asked: list[PagedAdamW]) -> None:
    made = optimizer()
    made.load_state_dict(made.state_dict())
    asked.clear()
    made.state_dict()
    assert asked == [made]
