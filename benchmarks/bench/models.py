"""Contests of a whole model: a LoRA training step, generation, and a step's peak memory.

The model is the same for all: its linear layers (the head excepted) hold NF4 weights with double
quantisation in qkern and in bitsandbytes, and those weights' dequantised values in the dense peer,
so losses, gradients and logits must agree before anything is timed.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qkern
from qkern import nn as qnn

from . import llama_model, peak, peers
from .matmul import relative_error
from .timing import Candidate, Problem, SkippedError

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLED_MODEL = "smollm2"
LORA_RANK = 16
COMPILED = "generate_compiled"
OPS = ("train_step", "generate", COMPILED, "memory")
PEERS = ("bitsandbytes", "dense")
FOUR_BIT_HEAD = "qkern, 4-bit head"
"""qkern with the output embedding in 4 bits too."""
INT8 = "qkern, 4-bit head, int8"
"""The same in a block of ``qkern.precision("int8")``: activations in 8 bits, as llama.cpp's are."""
CHUNKED_LOSS = "qkern, chunked loss"
"""qkern whose training step takes the loss by `qkern.linear_cross_entropy`, as examples/ do."""

_PROMPT_TOKENS = 32
_LEARNING_RATE = 2e-4
_MAX_LOSS_ERROR = 0.02
_ROUNDING_MARGIN = {"dense": 2.0, "bitsandbytes": 4.0}
_ROUNDING_MARGIN |= dict.fromkeys(("qkern", FOUR_BIT_HEAD, INT8, CHUNKED_LOSS), 2.0)
"""How often the dense model's own error in a dtype, against float32, a candidate's may be."""
_FLOOR = {"dense": 1e-3, "bitsandbytes": 0.02}
_FLOOR |= dict.fromkeys(("qkern", FOUR_BIT_HEAD, CHUNKED_LOSS), 1e-3) | {INT8: 0.1}
"""What is allowed besides, which in float32 is all. bitsandbytes' scales differ a little."""
_LLAMA_CPP_ERROR = 0.1  # of logits on its own weights: it rounds activations to 8 bits
_EVAL_FLOOR = 0.15  # bitsandbytes' layout for inference computes in bfloat16 with such scales


@dataclass(frozen=True)
class Workload:
    """The model's path, the sizes of a step and of a generation, and `peers.Choice.limit`."""

    model: str = BUNDLED_MODEL
    batch: int = 4
    sequence: int = 256
    new_tokens: int = 32
    limit: str | None = None

    @property
    def hide_bf16(self) -> bool:
        return self.limit not in (None, "avx512bf16")


@cache
def model_path(model: str) -> Path:
    """The Hugging Face directory of `model`, which is one, or ``smollm2``."""
    if model != BUNDLED_MODEL:
        return Path(model)
    sys.path.insert(0, str(EXAMPLES))
    try:
        from smollm2 import smollm2_dir
    finally:
        sys.path.remove(str(EXAMPLES))
    return smollm2_dir()


def _load(workload: Workload, dtype: torch.dtype, **keywords: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = model_path(workload.model)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, **keywords
    ).eval()


def build(name: str, workload: Workload, dtype: torch.dtype, lora: bool) -> nn.Module:
    """The model as `name`'s users build it: ``qkern``, ``bitsandbytes`` or ``dense``."""
    if name in ("qkern", CHUNKED_LOSS):
        config = qnn.LoRAConfig(r=LORA_RANK, alpha=LORA_RANK) if lora else None
        model = qnn.quantize_model(_load(workload, dtype), lora=config)
        if lora:
            qnn.prepare_for_training(model, gradient_checkpointing=False)
        return model
    if name in (FOUR_BIT_HEAD, INT8):
        return qnn.quantize_head(qnn.quantize_model(_load(workload, dtype)))
    if name == "bitsandbytes":
        peers.bitsandbytes(workload.hide_bf16)
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = _load(workload, dtype, quantization_config=quantization, device_map="cpu")
    else:
        model = _with_dequantized_weights(_load(workload, dtype))
    return _with_peft(model) if lora else model


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]


@torch.no_grad()
def _with_dequantized_weights(model: nn.Module) -> nn.Module:
    for linear in _linears(model):
        _round(linear.weight)
    return model


def _round(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> None:
    qw = qkern.quantize_4bit(weight.detach(), "nf4", block_size, double_quant)
    weight.copy_(qw.dequantize(weight.dtype))


def _with_peft(model: nn.Module) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SkippedError(f"PEFT cannot be imported: {error}") from None
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        return get_peft_model(model, config)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B by one name for qkern and PEFT, ``<layer>.a`` and ``<layer>.b``."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
            found[re.sub(r"lora_([ABab])$", lambda m: m[1].lower(), plain)] = parameter
    return found


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """Draw A and B by name and shape: equal in all models, and B not zero, so that A learns."""
    for name, parameter in sorted(adapters(model).items()):
        generator = torch.Generator().manual_seed(0)
        scale = 0.1 if name.endswith(".b") else 1.0
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn * scale / parameter.shape[-1] ** 0.5)


class TrainingStep:
    """Forward, backward, AdamW on the adapters; returns the loss."""

    def __init__(self, model: nn.Module, workload: Workload, chunked: bool = False) -> None:
        self.model: Any = model.train()
        self.chunked = chunked
        self.ids = tokens(model, workload.batch, workload.sequence)
        self.parameters = adapters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=_LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def loss(self) -> Tensor:
        if not self.chunked:
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            return loss
        hidden = self.model.get_decoder()(input_ids=self.ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings().weight
        return qkern.linear_cross_entropy(hidden[:, :-1], head, self.ids[:, 1:])

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss and the adapters' gradients, which stay in place."""
        loss = self.loss()
        loss.backward()
        found = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.float().clone()
        return loss.item(), found

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


@cache
def _dense_gradients(workload: Workload, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and gradients of the dense model on the dequantised weights; exact in float32."""
    model = qnn.add_lora(
        _with_dequantized_weights(_load(workload, dtype)),
        qnn.LoRAConfig(r=LORA_RANK, alpha=LORA_RANK),
    )
    draw_adapters(model)
    loss, gradients = TrainingStep(model, workload).gradients()
    return loss, _flat(gradients)


@cache
def _dense_logits(workload: Workload, dtype: torch.dtype, head_too: bool) -> Tensor:
    """Of the dense model on the dequantised weights, those of the head too where that is asked."""
    model: Any = build("dense", workload, dtype, lora=False)
    with torch.inference_mode():
        if head_too:
            _round(model.get_output_embeddings().weight, 32, False)
    return _logits(model, tokens(model, 1, _PROMPT_TOKENS))


def _assert_as_exact(name: str, what: str, value: Tensor, dense: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless `value`'s error is like that of `dense`, of the same dtype.

    In bfloat16 the rounding of every layer adds up to several percent, however exact a kernel is.
    """
    floor = _EVAL_FLOOR if (name, what) == ("bitsandbytes", "logits") else _FLOOR[name]
    allowed = _ROUNDING_MARGIN[name] * relative_error(dense, exact) + floor
    error = relative_error(value, exact)
    assert error <= allowed, f"relative error {error:.3g} of the {what}, above {allowed:.3g}"


def training_contest(
    workload: Workload, dtype: torch.dtype, chosen: tuple[str, ...]
) -> tuple[Problem, list[Candidate], list[str]]:
    """One step of ``batch x sequence`` tokens. Work is tokens."""

    def candidate(name: str) -> Candidate:
        model = build(name, workload, dtype, lora=True)
        draw_adapters(model)
        step = TrainingStep(model, workload, name == CHUNKED_LOSS)
        loss, by_name = step.gradients()
        gradients = _flat(by_name)
        step.optimizer.zero_grad(set_to_none=True)

        def check(_: float) -> None:
            exact_loss, exact = _dense_gradients(workload, torch.float32)
            _, dense = _dense_gradients(workload, dtype)
            assert abs(loss / exact_loss - 1) <= _MAX_LOSS_ERROR, (
                f"loss {loss:.4f}, exactly {exact_loss:.4f}"
            )
            _assert_as_exact(name, "gradients", gradients, dense, exact)

        return Candidate(name, lambda: step, check)

    problem = Problem(
        "train_step",
        dtype,
        (workload.batch, workload.sequence),
        work=workload.batch * workload.sequence,
        unit="tokens/s",
    )
    return problem, *_available(candidate, steps(chosen))


def generation_contest(
    workload: Workload, dtype: torch.dtype, chosen: tuple[str, ...], compiled: bool = False
) -> tuple[Problem, list[Candidate], list[str]]:
    """Greedy generation of ``new_tokens`` after a prompt, batch 1, with the cache of keys.

    Compiled: all candidates by a compiled step of one token, with a static cache.
    """

    def candidate(name: str) -> Candidate:
        if name == llama_model.NAME:
            return _llama_cpp(workload, dtype)
        model = build(name, workload, dtype, lora=False)
        prompt = tokens(model, 1, _PROMPT_TOKENS)
        call: Callable[[], Tensor] = partial(generate, model, prompt, workload.new_tokens)
        if compiled:
            call = CompiledGeneration(model, prompt, workload.new_tokens)
        checked = partial(_logits, model, prompt)
        if name == INT8:
            call = partial(_in_8_bits, call)
            checked = partial(_in_8_bits, partial(_logits, model, prompt[:, : peers.INT8_ROWS]))
        logits = checked()
        if compiled:
            call()  # compiles, so that no call whose time counts does

        def check(ids: Tensor) -> None:
            _assert_as_long(ids, workload)
            head_too = name in (FOUR_BIT_HEAD, INT8)
            rows = logits.shape[1]  # the first, on which later ones have no influence
            exact = _dense_logits(workload, torch.float32, head_too)[:, :rows]
            dense = _dense_logits(workload, dtype, head_too)[:, :rows]
            _assert_as_exact(name, "logits", logits, dense, exact)

        return Candidate(name, lambda: call, check)

    op = COMPILED if compiled else "generate"
    problem = Problem(op, dtype, (1, _PROMPT_TOKENS), work=workload.new_tokens, unit="tokens/s")
    everyone = ["qkern", FOUR_BIT_HEAD, *names(chosen)[1:]]
    if "llama.cpp" in chosen:
        everyone += [INT8, llama_model.NAME]
    return problem, *_available(candidate, everyone)


def _llama_cpp(workload: Workload, dtype: torch.dtype) -> Candidate:
    """llama.cpp with its own weights; it computes in no dtype of torch's, so beside float32."""
    if dtype != torch.float32:
        raise SkippedError("float32 only")
    before = llama_model.require(workload.limit)
    model = _load(workload, dtype)
    prompt = tokens(model, 1, _PROMPT_TOKENS)
    generation = llama_model.Generation(model, prompt, workload.new_tokens)
    with torch.inference_mode():
        exact = model(prompt, logits_to_keep=1).logits[0, -1]

    def check(ids: Tensor) -> None:
        _assert_as_long(ids, workload)
        error = relative_error(generation.logits(), exact)
        assert error <= _LLAMA_CPP_ERROR, f"relative error {error:.3g} of the logits"

    return Candidate(llama_model.NAME, lambda: generation, check, before=before)


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def _in_8_bits(call: Callable[[], Tensor]) -> Tensor:
    with qkern.precision("int8"):
        return call()


def _assert_as_long(ids: Tensor, workload: Workload) -> None:
    expected = _PROMPT_TOKENS + workload.new_tokens
    assert ids.shape == (1, expected), f"{ids.shape[1]} tokens, not {expected}"


def names(chosen: Collection[str]) -> list[str]:
    """qkern, then those of `chosen` that are models' peers."""
    return ["qkern", *(peer for peer in PEERS if peer in chosen)]


def steps(chosen: Collection[str]) -> list[str]:
    """Those whose training steps are compared."""
    return ["qkern", CHUNKED_LOSS, *names(chosen)[1:]]


def _available(
    make: Callable[[str], Candidate], everyone: list[str]
) -> tuple[list[Candidate], list[str]]:
    attempts = [_attempt(make, name) for name in everyone]
    found = [attempt for attempt in attempts if isinstance(attempt, Candidate)]
    return found, [attempt for attempt in attempts if isinstance(attempt, str)]


def _attempt(make: Callable[[str], Candidate], name: str) -> Candidate | str:
    try:
        return make(name)
    except SkippedError as error:
        return f"{name}: {error}"


@torch.inference_mode()
def generate(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """The prompt's ids and exactly `new_tokens` more."""
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(ids, Tensor)
    return ids


class CompiledGeneration:
    """The same ids by a compiled step: the prompt eagerly, then a graph for each token."""

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        room = prompt.shape[1] + new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.step = torch.compile(model, dynamic=False)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        self.cache.reset()
        ids, forward = [self.prompt], self.model
        for _ in range(self.new_tokens):
            logits = forward(ids[-1], past_key_values=self.cache, logits_to_keep=1).logits
            ids.append(logits[:, -1:].argmax(-1))
            forward = self.step
        return torch.cat(ids, 1)


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def peak_memory(name: str, workload: Workload, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of this process: ``model`` before a step, ``peak`` during it; run it in a fresh one.

    The peers' libraries are loaded in any case, so that their own size is in every figure.
    Raises `SkippedError` where the system does not tell a peak that can be reset.
    """
    for library in ("bitsandbytes", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    chunked = name == CHUNKED_LOSS
    step = TrainingStep(build(name, workload, dtype, lora=True), workload, chunked)
    first = TrainingStep(step.model, replace(workload, batch=1, sequence=8), chunked)
    first.optimizer = step.optimizer
    first()  # makes the optimizer's state
    return peak.during(step)


def peak_memory_in_subprocess(
    name: str, workload: Workload, dtype: torch.dtype, threads: int, arguments: list[str]
) -> dict[str, int]:
    """`peak_memory` in a fresh process, which ``run.py --memory-of`` is."""
    options = ["--dtype", str(dtype).removeprefix("torch."), "--threads", str(threads)]
    options += ["--model", workload.model, "--batch", str(workload.batch)]
    options += ["--sequence", str(workload.sequence), *arguments]
    return peak.in_subprocess(name, options)
