"""`compute_dtype`: what a layer casts its input to, as bitsandbytes' layers do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qkern import nn as qnn
from qkern import testing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def layer_in(compute: torch.dtype | None, dtype: torch.dtype = F32) -> qnn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, dtype=dtype)
    return qnn.Linear4bit.from_linear(dense, compute_dtype=compute)


def some(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("given", [F32, BF16, F16])
@pytest.mark.parametrize("compute", [F32, BF16, F16])
def test_the_product_is_computed_in_it(compute: torch.dtype, given: torch.dtype) -> None:
    layer, x = layer_in(compute), some(given)
    plain = layer_in(None)
    testing.assert_bitwise(layer(x), plain(x.to(compute)).to(given))
    assert layer(x).dtype == given
    x, twin = x.requires_grad_(), x.detach().requires_grad_()
    layer(x).float().square().sum().backward()
    plain(twin.to(compute)).to(given).float().square().sum().backward()
    testing.assert_bitwise(x.grad, twin.grad)
    testing.assert_bitwise(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_others_are_refused(dtype: object) -> None:
    linear = nn.Linear(64, 32)
    with pytest.raises(TypeError, match="compute_dtype: got"):
        qnn.Linear4bit.from_linear(linear, compute_dtype=dtype)
    model = nn.ModuleDict({"fc": linear})
    with pytest.raises(TypeError, match="compute_dtype: got"):
        qnn.quantize_model(model, compute_dtype=dtype)
    assert model["fc"] is linear
    with pytest.raises(TypeError, match="compute_dtype: got"):
        layer_in(None).compute_dtype = dtype


def test_a_wrong_input_is_still_refused() -> None:
    with pytest.raises(TypeError, match=r"x: got torch.int64"):
        layer_in(BF16)(torch.ones(2, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: got shape"):
        layer_in(BF16)(torch.ones(2, 63))


@pytest.mark.parametrize("compute", [F32, BF16])
@pytest.mark.parametrize("hooked", [False, True])
def test_with_an_adapter_the_whole_sum_is(compute: torch.dtype, hooked: bool) -> None:
    given = BF16 if compute == F32 else F32
    x = some(given)
    torch.manual_seed(1)
    layer = qnn.LoRALinear(layer_in(compute), r=4, alpha=8)
    nn.init.normal_(layer.lora_b)
    plain = qnn.LoRALinear(layer_in(None), r=4, alpha=8)
    plain.load_state_dict(layer.state_dict())
    expected = plain(x.to(compute))
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    y = layer(x)
    assert y.dtype == given
    if hooked and compute == F32:  # what the hook saw was rounded to x's dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)
    else:
        testing.assert_bitwise(y, expected.to(given))
    layer.merge()
    assert layer._merged is not None
    assert layer._merged[0].compute_dtype == compute
    plain.merge()
    testing.assert_bitwise(layer(x), plain(x.to(compute)).to(given))


def test_a_bfloat16_model_computes_in_float32_as_bitsandbytes_does() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(128, 64)
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=BF16)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").train()
    ours = qnn.Linear4bit.from_linear(dense, compute_dtype=BF16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 128)
    assert ours(x).dtype == theirs(x).dtype == F32
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
    # Every value was rounded to bfloat16 on the way, in both.
    for y in (ours(x), theirs(x)):
        testing.assert_bitwise(y, y.to(BF16).float())


def test_it_stays_with_the_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    qnn.quantize_model(model, compute_dtype=BF16)
    assert [layer.compute_dtype for layer in model.values()] == [BF16, BF16]
    assert model["a"].weight is model["b"].weight
    assert copy.deepcopy(model)["a"].half().compute_dtype == BF16
    assert "compute_dtype=torch.bfloat16" in repr(model)
    twin = qnn.Linear4bit(64, 64)
    twin.take_over(model["a"])
    assert twin.compute_dtype == BF16
    assert "compute_dtype" not in model.state_dict()
    with pytest.raises(ValueError, match="in 4 bits already, in another format"):
        qnn.quantize_model(model, targets=["a"])
    model["a"].compute_dtype = None
    assert model["a"](some(F16)).dtype == F16


def test_autocast_has_its_own_dtype() -> None:
    layer, x = layer_in(F32), some(F32)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == F32
    testing.assert_bitwise(y, layer_in(None)(x.to(BF16)).float())


@pytest.mark.slow
def test_compiled() -> None:
    layer, x = layer_in(F32), some(BF16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
