#!/usr/bin/env python3
"""Training adapters of a mixture of experts: qkern in 4 bits beside what others do.

    python examples/upcycle.py runs/mixture
    python benchmarks/experts_training.py runs/mixture

All start from one dense model, whose linear layers and experts hold values of NF4, and from one
file of adapters, on all linear layers and on all experts (PEFT's ``target_parameters``) or on
attention alone. `qkern` has both in 4 bits; `bitsandbytes` has linear layers in 4 bits and leaves
experts dense, which transformers multiplies by its `grouped_mm`; `grouped_mm` and `eager` are
transformers' ways with everything dense. Adapters of the last three are PEFT's.

Three parts: time of a training step, in turn; its peak memory, in processes of their own; and
held-out loss while one trains on Python's documentation, as examples/finetune.py does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import machine, models, peak, peers
from bench.timing import Candidate, Problem, Settings, run_contest
from torch import nn

import qkern
from qkern import nn as qnn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from finetuning.config import parse_args
from finetuning.dataset import Dataset, load_dataset
from finetuning.sequences import Batch, collate

CANDIDATES = ("qkern", "bitsandbytes", "grouped_mm", "eager")
TARGETS = {"experts too": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RANK = 16
HELD_OUT, BATCH = 32, 4  # sequences
LOSS_TOLERANCE = 0.01
_LEARNING_RATE = 2e-4


def load(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **options)


def prepare(path: Path, to: Path) -> None:
    """The dense model with the values of 4-bit weights, and the files of adapters, below ``to``."""
    from transformers import AutoTokenizer

    for name, targets in TARGETS.items():
        model = load(path, torch.float32)
        config = qnn.LoRAConfig(r=RANK, alpha=RANK, targets=targets)
        qnn.quantize_model(model, lora=config)
        models.draw_adapters(model)
        qkern.io.save_adapter(model, to / name)
    dense = qnn.dequantize_model(qnn.quantize_model(load(path, torch.float32)))
    dense.save_pretrained(to / "model")
    AutoTokenizer.from_pretrained(path).save_pretrained(to / "model")


def build(name: str, below: Path, targets: str, dtype: torch.dtype) -> nn.Module:
    """The model as users of ``name`` build it, with the adapters."""
    path, adapter = below / "model", below / targets
    if name == "qkern":
        from qkern.integrations.transformers import QKernConfig

        model = load(path, dtype, quantization_config=QKernConfig())
        qkern.io.load_adapter(model, adapter)
        return qnn.prepare_for_training(model, gradient_checkpointing=False)
    options: dict[str, Any] = {
        "experts_implementation": "eager" if name == "eager" else "grouped_mm"
    }
    if name == "bitsandbytes":
        peers.bitsandbytes(False)
        from transformers import BitsAndBytesConfig

        options["device_map"] = "cpu"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from peft import PeftModel

    return PeftModel.from_pretrained(load(path, dtype, **options), adapter, is_trainable=True)


def step_of(
    name: str, below: Path, targets: str, dtype: torch.dtype, sizes: models.Workload
) -> Any:
    return models.TrainingStep(build(name, below, targets, dtype), sizes)


def time_steps(
    below: Path, targets: str, dtype: torch.dtype, sizes: models.Workload, seconds: float
) -> dict[str, float]:
    """Median seconds of a step by candidate. All must have the loss of the dense model."""
    steps = {name: step_of(name, below, targets, dtype, sizes) for name in CANDIDATES}
    with torch.no_grad():
        losses = {name: step.loss().item() for name, step in steps.items()}
    expected = losses["eager"]
    candidates = []
    for name, step in steps.items():

        def check(_: object, name: str = name) -> None:
            found = losses[name]
            assert abs(found / expected - 1) < LOSS_TOLERANCE, f"loss {found}, not {expected}"

        candidates.append(Candidate(name, lambda step=step: step, check))
    problem = Problem("train_step", dtype, (sizes.batch, sizes.sequence))
    settings = Settings(repeat=1000, max_seconds=seconds, cold=False)
    samples = run_contest(problem, candidates, settings)
    return {sample.name: sample.percentile(50) for sample in samples}


def peak_of(
    name: str, below: Path, targets: str, dtype: torch.dtype, sizes: models.Workload
) -> dict[str, int]:
    """Bytes of this process: ``model`` before a step, ``peak`` during it. For a fresh one."""
    import bitsandbytes  # noqa: F401 (all have the same libraries in memory)
    import peft  # noqa: F401

    step = step_of(name, below, targets, dtype, sizes)
    first = models.TrainingStep(step.model, replace(sizes, batch=1, sequence=8))
    first.optimizer = step.optimizer
    first()  # makes the optimizer's state
    return peak.during(step)


class Training:
    """Adapters trained on batches in an order of their own, and held-out loss."""

    def __init__(self, name: str, below: Path, targets: str, dtype: torch.dtype) -> None:
        self.model: Any = build(name, below, targets, dtype).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)

    def loss(self, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            use_cache=False,
        ).loss
        return found

    def step(self, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def held_out(self, batches: list[Batch]) -> float:
        targets = [batch.targets for batch in batches]
        losses = [self.loss(batch).item() for batch in batches]
        return sum(n * loss for n, loss in zip(targets, losses, strict=True)) / sum(targets)


def batches_of(examples: Any, pad: int) -> Iterator[Batch]:
    for start in range(0, len(examples) - BATCH + 1, BATCH):
        yield collate(examples[start : start + BATCH], pad, train_on_source=False)


def dataset_of(path: Path) -> tuple[Dataset, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return load_dataset(parse_args(["--model", str(path)]), tokenizer), tokenizer.pad_token_id


def train(
    name: str, below: Path, targets: str, dtype: torch.dtype, steps: int
) -> list[dict[str, float]]:
    """Held-out loss before training and after every quarter of the steps."""
    data, pad = dataset_of(below / "model")
    held_out = list(batches_of(sorted(data.held_out[:HELD_OUT], key=len), pad))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    run = Training(name, below, targets, dtype)
    found = [{"step": 0, "held_out": run.held_out(held_out)}]
    batches = batches_of([data.train[i] for i in order[: steps * BATCH]], pad)
    for number, batch in enumerate(batches, start=1):
        run.step(batch)
        if number % max(1, steps // 4) == 0:
            found.append({"step": number, "held_out": run.held_out(held_out)})
            print(f"{name}: {found[-1]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory of a mixture")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each comparison of steps")
    parser.add_argument("--steps", type=int, default=40, help="of training; 0 leaves it out")
    parser.add_argument("--train", nargs="+", default=["qkern", "grouped_mm"], choices=CANDIDATES)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "TARGETS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    sizes = models.Workload(str(args.model), args.batch, args.sequence)
    if args.memory_of:
        name, targets = args.memory_of
        print(json.dumps(peak_of(name, args.model, targets, dtype, sizes)))
        return
    tokens = args.batch * args.sequence
    about = {"machine": machine.describe(torch.get_num_threads()), "dtype": args.dtype}
    found: dict[str, Any] = {**about, "batch": args.batch, "sequence": args.sequence}
    with tempfile.TemporaryDirectory() as folder:
        below = Path(folder)
        prepare(args.model, below)
        for targets in TARGETS:
            times = time_steps(below, targets, dtype, sizes, args.seconds)
            memory = {}
            for name in CANDIDATES:
                command = [sys.executable, __file__, str(below), "--memory-of", name, targets]
                command += ["--dtype", args.dtype, "--batch", str(args.batch)]
                command += ["--sequence", str(args.sequence)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                memory[name] = json.loads(done.stdout.splitlines()[-1])
            of_each = {
                name: {"tokens_per_second": tokens / times[name], **memory[name]} for name in times
            }
            found[targets] = of_each
            for name, figures in of_each.items():
                mib = ", ".join(f"{key} {figures[key] >> 20} MiB" for key in ("model", "peak"))
                print(f"{targets}, {name}: {figures['tokens_per_second']:.0f} tokens/s, {mib}")
        if args.steps:
            found["held_out"] = {
                name: train(name, below, "experts too", dtype, args.steps) for name in args.train
            }
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
