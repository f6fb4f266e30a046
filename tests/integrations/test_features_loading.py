"""Loading, saving and using models in 4 bits, on qkern and on bitsandbytes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.integrations.record import Side, cases, feature

GROUP = "Loading and saving"
IDS = torch.arange(3, 35).view(2, 16)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def layers(model: Any, side: Side) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, side.linear)]


@cases(
    group=GROUP,
    names={
        "NF4": {},
        "FP4": {"format": "fp4"},
        "scales in float32": {"double_quant": False},
        "blocks of 128 weights": {"block_size": 128},
        "layers left dense by name": {"skip": ["lm_head", "gate_proj", "up_proj", "down_proj"]},
        "4-bit embeddings": {"quantize_embeddings": True},
        "computing in bfloat16": {"compute_dtype": torch.bfloat16},
    },
    argument="options",
)
def test_options(side: Side, options: dict[str, Any], dense_llama: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(dense_llama, dtype=torch.float32)
    model = side.load(dense_llama, options=options)
    names = layers(model, side)
    assert len(names) == (8 if "skip" in options else 14), f"{len(names)} layers in 4 bits"
    assert not [name for name in names if "mlp" in name and "skip" in options], "mlp is in 4 bits"
    before = logits(model)
    error = float((before - logits(dense)).norm() / logits(dense).norm())
    assert 0 < error < 0.3, f"the logits differ by {error:.2f} of their size"
    if options.get("quantize_embeddings"):
        table = sum(p.nbytes for p in model.get_input_embeddings().parameters())
        assert table < dense.get_input_embeddings().weight.nbytes / 4, f"{table} bytes of table"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(side.reload(tmp_path)), before), "other logits once saved"


@feature("saving what was loaded in 4 bits, again and again", group=GROUP)
def test_saved_again(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    model = side.load(dense_llama)
    before, held = logits(model), []
    for i in range(3):
        model.save_pretrained(tmp_path / str(i))
        model = side.reload(tmp_path / str(i))
        assert torch.equal(logits(model), before), "other logits"
        held.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert held[0] == held[1] == held[2], "other files"


@feature("shards, read and written", group=GROUP)
def test_shards(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(dense_llama, dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3, "no shards"
    model = side.load(tmp_path / "dense")
    before = logits(model)
    assert torch.equal(before, logits(side.load(dense_llama))), "other logits than of one file"
    model.save_pretrained(tmp_path / "4-bit", max_shard_size="50KB")
    assert len(list((tmp_path / "4-bit").glob("*.safetensors"))) > 1, "no shards written"
    assert torch.equal(logits(side.reload(tmp_path / "4-bit")), before), "other logits once saved"


@feature("a tensor missing from a 4-bit file raises", group=GROUP)
def test_missing_tensors(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    side.load(dense_llama).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        side.reload(tmp_path)


@feature("`generate`, greedy", group=GROUP)
def test_generate(side: Side, dense_llama: Path) -> None:
    check_generation(side, dense_llama)


@feature("`generate` with a static cache", group=GROUP)
def test_static_cache(side: Side, dense_llama: Path) -> None:
    check_generation(side, dense_llama, cache_implementation="static", disable_compile=True)


@feature("`generate` with a static cache, compiled by `torch.compile`", group=GROUP, slow=True)
def test_compiled_generation(side: Side, dense_llama: Path) -> None:
    check_generation(side, dense_llama, cache_implementation="static", compiled=True)


def check_generation(side: Side, path: Path, compiled: bool = False, **options: Any) -> None:
    """The tokens are those of the dense model with the 4-bit weights' values."""
    model = side.load(path)
    dense = side.load(path)
    dense = dense.dequantize() or dense
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = dense.generate(IDS, **given)
    if compiled:
        model.forward = torch.compile(model.forward, fullgraph=True)
    found = model.generate(IDS, **given, **options)
    assert torch.equal(found, expected), "other tokens than of the dequantised model"


@feature("`torch.compile(fullgraph=True)`, forward and backward", group=GROUP, slow=True)
def test_compiled(side: Side, dense_llama: Path) -> None:
    model = side.load(dense_llama)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=IDS).loss
    expected = torch.autograd.grad(loss, x)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(inputs_embeds=x, labels=IDS).loss
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(torch.autograd.grad(again, x)[0], expected, rtol=1e-3, atol=1e-6)


@feature("`num_parameters()` and `get_memory_footprint()`", group=GROUP)
def test_sizes(side: Side, dense_llama: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(dense_llama, dtype=torch.float32)
    model = side.load(dense_llama)
    assert model.num_parameters() == dense.num_parameters(), (
        f"{model.num_parameters()} parameters, the dense model has {dense.num_parameters()}"
    )
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.nbytes for t in tensors)
    assert model.get_memory_footprint() == held, "not the bytes of its tensors"
    assert held < 0.5 * dense.get_memory_footprint(), f"{held} bytes"


@feature("`resize_token_embeddings`", group=GROUP)
def test_resized(side: Side, dense_llama: Path) -> None:
    model = side.load(dense_llama)
    before = logits(model)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 7)
    found = logits(model)
    assert found.shape[-1] == size + 7, "other shape"
    torch.testing.assert_close(found[..., :size], before)


@feature("`resize_token_embeddings` of 4-bit embeddings", group=GROUP)
def test_resized_in_4_bits(side: Side, dense_llama: Path) -> None:
    model = side.load(dense_llama, options={"quantize_embeddings": True})
    before, size = logits(model), model.config.vocab_size
    try:
        model.resize_token_embeddings(size + 7)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert torch.equal(logits(model), before), "changed by a call that raised"
        side.note(f"refused, and nothing changed ({type(error).__name__})")
    else:
        torch.testing.assert_close(logits(model)[..., :size], before)


@feature("`dequantize()`, and saving what it gives", group=GROUP)
def test_dequantised(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    model = side.load(dense_llama)
    before = logits(model)
    model = model.dequantize() or model
    assert not layers(model, side), "still in 4 bits"
    found = logits(model)
    torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(plain), found), "other logits once saved"


@feature("`dequantize()` of what was loaded in 4 bits, and saving it", group=GROUP)
def test_reloaded_dequantised(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    side.load(dense_llama).save_pretrained(tmp_path / "4-bit")
    model = side.reload(tmp_path / "4-bit")
    model = model.dequantize() or model
    model.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model)), "other logits once saved"


@feature("a layer offloaded to the disk by `device_map`", group="Several devices")
def test_offloaded(side: Side, dense_llama: Path, tmp_path: Path) -> None:
    expected = logits(side.load(dense_llama))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = side.load(dense_llama, device_map=places, offload_folder=tmp_path)
    assert layers(model, side), "no layer is in 4 bits"
    assert all(p.is_meta for p in model.model.layers[1].parameters()), "nothing is away"
    assert torch.equal(logits(model), expected), "other logits"


@feature("a copy, by `copy.deepcopy` and by `pickle`", group=GROUP)
def test_copies(side: Side, dense_llama: Path) -> None:
    model = side.load(dense_llama)
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before), "deepcopy: other logits"
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before), "pickle: other logits"


@feature("`to(torch.bfloat16)` and back leave the weights as they are", group=GROUP)
def test_casts(side: Side, dense_llama: Path) -> None:
    # Of a layer alone: transformers forbids casts of a model that bitsandbytes loaded.
    layer = side.load(dense_llama).model.layers[0].mlp.up_proj
    x = torch.linspace(-1, 1, 128).view(2, 64)
    before = layer(x)
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer(x), before), "other results"
