"""The layouts that `load_state_dict` takes: the parameters' own, bitsandbytes', version 0.1.0's."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qkern
from qkern import nn as qnn
from qkern import testing
from tests import models

State = dict[str, Tensor]

IN, OUT = 250, 101  # more than 256 blocks of 64 and a short last block
CASES = [
    pytest.param("nf4", 64, True, id="nf4-64-double"),
    pytest.param("nf4", 128, False, id="nf4-128-single"),
    pytest.param("fp4", 64, True, id="fp4-64-double"),
    pytest.param("fp4", 256, False, id="fp4-256-single"),
]


def bnb_layer(
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> bnb.nn.Linear4bit:
    """A layer quantised by bitsandbytes itself."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, dtype=dtype)
    return models.bnb_layer(dense, kind, block_size, double_quant, storage)


def dense_of(layer: bnb.nn.Linear4bit) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def linear(
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> qnn.Linear4bit:
    """A layer of zeros."""
    return qnn.Linear4bit(
        IN,
        OUT,
        format=kind,
        block_size=block_size,
        double_quant=double_quant,
        device=device,
        dtype=dtype,
    )


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        testing.assert_bitwise(found[name].detach(), tensor.detach(), name)


def as_is(state: State, folder: Path) -> State:
    return state


def through_safetensors(state: State, folder: Path) -> State:
    save_file(dict(state), folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def through_torch(state: State, folder: Path) -> State:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


WAYS = pytest.mark.parametrize("way", [as_is, through_safetensors, through_torch])


# Its own names


@WAYS
@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"format": "custom", "codebook": torch.linspace(-1, 1, 16)}],
    ids=["nf4", "single", "custom"],
)
def test_keys_are_the_parameters(
    options: dict[str, object], way: Callable[[State, Path], State], tmp_path: Path
) -> None:
    layer = qnn.Linear4bit.from_linear(nn.Linear(IN, OUT), **options)
    state = layer.state_dict()
    assert list(state) == [name for name, _ in layer.named_parameters()]
    assert state["weight"].shape == (IN * OUT // 2, 1)
    assert {t.dtype for n, t in state.items() if n != "bias"} == {torch.uint8, torch.int32}
    named = {k: v for k, v in options.items() if k != "codebook"}
    for device, assign in ((None, False), (None, True), ("meta", True)):
        other = qnn.Linear4bit(IN, OUT, device=device, **named)
        other.load_state_dict(way(state, tmp_path), assign=assign)
        assert_same_state(other.state_dict(), state)
        testing.assert_bitwise(other.quantized.dequantize(), layer.quantized.dequantize())
        assert all(type(p) is nn.Parameter and not p.is_meta for p in other.parameters())
        trainable = [name for name, p in other.named_parameters() if p.requires_grad]
        assert trainable == ["bias"]


def test_scales_keep_every_bit_of_a_float32() -> None:
    """A NaN's payload, a negative zero, the smallest denormal: all pass as what they are."""
    bits = torch.tensor([0x7FC12345, -0x80000000, 1, 0x3F800001], dtype=torch.int32)
    layer = qnn.Linear4bit(64, 4, double_quant=False)
    layer.absmax.data.copy_(bits)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = qnn.Linear4bit(64, 4, double_quant=False)
    other.load_state_dict(torch.load(buffer))
    for one in (layer.half(), other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one.absmax, bits)
        assert torch.equal(one.quantized.absmax.view(torch.int32), bits)


# bitsandbytes' keys


@WAYS
@pytest.mark.parametrize(("kind", "block_size", "double_quant"), CASES)
@pytest.mark.parametrize(
    ("device", "assign"), [(None, False), (None, True), ("meta", True)], ids=str
)
def test_bitsandbytes_keys(
    kind: str,
    block_size: int,
    double_quant: bool,
    device: str | None,
    assign: bool,
    way: Callable[[State, Path], State],
    tmp_path: Path,
) -> None:
    source = bnb_layer(kind, block_size, double_quant)
    model = nn.Sequential(linear(kind, block_size, double_quant, device=device))
    keys = model.load_state_dict(
        way(nn.Sequential(source).state_dict(), tmp_path), strict=True, assign=assign
    )
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    testing.assert_bitwise(model[0].quantized.dequantize(), dense_of(source))
    testing.assert_bitwise(model[0].bias.detach(), source.bias.detach())
    # And what it saves from then on is its own layout.
    again = nn.Sequential(linear(kind, block_size, double_quant))
    again.load_state_dict(model.state_dict())
    assert_same_state(again.state_dict(), model.state_dict())


def test_bitsandbytes_keys_of_a_layer_that_is_the_root() -> None:
    source, layer = bnb_layer(), linear()
    layer.load_state_dict(source.state_dict())
    testing.assert_bitwise(layer.quantized.dequantize(), dense_of(source))


def test_bitsandbytes_storage_dtypes_are_the_same_bytes() -> None:
    layer = linear()
    layer.load_state_dict(bnb_layer().state_dict())
    # An even number of bytes, as another storage needs.
    source = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16)
    source.weight = bnb.nn.Params4bit(
        torch.randn(32, 64), requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16
    )
    source = source.to("cpu")
    assert source.state_dict()["weight"].dtype == torch.bfloat16
    other = qnn.Linear4bit(64, 32)
    other.load_state_dict(source.state_dict())
    testing.assert_bitwise(other.quantized.dequantize(), dense_of(source))


@pytest.mark.parametrize("assign", [False, True])
def test_the_dtype_is_the_modules_own_unless_assigned(assign: bool) -> None:
    layer = linear(dtype=torch.float32)
    layer.load_state_dict(bnb_layer(dtype=torch.bfloat16).state_dict(), assign=assign)
    assert layer.quantized.dtype == (torch.bfloat16 if assign else torch.float32)
    assert layer.bias.dtype == layer.quantized.dtype
    own = linear(dtype=torch.float16)
    own.load_state_dict(layer.state_dict(), assign=assign)
    assert own.quantized.dtype == torch.float16


def test_bitsandbytes_keys_of_a_table_that_is_padded() -> None:
    torch.manual_seed(0)
    source = bnb_layer()  # [101, 250]: a short last block
    table = qnn.Embedding4bit.from_embedding(nn.Embedding(OUT, IN, dtype=torch.bfloat16))
    state = source.state_dict()
    del state["bias"]
    table.load_state_dict(state)
    testing.assert_bitwise(table.quantized.dequantize(), dense_of(source))
    ids = torch.tensor([0, 57, OUT - 1])
    testing.assert_bitwise(table(ids), dense_of(source)[ids])


STATE_KEY = models.BNB_STATE_KEY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, r"Missing key\(s\) in state_dict: \"0.bias\""),
        ({"0.weight": None}, "0.weight: is missing"),
        ({"0.weight.absmax": None}, "0.weight.absmax: is missing"),
        ({"0.weight.nested_absmax": None}, "0.weight.nested_absmax: is missing"),
        ({"0.weight.nested_quant_map": None}, "0.weight.nested_quant_map: is missing"),
        ({"0.weight.quant_map": torch.zeros(16)}, "0.weight.quant_map: differs from the table"),
        ({"0.weight.nested_quant_map": torch.zeros(256)}, "nested_quant_map: differs"),
        ({"0.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, "0.weight: absmax: got shape"),
        ({STATE_KEY: None}, r"got 0.weight.absmax alone; takes one .*bitsandbytes__nf4 or __fp4"),
        ({STATE_KEY: torch.zeros(3, dtype=torch.uint8)}, f"{STATE_KEY}: not JSON"),
        ({STATE_KEY.replace("nf4", "fp4"): torch.zeros(1)}, "nf4 and .*fp4; takes one"),
        ({"0.weight.more": torch.zeros(1)}, r"Unexpected key\(s\) .*\"0.weight.more\""),
        ({"0.quant_meta": torch.zeros(1)}, "holds it as 0.weight.absmax and as 0.quant_meta"),
        ({"0.packed": torch.zeros(1)}, "holds it as 0.weight.absmax and as 0.packed"),
        ({"quant_type": "fp4"}, "quant_type: got 'fp4'"),
        ({"quant_type": "af4"}, "quant_type: got 'af4'"),
        ({"shape": [IN, OUT]}, r"'shape': \[250, 101\].*this module takes.*\[101, 250\]"),
        ({"shape": [OUT, IN + 2]}, "0.weight: packed: got shape"),
        ({"blocksize": 128}, "0.weight: absmax: got shape"),
        ({"blocksize": 48}, "0.weight: block_size: got 48"),
        ({"dtype": "float64"}, "0.weight: dtype: got torch.float64"),
        ({"dtype": None}, "has no dtype"),
        ({"nested_blocksize": 128}, "got 128, float32; takes 256 and float32, bfloat16"),
        ({"nested_offset": None}, "0.weight: absmax: got torch.uint8; takes torch.float32"),
    ],
)
def test_bitsandbytes_keys_that_do_not_fit(change: dict[str, object], message: str) -> None:
    state = nn.Sequential(bnb_layer()).state_dict()
    models.change_bnb_state(state, change)
    model = nn.Sequential(linear())
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    # Names that torch itself misses, or has too many, are found after the rest was loaded.
    if "key" not in message:
        assert_same_state(model[0].state_dict(), before)


@pytest.mark.parametrize(
    ("field", "value", "takes"),
    [
        ("nested_offset", "x", "a number"),
        ("nested_offset", None, "a number"),
        ("nested_offset", True, "a number"),
        ("shape", None, "a list of integers"),
        ("shape", [101.0, 250], "a list of integers"),
        ("shape", "101", "a list of integers"),
        ("dtype", 3, "the name of a torch.dtype"),
        ("dtype", None, "the name of a torch.dtype"),
        ("blocksize", 64.0, "an integer"),
        ("blocksize", None, "an integer"),
    ],
)
def test_bitsandbytes_values_of_another_type(field: str, value: object, takes: str) -> None:
    state = nn.Sequential(bnb_layer()).state_dict()
    fields = json.loads(bytes(state[STATE_KEY].tolist())) | {field: value}
    text = json.dumps(fields).encode()
    models.change_bnb_state(state, {STATE_KEY: torch.tensor(list(text), dtype=torch.uint8)})
    message = re.escape(f"{STATE_KEY}: {field}: got {value!r}; takes {takes}")
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(linear()).load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "block_size", "double_quant", "message"),
    [
        ("fp4", 64, True, "'format': 'fp4'.*takes.*'format': 'nf4'"),
        ("nf4", 128, True, "'block_size': 128.*takes.*'block_size': 64"),
        ("nf4", 64, False, "'double_quant': False.*takes.*'double_quant': True"),
    ],
)
def test_bitsandbytes_weights_of_another_kind_are_refused(
    kind: str, block_size: int, double_quant: bool, message: str
) -> None:
    layer = linear()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = bnb_layer(kind, block_size, double_quant).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict)
    assert_same_state(layer.state_dict(), before)


def test_a_state_dict_is_not_changed_by_loading() -> None:
    state = bnb_layer().state_dict()
    names, tensors = list(state), {name: tensor.clone() for name, tensor in state.items()}
    linear().load_state_dict(state)
    assert list(state) == names
    assert_same_state(dict(state), tensors)


# Version 0.1.0

OLD = load_file(Path(__file__).with_name("state_dict_0_1_0.safetensors"))
"""State dicts that version 0.1.0 wrote, and what it dequantised them to."""


def old_state(name: str) -> State:
    return {k.removeprefix(name + "."): t for k, t in OLD.items() if k.startswith(name + ".")}


OLD_LAYERS = {
    "nf4": {},
    "nf4_single": {"double_quant": False},
    "fp4": {"format": "fp4", "block_size": 32},
    "custom": {"format": "custom"},
}


def old_module(name: str, device: str | None = None) -> qnn.Linear4bit | qnn.Embedding4bit:
    if name != "table":
        return qnn.Linear4bit(33, 5, device=device, **OLD_LAYERS[name])
    return qnn.Embedding4bit.from_embedding(nn.Embedding(7, 33, device=device))


@pytest.mark.parametrize("name", [*OLD_LAYERS, "table"])
@pytest.mark.parametrize(
    ("device", "assign"), [(None, False), (None, True), ("meta", True)], ids=str
)
def test_0_1_0(name: str, device: str | None, assign: bool) -> None:
    state, module = old_state(name), old_module(name, device)
    assert "packed" in state
    keys = module.load_state_dict(state, strict=True, assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    testing.assert_bitwise(module.quantized.dequantize(), OLD[name + "_dense"])
    if name != "table":
        testing.assert_bitwise(module.bias.detach(), state["bias"])
    assert not set(module.state_dict()) & {"packed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax": "bfloat16"}, "absmax: got torch.bfloat16; takes torch.float32 or torch.uint8"),
        ({"packed": "int8"}, "packed: got torch.int8; takes torch.uint8"),
        ({"nested_offset": "float64"}, "nested_offset: got torch.float64; takes torch.float32"),
        ({"packed": None}, r"nested_absmax: got torch.float32; takes torch.int32"),
        ({"nested_absmax": None}, r"Missing key.*\"nested_absmax\""),
        ({"weight": "uint8"}, "weight: the checkpoint holds it as weight and as packed"),
    ],
)
def test_0_1_0_that_does_not_fit(change: dict[str, str | None], message: str) -> None:
    state = old_state("nf4")
    for name, dtype in change.items():
        if dtype is None:
            del state[name]
        else:
            state[name] = state.get(name, torch.zeros(1)).to(getattr(torch, dtype))
    with pytest.raises(RuntimeError, match=message):
        old_module("nf4").load_state_dict(state)


def test_0_1_0_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'format': 'fp4'.*takes.*'format': 'nf4'"):
        old_module("nf4").load_state_dict(old_state("fp4"))


# Neither


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_weight_is_refused(strict: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="weight: the checkpoint holds a dense weight"):
            linear().load_state_dict(nn.Linear(IN, OUT, dtype=dtype).state_dict(), strict=strict)


def test_codes_of_another_dtype_are_refused() -> None:
    state = linear().state_dict()
    state["weight"] = state["weight"].view(torch.int8)
    with pytest.raises(RuntimeError, match=r"weight: got torch.int8; takes torch.uint8"):
        linear().load_state_dict(state)
    state = linear(double_quant=False).state_dict()
    state["absmax"] = state["absmax"].view(torch.float32)
    with pytest.raises(RuntimeError, match=r"absmax: got torch.float32; takes torch.int32"):
        linear(double_quant=False).load_state_dict(state)


def test_a_model_with_adapters_keeps_its_names() -> None:
    model = nn.Sequential(qnn.LoRALinear(linear(dtype=torch.float32), 4, 8))
    assert "0.base_layer.weight" in model.state_dict()
    other = nn.Sequential(qnn.LoRALinear(linear(dtype=torch.float32), 4, 8))
    other.load_state_dict(model.state_dict())
    assert_same_state(other.state_dict(), model.state_dict())


def test_a_model_on_meta_takes_a_bitsandbytes_checkpoint() -> None:
    sizes = ((IN, OUT), (OUT, 64))
    dense = nn.Sequential(*(nn.Linear(i, o, dtype=torch.bfloat16) for i, o in sizes))
    theirs = nn.Sequential(*(bnb.nn.Linear4bit(i, o, quant_type="nf4") for i, o in sizes))
    for own, layer in zip(theirs, dense, strict=True):
        own.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        own.bias = layer.bias
    state = theirs.to("cpu").state_dict()
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(i, o, dtype=torch.bfloat16) for i, o in sizes))
        qkern.nn.quantize_model(model)
        model.load_state_dict(state, assign=True)
    for own, layer in zip(theirs, model, strict=True):
        testing.assert_bitwise(layer.quantized.dequantize(), dense_of(own))
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=2e-2, atol=2e-2)
