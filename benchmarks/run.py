#!/usr/bin/env python3
"""Time qkern beside its peers, on checked results, against limits measured in the same run.

``--help`` lists the settings, README.md says what the figures mean. Exits with 1 when a result
was wrong; what gave it is not timed then.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ISA_ENVIRONMENT = {
    "avx512bf16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "QKERN_CPU_ISA": "avx512bf16",
    },
    "avx512vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "QKERN_CPU_ISA": "avx512vnni",
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "QKERN_CPU_ISA": "avx512",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "QKERN_CPU_ISA": "avx2",
    },
}
"""What makes torch, its libraries and qkern act as on a lesser processor; read as they load."""

PEERS = ("bitsandbytes", "dense", "torchao", "llama.cpp")
DTYPES = ("float32", "bfloat16", "float16")
STANDARD_OPS = (
    *("quantize", "dequantize", "forward", "forward_backward"),
    *("mixed", "overhead", "adamw"),
    *("loss", "train_step", "generate", "memory", "crowded"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--op",
        type=_names,
        default=list(STANDARD_OPS),
        help="comma-separated: "
        + ", ".join(STANDARD_OPS)
        + "; adamw_in_file, which writes gigabytes to the disk; enabled_forward and "
        "enabled_forward_backward, bitsandbytes' layer on its own code and on qkern's kernels; "
        "generate_compiled, by a compiled step with a static cache, which compiles for minutes; or "
        "an op of qkern.testing.OPS, without peers",
    )
    add(
        "--peer",
        type=_names,
        default=["bitsandbytes", "dense"],
        help="bitsandbytes, dense, torchao, llama.cpp, or none",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: time on the current CUDA device, by events; quantize, dequantize, forward and "
        "forward_backward only",
    )
    add(
        "--shape",
        type=_shapes,
        help="weights [out]x[in], comma-separated (default: 4096x4096, overhead 64x64,576x576); "
        "of adamw [parameters]x[elements] (8x4194304,420x9216, in_file 8x16777216); of loss "
        "[vocabulary]x[hidden] (262144x640 with --m 512, 49152x576 with --m 1024)",
    )
    add(
        "--m",
        type=_numbers,
        help="rows of activations (default: 1,4,8,64,512, mixed 1,64, crowded 1,512, overhead 1)",
    )
    add(
        "--dtype",
        type=_names,
        help="of activations: float32, bfloat16 or float16 (default: the first two, and for ops of "
        "many products only what torch does not emulate on this processor)",
    )
    add("--threads", type=int, default=2, help="of torch and qkern; mixed is also run with one")
    add(
        "--isa",
        type=_names,
        default=[],
        help="time qkern on each of these instruction sets "
        "(default: the one that it chooses); ratios are to the first",
    )
    add(
        "--peer-isa",
        choices=sorted(ISA_ENVIRONMENT),
        help="hide wider instruction sets from "
        "torch, oneDNN, MKL, bitsandbytes and qkern, as on a processor without them",
    )
    add(
        "--cache",
        choices=("cold", "warm"),
        default="cold",
        help="cold: go through copies of the "
        "weight, of twice the last-level cache together; warm: use one copy again and again",
    )
    add("--repeat", type=int, default=50, help="rounds, each calling every candidate once")
    add("--max-seconds", type=float, default=6, help="of a contest, once it has 5 rounds")
    add("--model-repeat", type=int, default=5, help="rounds of train_step, generate and loss")
    add(
        "--model",
        default="smollm2",
        help="for train_step, generate, memory: a Hugging Face "
        "directory, or smollm2 for the bundled SmolLM2-135M",
    )
    add("--batch", type=int, default=4, help="sequences of a training step")
    add("--sequence", type=_numbers, default=[256], help="tokens of each")
    add("--new-tokens", type=int, default=32, help="that generate makes")
    add("--json", type=Path, help="file for everything measured")
    add("--plot", type=Path, help="directory for plots, PNG and SVG")
    add(
        "--replot",
        type=_paths,
        default=[],
        metavar="FILES",
        help="measure nothing: merge these comma-separated JSON files of one machine, draw them "
        "into --plot, and print the overview and the ratios",
    )
    add("--memory-of", help=argparse.SUPPRESS)  # the subprocess that measures peak memory
    args = parser.parse_args(argv)
    args.every_dtype = args.dtype is not None
    args.dtype = args.dtype or ["float32", "bfloat16"]
    for option, known in (("peer", PEERS), ("dtype", DTYPES)):
        if unknown := set(getattr(args, option)) - set(known):
            parser.error(f"--{option}: got {', '.join(unknown)}; takes {', '.join(known)}")
    if args.replot and not args.plot:
        parser.error("--replot: draws into the directory that --plot names; got none")
    return args


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name and name != "none"]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _paths(text: str) -> list[Path]:
    return [Path(name) for name in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        rows, _, columns = part.partition("x")
        shapes.append((int(rows), int(columns)))
    return shapes


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.peer_isa:
        wanted = ISA_ENVIRONMENT[args.peer_isa]
        if any(os.environ.get(name) != value for name, value in wanted.items()):
            # The libraries read these as they load, so in a fresh process.
            arguments = sys.argv[1:] if argv is None else list(argv)
            command = [sys.executable, str(Path(__file__).resolve()), *arguments]
            os.execve(sys.executable, command, {**os.environ, **wanted})
    # They load torch, so only now.
    if args.replot:
        from bench import overview

        return overview.replot(args.replot, args.plot)
    if args.device == "cuda":
        from bench import gpu

        return gpu.run(args)
    from bench.session import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
