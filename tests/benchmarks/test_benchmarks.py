"""The benchmarks' own logic on tiny inputs: no figure that they print is judged here."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import run
import torch
from bench import (
    kernels,
    llama_cpp,
    machine,
    machinecode,
    matmul,
    mixed,
    models,
    overhead,
    overview,
    peers,
    plots,
    report,
    timing,
    weights,
)

import qkern
from lab import ROOT
from tests.models import tiny_llama

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


TIMED_BY_WORK = ("quantize", "dequantize", "forward", "forward_backward")


@pytest.mark.parametrize("op", [*TIMED_BY_WORK, "linear_4bit_dx", "quantize_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contest(op, dtype):
    problem, samples = play(op, dtype=dtype)
    assert samples[0].name == "qkern"
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
    names = [sample.name for sample in samples]
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


def test_slow_candidate_leaves_the_time_to_others():
    contestants = [candidate("slow", lambda: 2.0), candidate("quick", lambda: 0.0)]
    settings = timing.Settings(repeat=7, max_seconds=3, min_rounds=5)
    slow, quick = timing.run_contest(
        timing.Problem("op", torch.float32), contestants, settings, clock=lambda call: call()
    )
    assert len(slow.seconds) == 2
    assert len(quick.seconds) == 7


def test_percentile():
    assert timing.percentile([3, 1, 2], 50) == 2
    assert timing.percentile([0, 10], 20) == pytest.approx(2)
    assert timing.percentile([7], 80) == 7


def test_integers_are_not_held_to_the_limit_of_floats():
    problem = timing.Problem("forward", torch.float32, (64, 64), 512, flops=10**9)
    contestants = [
        candidate("floats", lambda: None, bytes=10**6),
        candidate("integers", lambda: None, bytes=10**6, integers=True),
    ]
    samples = timing.run_contest(problem, contestants, QUICK, clock=lambda _: 0.02)
    floats, integers = report.records(problem, samples, LIMITS)
    assert (floats["bound"], floats["limit_ms"]) == ("compute", pytest.approx(10.0))
    assert (integers["bound"], integers["limit_ms"]) == ("memory", pytest.approx(0.1))


def test_limits():
    assert LIMITS.peak_gflops(torch.float32) == 100
    assert LIMITS.peak_gflops(torch.bfloat16) == 200
    assert LIMITS.seconds(10**10, 10**10, torch.float32) == (1.0, "memory")
    assert LIMITS.seconds(10**9, 10**12, torch.float32) == (10.0, "compute")
    higher = LIMITS.better_of(replace(LIMITS, read_gb_s=12.0, fma_gflops=None, amx_gflops=5.0))
    assert (higher.read_gb_s, higher.fma_gflops, higher.amx_gflops) == (12.0, 100.0, 5.0)


@pytest.mark.parametrize(("shape", "piece"), [((70, 520), 1), ((300, 257), 1 << 14), ((5, 64), 1)])
def test_parts_of_a_weight(shape, piece, monkeypatch):
    monkeypatch.setattr(weights, "_PIECE", piece)
    qw = qkern.quantize_4bit(torch.randn(shape), block_size=32)
    rows, columns = torch.tensor([0, 3, shape[0] - 1]), torch.tensor([0, 7, shape[1] - 1])
    dense = qw.dequantize(torch.float32)
    assert torch.equal(weights.rows(qw, rows), dense[rows])
    assert torch.equal(weights.columns(qw, columns), dense[:, columns].T)
    pieces = [piece.dequantize(torch.float32) for _, piece in weights.pieces(qw)]
    assert torch.equal(torch.cat(pieces), dense)


def test_int4_peer_is_near():
    pytest.importorskip("torchao.prototype.quantization.int4")
    _, samples = play("forward", (64, 128), 5, torch.bfloat16, chosen=("torchao",))
    assert [sample.name for sample in samples] == ["qkern", "torchao int4"]


def test_own_format_is_held_to_its_own_weight():
    shape = (64, 96)
    qw = weights.random_weight(shape, torch.float32)
    held = weights.rows(qw, torch.arange(64)) * 1.1
    x, _ = matmul.activations(3, shape, torch.float32)
    peer = peers.LinearPeer(lambda _: None, 0, tolerance=0.001, rows=lambda wanted: held[wanted])
    judge = matmul.Check(qw, x).judge("other", peer)
    judge((x @ held.T,))
    with pytest.raises(AssertionError, match="relative error"):
        judge((x @ held.T * 1.01,))
    judge = matmul.Check(qw, x).judge("other", replace(peer, rows=lambda i: held[i] * 1.4))
    with pytest.raises(AssertionError, match=r"relative error 0\.5"):  # another weight
        judge((x @ held.T * 1.4,))


def test_peers_share_the_memory(monkeypatch):
    qw = weights.random_weight((64, 128), torch.float32)
    choice = peers.Choice(peers=("dense",))

    def left(copies: int) -> list[str]:
        return peers.linear_peers(qw, torch.float32, choice, copies=copies)[1]

    dense = 4 * qw.numel()
    free = int((qw.nbytes + dense) / peers._MEMORY_SHARE) + 2
    monkeypatch.setattr(peers.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert left(copies=1) == []
    (reason,) = left(copies=2)
    assert reason.startswith("dense: needs 0.0 GiB")


def test_scratch_of_one_peer_counts_for_all(monkeypatch):
    qw = weights.random_weight((64, 128), torch.float32)
    makers = [
        ("large scratch", lambda *_: peers.LinearPeer(lambda _: None, 100, 0.0, scratch=1000)),
        ("next", lambda *_: peers.LinearPeer(lambda _: None, 100, 0.0, held=100)),
    ]
    monkeypatch.setattr(peers, "_makers", lambda _: makers)

    def found(room: int) -> list[str]:
        free = (qw.nbytes + room) / peers._MEMORY_SHARE + 1
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(peers.psutil, "virtual_memory", lambda: memory)
        return list(peers.linear_peers(qw, torch.float32, peers.Choice())[0])

    assert found(room=1300) == ["qkern", "large scratch", "next"]
    assert found(room=1299) == ["qkern", "large scratch"]
    assert found(room=1099) == ["qkern", "next"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_loops_beside_their_parts(dtype):
    problem, samples = play("mixed", dtype=dtype)
    rows = report.records(problem, samples, LIMITS)
    assert [row["name"] for row in rows] == ["qkern", "dense"]
    times = {sample.name: sample.percentile(50) * 1e3 for sample in samples}
    for row in rows:
        parts = times[row["name"] + " alone"] + times["torch's ops"]
        assert row["of_parts"] == pytest.approx(row["ms"] / parts)
        assert row["threads"] == torch.get_num_threads()


def test_mixed_loops_call_every_layer_and_every_op(monkeypatch):
    calls = []
    right = qkern.linear_4bit
    monkeypatch.setattr(qkern, "linear_4bit", lambda *a: (calls.append("linear"), right(*a))[1])
    gelu = mixed.F.gelu
    monkeypatch.setattr(mixed.F, "gelu", lambda x: (calls.append("other"), gelu(x))[1])
    _, candidates, _ = kernels.contest(
        "mixed", (96, 128), 3, torch.float32, kernels.Choice(peers=())
    )
    expected = {
        "qkern": ["linear", "other"] * mixed.LAYERS,
        "qkern alone": ["linear"] * mixed.LAYERS,
        "torch's ops": ["other"] * mixed.LAYERS,
    }
    for contestant in candidates:
        call = contestant.prepare()
        calls.clear()
        call()
        assert calls == expected[contestant.name]


@pytest.mark.parametrize(
    ("owner", "name", "who"),
    [(qkern, "linear_4bit", "qkern"), (mixed.F, "gelu", "torch's ops")],
)
def test_wrong_part_of_a_mixed_loop_is_detected(owner, name, who, monkeypatch):
    right = getattr(owner, name)
    checked = mixed.Others.check

    def check(others, result):
        monkeypatch.undo()  # what is exact must not be computed by what is broken
        checked(others, result)

    monkeypatch.setattr(mixed.Others, "check", check)
    monkeypatch.setattr(owner, name, lambda *arguments: right(*arguments) * 1.1)
    with pytest.raises(timing.WrongResultError, match=f"{who}, mixed"):
        play("mixed", chosen=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overhead(dtype):
    problem, samples = play("overhead", (32, 64), 1, dtype)
    rows = report.records(problem, samples, LIMITS)
    names = ["qkern", "qkern (torch op)", "qkern (compiled function)", "dense"]
    assert [row["name"] for row in rows] == names
    assert all(row["cache"] == "warm" for row in rows)


def test_batches_of_calls_are_divided(monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(now))
    calls = []
    seconds = overhead.batched_clock(lambda: calls.append(1))
    assert seconds == 2.0 / len(calls)


def test_wrong_compiled_function_is_detected(monkeypatch):
    monkeypatch.setattr(overhead, "compiled_function", lambda x, qw: lambda: (torch.zeros(1, 32),))
    with pytest.raises(timing.WrongResultError, match=r"qkern \(compiled function\), overhead"):
        play("overhead", (32, 64), 1)


def test_compiled_function_writes_the_result():
    x, _ = matmul.activations(2, (32, 64), torch.float32)
    qw = weights.random_weight((32, 64), torch.float32)
    call = overhead.compiled_function(x, qw)
    expected = qkern.linear_4bit(x, qw)
    assert torch.equal(call()[0], expected)
    x.mul_(2)  # it reads the same memory each time
    assert torch.equal(call()[0], 2 * expected)


@pytest.fixture
def fresh_llama_cpp():
    """The module without what it found before."""
    caches = (llama_cpp._library, llama_cpp.working_layouts)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def llama_cpp_reason(**fields) -> list[str]:
    choice = kernels.Choice(peers=("llama.cpp",), **fields)
    return kernels.contest("forward", (64, 256), 2, torch.float32, choice)[2]


def test_missing_llama_cpp_tells_how_to_get_it(fresh_llama_cpp, monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    reasons = llama_cpp_reason()
    assert [reason.split(":")[0] for reason in reasons] == ["llama.cpp Q4_0", "llama.cpp Q4_K"]
    assert "pip install llama-cpp-python" in reasons[0]
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert "libggml-base" in llama_cpp_reason()[0]


def test_layout_that_crashes_is_left_out(fresh_llama_cpp, monkeypatch):
    library = SimpleNamespace(layouts={"AMX": 1, "CPU_REPACK": 2, "CPU": 3})
    monkeypatch.setattr(llama_cpp, "_library", lambda: library)

    def run(command, **_):
        return subprocess.CompletedProcess(command, -4, "CPU\nCPU_REPACK\n", "")

    monkeypatch.setattr(llama_cpp.subprocess, "run", run)
    assert llama_cpp.working_layouts() == ("CPU_REPACK", "CPU")
    assert llama_cpp.broken_layouts() == ["AMX"]


def test_no_layout_that_works(fresh_llama_cpp, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_library", lambda: SimpleNamespace(layouts={"CPU": 1}))
    finished = subprocess.CompletedProcess([], 1, "", "first\nCPU, Q4_0: relative error 0.5\n")
    monkeypatch.setattr(llama_cpp.subprocess, "run", lambda *_, **__: finished)
    with pytest.raises(
        timing.SkippedError, match=r"no layout works: CPU, Q4_0: relative error 0.5"
    ):
        llama_cpp.working_layouts()


def require_llama_cpp() -> tuple[str, ...]:
    try:
        return llama_cpp.working_layouts()
    except timing.SkippedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("m", [1, 5, 40])
def test_llama_cpp_peer(m):
    require_llama_cpp()
    _, samples = play("forward", (64, 512), m, chosen=("llama.cpp",))
    assert [s.name for s in samples] == ["qkern", "llama.cpp Q4_0", "llama.cpp Q4_K"]
    play("mixed", (64, 512), m, chosen=("llama.cpp",))
    play("overhead", (64, 512), m, chosen=("llama.cpp",))


def test_llama_cpp_beside_others_that_use_the_tile_unit():
    layouts = require_llama_cpp()
    qw = weights.random_weight((64, 512), torch.float32)
    x, _ = matmul.activations(40, (64, 512), torch.float32)
    for layout in layouts:
        weight = llama_cpp.Weight.quantize(llama_cpp.KINDS[0], qw)
        linear = llama_cpp.Linear(weight, (layout,))
        before = llama_cpp.before_calls(layout) or (lambda: None)
        before()
        expected = linear(x).clone()
        qkern.linear_4bit(x.bfloat16(), qw)
        x.bfloat16() @ x.bfloat16().T
        before()
        assert torch.equal(linear(x), expected), layout


def test_llama_cpp_hides_no_more_than_amx():
    layouts = require_llama_cpp()
    assert llama_cpp_reason(limit="avx512vnni") == []
    assert "cannot be limited to avx512" in llama_cpp_reason(limit="avx512")[0]
    weight = llama_cpp.Weight(llama_cpp.KINDS[0], (64, 256))
    limited = [name for name in layouts if name != "AMX"]
    assert llama_cpp.Linear(weight, tuple(limited)).layout in limited


def test_llama_cpp_weight_is_near_and_wrong_results_are_seen(monkeypatch):
    require_llama_cpp()
    right = llama_cpp.Linear.__call__
    monkeypatch.setattr(llama_cpp.Linear, "__call__", lambda self, x: right(self, x) * 1.05)
    with pytest.raises(timing.WrongResultError, match=r"llama\.cpp Q4_0, forward"):
        play("forward", (64, 512), 5, chosen=("llama.cpp",))


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
            *("--op", "dequantize,forward,mixed,overhead"),
            *("--peer", "dense", "--dtype", "bfloat16"),
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
    # of each shape: two candidates and a copy; then for each M two, two loops, and four calls
    assert len(content["results"]) == 2 * (3 + 2 * (2 + 2 + 4))
    lines = capsys.readouterr().out.splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(content["results"])
    assert len({len(line) for line in cells}) == 1
    stems = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert {"roofline-bfloat16", "forward-64x64-bfloat16-over-m"} <= stems
    assert {"forward-m5-bfloat16-over-size", "dequantize-bfloat16-over-size"} <= stems
    assert {"mixed-m1-bfloat16", "overhead-m5-bfloat16"} <= stems


def test_mixed_runs_on_one_thread_too(quick_probes, capsys):
    arguments = ["--op", "mixed", "--peer", "none", "--dtype", "float32", "--shape", "64x64"]
    assert run.main([*arguments, "--m", "1", "--threads", "2", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "| mixed, 1 thread " in out
    assert "| mixed, 2 threads " in out
    assert " of its parts " in out


def record(op: str, name: str, ms: float, m: int | None = None, **fields) -> dict:
    found = {"op": op, "shape": [64, 64], "m": m, "dtype": "float32", "threads": 2, "name": name}
    times = {"ms": ms, "p20_ms": ms, "p80_ms": ms, "ratio": 1.0, "bytes": 4096, "flops": 0}
    return found | times | fields


@pytest.fixture
def two_files(tmp_path) -> list[Path]:
    """Results of two runs, with one contest that both played."""
    about = {"machine": {"threads": 2}, "settings": {}, "notes": [], "schema": 1}
    step = {"unit": "tokens/s", "bytes": 0, "shape": [4, 256]}
    problem = timing.Problem("memory", torch.float32, (4, 256))
    ours = {"model": 1 << 20, "peak": 1500 << 20}
    first = [
        record("quantize", "qkern", 2.0),
        record("quantize", "bitsandbytes", 50.0),
        record("forward", "qkern", 4.0, 1),
        record("forward", "bitsandbytes", 2.0, 1),
    ]
    second = [
        record("quantize", "qkern", 99.0),
        record("forward", "dense", 1.0, 1),
        record("forward", "qkern", 3.0, 512),
        record("forward", "llama.cpp Q4_0", 1.0, 512),
        record("forward", "dense", 1.0, 7),  # in no line of the overview
        record("train_step", "qkern", 1000.0, rate=1024.0, **step),
        record("train_step", "bitsandbytes", 2000.0, rate=512.0, **step),
        record("train_step", "qkern", 500.0, rate=512.0, **step | {"shape": [4, 64]}),
        *(
            report.memory_record(problem, name, {"model": 1 << 20, "peak": peak << 20}, ours)
            for name, peak in (("qkern", 1500), ("bitsandbytes", 3000))
        ),
    ]
    paths = []
    for number, rows in enumerate((first, second)):
        limits = {"read_gb_s": 10.0 + number, "amx_gflops": None, "matmul_gflops": {}}
        paths.append(tmp_path / f"{number}.json")
        report.write_json(paths[-1], about | {"results": rows, "limits": limits})
    return paths


def test_merged_results(two_files):
    content = overview.merged([json.loads(path.read_text()) for path in two_files])
    # Contestants of one contest took turns, so those of another run are not set beside them.
    rows = [row for row in content["results"] if "ms" in row and row["shape"] != [4, 64]]
    found = {(row["op"], row["m"], row["name"]): row["ms"] for row in rows}
    assert found == {
        ("quantize", None, "qkern"): 2.0,
        ("quantize", None, "bitsandbytes"): 50.0,
        ("forward", 1, "qkern"): 4.0,
        ("forward", 1, "bitsandbytes"): 2.0,
        ("forward", 512, "qkern"): 3.0,
        ("forward", 512, "llama.cpp Q4_0"): 1.0,
        ("forward", 7, "dense"): 1.0,
        ("train_step", None, "qkern"): 1000.0,
        ("train_step", None, "bitsandbytes"): 2000.0,
    }
    assert content["limits"]["read_gb_s"] == 11.0


def test_replot(two_files, tmp_path, capsys):
    plots_at = tmp_path / "plots"
    assert run.main(["--replot", ",".join(map(str, two_files)), "--plot", str(plots_at)]) == 0
    assert {"overview.png", "overview.svg", "train_step.png"} <= {
        p.name for p in plots_at.iterdir()
    }
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    assert lines[start:] == [
        "|  |  | qkern | bitsandbytes | llama.cpp Q4_0 | ratio to bitsandbytes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| quantise | float32 | 2 | 50 |  | 25 |",
        "| forward, 1 row | float32 | 4 | 2 |  | 0.5 |",
        "| forward, 512 rows | float32 | 3 |  | 1 |  |",
        "| LoRA training step | float32 | 1,024 tokens/s | 512 tokens/s |  | 2 |",
        "| its peak memory | float32 | 1,500 MiB | 3,000 MiB |  | 2 |",
    ]


@pytest.mark.slow
def test_committed_results_can_be_drawn_again(tmp_path):
    results = ROOT / "benchmarks" / "results"
    files = [p for p in results.glob("*/*.json") if "schema" in json.loads(p.read_text("utf-8"))]
    assert files
    for file in files:
        assert overview.replot([file], tmp_path) == 0


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
    with pytest.raises(SystemExit):
        run.main(["--replot", "results.json"])
    assert "--replot: draws into the directory that --plot names" in capsys.readouterr().err
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
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        model = tiny_llama(intermediate_size=128, tie_word_embeddings=True)
    model.save_pretrained(path)
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
            found = [s.name for s in timing.run_contest(problem, candidates, QUICK)]
            assert {"qkern", "bitsandbytes"} <= set(found)


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
