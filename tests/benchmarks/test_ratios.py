"""The table of ratios to the best peer: who is compared with whom, and in which order."""

from __future__ import annotations

import torch
from bench import ratios, report, timing

from tests.benchmarks.contests import LIMITS, QUICK, candidate


def record(op: str, name: str, ms: float, **fields) -> dict:
    found = {"op": op, "shape": [64, 64], "m": None, "dtype": "float32", "threads": 2, "name": name}
    return found | {"ms": ms} | fields


def rows(*records: dict, **machine) -> list[dict]:
    return ratios.rows({"machine": {"qkern_isa": "avx2", **machine}, "results": list(records)})


def test_the_worst_of_all_ops_comes_first():
    found = rows(
        record("quantize", "qkern", 1.0),
        record("quantize", "bitsandbytes", 50.0),
        record("forward", "qkern", 4.0, m=8),
        record("forward", "dense", 2.0, m=8),
        record("forward", "bitsandbytes", 1.0, m=8),
        record("forward", "qkern", 1.0, m=1),
        record("forward", "dense", 1.5, m=1),
    )
    assert [(row["op"], row["m"], row["peer"], row["ratio"]) for row in found] == [
        ("forward", 8, "bitsandbytes", 0.25),
        ("forward", 1, "dense", 1.5),
        ("quantize", None, "bitsandbytes", 50.0),
    ]
    assert all(row["level"] == "avx2" for row in found)


def test_each_instruction_set_has_a_row():
    found = rows(
        record("forward", "qkern[avx512]", 1.0),
        record("forward", "qkern[avx2]", 4.0),
        record("forward", "dense", 2.0),
    )
    assert [(row["name"], row["level"], row["ratio"]) for row in found] == [
        ("qkern", "avx2", 0.5),
        ("qkern", "avx512", 2.0),
    ]


def test_contests_with_other_threads_or_dtypes_are_others():
    found = rows(
        record("mixed", "qkern", 4.0),
        record("mixed", "dense", 4.0, threads=1),
        record("mixed", "dense", 2.0, dtype="bfloat16"),
    )
    assert found == []


def test_only_what_does_the_same_is_a_peer():
    """States of as many bits; a fresh output beside a fresh one; no limit of the machine."""
    found = rows(
        record("adamw", "qkern", 4.0),
        record("adamw", "qkern (8 bits)", 6.0),
        record("adamw", "torch (fused)", 5.0),
        record("adamw", "bitsandbytes", 40.0),
        record("adamw", "bitsandbytes (8 bits)", 60.0),
        record("adamw_in_file", "qkern", 4.0),
        record("adamw_in_file", "disk", 1.0),
        record("dequantize", "qkern", 3.0),
        record("dequantize", "qkern (fresh output)", 8.0),
        record("dequantize", "bitsandbytes", 16.0),
        record("dequantize", "dense (a copy)", 4.0),
        record("enabled_forward", "bitsandbytes on qkern", 2.0),
        record("enabled_forward", "bitsandbytes", 30.0),
    )
    assert {(row["op"], row["name"]): row["theirs"] for row in found} == {
        ("adamw", "qkern"): 5.0,
        ("adamw", "qkern (8 bits)"): 60.0,
        ("dequantize", "qkern"): 4.0,
        ("dequantize", "qkern (fresh output)"): 16.0,
        ("enabled_forward", "bitsandbytes on qkern"): 30.0,
    }


def test_models_are_also_compared_in_the_best_dtype_of_each():
    step = {"unit": "tokens/s"}
    found = rows(
        record("train_step", "qkern", 10.0, **step),
        record("train_step", "dense", 30.0, **step),
        record("train_step", "qkern", 8.0, dtype="bfloat16", **step),
        record("train_step", "dense", 40.0, dtype="bfloat16", **step),
        record("train_step", "bitsandbytes", 20.0, dtype="bfloat16", **step),
    )
    assert [(row["dtype"], row["peer"], row["ratio"]) for row in found] == [
        ("bfloat16", "bitsandbytes", 2.5),
        ("the best of each", "bitsandbytes", 2.5),
        ("float32", "dense", 3.0),
    ]


def test_memory_is_compared_by_its_peak():
    problem = timing.Problem("memory", torch.float32, (4, 256))
    ours, theirs = ({"model": 1, "peak": peak << 20} for peak in (100, 250))
    found = rows(
        report.memory_record(problem, "qkern", ours, ours),
        report.memory_record(problem, "dense", theirs, ours),
    )
    assert [(row["of"], row["ours"], row["ratio"], row["unit"]) for row in found] == [
        ("peak", 100.0, 2.5, "MiB")
    ]


def test_what_has_no_peer_is_named():
    content = {
        "machine": {"qkern_isa": "avx2"},
        "results": [
            record("quantize_8bit", "qkern", 1.0),
            record("forward", "qkern", 1.0, m=3),
            record("forward", "dense", 2.0, m=3),
            record("forward", "qkern", 1.0, m=3, shape=[32, 32]),
        ],
    }
    assert ratios.table(content).splitlines()[-2:] == [
        "1 rows beside their best peer, none is below 1.0",
        "without a peer: quantize_8bit 64x64 float32, forward 32x32 float32 M=3",
    ]
    content["results"] = content["results"][:1]
    assert ratios.table(content) == "no row has a peer"


def test_a_played_contest_has_a_row():
    problem = timing.Problem("forward", torch.float32, (64, 64), 3)
    seconds = {"qkern": 0.02, "dense": 0.01}
    contestants = [candidate(name, lambda name=name: seconds[name]) for name in seconds]
    samples = timing.run_contest(problem, contestants, QUICK, clock=lambda call: call())
    (row,) = rows(*report.records(problem, samples, LIMITS))
    assert row["ratio"] == 0.5
    assert (row["ours"], row["theirs"], row["unit"]) == (20.0, 10.0, "ms")
