"""The side that a feature's test runs on, and the small model that most of them load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.record import PEER, Side
from tests.models import byte_tokenizer, tiny_llama


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Side:
    """qkern's side, or the peer's; `tests.integrations.record.feature` chooses."""
    if request.param == PEER:
        pytest.importorskip(PEER)
    return Side(request.param)


@pytest.fixture(scope="session")
def dense_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama of two layers in float32, and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("dense-llama")
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        model = tiny_llama(
            vocab_size=len(tokenizer), intermediate_size=128, eos_token_id=0, pad_token_id=0
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
