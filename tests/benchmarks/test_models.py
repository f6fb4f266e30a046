"""Contests of a whole model's training step and generation."""

from __future__ import annotations

import pytest
import torch
from bench import kernels, llama_model, models, optimizer, peers, report, timing, weights

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


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_file_has_the_model(tied, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, other = (tiny_llama(tie_word_embeddings=tied) for _ in range(2))
    for parameter in other.parameters():
        parameter.detach().zero_()
    path = tmp_path / "model.gguf"
    llama_model.write(model, path)
    fields = gguf.GGUFReader(path).fields
    heads = [
        fields[f"llama.attention.{name}"].contents() for name in ("head_count", "head_count_kv")
    ]
    assert heads == [model.config.num_attention_heads, model.config.num_key_value_heads]
    llama_model.read_into(other, path)
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    # Rows of queries and keys lie as llama.cpp rotates them, elements 2i and 2i + 1 together.
    written = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    width = model.config.head_dim
    query = model.model.layers[0].self_attn.q_proj.weight
    pair = torch.from_numpy(written["blk.0.attn_q.weight"][2 * 3 : 2 * 3 + 2].copy())
    assert torch.equal(pair, query[[3, 3 + width // 2]])


def test_gguf_of_other_models_is_refused(tmp_path):
    pytest.importorskip("gguf")
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(timing.SkippedError, match="plain Llama"):
        llama_model.write(model, tmp_path / "model.gguf")


def test_llama_cpp_generates_beside_others(tiny_workload):
    problem, candidates, missing = models.generation_contest(
        tiny_workload, torch.float32, ("llama.cpp",)
    )
    names = ["qkern", models.FOUR_BIT_HEAD, models.INT8]
    if any("llama-cpp-python cannot be used" in reason for reason in missing):
        pytest.skip("llama.cpp is not installed")
    assert [candidate.name for candidate in candidates] == [*names, llama_model.NAME]
    timing.run_contest(problem, candidates, QUICK)
    _, _, missing = models.generation_contest(tiny_workload, torch.bfloat16, ("llama.cpp",))
    assert missing == [f"{llama_model.NAME}: float32 only"]


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
