"""Peak memory of loading a model in 4 bits, whole processes side by side.

``python -m bench.loading`` in ``benchmarks/`` makes a random model of half a billion parameters,
saved in shards, loads it in a fresh process each way, and prints a table; ``--json FILE`` writes
the record too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WAYS = ("imports", "dense", "qkern", "qkern-again", "bitsandbytes", "bitsandbytes-again")
"""The last of each library loads what it saved in 4 bits."""

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
SHARD = "200MB"
_SLACK = 1.1
"""Of the bound that loading by qkern is to keep: the 4-bit model, one dense tensor, and a tenth."""


def save_random(folder: Path, sizes: dict[str, Any] = SIZES) -> tuple[int, int]:
    """A bfloat16 Llama of random weights in ``folder``: its parameters, bytes of its largest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return model.num_parameters(), max(p.nbytes for p in model.parameters())


def peak_rss() -> int:
    """The most bytes that this process has had in memory, by Linux.

    Not ``ru_maxrss``, which starts at what the process that started this one had.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    if found is None:
        raise OSError("/proc/self/status: has no VmHWM")
    return int(found[1]) * 1024


def load(way: str, folder: Path) -> dict[str, int]:
    """Bytes of this process before and at the peak of loading in one of ``WAYS``, and the model's.

    Both libraries are loaded in any case, so that their own size is in every figure.
    """
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qkern.integrations.transformers import QKernConfig

    library, _, again = way.partition("-")
    before = peak_rss()
    if way == "imports":
        return {"before": before, "peak": before, "model": 0}
    config = {
        "dense": None,
        "qkern": QKernConfig(),
        "bitsandbytes": None
        if again
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }[library]
    source = folder / library if again else folder / "dense-model"
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    peak = peak_rss()
    if library != "dense" and not again:
        model.save_pretrained(folder / library, max_shard_size=SHARD)
    return {"before": before, "peak": peak, "model": model.get_memory_footprint()}


def in_subprocess(way: str, folder: Path) -> dict[str, int]:
    """`load` in a fresh process."""
    command = [sys.executable, "-m", "bench.loading", "--load", way, "--folder", str(folder)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(sizes: dict[str, Any] = SIZES, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Every way's bytes, in this order, and what they are to be compared with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters, largest = save_random(folder / "dense-model", sizes)
        found = {way: in_subprocess(way, folder) for way in ways}
    return {"parameters": parameters, "largest_tensor": largest, "ways": found}


def bound(record: dict[str, Any], way: str) -> int:
    """Bytes that loading may add to the process: the model, one dense tensor, and a tenth."""
    return int((record["ways"][way]["model"] + record["largest_tensor"]) * _SLACK)


def table(record: dict[str, Any]) -> str:
    """Markdown, in MB."""
    lines = ["| loaded by | model | peak above the imports | bound |", "|---|---|---|---|"]
    for way, found in record["ways"].items():
        if way != "imports":
            figures = found["model"], found["peak"] - found["before"], bound(record, way)
            lines.append(f"| {way} | " + " | ".join(f"{n / 1e6:.0f}" for n in figures) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.loading", description=__doc__)
    parser.add_argument("--json", type=Path, help="a file for the record")
    parser.add_argument("--load", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        print(json.dumps(load(args.load, args.folder)))
        return
    record = measure()
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
