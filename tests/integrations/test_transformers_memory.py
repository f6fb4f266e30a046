"""Loading holds the 4-bit model and a tensor, not what it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qkern.integrations import _hf_loading, _hf_pages
from tests.integrations.models_of_transformers import load, saved_llama, tensors


def mapped() -> int:
    """Bytes of files that are in this process's memory."""
    found = re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        pytest.skip("the system does not tell")
    return int(found[1]) * 1024


@pytest.mark.slow
def test_pages_of_the_files_are_let_go_as_weights_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    folder = saved_llama(tmp_path, shard="20MB", **sizes)
    load(folder)  # what libraries have in files themselves
    peaks = {}
    for release in (True, False):
        if not release:
            monkeypatch.setattr(_hf_loading, "release", lambda tensor: None)
        before, peak = mapped(), 0
        original = _hf_loading.Quantize.convert

        def convert(self: Any, *args: Any, _original: Any = original, **options: Any) -> Any:
            nonlocal peak
            made = _original(self, *args, **options)
            peak = max(peak, mapped())
            return made

        with monkeypatch.context() as patch:
            patch.setattr(_hf_loading.Quantize, "convert", convert)
            load(folder)
        peaks[release] = peak - before
    total = sum(tensor.nbytes for tensor in tensors(folder).values())
    assert peaks[False] > total / 2, "nothing was mapped, so that this shows nothing"
    assert peaks[True] < total / 5


def test_only_unchanged_memory_of_files_is_let_go(tmp_path: Path) -> None:
    own = torch.arange(1 << 16, dtype=torch.float32)
    _hf_pages.release(own)
    assert torch.equal(own, torch.arange(1 << 16, dtype=torch.float32))
    folder = saved_llama(tmp_path, shard="1GB", vocab_size=2048)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        name = "model.embed_tokens.weight"
        tensor = file.get_tensor(name)
        before = tensor.clone()
        _hf_pages.release(tensor)
        assert torch.equal(tensor, before)


def test_a_state_dict_that_was_passed_keeps_its_values(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from qkern.integrations.transformers import QKernConfig

    folder = saved_llama(tmp_path, shard="1GB")
    held = tensors(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    held[name].mul_(2)
    before = held[name].clone()
    config = load(folder).config
    del config.quantization_config
    LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=held, quantization_config=QKernConfig()
    )
    assert torch.equal(held[name], before)
