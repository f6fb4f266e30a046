#!/usr/bin/env python3
"""Does training with 8-bit moments go as with bitsandbytes', and as with 32 bits?

Finetunes SmolLM2-135M (NF4, LoRA on all linear layers, as examples/finetune.py does) once with each
optimizer: the same start, the same batches, no dropout, so that the optimizers alone differ. Prints
and plots the loss of each step, smoothed, and of held-out targets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import bitsandbytes
from bench import machine, plots
from bench.report import write_json
from finetune import seed_everything
from finetuning.config import Config, parse_args
from finetuning.dataset import load_dataset
from finetuning.model import choose_device, load_model, padding_id, quantize
from finetuning.training import History, Trainer
from matplotlib.figure import Figure

import qkern

Make = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "qkern, 8 bits": qkern.optim.PagedAdamW8bit,
    "bitsandbytes, 8 bits": bitsandbytes.optim.AdamW8bit,
    "torch, 32 bits": torch.optim.AdamW,
}
COLOURS = ("tab:blue", "tab:red", "tab:gray")
SMOOTHING = 0.1
HELD_OUT = 32  # sequences


class OtherTrainer(Trainer):
    """With another optimizer."""

    def __init__(self, make: Make, *arguments: Any) -> None:
        self._make = make
        super().__init__(*arguments)

    def _make_optimizer(self) -> None:
        super()._make_optimizer()
        options = self.optimizer.param_groups[0]
        names = ("lr", "betas", "eps", "weight_decay")
        self.optimizer = self._make(self.parameters, **{name: options[name] for name in names})
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, self.scheduler.lr_lambdas
        )


def train(make: Make, config: Config) -> History:
    seed_everything(config.seed)
    device, dtype = choose_device(config)
    _, model, tokenizer = load_model(config)
    dataset = load_dataset(config, tokenizer)
    quantize(model, config, device, dtype)
    trainer = OtherTrainer(
        make, model, dataset.train, dataset.held_out[:HELD_OUT], config, padding_id(tokenizer), {}
    )
    trainer.evaluate()
    for step in range(1, config.max_steps + 1):
        trainer.train_step()
        if step % config.eval_steps == 0 or step == config.max_steps:
            trainer.evaluate()
    return trainer.history


def smoothed(values: Sequence[float]) -> list[float]:
    found = [values[0]]
    for value in values[1:]:
        found.append(found[-1] + SMOOTHING * (value - found[-1]))
    return found


def plot(directory: Path, found: dict[str, History]) -> list[Path]:
    figure = Figure(figsize=(9, 4), layout="constrained")
    of_steps, of_held_out = figure.subplots(1, 2)
    for (name, history), colour in zip(found.items(), COLOURS, strict=True):
        style = {"label": name, "color": colour, "linestyle": "-" if "8" in name else "--"}
        losses = [record.loss for record in history.steps]
        of_steps.plot(range(1, len(losses) + 1), smoothed(losses), **style)
        held_out = history.held_out
        of_held_out.plot([r.step for r in held_out], [r.loss for r in held_out], **style)
    of_steps.set(xlabel="step", ylabel="training loss, smoothed")
    of_held_out.set(xlabel="step", ylabel="held-out loss")
    of_steps.legend()
    return plots.save(figure, directory, "convergence")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other settings are those of examples/finetune.py: --model, --lora-r, --seed, ...",
    )
    parser.add_argument("--steps", type=int, default=60, help="of each optimizer")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="constant")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="draw them there")
    arguments, others = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as output:
        options = {
            "--max-steps": arguments.steps,
            "--eval-steps": max(1, arguments.steps // 5),
            "--learning-rate": arguments.learning_rate,
            "--lora-dropout": 0,
            "--output": output,
        }
        config = parse_args([*(str(part) for pair in options.items() for part in pair), *others])
        found = {}
        for name, make in OPTIMIZERS.items():
            found[name] = train(make, config)
            held_out = ", ".join(f"{record.loss:.4f}" for record in found[name].held_out)
            print(f"{name:22} held out {held_out}", flush=True)
    ours, theirs, *_ = ([record.loss for record in h.steps] for h in found.values())
    apart = max(abs(a - b) for a, b in zip(smoothed(ours), smoothed(theirs), strict=True))
    print(f"8 bits: the smoothed losses of both differ by at most {apart:.4f}")
    if arguments.json:
        settings = {name.strip("-"): value for name, value in options.items() if name != "--output"}
        write_json(
            arguments.json,
            {
                "settings": settings | {"others": others},
                "machine": machine.describe(torch.get_num_threads()),
                "histories": {name: asdict(history) for name, history in found.items()},
            },
        )
    if arguments.plot:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        plot(arguments.plot, found)


if __name__ == "__main__":
    main()
