"""Tiny models of transformers, saved in shards, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qkern.integrations.transformers import QKernConfig
from tests.models import tiny_llama

IDS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(1))


def saved_llama(folder: Path, *, shard: str = "60KB", **config: Any) -> Path:
    """A directory with a dense Llama of random weights, in shards."""
    tiny_llama(**config).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, config: Any = None, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model there, quantised as ``config`` says."""
    return kind.from_pretrained(folder, quantization_config=config or QKernConfig(), **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the files of a directory hold."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_files(one: Path, other: Path) -> None:
    """Two directories hold the same tensors, bit for bit, and say the same of them."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.shape == b[name].shape
        # As bytes: codes seen as floats may be NaN.
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
    assert (one / "config.json").read_text() == (other / "config.json").read_text()


@contextmanager
def changed(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a directory of one file, to be changed; written when it ends."""
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield held
    save_file({name: tensor.clone() for name, tensor in held.items()}, file, {"format": "pt"})
