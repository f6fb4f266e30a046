#!/usr/bin/env python3
"""How fast are experts in 4 bits, beside the same bytes in one weight and beside dense experts?

`decode`: one token by its experts, beside `linear_4bit` on one weight that is as large as theirs
together. `prefill` and `step` (forward, and backward to the input): many tokens, beside dense
experts in the same dtype by torch's `grouped_mm` and expert by expert. Weights come from memory:
each call takes the next of several copies. Candidates take turns in one process; figures are
medians, and results are checked against each other first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import machine
from bench.timing import Call, Candidate, Problem, Settings, run_contest
from torch import Tensor

import qkern


class Sizes(NamedTuple):
    """Experts, and each one's weight."""

    experts: int
    out_features: int
    in_features: int


DECODE = (Sizes(8, 1536, 576), Sizes(64, 768, 2048), Sizes(8, 4096, 4096))
PREFILL = (Sizes(8, 3072, 576), Sizes(8, 2048, 1024), Sizes(64, 768, 1024))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def weights(sizes: Sizes, dtype: torch.dtype) -> tuple[qkern.QuantizedExperts, Tensor]:
    dense = torch.randn(sizes, dtype=dtype) / sizes.in_features**0.5
    return qkern.quantize_experts(dense), dense


def routed(tokens: int, experts: int, top_k: int) -> Tensor:
    """Where the rows of each expert end, of tokens that choose at random."""
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    return torch.bincount(chosen.flatten(), minlength=experts).cumsum(0)


def near(expected: Tensor, what: str) -> Callable[[Any], None]:
    def check(found: Any) -> None:
        worst = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert worst < 0.02, f"{what}: off by {worst:.3g} of the largest"

    return check


def eager(x: Tensor, dense: Tensor, ends: list[int]) -> Tensor:
    """Expert by expert, as transformers' eager experts do."""
    parts, begin = [], 0
    for expert, end in enumerate(ends):
        if begin < end:
            parts.append(x[begin:end] @ dense[expert].mT)
        begin = end
    return torch.cat(parts)


def contest(problem: Problem, candidates: list[Candidate], settings: Settings) -> dict[str, float]:
    samples = run_contest(problem, candidates, settings)
    return {sample.name: sample.percentile(50) * 1e3 for sample in samples}


def decode(sizes: Sizes, dtype: torch.dtype, top_k: int, settings: Settings) -> dict[str, float]:
    """One token by ``top_k`` experts, beside one weight of as many rows."""
    qw, _ = weights(sizes, dtype)
    chosen = torch.randperm(sizes.experts)[:top_k].sort().values
    counts = torch.zeros(sizes.experts, dtype=torch.int64)
    counts[chosen] = 1
    offsets = counts.cumsum(0)
    token = torch.randn(1, sizes.in_features, dtype=dtype)
    x = token.expand(top_k, -1).contiguous()
    rows = qkern.dequantize_4bit
    together = torch.cat([rows(qw[int(e)], dtype=torch.float32) for e in chosen])
    one = qkern.quantize_4bit(together, double_quant=True)
    used = one.nbytes

    def experts() -> Call:
        mine = qkern.QuantizedExperts.stack(list(qw))
        return lambda: qkern.grouped_linear_4bit(x, mine, offsets)

    def single() -> Call:
        mine = qkern.quantize_4bit(together, double_quant=True)
        return lambda: qkern.linear_4bit(token, mine)

    expected = qkern.linear_4bit(token, one).view(top_k, -1)
    with torch.no_grad():
        problem = Problem("decode", dtype, sizes, top_k)
        check = near(expected, "decode")
        return contest(
            problem,
            [
                Candidate("experts", experts, check, used, qw.nbytes),
                Candidate("one weight", single, lambda y: check(y.view(top_k, -1)), used, used),
            ],
            settings,
        )


def many(
    sizes: Sizes, dtype: torch.dtype, tokens: int, top_k: int, backward: bool, settings: Settings
) -> dict[str, float]:
    """``tokens`` by ``top_k`` experts each, beside dense ones."""
    qw, dense = weights(sizes, dtype)
    dense = qw.dequantize(dtype)
    offsets = routed(tokens, sizes.experts, top_k)
    ends, narrow = offsets.tolist(), offsets.int()
    x = torch.randn(tokens * top_k, sizes.in_features, dtype=dtype, requires_grad=backward)
    dy = torch.randn(tokens * top_k, sizes.out_features, dtype=dtype)

    def called(product: Callable[[], Tensor]) -> Tensor:
        if not backward:
            with torch.no_grad():
                return product()
        return torch.autograd.grad(product(), x, dy)[0]

    products: dict[str, Callable[[], Tensor]] = {
        "qkern": lambda: qkern.grouped_linear_4bit(x, qw, offsets),
        "grouped_mm": lambda: torch.nn.functional.grouped_mm(x, dense.mT, offs=narrow),
        "eager": lambda: eager(x, dense, ends),
    }
    check = near(called(products["eager"]), "many tokens")
    name = "step" if backward else "prefill"
    problem = Problem(name, dtype, sizes, tokens * top_k)
    candidates = [
        Candidate(name, lambda product=product: lambda: called(product), check)
        for name, product in products.items()
    ]
    return contest(problem, candidates, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []

    def add(op: str, sizes: Sizes, dtype: str, times: dict[str, float]) -> None:
        first, *others = times
        ratios = {name: times[name] / times[first] for name in others}
        found.append({"op": op, **sizes._asdict(), "dtype": dtype, "ms": times, "ratios": ratios})
        cells = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
        shown = ", ".join(f"{name} / {first} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"{op} {' x '.join(map(str, sizes))} {dtype}: {cells}; {shown}", flush=True)

    cache, threads = machine.cache_bytes(), torch.get_num_threads()
    for dtype in args.dtype:
        cold = Settings(repeat=100_000, max_seconds=args.seconds, cache_bytes=cache)
        warm = Settings(repeat=100_000, max_seconds=args.seconds, cold=False)
        for sizes in DECODE:
            add("decode", sizes, dtype, decode(sizes, DTYPES[dtype], args.top_k, cold))
        for sizes in PREFILL:
            for backward in (False, True):
                times = many(sizes, DTYPES[dtype], args.tokens, args.top_k, backward, warm)
                add("step" if backward else "prefill", sizes, dtype, times)
    if args.out is not None:
        about = {"machine": machine.describe(threads), "tokens": args.tokens, "top_k": args.top_k}
        args.out.write_text(json.dumps({**about, "results": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
