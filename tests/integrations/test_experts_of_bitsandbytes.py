"""Directories whose experts bitsandbytes put in 4 bits when frameworks had them as layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import nn as qnn
from qkern import testing
from tests.experts_of_models import IDS, experts_of, near
from tests.experts_of_models import dense as mixture

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

from qkern.integrations.transformers import (
    QKernConfig,
    give_back_bitsandbytes,
    take_over_bitsandbytes,
)

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe")
"""Those whose checkpoints have each expert's layers."""
FILE = "model.safetensors"
Tensors = dict[str, Tensor]


def is_expert(name: str) -> bool:
    return ".experts." in name and name.endswith(".weight")


def directories(name: str, below: Path, double_quant: bool = True) -> tuple[Any, Path, Path]:
    """A model's class, its directory as bitsandbytes would write it, and the same values dense."""
    model = mixture(name)
    four_bits, dense = below / "four_bits", below / "dense"
    model.save_pretrained(four_bits)
    model.save_pretrained(dense)
    tensors = load_file(four_bits / FILE)
    written, values = dict(tensors), dict(tensors)
    for key, tensor in tensors.items():
        if is_expert(key) or key.endswith(("q_proj.weight", "o_proj.weight")):
            qw = qkern.quantize_4bit(tensor, "nf4", 64, double_quant)
            written |= qw.to_bnb(key)
            values[key] = qw.dequantize()
    save_file(written, four_bits / FILE, metadata={"format": "pt"})
    save_file(values, dense / FILE, metadata={"format": "pt"})
    config = json.loads((four_bits / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "float32",
    }
    (four_bits / "config.json").write_text(json.dumps(config))
    return type(model), four_bits, dense


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.fixture(params=["QKernConfig", "taken over"])
def load(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    if request.param == "QKernConfig":
        yield lambda kind, path: kind.from_pretrained(path, quantization_config=QKernConfig())
        return
    take_over_bitsandbytes()
    yield lambda kind, path: kind.from_pretrained(path)
    give_back_bitsandbytes()


@pytest.mark.parametrize("double_quant", [True, False], ids=["double_quant", "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_read_in_4_bits(
    load: Callable[..., Any], name: str, double_quant: bool, tmp_path: Path
) -> None:
    kind, four_bits, dense = directories(name, tmp_path, double_quant)
    model = load(kind, four_bits)
    expected = kind.from_pretrained(dense, experts_implementation="eager")
    near(logits(model), logits(expected))
    stacks = experts_of(model)
    assert stacks
    weights = dict(expected.named_parameters())
    for path, experts in stacks.items():
        testing.assert_bitwise(experts.quantized.dequantize(), weights[path])
        # Scales of two layers have two offsets, so those of gate and up are plain.
        joined = path.endswith("gate_up_proj")
        assert experts.quantized.double_quant == (double_quant and not joined)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    model = qnn.prepare_for_training(qnn.add_lora(model, qnn.LoRAConfig(r=4)))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in qnn.lora_parameters(model))


def test_saving_says_what_has_no_common_format(tmp_path: Path) -> None:
    kind, four_bits, _ = directories("mixtral", tmp_path)
    model = kind.from_pretrained(four_bits, quantization_config=QKernConfig())
    with pytest.raises(ValueError, match=r"gate_up_proj in \('nf4', 64, False\); takes one format"):
        model.save_pretrained(tmp_path / "again")
    kind, four_bits, _ = directories("mixtral", tmp_path / "plain", double_quant=False)
    model = kind.from_pretrained(four_bits, quantization_config=QKernConfig())
    model.save_pretrained(tmp_path / "again")
    testing.assert_bitwise(logits(kind.from_pretrained(tmp_path / "again")), logits(model))


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


FIRST = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def without_a_state(tensors: Tensors) -> None:
    del tensors[f"{FIRST}.quant_state.bitsandbytes__nf4"]


def without_an_expert(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.startswith(FIRST.replace("w1.weight", ""))]:
        del tensors[key]


def without_a_layer(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.startswith(FIRST)]:
        del tensors[key]


def with_a_dense_one(tensors: Tensors) -> None:
    without_a_layer(tensors)
    tensors[FIRST] = torch.zeros(96, 64)


def of_another_shape(tensors: Tensors) -> None:
    without_a_layer(tensors)
    tensors |= qkern.quantize_4bit(torch.ones(128, 64)).to_bnb(FIRST)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_a_state, "takes the parts of a 4-bit weight for each expert"),
        (without_an_expert, "got 3 experts; takes 4"),
        (without_a_layer, "got 3, 4 layers; takes as many of each kind"),
        (with_a_dense_one, "takes the parts of a 4-bit weight for each expert"),
        (of_another_shape, r"got shape \(224, 64\) of expert 1; takes \(192, 64\), expert 0's"),
    ],
    ids=["state", "expert", "layer", "dense", "shape"],
)
def test_files_that_do_not_fit_are_refused(
    edit: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    kind, four_bits, _ = directories("mixtral", tmp_path)
    change(four_bits, edit)
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        kind.from_pretrained(four_bits, quantization_config=QKernConfig())
    assert "layers.0.mlp.experts.gate_up_proj" in str(raised.value)
