"""One weight as bitsandbytes keeps it: `to_bnb`, `from_bnb`, and what other machines wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qkern
from qkern import QuantizedTensor, formats, io, testing
from qkern import nn as qnn

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STATE = "w.quant_state.bitsandbytes__nf4"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def theirs(
    w: Tensor, kind: str = "nf4", nested: bool = True, **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """What bitsandbytes writes of ``w``, and the values that it restores."""
    packed, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested, **options)
    return written(packed, state), bnb.dequantize_4bit(packed, state)


def written(packed: Tensor, state: bnb.QuantState) -> dict[str, Tensor]:
    parts = state.as_dict(packed=True)
    return {"w": packed, **{f"w.{key}": tensor for key, tensor in parts.items()}}


def with_state(tensors: dict[str, Tensor], **changes: object) -> dict[str, Tensor]:
    key = next(key for key in tensors if ".quant_state." in key)
    state = json.loads(bytes(tensors[key].tolist())) | changes
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {key: text}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_there_and_back(kind: str, nested: bool, dtype: torch.dtype) -> None:
    qw = qkern.quantize_4bit(drawn(48, 100).to(dtype), kind, double_quant=nested)
    tensors = qw.to_bnb("w")
    assert tensors.keys() == theirs(drawn(8, 64), kind, nested)[0].keys()
    back = QuantizedTensor.from_bnb(tensors, "w")
    assert (back.shape, back.dtype, back.double_quant) == ((48, 100), dtype, nested)
    for name, tensor in qw.tensors().items():
        if name != "nested_offset":  # a number in JSON
            assert back.tensors()[name].data_ptr() == tensor.data_ptr()
        testing.assert_bitwise(back.tensors()[name], tensor)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_and_writes_the_same(kind: str, nested: bool) -> None:
    qw = qkern.quantize_4bit(drawn(64, 128).bfloat16(), kind, double_quant=nested)
    tensors = qw.to_bnb()
    packed = tensors.pop("weight")
    parts = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
    state = bnb.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    testing.assert_bitwise(bnb.dequantize_4bit(packed, state) + 0.0, qw.dequantize() + 0.0)
    back = QuantizedTensor.from_bnb(written(packed, state), "w")
    for name, tensor in qw.tensors().items():
        testing.assert_bitwise(back.tensors()[name], tensor)
    layer = qnn.Linear4bit(128, 64, bias=False, format=kind, double_quant=nested, dtype=BF16)
    layer.load_state_dict(qw.to_bnb())
    testing.assert_bitwise(layer.quantized.dequantize(), qw.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, F32, BF16])
def test_any_storage_dtype(storage: torch.dtype) -> None:
    tensors, expected = theirs(drawn(64, 64), quant_storage=storage)
    qw = QuantizedTensor.from_bnb(tensors | {"other.weight": drawn(1)}, "w")
    testing.assert_bitwise(qw.dequantize(), expected)
    assert qw.packed.data_ptr() == tensors["w"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w"), "w: is missing"),
        (lambda t: t.pop("w.absmax"), "w.absmax: is missing"),
        (lambda t: t.pop(STATE), "w: got none; takes one w.quant_state"),
        (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), "w: got .* and .*; takes one"),
        (lambda t: t.update({"w.more": drawn(1)}), "w.more: is no part of a weight"),
        (lambda t: t.update({"w.absmax": t["w.absmax"][1:]}), "w: absmax: got shape"),
        (lambda t: t.update({"w": t["w"][1:]}), "w: packed: got shape"),
        (lambda t: t.update({"w": t["w"].int()}), "w: got torch.int32; takes"),
        (lambda t: t.update({"w": None}), "w: got NoneType; takes a torch.Tensor"),
        (lambda t: t.update({"w.quant_map": t["w.quant_map"] * 2}), "w.quant_map: differs"),
        (lambda t: t["w.nested_absmax"].fill_(float("nan")), "nested_absmax: got NaN"),
    ],
)
def test_what_is_no_weight_is_refused(change: Callable[..., Any], message: str) -> None:
    tensors, _ = theirs(drawn(64, 64))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.from_bnb(tensors, "w")


def test_what_bitsandbytes_has_no_layout_for() -> None:
    codebook = torch.linspace(-1, 1, 16)
    custom = qkern.quantize_4bit(drawn(64), "custom", codebook=codebook)
    with pytest.raises(ValueError, match=r"w: .* custom codebook"):
        custom.to_bnb("w")
    assert qkern.quantize_4bit(drawn(64), block_size=formats.BNB_BLOCK_SIZES[-1]).to_bnb()
    for block_size in (8192, 16384):
        long = qkern.quantize_4bit(drawn(64), block_size=block_size)
        with pytest.raises(ValueError, match=f"w: block_size: got {block_size}; .* up to 4096"):
            long.to_bnb("w")
    with pytest.raises(ValueError, match="weight: is on the meta device"):
        qkern.quantize_4bit(torch.empty(64, device="meta")).to_bnb()


# Files of other machines


def elsewhere(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The same file with a map of which 42 values are an ulp off, and what it restores to."""
    values = tensors["w.nested_quant_map"].clone()
    some = torch.arange(3, 255, 6)
    values[some] = torch.nextafter(values[some], torch.tensor(2.0))
    tensors = tensors | {"w.nested_quant_map": values}
    parts = {key.removeprefix("w."): tensor for key, tensor in tensors.items() if key != "w"}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return tensors, bnb.dequantize_4bit(tensors["w"], state)


def test_the_files_own_map_decodes() -> None:
    tensors, usual = theirs(drawn(256, 256))
    tensors, expected = elsewhere(tensors)
    assert not torch.equal(usual, expected)
    qw = QuantizedTensor.from_bnb(tensors, "w")
    assert not qw.double_quant
    testing.assert_bitwise(qw.dequantize(), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_loads_it(assign: bool) -> None:
    tensors, expected = elsewhere(theirs(drawn(256, 256))[0])
    state = {f"weight{key[1:]}": tensor for key, tensor in tensors.items()}
    layer = qnn.Linear4bit(256, 256, bias=False)
    layer.load_state_dict(state, assign=assign)
    testing.assert_bitwise(layer.quantized.dequantize(), expected)
    assert not layer.quantized.double_quant
    x = drawn(3, 256)
    torch.testing.assert_close(layer(x), x @ expected.T)
    # Its own state dict says so, and the layer takes it again.
    again = qnn.Linear4bit(256, 256, bias=False, double_quant=False)
    again.load_state_dict(layer.state_dict())
    testing.assert_bitwise(again.quantized.dequantize(), expected)
    # A file of another shape leaves the layer as it is.
    other = qnn.Linear4bit(128, 256, bias=False)
    with pytest.raises(RuntimeError, match="the checkpoint holds"):
        other.load_state_dict(state)
    assert other.quantized.double_quant


def test_a_checkpoint_of_it(tmp_path: Any) -> None:
    tensors, expected = elsewhere(theirs(drawn(256, 256))[0])
    state = {f"fc.weight{key[1:]}": tensor for key, tensor in tensors.items()}
    save_file(state, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"fc": nn.Linear(256, 256, bias=False)})
    io.load_bnb(model, tmp_path)
    testing.assert_bitwise(model["fc"].quantized.dequantize(), expected)


def test_layers_that_share_it_stay_right() -> None:
    tensors, expected = elsewhere(theirs(drawn(256, 256))[0])
    first = qnn.Linear4bit(256, 256, bias=False)
    model = nn.ModuleDict({"a": first, "b": first.with_same_weight(None)})
    state = {f"{n}.weight{key[1:]}": t for n in "ab" for key, t in tensors.items()}
    model.load_state_dict(state)
    for layer in model.values():
        testing.assert_bitwise(layer.quantized.dequantize(), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: torch.zeros(256),
        lambda m: m * 1.1,
        lambda m: m.flip(0),
        lambda m: m[1:],
        lambda m: torch.where(m == m[7], float("nan"), m),
        lambda m: torch.where(m == m[7], m[8], m),
    ],
)
def test_a_map_that_is_none_is_refused(wrong: Callable[[Tensor], Tensor]) -> None:
    tensors, _ = theirs(drawn(64, 64))
    tensors["w.nested_quant_map"] = wrong(tensors["w.nested_quant_map"])
    with pytest.raises(ValueError, match=r"w.nested_quant_map: differs"):
        QuantizedTensor.from_bnb(tensors, "w")


# Weights that were repacked for inference


def repacked(w: Tensor, nested: bool) -> tuple[Tensor, bnb.QuantState, Tensor]:
    """What an evaluation on a processor with BF16 instructions leaves, and the scales it has."""
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    codes = QuantizedTensor.from_bnb(written(packed, state), "w")
    packed, state = bnb._convert_weight_packed_for_cpu(packed, state)
    scales = state.absmax.T.reshape(-1).float()
    plain = QuantizedTensor(
        codes.packed, scales, None, None, None, "nf4", 64, tuple(w.shape), w.dtype
    )
    return packed, state, plain.dequantize()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_state_dict_saved_after_an_evaluation(dtype: torch.dtype) -> None:
    """``nested_dtype`` is the weight's, in which bitsandbytes restores the scales."""
    packed, state, _ = repacked(drawn(96, 192).to(dtype), nested=True)
    packed, state = bnb._convert_weight_packed_for_cpu_inverse(packed, state)
    tensors = written(packed, state)
    assert str(dtype).endswith(json.loads(bytes(tensors[STATE].tolist()))["nested_dtype"])
    qw = QuantizedTensor.from_bnb(tensors, "w")
    assert qw.double_quant == (dtype == F32)
    parts = {key.removeprefix("w."): tensor for key, tensor in tensors.items() if key != "w"}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    testing.assert_bitwise(qw.dequantize(), bnb.dequantize_4bit(packed, state))


def test_scales_that_are_not_nested_stay_transposed_in_it() -> None:
    packed, state, expected = repacked(drawn(96, 192), nested=False)
    packed, state = bnb._convert_weight_packed_for_cpu_inverse(packed, state)
    tensors = written(packed, state)
    assert (tensors["w.absmax"].dtype, list(tensors["w.absmax"].shape)) == (BF16, [3, 96])
    testing.assert_bitwise(QuantizedTensor.from_bnb(tensors, "w").dequantize(), expected)
    tensors["w.absmax"] = tensors["w.absmax"].T.contiguous()
    with pytest.raises(ValueError, match=r"w.absmax: got torch.bfloat16 \[96, 3\]; takes"):
        QuantizedTensor.from_bnb(tensors, "w")


@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_saved_while_it_is_repacked(nested: bool) -> None:
    packed, state, expected = repacked(drawn(96, 192), nested)
    tensors = written(packed, state)
    assert list(packed.shape) == [96, 96]
    qw = QuantizedTensor.from_bnb(tensors, "w")
    assert qw.dtype == BF16  # as it says
    testing.assert_bitwise(qw.dequantize(F32), expected)


@pytest.mark.parametrize("changes", [{"nested_dtype": "float64"}, {"nested_blocksize": 128}])
def test_other_nesting_is_refused(changes: dict[str, object]) -> None:
    tensors, _ = theirs(drawn(64, 64))
    with pytest.raises(ValueError, match=r"nested_blocksize, nested_dtype: got"):
        QuantizedTensor.from_bnb(with_state(tensors, **changes), "w")
