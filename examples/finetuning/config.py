"""The settings of a run and its command line.

The defaults are those of the Guanaco models (QLoRA, arXiv 2305.14314 and its scripts), except where
they would not fit the demo, a 135M model in five minutes on two CPU cores: those departures are
marked "Guanaco: ..." in ``--help``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import DATA_FORMATS

BUNDLED_MODEL = "smollm2"


@dataclass(frozen=True)
class Config:
    model: str
    data: Path | None
    data_format: str
    eval_data: Path | None
    held_out_fraction: float
    max_held_out: int
    source_max_len: int
    target_max_len: int
    train_on_source: bool
    format: str
    block_size: int
    double_quant: bool
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: list[str]
    learning_rate: float
    warmup_ratio: float
    adam_beta2: float
    max_grad_norm: float
    optim_bits: int
    pager: str
    budget: int | None
    batch_size: int
    accumulation: int
    max_steps: int
    max_minutes: float
    group_by_length: bool
    gradient_checkpointing: bool
    seed: int
    device: str
    dtype: str
    threads: int | None
    output: Path
    save_steps: int
    keep_checkpoints: int
    resume: bool
    overwrite: bool
    eval_steps: int
    sample_prompt: str | None
    sample_tokens: int

    # What a resumed run may change, for it does not touch the numbers of a step. Model and data are
    # compared by content instead of by path, the dtype as it was resolved.
    _FREE_ON_RESUME = (
        *("model", "data", "data_format", "eval_data", "dtype", "device", "threads"),
        *("max_steps", "max_minutes", "output", "resume", "overwrite"),
        *("save_steps", "keep_checkpoints", "eval_steps", "pager", "budget"),
    )

    def fixed_settings(self) -> dict[str, Any]:
        """The settings a resumed run must share with the run it continues."""
        return {k: v for k, v in self.as_json().items() if k not in self._FREE_ON_RESUME}

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def parse_args(argv: Sequence[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="QLoRA-finetune a causal language model: 4-bit frozen weights, LoRA on top. "
        "Without arguments: SmolLM2-135M-Instruct on Python's own documentation, "
        "at most 5 minutes of training.",
        epilog="The defaults follow the Guanaco recipe of QLoRA (arXiv 2305.14314); where the "
        "five-minute demo departs from it, the help names Guanaco's value.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        help=f'a local Hugging Face directory, or "{BUNDLED_MODEL}" for the bundled SmolLM2-135M',
    )
    group.add_argument("--format", choices=("nf4", "fp4"), default="nf4", help="4-bit format")
    group.add_argument("--block-size", type=int, default=64, help="weights that share a scale")
    group.add_argument(
        "--double-quant", action=switch, default=True, help="keep the scales in 8 bits"
    )
    group.add_argument("--device", default="auto", help='"cuda", "cpu", ...; auto: a GPU if any')
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of activations and unquantised weights; auto: bfloat16 where the GPU or the CPU "
        "computes in it, else float32 (Guanaco: bfloat16)",
    )
    group.add_argument("--threads", type=_positive_int, help="CPU threads (default: torch's)")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        help="JSON Lines (alpaca, self-instruct, hh-rlhf, oasst1, chip2 or chat messages) or plain "
        "text (default: Python's pydoc_data.topics)",
    )
    group.add_argument("--data-format", choices=DATA_FORMATS, default="auto", help="of --data")
    group.add_argument(
        "--eval-data", type=Path, help="held-out data in the same form (default: split from --data)"
    )
    group.add_argument(
        "--held-out-fraction",
        type=_fraction,
        default=0.05,
        help="of --data, held out where there is no --eval-data",
    )
    group.add_argument(
        "--max-held-out",
        type=_positive_int,
        default=64,
        help="held-out sequences that are evaluated at most",
    )
    group.add_argument(
        "--source-max-len",
        type=_positive_int,
        default=256,
        help="tokens before the first answer; more are cut at the beginning",
    )
    group.add_argument(
        "--target-max-len",
        type=_positive_int,
        default=256,
        help="tokens from the first answer on; more are cut at the end "
        "(Guanaco: source and target 512 together)",
    )
    group.add_argument(
        "--train-on-source", action=switch, default=False, help="let the loss cover the prompt too"
    )
    group.add_argument(
        "--group-by-length", action=switch, default=True, help="batch sequences of like length"
    )

    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora-r", type=_positive_int, default=64, help="rank")
    group.add_argument("--lora-alpha", type=_positive_float, default=16.0, help="scaling times r")
    group.add_argument("--lora-dropout", type=_fraction, default=0.1, help="on the adapter's input")
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="module names, or all-linear (the head excepted)",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=_positive_float, default=2e-4, help="constant")
    group.add_argument(
        "--warmup-ratio", type=_fraction, default=0.03, help="of the steps, linearly"
    )
    group.add_argument("--adam-beta2", type=_fraction, default=0.999, help="AdamW's second beta")
    group.add_argument(
        "--max-grad-norm", type=_positive_float, default=0.3, help="gradients are clipped to it"
    )
    group.add_argument(
        "--optim-bits", type=int, choices=(32, 8), default=32, help="of AdamW's moments"
    )
    group.add_argument(
        "--pager",
        choices=("auto", "none", "unified", "mmap"),
        default="auto",
        help="where AdamW's moments are: with the parameters, in host memory for those on a GPU, in"
        " a file in --output; auto: unified on a GPU, else none",
    )
    group.add_argument(
        "--budget",
        type=_positive_int,
        help="MiB of those moments in GPU memory (unified) or in memory (mmap) at a time",
    )
    group.add_argument("--batch-size", type=_positive_int, default=1, help="sequences at a time")
    group.add_argument(
        "--accumulation", type=_positive_int, default=1, help="batches a step (Guanaco: 16)"
    )
    group.add_argument(
        "--max-steps", type=_positive_int, default=150, help="optimizer steps (Guanaco: 1875)"
    )
    group.add_argument(
        "--max-minutes",
        type=_positive_float,
        default=5.0,
        help="of training, interruptions not counted (Guanaco: no limit)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=switch,
        default=True,
        help="recompute activations in the backward pass instead of keeping them",
    )
    group.add_argument("--seed", type=_seed, default=0, help="of all random numbers")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/finetune"),
        help="directory for adapter, loss curve, run.json and checkpoints",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue the interrupted run in --output"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away an interrupted run in --output (nothing that others wrote)",
    )
    group.add_argument(
        "--eval-steps",
        type=_positive_int,
        default=50,
        help="a held-out loss every so many steps, for the curve",
    )
    group.add_argument(
        "--save-steps",
        type=_positive_int,
        default=20,
        help="a checkpoint every so many steps: what kill -9 can lose",
    )
    group.add_argument(
        "--keep-checkpoints", type=_positive_int, default=2, help="the newest that are kept"
    )
    group.add_argument(
        "--sample-prompt", help="for the answers before and after (default: a held-out prompt)"
    )
    group.add_argument(
        "--sample-tokens", type=_positive_int, default=96, help="of these answers at most"
    )

    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return Config(**vars(arguments))


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; takes a whole number from 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; takes a number above 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; takes a number from 0 to below 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:  # numpy's range
        raise argparse.ArgumentTypeError(f"got {text}; takes a whole number from 0 to 2**32 - 1")
    return value
