"""4-bit models on a device map: files, hooks, and what is saved of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from tests.integrations.models_of_transformers import (
    assert_same_files,
    load,
    logits,
    saved_llama,
)

MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    "embeddings",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["bitsandbytes", "own"],
)
def test_layers_on_disk_compute_and_are_saved_like_others(tmp_path: Path, embeddings: bool) -> None:
    config = QKernConfig(quantize_embeddings=embeddings)
    dense = saved_llama(tmp_path / "dense", attention_bias=True)
    whole = load(dense, config)
    whole.save_pretrained(tmp_path / "q")
    for name in ("dense", "q"):
        model = load(
            tmp_path / name, config, device_map=MAP, offload_folder=tmp_path / f"off-{name}"
        )
        layer = model.model.layers[1].mlp.up_proj
        assert isinstance(layer, qnn.Linear4bit)
        assert all(p.is_meta for p in layer.parameters())
        assert torch.equal(logits(model), logits(whole))
        assert all(p.is_meta for p in layer.parameters())
        assert model.num_parameters() == whole.num_parameters()
        model.save_pretrained(tmp_path / f"again-{name}")
        assert_same_files(tmp_path / "q", tmp_path / f"again-{name}")


def test_memory_is_planned_for_4_bits(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, num_hidden_layers=4)
    model = load(folder)
    size = model.get_memory_footprint()
    found = load(
        folder,
        device_map="auto",
        max_memory={"cpu": int(size * 1.5)},
        offload_folder=tmp_path / "off",
    )
    assert not any(p.is_meta for p in found.parameters())
    found = load(
        folder,
        device_map="auto",
        max_memory={"cpu": int(size * 0.8)},
        offload_folder=tmp_path / "off",
    )
    assert any(p.is_meta for p in found.parameters())
    assert torch.equal(logits(found), logits(model))
