"""The model of a run: loaded from the disk, quantised, asked for an answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from smollm2 import MODEL_NAME, smollm2_dir
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import qkern.env
import qkern.nn

from . import UserError
from .config import BUNDLED_MODEL, Config

_IN_4_BITS = (qkern.nn.Linear4bit, qkern.nn.Embedding4bit, qkern.nn.Experts4bit)


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute. Raises `UserError` for a device that is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UserError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise UserError(f"--device {config.device}: it holds no values; takes one that computes")
    if config.dtype != "auto":
        return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    # Where bfloat16 is emulated, on most CPUs and on GPUs before Ampere, float32 is faster.
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = qkern.env.report()["native"].get("instruction_set") == "amx"
    return device, torch.bfloat16 if native else torch.float32


def load_model(config: Config) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """(name, model on the CPU in the dtype of its files, tokenizer), read from the disk only."""
    if config.model == BUNDLED_MODEL:
        try:
            name, path = MODEL_NAME, smollm2_dir()
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
    else:
        name, path = config.model, Path(config.model)
        takes = f'takes a local Hugging Face directory or "{BUNDLED_MODEL}"'
        if not path.is_dir():
            raise UserError(f"--model {path}: no such directory; {takes}")
        if not (path / "config.json").is_file():
            raise UserError(f"--model {path}: has no config.json; {takes}")
        _refuse_quantized(path)
    try:
        # Code that lies in the directory is not run, nor is anybody asked whether it may be.
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (tokenizers raises it as such)
        raise UserError(
            f"--model {path}: cannot be read: {type(error).__name__}: {error}"
        ) from None
    return name, model.eval(), tokenizer


def _refuse_quantized(path: Path) -> None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: config.json: {error}") from None
    if isinstance(config, dict) and (found := config.get("quantization_config")):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise UserError(
            f"--model {path}: its weights are quantised already ({method}); takes the model they "
            "were made from, in 16 or 32 bits"
        )


def quantize(
    model: PreTrainedModel, config: Config, device: torch.device, dtype: torch.dtype
) -> None:
    """Put the linear layers but the head in 4 bits, the rest in `dtype`; add adapters; in place.

    The weights are quantised as the files hold them, before any cast to `dtype`, and before the
    model moves to the device, which then never holds it whole.
    """
    whole = config.lora_targets == ["all-linear"]
    try:
        qkern.nn.quantize_model(
            model,
            format=config.format,
            block_size=config.block_size,
            double_quant=config.double_quant,
        )
        model.to(device, dtype)
        lora = qkern.nn.LoRAConfig(
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets="all-linear" if whole else config.lora_targets,
        )
        qkern.nn.add_lora(model, lora)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of memory that the model's tensors hold, by kind; what two of them share counts once.

    The kinds are "4 bits" (codes, scales and what describes them), "LoRA" and, of everything else,
    the dtype.
    """
    seen: set[tuple[torch.device, int]] = set()
    held: dict[str, int] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            storage = tensor.untyped_storage()
            if (place := (tensor.device, storage.data_ptr())) in seen:
                continue
            seen.add(place)
            if isinstance(module, _IN_4_BITS) and name != "bias":
                kind = "4 bits"
            elif isinstance(module, qkern.nn.LoRALinear | qkern.nn.LoRAExperts):
                kind = "LoRA"
            else:
                kind = str(tensor.dtype).removeprefix("torch.")
            held[kind] = held.get(kind, 0) + storage.nbytes()
    return {kind: held[kind] for kind in sorted(held, key=lambda kind: (kind == "LoRA", kind))}


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many token ids the model's embedding has."""
    return int(model.get_input_embeddings().weight.shape[0])


def weights_digest(model: nn.Module) -> str:
    """A hash of the frozen tensors' names, shapes and first values.

    The beginning of every tensor tells two models apart, and costs nothing on a large one.
    """
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            head = tensor.detach().reshape(-1)[:256].cpu().contiguous()
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(head.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    max_tokens: int,
) -> str:
    """The model's greedy answer to token ids [1, length]."""
    prompt = prompt.to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=padding_id(tokenizer, vocabulary_rows(model)),
    )
    model.train(was_training)
    text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """A token to pad with, of the `rows` that the model's table has.

    Any will do where the tokenizer has none in it, for padding is masked.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or token < rows):
            return int(token)
    return 0
