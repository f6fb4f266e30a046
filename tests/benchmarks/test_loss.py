"""The contest of a large head's loss."""

from __future__ import annotations

import json

import pytest
import run
import torch
from bench import loss, report, timing

import qkern
from tests.benchmarks.contests import LIMITS, QUICK

pytestmark = pytest.mark.unpoisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contest(dtype):
    problem, candidates, missing = loss.contest((320, 64), 12, dtype, ("dense",))
    samples = timing.run_contest(problem, candidates, QUICK)
    rows = report.records(problem, samples, LIMITS)
    assert not missing
    assert [row["name"] for row in rows] == ["qkern", "qkern (4-bit head)", "dense"]
    assert all(row["unit"] == "tokens/s" for row in rows)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_wrong_result_is_detected(what, monkeypatch):
    right = qkern.linear_cross_entropy

    def wrong(hidden, weight, labels):
        value = right(hidden, weight, labels)
        if what == "loss":
            return value * 1.1
        return value + 0.1 * (value - value.detach())  # the same value, another slope

    monkeypatch.setattr(qkern, "linear_cross_entropy", wrong)
    problem, candidates, _ = loss.contest((320, 64), 12, torch.float32, ())
    with pytest.raises(timing.WrongResultError, match="qkern, loss 320x64 float32 M=12"):
        timing.run_contest(problem, candidates, QUICK)


@pytest.mark.slow
def test_run_has_times_and_peaks(quick_probes, tmp_path):
    path = tmp_path / "loss.json"
    arguments = ["--op", "loss", "--shape", "16384x64", "--m", "1024", "--dtype", "float32"]
    assert run.main([*arguments, "--repeat", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    names = ["qkern", "qkern (4-bit head)", "dense"]
    assert [row["name"] for row in rows if "ms" in row] == names
    peaks = {row["name"]: row["peak_bytes"] for row in rows if "peak_bytes" in row}
    assert list(peaks) == names
    # The logits are 64 MiB, and plain torch holds their gradient too.
    assert peaks["dense"] > 128 << 20
    assert max(peaks["qkern"], peaks["qkern (4-bit head)"]) < 64 << 20
