"""Contests: wrong results are noticed before timing, turns are taken, times divided."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from bench import (
    kernels,
    machine,
    machinecode,
    matmul,
    mixed,
    overhead,
    peers,
    report,
    timing,
    weights,
)

import qkern
from tests.benchmarks.contests import LIMITS, QUICK, candidate, play

pytestmark = pytest.mark.unpoisoned


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
    native = qkern.backends.cpu
    if reason := native.missing_reason():
        pytest.skip(reason)
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


def test_the_slowest_are_called_once(monkeypatch):
    monkeypatch.setattr(timing, "_ONCE_SECONDS", 0.001)
    calls = []

    def slow():
        calls.append(time.sleep(0.02))

    contestants = [candidate("slow", slow), candidate("quick", lambda: None)]
    settings = timing.Settings(repeat=7, max_seconds=0.01, min_rounds=5)
    found, quick = timing.run_contest(timing.Problem("op", torch.float32), contestants, settings)
    assert len(calls) == len(found.seconds) == 1
    assert found.seconds[0] >= 0.02
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
