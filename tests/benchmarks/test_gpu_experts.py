"""The modelled times of matmuls by experts."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_experts
import numpy as np
import pytest

from lab import ROOT
from qkern.backends import _cuda_paths

pytestmark = pytest.mark.unpoisoned
SMALL = gpu_experts.LAYERS[1]


@pytest.mark.parametrize("routing", gpu_experts.ROUTINGS)
def test_a_token_chooses_different_experts(routing: str) -> None:
    for layer in gpu_experts.LAYERS:
        rows = gpu_experts.rows_by_expert(layer, 1, routing)
        assert rows.max() == 1
        assert rows.sum() == layer.top_k
    rows = gpu_experts.rows_by_expert(SMALL, 1000, routing)
    assert rows.sum() == 1000 * SMALL.top_k
    assert (rows[:8].mean() > 2 * rows[-8:].mean()) == (routing == "skewed")


def test_tiles_are_rounded_up_for_each_expert() -> None:
    assert gpu_experts.tiles_of(np.array([0, 1, 16, 17, 64]), 16) == 0 + 1 + 1 + 2 + 4


def test_vectors_take_as_many_rows_as_the_launcher_says() -> None:
    source = (ROOT / "csrc" / "cuda" / "linear_4bit_vector.cu").read_text("utf-8")
    experts = SMALL.experts
    for line, most in (
        ("if (m == 1 || 2 * m <= args.groups.experts)", experts // 2),
        ("if (m <= 4 * args.groups.experts) return launch_grouped<T, 2, 4, true>", 4 * experts),
        ("if (m <= 16 * args.groups.experts) return launch_grouped<T, 4, 4, true>", 16 * experts),
    ):
        assert line in source
        tiles = [
            gpu_experts.grouped_tile("vector", False, SMALL, rows, 90)[0]
            for rows in (most, most + 1)
        ]
        assert tiles[1] == 2 * tiles[0]
    assert gpu_experts.grouped_tile("vector", False, SMALL._replace(experts=1), 1, 90)[0] == 1


def test_no_time_is_below_the_bound_and_more_tokens_take_longer() -> None:
    for gpu in gpu_experts.GPUS:
        for layer in gpu_experts.LAYERS:
            for dx in (False, True):
                found = [
                    gpu_experts.modelled(layer, gpu, tokens, "even", dx)
                    for tokens in gpu_experts.TOKENS
                ]
                times = [model["us"] for model in found]
                assert times == sorted(times)
                for model in found:
                    assert model["us"] > model["bound_us"]
                    assert model["all_dense_us"] > model["dense_us"] > 0
                    assert 0 <= model["padding"] < 1


def test_a_single_token_reads_the_experts_it_goes_to() -> None:
    for gpu in gpu_experts.GPUS:
        model = gpu_experts.modelled(SMALL, gpu, 1, "even", dx=False)
        assert model["experts_used"] == SMALL.top_k
        assert model["us"] < model["dense_us"] < model["all_dense_us"] / 5


def test_one_expert_is_the_model_that_chooses_paths() -> None:
    """Without experts that find no rows."""
    layer = SMALL._replace(experts=1, top_k=1)
    for gpu in gpu_experts.GPUS:
        model = gpu_experts.modelled(layer, gpu, 64, "even", dx=True)
        call = _cuda_paths.Matmul(
            True, gpu_experts.torch.bfloat16, 64, layer.out_features, layer.in_features
        )
        limits = _cuda_paths.Limits(gpu.architecture, gpu.processors, 0)
        clocks = _cuda_paths.modelled_clocks(model["path"].split()[0], call, limits)
        assert model["us"] == pytest.approx(clocks / gpu.boost_ghz / 1e3, rel=0.3)


def test_the_result_on_record_is_this_models(tmp_path: Path) -> None:
    gpu_experts.main(["--out", str(tmp_path / "experts.json")])
    found = json.loads((tmp_path / "experts.json").read_text("utf-8"))
    on_record = ROOT / "benchmarks" / "results" / "gpu-static" / "experts.json"
    recorded = json.loads(on_record.read_text("utf-8"))
    assert len(found["models"]) == len(recorded["models"])
    for ours, theirs in zip(found["models"], recorded["models"], strict=True):
        assert ours == {
            key: pytest.approx(value) if isinstance(value, float) else value
            for key, value in theirs.items()
        }
