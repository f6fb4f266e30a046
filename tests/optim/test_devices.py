"""Where step counters are, told without a GPU."""

from __future__ import annotations

import pytest
import torch

from qkern.optim import _updates


@pytest.mark.parametrize(
    ("of_parameter", "expected"), [("cuda:1", "cuda:1"), ("cpu", "cpu"), ("meta", "cpu")]
)
def test_steps_are_counted_on_a_gpu_or_on_the_cpu(of_parameter: str, expected: str) -> None:
    device = torch.device(of_parameter)
    assert _updates.device_of_steps(device) == torch.device(expected)
