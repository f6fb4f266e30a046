#!/usr/bin/env python3
"""QLoRA: finetune a causal language model whose weights stay in 4 bits.

Without arguments this is the demo: SmolLM2-135M-Instruct on Python's own documentation, at most
five minutes of training on two CPU cores. ``--help`` lists the settings, README.md tells more.
"""

from __future__ import annotations

import io
import random
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

import numpy as np
import torch
from finetuning import UserError
from finetuning.checkpoint import began, checkpoints, clear, refuse_foreign
from finetuning.config import Config, parse_args
from finetuning.dataset import load_dataset
from finetuning.model import (
    answer,
    choose_device,
    held_bytes,
    load_model,
    padding_id,
    quantize,
    vocabulary_rows,
    weights_digest,
)
from finetuning.output import OutputDirectory, atomic_directory
from finetuning.report import environment, held, peak_memory, plot_losses, write_json
from finetuning.training import Trainer, disk_errors
from transformers.utils import logging as transformers_logging

import qkern.io

EXIT_SYSTEM_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report SIGINT


def program() -> int:
    """As `main`; what the system refuses, say a full disk, is one line too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # which may take fewer letters than models know
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except OSError as error:
        return _failed(error, EXIT_SYSTEM_ERROR)


def _failed(error: Exception, status: int) -> int:
    print(f"finetune.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        return run(config)
    except UserError as error:
        return _failed(error, EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(config: Config) -> int:
    output = OutputDirectory(config.output)
    with output.locked():
        check_output(config, output)
        return _run(config, output)


def _run(config: Config, output: OutputDirectory) -> int:
    device, dtype = choose_device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    checkpoint_root = config.output / "checkpoints"
    started = (began(checkpoint_root) if config.resume else None) or datetime.now()

    name, model, tokenizer = load_model(config)
    dataset = load_dataset(config, tokenizer, started)
    dataset.check_ids(tokenizer, vocabulary_rows(model))
    bytes_before = held_bytes(model)
    start = time.perf_counter()
    quantize(model, config, device, dtype)
    quantize_seconds = time.perf_counter() - start
    bytes_after = held_bytes(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cut = dataset.truncation
    print(
        f"model     {name}, {device.type}, {dtype}; quantised in {quantize_seconds:.1f} s\n"
        f"bytes     {held(bytes_before)} loaded, {held(bytes_after)} to train\n"
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
    pad_id = padding_id(tokenizer, vocabulary_rows(model))
    trainer = Trainer(
        model,
        dataset.train,
        dataset.held_out,
        config,
        pad_id,
        fingerprint,
        began=started.isoformat(),
    )
    if config.resume:
        print(f"resumed   {trainer.resume()}")
    else:
        clear(checkpoint_root, output.work)
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
    check_results(config, output)  # again: training took its time
    adapter = config.output / "adapter"
    with atomic_directory(adapter, output.work) as path, disk_errors(adapter):
        qkern.io.save_adapter(model, path, name, task_type="CAUSAL_LM")
    title = f"{name}, {config.format}, LoRA rank {config.lora_r}"
    plot_losses(config.output / "loss.png", history, title, output.work)
    write_json(
        config.output / "run.json",
        {
            "config": config.as_json(),
            "environment": environment(device),
            "model": {
                "name": name,
                "dtype": str(dtype),
                "bytes_loaded": bytes_before,
                "bytes_to_train": bytes_after,
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
        output.work,
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


def check_output(config: Config, output: OutputDirectory) -> None:
    """Refuse what is not there to resume, to lose an interrupted run, or what others wrote."""
    root = config.output / "checkpoints"
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UserError(f"{root} is not a directory: move it away, or name another --output")
    if not config.resume:
        refuse_foreign(root)
    found = checkpoints(root)
    if config.resume and not found:
        raise UserError(f"--resume: {config.output} has no checkpoint")
    finished = (config.output / "run.json").exists()
    if found and not finished and not config.resume and not config.overwrite:
        raise UserError(
            f"{config.output} holds an interrupted run ({found[-1].name}): --resume continues it, "
            "--overwrite starts again, --output names another directory"
        )
    check_results(config, output)


def check_results(config: Config, output: OutputDirectory) -> None:
    """Refuse to replace results that this program did not write."""
    files = [config.output / "loss.png", config.output / "run.json"]
    output.refuse_strangers([config.output / "adapter"], files)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _indented(text: str) -> str:
    return textwrap.indent(text.strip(), "  | ", lambda line: True)


if __name__ == "__main__":
    sys.exit(program())
