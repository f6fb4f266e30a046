"""SmolLM2 in 4 bits: as good as with the weights that bitsandbytes makes."""

from __future__ import annotations

import copy
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn

from qkern import nn as qnn

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.unpoisoned]

TOKENS = 384


@pytest.fixture(scope="module")
def smollm2():
    from smollm2 import load_smollm2

    return load_smollm2(torch.float32)


def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return model(ids, labels=ids).loss.exp().item()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def test_perplexity_equals_bitsandbytes(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(topics["objects"])["input_ids"]
    ids = torch.tensor([ids[:TOKENS]])
    assert ids.shape[1] == TOKENS
    dense = perplexity(model, ids)

    peer = copy.deepcopy(model)
    with torch.no_grad():
        for linear in linears(peer):
            packed, state = bitsandbytes.functional.quantize_4bit(
                linear.weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            linear.weight.copy_(bitsandbytes.functional.dequantize_4bit(packed, state))
    expected = perplexity(peer, ids)
    # What is compared is no noise: quantisation itself shows far above the tolerance.
    assert expected > 1.02 * dense

    qnn.quantize_model(model)
    assert all(isinstance(linear, qnn.Linear4bit) for linear in linears(model))
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-3)
