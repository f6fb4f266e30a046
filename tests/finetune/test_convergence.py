"""The comparison of optimizers, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import convergence
import pytest


def test_every_optimizer_trains_the_same_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path = tmp_path / "losses.json"
    options = ["--steps", "6", "--learning-rate", "0.01", "--json", str(json_path)]
    options += ["--plot", str(tmp_path), "--model", str(tiny_model), "--lora-r", "128"]
    options += ["--eval-steps", "6"]
    convergence.main(options)
    histories = json.loads(json_path.read_text())["histories"]
    assert list(histories) == list(convergence.OPTIMIZERS)
    losses = [[step["loss"] for step in history["steps"]] for history in histories.values()]
    ours, bitsandbytes, torch = losses
    # One start and one first batch; then other roundings, that of codes the largest.
    assert ours[0] == bitsandbytes[0] == torch[0]
    assert ours[1:] != bitsandbytes[1:] != torch[1:]
    assert ours == pytest.approx(torch, rel=0.02)
    assert ours == pytest.approx(bitsandbytes, rel=0.02)
    held_out = [record["loss"] for record in histories["qkern, 8 bits"]["held_out"]]
    assert held_out[-1] < held_out[0] - 0.1
    assert "the smoothed losses of both differ by at most" in capsys.readouterr().out
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
