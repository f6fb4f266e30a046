#!/usr/bin/env python3
"""QLoRA by transformers, PEFT and its Trainer; with --bitsandbytes the same on bitsandbytes."""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from finetuning.report import peak_memory
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from smollm2 import smollm2_dir
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from qkern.integrations.transformers import QKernConfig

BATCH, LENGTH = 4, 256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bitsandbytes", action="store_true")
    parser.add_argument("--model", help="a local Hugging Face directory; default: SmolLM2-135M")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/transformers_qlora")
    args = parser.parse_args(argv)
    path, dtype = args.model or smollm2_dir(), getattr(torch, args.dtype)

    if args.bitsandbytes:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        quantization = QKernConfig(format="nf4", double_quant=True, compute_dtype=dtype)

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map="auto", quantization_config=quantization
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            per_device_train_batch_size=BATCH,
            max_steps=args.steps,
            learning_rate=2e-4,
            bf16=dtype == torch.bfloat16,
            logging_steps=max(1, args.steps // 5),
            report_to="none",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    seconds = trainer.train().metrics["train_runtime"]
    model.save_pretrained(args.output)

    peak = peak_memory(model.device) >> 20
    print(f"{args.steps * BATCH * LENGTH / seconds:.0f} tokens/s, peak memory {peak:,} MiB")


if __name__ == "__main__":
    main()
