"""The benchmarks' own logic on tiny inputs: no figure that they print is judged here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qkern

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import run
    from bench import kernels, machine, machinecode, models, peers, plots, report, timing
finally:
    sys.path.remove(BENCHMARKS)

pytestmark = pytest.mark.unpoisoned

QUICK = timing.Settings(repeat=3, max_seconds=60, cold=False)
LIMITS = machine.Limits(
    read_gb_s=10.0,
    copy_gb_s=10.0,
    fma_gflops=100.0,
    amx_gflops=None,
    matmul_gflops={"float32": 80.0, "bfloat16": 200.0},
)


def candidate(name: str, call, check=lambda result: None, **fields) -> timing.Candidate:
    return timing.Candidate(name, lambda: call, check, **fields)


def play(op: str, shape=(96, 128), m=3, dtype=torch.float32, chosen=("dense",), **fields):
    problem, candidates, missing = kernels.contest(
        op, shape, m, dtype, kernels.Choice(peers=chosen, **fields)
    )
    assert not missing
    return problem, timing.run_contest(problem, candidates, QUICK)


@pytest.fixture
def quick_probes(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(machine, "probe_buffer_bytes", lambda cache: 1 << 20)
    monkeypatch.setattr(machine, "_MATMUL_SIZE", 64)


def test_wrong_result_stops_before_timing():
    calls = []

    def wrong():
        calls.append("wrong")
        return 1

    def check(result):
        assert result == 2, "one is not two"

    problem = timing.Problem("add", torch.float32)
    with pytest.raises(timing.WrongResultError, match="liar, add float32: one is not two"):
        timing.run_contest(problem, [candidate("liar", wrong, check)], QUICK)
    assert calls == ["wrong"]


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_wrong_matmul_is_detected(op, monkeypatch):
    right = qkern.linear_4bit
    monkeypatch.setattr(qkern, "linear_4bit", lambda x, qw: right(x, qw) * 1.001)
    with pytest.raises(timing.WrongResultError, match="qkern"):
        play(op)


def test_wrong_gradient_is_detected(monkeypatch):
    right = qkern.linear_4bit

    def wrong(x, qw):
        y = right(x, qw)
        y.register_hook(lambda dy: dy * 1.001)
        return y

    monkeypatch.setattr(qkern, "linear_4bit", wrong)
    with pytest.raises(timing.WrongResultError, match="qkern"):
        play("forward_backward")


def test_wrong_codes_are_detected(monkeypatch):
    right = qkern.quantize_4bit

    def wrong(w):
        qw = right(w)
        qw.packed[5] ^= 1
        return qw

    monkeypatch.setattr(qkern, "quantize_4bit", wrong)
    with pytest.raises(timing.WrongResultError, match="packed: 1 of"):
        play("quantize")


def test_wrong_peer_is_detected(monkeypatch):
    monkeypatch.setattr(peers.F, "linear", lambda x, w: 1.1 * (x @ w.T))
    with pytest.raises(timing.WrongResultError, match="dense"):
        play("forward")


@pytest.mark.parametrize("op", [*kernels.CONTESTS, "linear_4bit_dx", "quantize_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contest(op, dtype):
    problem, samples = play(op, dtype=dtype)
    assert samples[0].candidate.name == "qkern"
    assert all(len(sample.seconds) == QUICK.repeat for sample in samples)
    rows = report.records(problem, samples, LIMITS)
    assert rows[0]["ratio"] == 1
    assert all(0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] for row in rows)
    assert all(row["share"] == pytest.approx(row["limit_ms"] / row["ms"]) for row in rows)


def test_instruction_sets_take_turns():
    native = qkern.backends.native
    if native.missing_reason:
        pytest.skip(native.missing_reason)
    before = native.isa()
    try:
        _, samples = play("forward", isas=("scalar", native.available_isas()[-1]))
    finally:
        native.set_isa(before)
    names = [sample.candidate.name for sample in samples]
    assert names == ["qkern[scalar]", f"qkern[{native.available_isas()[-1]}]", "dense"]


def test_calls_take_turns_and_copies_rotate():
    calls, made = [], iter("abcdef")

    def prepare():
        copy = next(made)
        return lambda: calls.append(copy)

    settings = timing.Settings(repeat=4, cold=True, cache_bytes=100)
    first = timing.Candidate("first", prepare, lambda _: None, footprint=100)
    second = replace(first, name="second", footprint=200)
    samples = timing.run_contest(timing.Problem("op", torch.float32), [first, second], settings)
    assert [(s.copies, s.cache) for s in samples] == [(2, "cold"), (1, "cold")]
    assert "".join(calls) == "ac" + "ac" + "cb" + "ac" + "cb"  # the checks, then four rounds


def test_copies_are_bounded():
    settings = timing.Settings(cold=True, cache_bytes=1 << 30)
    assert timing.copies_needed(candidate("x", None, footprint=1), settings) == (256, "partly cold")
    assert timing.copies_needed(candidate("x", None, footprint=1 << 31), settings)[0] == 1
    warm = replace(settings, cold=False)
    assert timing.copies_needed(candidate("x", None, footprint=1), warm) == (1, "warm")


def test_time_limit_leaves_the_fewest_rounds():
    settings = timing.Settings(repeat=100, max_seconds=0, min_rounds=2)
    (sample,) = timing.run_contest(
        timing.Problem("op", torch.float32), [candidate("x", lambda: None)], settings
    )
    assert len(sample.seconds) == 2


def test_percentile():
    assert timing.percentile([3, 1, 2], 50) == 2
    assert timing.percentile([0, 10], 20) == pytest.approx(2)
    assert timing.percentile([7], 80) == 7


def test_limits():
    assert LIMITS.peak_gflops(torch.float32) == 100
    assert LIMITS.peak_gflops(torch.bfloat16) == 200
    assert LIMITS.seconds(10**10, 10**10, torch.float32) == (1.0, "memory")
    assert LIMITS.seconds(10**9, 10**12, torch.float32) == (10.0, "compute")
    higher = LIMITS.better_of(replace(LIMITS, read_gb_s=12.0, fma_gflops=None, amx_gflops=5.0))
    assert (higher.read_gb_s, higher.fma_gflops, higher.amx_gflops) == (12.0, 100.0, 5.0)


@pytest.mark.parametrize(("shape", "piece"), [((70, 520), 1), ((300, 257), 1 << 14), ((5, 64), 1)])
def test_gathered_weights(shape, piece, monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE", piece)
    qw = qkern.quantize_4bit(torch.randn(shape), block_size=32)
    rows, columns = torch.tensor([0, 3, shape[0] - 1]), torch.tensor([0, 7, shape[1] - 1])
    dense = qw.dequantize(torch.float32)
    by_row, by_column = kernels.gather(qw, rows, columns)
    assert torch.equal(by_row, dense[rows])
    assert torch.equal(by_column, dense[:, columns].T)


def test_int4_peer_is_near():
    _, samples = play("forward", shape=(64, 128), m=5, chosen=("torchao",))
    assert [sample.candidate.name for sample in samples] == ["qkern", "torchao int4"]


def test_machine_code_measures_something():
    isa = machine.widest_isa("avx512")
    buffer = torch.ones(1 << 16)
    found = [
        machinecode.fma_gflops(isa, 2, seconds=0.001),
        machinecode.read_gbytes(buffer.data_ptr(), buffer.nbytes, isa, 2),
    ]
    if machine.widest_isa() == "amx":
        found.append(machinecode.amx_gflops(1, seconds=0.001))
    assert all(value is None or value > 0.01 for value in found)


def test_crossover():
    rows = [{"name": "dense", "m": m, "ratio": r} for m, r in ((1, 4.0), (16, 0.25), (32, 0.5))]
    assert plots.crossovers(rows) == pytest.approx([4.0])


def test_run(quick_probes, tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    status = run.main(
        [
            *("--op", "dequantize,forward", "--peer", "dense", "--dtype", "bfloat16"),
            *("--shape", "64x64,64x128", "--m", "1,5"),
            *("--threads", "1", "--repeat", "2", "--json", str(path)),
            *("--plot", str(tmp_path / "plots")),
        ]
    )
    assert status == 0
    content = json.loads(path.read_text())
    assert content.keys() == {"schema", "machine", "limits", "settings", "results", "notes"}
    about = content["machine"]
    assert about["threads"] == 1
    assert about["versions"]["torch"] == torch.__version__
    assert len(about["load_average"]) == len(about["load_average_after"]) == 3
    keys = {"op", "shape", "m", "dtype", "name", "ms", "p20_ms", "p80_ms", "ratio", "cache"}
    assert all(keys <= row.keys() for row in content["results"])
    # of each shape: two candidates and a copy, then two candidates for each M
    assert len(content["results"]) == 2 * (3 + 2 * 2)
    lines = capsys.readouterr().out.splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(content["results"])
    assert len({len(line) for line in cells}) == 1
    stems = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert {"roofline-bfloat16", "forward-64x64-bfloat16-over-m"} <= stems
    assert {"forward-m5-bfloat16-over-size", "dequantize-bfloat16-over-size"} <= stems


def test_wrong_result_is_the_exit_status(quick_probes, monkeypatch, capsys):
    monkeypatch.setattr(peers.F, "linear", lambda x, w: torch.zeros(len(x), len(w)))
    arguments = ["--op", "forward,dequantize", "--shape", "64x64", "--m", "2", "--peer", "dense"]
    arguments += ["--dtype", "float32", "--threads", "1", "--repeat", "1"]
    assert run.main(arguments) == 1
    out = capsys.readouterr().out
    assert "wrong result, not timed: dense, forward 64x64 float32 M=2" in out
    assert "| dequantize |" in out  # the rest is timed all the same
    assert "| forward " not in out


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        run.main(["--peer", "bitsnbytes"])
    assert "--peer: got bitsnbytes; takes bitsandbytes" in capsys.readouterr().err
    assert run.main(["--op", "forwards"]) == 2


def test_limited_instruction_set_takes_a_fresh_process(monkeypatch):
    class ReplacedError(Exception):
        pass

    def execve(path, command, environment):
        raise ReplacedError(command, environment)

    monkeypatch.setattr(run.os, "execve", execve)
    with pytest.raises(ReplacedError) as replaced:
        run.main(["--peer-isa", "avx512", "--op", "forward"])
    command, environment = replaced.value.args
    assert command[-4:] == ["--peer-isa", "avx512", "--op", "forward"]
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert environment["QKERN_CPU_ISA"] == "avx512"


@pytest.fixture(scope="module")
def tiny_workload(tmp_path_factory) -> models.Workload:
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return models.Workload(str(path), batch=2, sequence=12, new_tokens=3)


@pytest.mark.parametrize("make", [models.training_contest, models.generation_contest])
def test_model_contest(make, tiny_workload):
    problem, candidates, missing = make(tiny_workload, torch.float32, ())
    samples = timing.run_contest(problem, candidates, QUICK)
    (row,) = report.records(problem, samples, LIMITS)
    assert not missing
    assert row["unit"] == "tokens/s"
    assert row["rate"] == pytest.approx(problem.work / row["ms"] * 1e3)


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
            assert len(timing.run_contest(problem, candidates, QUICK)) == 3
        for op in kernels.CONTESTS:
            problem, candidates, _ = kernels.contest(
                op, (96, 128), 5, dtype, kernels.Choice(peers=names)
            )
            found = [s.candidate.name for s in timing.run_contest(problem, candidates, QUICK)]
            assert {"qkern", "bitsandbytes"} <= set(found)


@pytest.mark.slow
def test_peak_memory(tiny_workload):
    found = models.peak_memory_in_subprocess("qkern", tiny_workload, torch.float32, 1, [])
    assert 0 < found["model"] <= found["peak"]
