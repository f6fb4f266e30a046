#!/usr/bin/env python3
"""QLoRA: finetune a causal language model whose weights stay in 4 bits.

Without arguments this is the demo: SmolLM2-135M-Instruct on Python's own documentation, at most
five minutes of training on two CPU cores. ``--help`` lists the settings, README.md tells more.
"""

from __future__ import annotations

import random
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from finetuning import UserError
from finetuning.checkpoint import atomic_directory, checkpoints
from finetuning.config import Config, parse_args
from finetuning.dataset import load_dataset
from finetuning.model import (
    answer,
    choose_device,
    load_model,
    padding_id,
    quantize,
    size_in_bytes,
    weights_digest,
)
from finetuning.report import environment, peak_memory, plot_losses, write_json
from finetuning.training import Trainer
from transformers.utils import logging as transformers_logging

import qkern.io

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        return run(config)
    except UserError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(config: Config) -> int:
    check_output(config)
    device, dtype = choose_device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)

    name, model, tokenizer = load_model(config)
    dataset = load_dataset(config, tokenizer)
    bytes_before = size_in_bytes(model)
    start = time.perf_counter()
    quantize(model, config, device, dtype)
    quantize_seconds = time.perf_counter() - start
    bytes_after = size_in_bytes(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cut = dataset.truncation
    print(
        f"model     {name}, {device.type}, {dtype}; quantised in {quantize_seconds:.1f} s\n"
        f"bytes     {bytes_before:,} in bfloat16, {bytes_after:,} in 4 bits\n"
        f"LoRA      rank {config.lora_r}, {trainable:,} trainable parameters\n"
        f"data      {len(dataset.train)} sequences, {len(dataset.held_out)} more held out; cut "
        f"short: {cut.sources} sources by {cut.source_tokens} tokens, {cut.targets} targets by "
        f"{cut.target_tokens}"
    )

    fingerprint = {
        **config.fixed_settings(),
        "dtype": str(dtype),
        "model": weights_digest(model),
        "data": dataset.digest(),
    }
    trainer = Trainer(
        model, dataset.train, dataset.held_out, config, padding_id(tokenizer), fingerprint
    )
    if config.resume:
        print(f"resumed   {trainer.resume()}")
    else:
        shutil.rmtree(trainer.checkpoint_root, ignore_errors=True)
        trainer.evaluate()
        trainer.history.sample_prompt = tokenizer.decode(dataset.prompt[0])
        trainer.history.sample_before = answer(
            model, tokenizer, dataset.prompt, config.sample_tokens
        )
    history = trainer.history
    print(f"held out  loss {history.held_out[0].loss:.4f} before training", flush=True)
    # Without it the run counts as unfinished.
    (config.output / "run.json").unlink(missing_ok=True)

    if not trainer.run():
        print(f"stopped after step {history.step}; --resume continues the run")
        return EXIT_INTERRUPTED

    if history.held_out[-1].step != history.step:
        trainer.evaluate()
    loss_before, loss_after = history.held_out[0].loss, history.held_out[-1].loss
    sample_after = answer(model, tokenizer, dataset.prompt, config.sample_tokens)
    training_seconds = sum(record.seconds for record in history.steps)
    tokens_per_second = sum(record.tokens for record in history.steps) / training_seconds
    with atomic_directory(config.output / "adapter") as path:
        qkern.io.save_adapter(model, path, name, task_type="CAUSAL_LM")
    plot_losses(
        config.output / "loss.png", history, f"{name}, {config.format}, LoRA rank {config.lora_r}"
    )
    write_json(
        config.output / "run.json",
        {
            "config": config.as_json(),
            "environment": environment(device),
            "model": {
                "name": name,
                "dtype": str(dtype),
                "bytes_bfloat16": bytes_before,
                "bytes_4bit": bytes_after,
                "trainable_parameters": trainable,
            },
            "data": {
                "train": len(dataset.train),
                "held_out": len(dataset.held_out),
                "truncation": asdict(cut),
            },
            "quantize_seconds": quantize_seconds,
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory(device),
            "held_out_loss": {"before": loss_before, "after": loss_after},
            "sample_after": sample_after,
            "history": asdict(history),
        },
    )
    print(
        f"prompt\n{_indented(history.sample_prompt)}\n"
        f"answer before\n{_indented(history.sample_before)}\n"
        f"answer after\n{_indented(sample_after)}\n"
        f"held out  loss {loss_before:.4f} before, {loss_after:.4f} after {history.step} steps\n"
        f"training  {history.seconds:.0f} s, {tokens_per_second:.0f} tokens/s, peak memory "
        f"{peak_memory(device) / 2**20:,.0f} MiB\n"
        f"written   adapter, loss.png and run.json in {config.output}"
    )
    return 0


def check_output(config: Config) -> None:
    """Refuse to throw away an interrupted run, or to resume one that is not there."""
    found = checkpoints(config.output / "checkpoints")
    if config.resume and not found:
        raise UserError(f"--resume: {config.output} has no checkpoint")
    finished = (config.output / "run.json").exists()
    if found and not finished and not config.resume and not config.overwrite:
        raise UserError(
            f"{config.output} holds an interrupted run ({found[-1].name}): --resume continues it, "
            "--overwrite starts again, --output names another directory"
        )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {config.output}: {error.strerror}") from None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _indented(text: str) -> str:
    return textwrap.indent(text.strip(), "  | ", lambda line: True)


if __name__ == "__main__":
    sys.exit(main())
