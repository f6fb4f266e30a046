"""Contests of a whole model's training step and generation."""

from __future__ import annotations

import pytest
import torch
from bench import kernels, models, optimizer, peers, report, timing, weights

import qkern
from tests.benchmarks.contests import LIMITS, QUICK
from tests.models import tiny_llama

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(scope="module")
def tiny_workload(tmp_path_factory) -> models.Workload:
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        model = tiny_llama(intermediate_size=128, tie_word_embeddings=True)
    model.save_pretrained(path)
    return models.Workload(str(path), batch=2, sequence=12, new_tokens=3)


@pytest.mark.parametrize("make", [models.training_contest, models.generation_contest])
def test_model_contest(make, tiny_workload):
    problem, candidates, missing = make(tiny_workload, torch.float32, ())
    samples = timing.run_contest(problem, candidates, QUICK)
    row, *others = report.records(problem, samples, LIMITS)
    expected = models.CHUNKED_LOSS if make is models.training_contest else models.FOUR_BIT_HEAD
    assert [other["name"] for other in others] == [expected]
    assert not missing
    assert row["unit"] == "tokens/s"
    assert row["rate"] == pytest.approx(problem.work / row["ms"] * 1e3)


def test_a_compiled_step_generates_the_same(tiny_workload, monkeypatch):
    # How it is compiled is the compiler's; here it is how it is called.
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    for name in ("qkern", models.FOUR_BIT_HEAD):
        model = models.build(name, tiny_workload, torch.float32, lora=False)
        prompt = torch.arange(5)[None]
        expected = models.generate(model, prompt, 4)
        call = models.CompiledGeneration(model, prompt, 4)
        assert torch.equal(call(), expected)
        assert torch.equal(call(), expected)


def test_wrong_model_is_detected(tiny_workload, monkeypatch):
    monkeypatch.setattr(qkern.nn.LoRALinear, "scaling", 1.1)
    problem, candidates, _ = models.training_contest(tiny_workload, torch.float32, ())
    # What is exact must not be computed by the broken layers.
    monkeypatch.undo()
    with pytest.raises(timing.WrongResultError, match="qkern, train_step"):
        timing.run_contest(problem, candidates, QUICK)


@pytest.mark.slow
def test_peers_on_equal_weights(tiny_workload):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    names = ("bitsandbytes", "dense")
    for dtype in (torch.float32, torch.bfloat16):
        for make in (models.training_contest, models.generation_contest):
            problem, candidates, missing = make(tiny_workload, dtype, names)
            assert not missing
            assert len(timing.run_contest(problem, candidates, QUICK)) == 4
        for op in kernels.CONTESTS:
            problem, candidates, _ = kernels.contest(
                op, (96, 128), 5, dtype, kernels.Choice(peers=names)
            )
            found = {s.name for s in timing.run_contest(problem, candidates, QUICK)}
            # bitsandbytes pages to memory only, so that it has no part where moments are in a file.
            expected = {"qkern", "disk" if op == optimizer.IN_FILE else "bitsandbytes"}
            assert expected <= found, op


def test_peers_that_take_no_such_shape_say_so():
    pytest.importorskip("bitsandbytes")
    qw = weights.random_weight((24, 96), torch.bfloat16)
    choice = peers.Choice(peers=("bitsandbytes", "dense"))
    found, missing = peers.linear_peers(qw, torch.bfloat16, choice)
    assert list(found) == ["qkern", "dense"]
    assert missing[0] == (
        "bitsandbytes: decodes wrong values where a block of weights spans two rows"
    )


@pytest.mark.slow
def test_peak_memory(tiny_workload):
    found = models.peak_memory_in_subprocess("qkern", tiny_workload, torch.float32, 1, [])
    assert 0 < found["model"] <= found["peak"]
