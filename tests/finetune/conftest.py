"""A byte-level tokenizer and a tiny random Llama, made offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import PreTrainedTokenizerFast

from tests.models import byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <end> after a turn, and a chat template that says who speaks."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Hugging Face directory with a two-layer Llama of random weights."""
    path = tmp_path_factory.mktemp("tiny-llama")
    config = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        model = tiny_llama(**config, intermediate_size=128, tie_word_embeddings=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
