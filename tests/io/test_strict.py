"""Readers take what the formats hold and nothing that merely looks like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qkern import _json, io
from qkern import nn as qnn
from tests import models

LORA_A = "base_model.model.0.lora_A.weight"


def adapter(tmp_path: Path, trained: bool = False) -> None:
    """One of PEFT's kind, without what qkern writes into the metadata."""
    model = qnn.add_lora(dense(), qnn.LoRAConfig(r=2, alpha=4))
    model[1].requires_grad_(trained)
    io.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))


def refuse_adapter(tmp_path: Path, message: str) -> None:
    model = dense()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        io.load_adapter(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def refuse_bnb(path: Path, message: str) -> None:
    model = dense()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        io.load_bnb(model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


KINDS = {
    "peft_type": [3],
    "r": [2.0, True, "2", [2]],
    "lora_alpha": ["4", True, float("nan"), float("-inf"), 10**400, None],
    "lora_dropout": ["0", False, None],
    "use_rslora": ["false", 0, 1, "no", []],
    "init_lora_weights": [1, [True]],
    "rank_pattern": [{"0": 2.0}, {"0": True}, [], "0", {"0": None}],
    "alpha_pattern": [{"0": "4"}, {"0": float("inf")}, 3],
    "modules_to_save": ["1", [1], {"1": 1}],
    "task_type": [1, {}, ["SEQ_CLS"]],
    "bias": [None, True, "ALL", ["none"], "lora"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in KINDS.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_fields_of_an_adapters_configuration(field, value, tmp_path):
    adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    refuse_adapter(tmp_path, f"adapter_config.json: {field}: got .*; takes ")


def test_configurations_of_old_versions(tmp_path):
    """PEFT 0.2 wrote these fields only, and some with null that have other values today."""
    adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = {
        "base_model_name_or_path": "x",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["0"],
        "task_type": "CAUSAL_LM",
    }
    models = []
    for extra in ({}, {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None}):
        file.write_text(json.dumps(fields | extra))
        models.append(io.load_adapter(dense(), tmp_path))
    for model in models:
        assert (model[0].r, model[0].alpha, model[0].use_rslora) == (2, 4, False)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert torch.equal(model[0].lora_a, tensors[LORA_A])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 2, "r": 4}', "has the key 'r' twice"),
        ('{"rank_pattern": {"a": 2, "a": 3}}', "has the key 'a' twice"),
        ("[" * 100_000, "not JSON"),
        ('{"r": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("3", "got int; takes a JSON object"),
    ],
    ids=range(6),
)
def test_text_that_is_no_configuration(text, message, tmp_path):
    adapter(tmp_path)
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "adapter_config.json").write_bytes(data)
    refuse_adapter(tmp_path, f"adapter_config.json: {message}")


def changed(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in ("nan", "inf"):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = float(kind)
        return tensor
    return tensor.to(getattr(torch, kind))


VALUES = ["int64", "uint8", "bool", "complex64", "float8_e4m3fn", "nan", "inf"]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", [LORA_A, "base_model.model.1.weight"])
def test_values_of_an_adapter(name, kind, tmp_path):
    adapter(tmp_path, trained=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: changed(tensors[name], kind)}, file)
    path = name.removeprefix("base_model.model.").removesuffix(".weight")
    refuse_adapter(tmp_path, rf"adapter_model.safetensors: {path}.*: got .*; takes ")


def test_values_that_the_model_cannot_hold(tmp_path):
    adapter(tmp_path, trained=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    big = {name: torch.full_like(tensors[name], 1e30) for name in (LORA_A,)}
    save_file(tensors | big, file)
    with pytest.raises(ValueError, match=r"0.lora_A: got 128 values that are NaN or infinite"):
        io.load_adapter(dense(), tmp_path, dtype=torch.float16)
    save_file(tensors | {"base_model.model.1.bias": torch.full((64,), 1e30)}, file)
    with pytest.raises(ValueError, match=r"1.bias: got 64 values that are NaN or infinite"):
        io.load_adapter(dense().half(), tmp_path)
    io.load_adapter(dense(), tmp_path)


def bnb(tmp_path: Path, change: dict[str, Any], double_quant: bool = True) -> Path:
    file = tmp_path / "model.safetensors"
    io.save_bnb(qnn.quantize_model(dense(), double_quant=double_quant), file)
    tensors = load_file(file)
    models.change_bnb_state(tensors, change)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("kind", VALUES)
def test_dense_values_of_a_checkpoint(kind, tmp_path):
    file = bnb(tmp_path, {"1.weight": changed(torch.ones(64), kind)})
    refuse_bnb(file, r"model.safetensors: 1.weight: got .*; takes ")


STATE = "0.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [64.0, 64]}, "shape: got .*; takes a list of integers from 0"),
        ({"shape": [-64, -64]}, "shape: got .*; takes a list of integers from 0"),
        ({"shape": [True, 4096]}, "shape: got .*; takes a list of integers from 0"),
        ({"shape": [4096]}, r"0.weight: got shape \(4096,\)"),
        ({"blocksize": True}, "blocksize: got True; takes an integer"),
        ({"nested_blocksize": 256.0}, "nested_blocksize: got 256.0; takes an integer"),
        ({"nested_dtype": 32}, "nested_dtype: got 32; takes a string"),
        ({"nested_offset": float("nan")}, "nested_offset: got nan; takes a number"),
        ({"quant_type": ["nf4"]}, "quant_type: got .*; takes a string"),
        ({"0.weight": torch.zeros(2048, 1, dtype=torch.bool)}, "0.weight: got torch.bool; takes"),
        (
            {"0.weight": torch.zeros(256, 1, dtype=torch.complex64)},
            "0.weight: got torch.complex64; takes",
        ),
        ({"0.weight.absmax": torch.zeros(64)}, "absmax: got torch.float32; takes torch.uint8"),
        ({"0.weight.nested_absmax": torch.full((1,), torch.inf)}, "nested_absmax: got NaN or inf"),
        ({"0.weight.nested_absmax": None}, "has no 0.weight.nested_absmax"),
        ({STATE: torch.zeros(3)}, r"got torch.float32 \[3\]; takes JSON as torch.uint8"),
        (
            {STATE: torch.tensor(list(b'{"shape": [1], "shape": [2]}'), dtype=torch.uint8)},
            "has the key 'shape' twice",
        ),
        (
            {STATE.replace("nf4", "fp4"): torch.zeros(3, dtype=torch.uint8)},
            "bitsandbytes__.p4 and .*bitsandbytes__|bitsandbytes__nf4 and",
        ),
    ],
    ids=range(17),
)
def test_weights_of_a_checkpoint(change, message, tmp_path):
    refuse_bnb(bnb(tmp_path, change), message)


def test_one_of_the_two_nested_tensors(tmp_path):
    """Scales in float32 with a leftover of double quantisation: which of the two was meant?"""
    change = {"0.weight.nested_absmax": torch.ones(1)}
    refuse_bnb(bnb(tmp_path, change, double_quant=False), "has no nested_offset, but there is")


def test_scales_that_are_not_finite(tmp_path):
    change = {"0.weight.absmax": torch.full((64,), torch.nan)}
    refuse_bnb(bnb(tmp_path, change, double_quant=False), "absmax: got NaN or infinity")


def test_buffers_may_hold_infinities(tmp_path):
    def make() -> nn.Sequential:
        model = dense()
        model.register_buffer("mask", torch.full((2, 2), -torch.inf))
        model.register_buffer("ids", torch.arange(3))
        return model

    io.save_bnb(qnn.quantize_model(make()), tmp_path / "model.safetensors")
    model = make()
    model.mask.zero_()
    model.ids.zero_()
    io.load_bnb(model, tmp_path)
    assert torch.equal(model.mask, make().mask)
    assert torch.equal(model.ids, make().ids)


def test_a_tied_tensor_given_twice(tmp_path):
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(8, 64), nn.Linear(64, 8, bias=False))
        model[2].weight = model[1].weight
        return model

    file = tmp_path / "model.safetensors"
    io.save_bnb(qnn.quantize_model(make(), targets=["0"]), file)
    tensors = load_file(file)
    save_file(tensors | {"2.weight": tensors["1.weight"].clone()}, file)
    io.load_bnb(make(), file)
    save_file(tensors | {"2.weight": tensors["1.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"(1|2).weight: differs from (1|2).weight"):
        io.load_bnb(make(), file)


class TestShards:
    @staticmethod
    def shards(tmp_path: Path) -> dict[str, str]:
        """A checkpoint in two files; the index's map of weights."""
        bnb(tmp_path, {})
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        file.unlink()
        found = {}
        for number, prefix in enumerate("01"):
            part = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            save_file(part, tmp_path / f"part-{number}.safetensors")
            found |= dict.fromkeys(part, f"part-{number}.safetensors")
        return found

    @staticmethod
    def index(tmp_path: Path, found: object) -> Path:
        file = tmp_path / "model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {}, "weight_map": found}))
        return file

    def test_are_read_by_folder_and_by_index(self, tmp_path):
        found = self.shards(tmp_path)
        file = self.index(tmp_path, found)
        (tmp_path / "sub").mkdir()
        (tmp_path / "part-0.safetensors").rename(tmp_path / "sub/x")
        (tmp_path / "part-0.safetensors").symlink_to("sub/x")
        first, second = (io.load_bnb(dense(), path) for path in (tmp_path, file))
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name])

    @pytest.mark.parametrize(
        "shard", ["../part-0.safetensors", "sub/../../x", "/etc/passwd", "", ".", 3, None]
    )
    def test_lie_beside_the_index(self, shard, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        found = self.shards(folder)
        (folder / "part-0.safetensors").rename(tmp_path / "part-0.safetensors")
        self.index(folder, {k: shard if v.startswith("part-0") else v for k, v in found.items()})
        refuse_bnb(folder, r"index.json: .*: got .*; takes (a file beside|an object of file names)")

    def test_contradictions(self, tmp_path):
        found = self.shards(tmp_path)
        file = self.index(tmp_path, found | {"1.weight": "part-0.safetensors"})
        refuse_bnb(file, "says that 1.weight is in part-0.safetensors, where it is not")
        self.index(tmp_path, found)
        part = load_file(tmp_path / "part-1.safetensors")
        save_file(part | {"0.bias": torch.zeros(64)}, tmp_path / "part-1.safetensors")
        refuse_bnb(tmp_path, r"0.bias: is in .*part-0.safetensors and in .*part-1.safetensors")
        save_file(part, tmp_path / "model.safetensors")
        refuse_bnb(tmp_path, r"holds model.safetensors and model.safetensors.index.json; name one")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"weight_map": {"a": "x", "a": "y"}}', "has the key 'a' twice"),
            ("{}", "has no weight_map"),
            ("[]", "got list; takes a JSON object"),
            ('{"weight_map": []}', "weight_map: got .*; takes an object"),
        ],
    )
    def test_text_that_is_no_index(self, text, message, tmp_path):
        self.shards(tmp_path)
        self.index(tmp_path, {}).write_text(text)
        refuse_bnb(tmp_path, f"index.json: {message}")

    def test_damaged_files(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
        refuse_bnb(tmp_path, "model.safetensors: is not a safetensors file")
        adapter(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
        refuse_adapter(tmp_path, "adapter_model.safetensors: is not a safetensors file")


def test_kinds_in_words():
    kind = _json.map_of(_json.INTEGER, "integers") | _json.NULL
    assert kind.takes == "an object of integers or null"
    assert kind.fits(None)
    assert kind.fits({"a": 1})
    assert not kind.fits({"a": True})
