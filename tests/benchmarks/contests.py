"""What tests of the benchmarks share: contests on tiny inputs."""

from __future__ import annotations

import torch
from bench import kernels, machine, timing

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
