"""`qkern.nn.FrozenLinear`: dense 16-bit layers in float32 where a CPU would emulate them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qkern import autograd
from qkern import nn as qnn
from qkern.backends import cpu
from tests.models import tiny_llama

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def emulated(monkeypatch):
    """A processor without 16-bit matmuls, and slices of 7 rows of a weight with 48 columns."""
    monkeypatch.setattr(cpu, "has_matmul", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(autograd, "_SLICE_BYTES", 7 * 48 * 4 + 40)


@pytest.fixture
def widened(monkeypatch):
    """How often the Function ran."""
    calls = []
    forward = autograd.FrozenLinear.forward

    def counting(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(autograd.FrozenLinear, "forward", staticmethod(counting))
    return calls


def layer_of(dtype: torch.dtype, bias: bool = True) -> qnn.FrozenLinear:
    torch.manual_seed(3)
    return qnn.FrozenLinear.from_linear(nn.Linear(48, 37, bias, dtype=dtype).requires_grad_(False))


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (3, 11, 48), (2, 2, 8, 48)])
def test_result_and_gradients_are_rounded_once(dtype, bias, shape, emulated, widened):
    layer = layer_of(dtype, bias)
    if bias:
        layer.bias.requires_grad_()
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    exact_bias = layer.bias.detach().double().requires_grad_() if bias else None
    y = layer(x)
    expected = F.linear(exact, layer.weight.double(), exact_bias)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    assert len(widened) == 1
    assert (y.shape, y.dtype, x.grad.dtype) == (expected.shape, dtype, dtype)
    # Half a unit in the last place, and the float32 sums' own error.
    rounding = {"rtol": torch.finfo(dtype).eps / 2, "atol": 2e-6}
    torch.testing.assert_close(y.double(), expected, **rounding)
    torch.testing.assert_close(x.grad.double(), exact.grad, **rounding)
    if bias:
        torch.testing.assert_close(layer.bias.grad, exact_bias.grad.to(dtype), rtol=0.02, atol=0.02)


def test_gradients_of_gradients(emulated):
    layer = layer_of(torch.bfloat16, bias=False)
    x = torch.randn(16, 48).bfloat16().requires_grad_()
    dy = torch.randn(16, 37).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    direction = torch.randn_like(dx)
    (ddy,) = torch.autograd.grad(dx, dy, direction)
    torch.testing.assert_close(ddy, layer(direction))


def test_backward_keeps_nothing_but_the_weight(emulated):
    layer = layer_of(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(16, 48).bfloat16().requires_grad_())
    assert [tensor.data_ptr() for tensor in saved] == [layer.weight.data_ptr()]


class TestLeftToTorch:
    def of(self, layer: nn.Linear, x: torch.Tensor, widened: list) -> torch.Tensor:
        y = layer(x)
        assert not widened
        assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
        return y

    def test_few_rows(self, emulated, widened):
        layer = layer_of(torch.bfloat16)
        self.of(layer, torch.randn(15, 48).bfloat16(), widened)
        self.of(layer, torch.randn(48).bfloat16(), widened)
        self.of(layer, torch.randn(0, 48).bfloat16(), widened)

    def test_float32(self, emulated, widened):
        layer = qnn.FrozenLinear.from_linear(nn.Linear(48, 37).requires_grad_(False))
        self.of(layer, torch.randn(16, 48), widened)

    def test_a_processor_that_multiplies_the_dtype(self, monkeypatch, widened):
        monkeypatch.setattr(cpu, "has_matmul", lambda dtype: True)
        self.of(layer_of(torch.bfloat16), torch.randn(16, 48).bfloat16(), widened)

    def test_a_weight_that_is_trained(self, emulated, widened):
        layer = layer_of(torch.bfloat16)
        layer.weight.requires_grad_()
        self.of(layer, torch.randn(16, 48).bfloat16(), widened).sum().backward()
        assert layer.weight.grad is not None

    def test_autocast(self, emulated, widened):
        layer = qnn.FrozenLinear.from_linear(nn.Linear(48, 37).requires_grad_(False))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(16, 48)).dtype == torch.bfloat16
            assert layer.bfloat16()(torch.randn(16, 48).bfloat16()).dtype == torch.bfloat16
        assert not widened

    def test_other_dtype_of_x_is_refused_as_by_torch(self, emulated):
        with pytest.raises(RuntimeError, match="dtype"):
            layer_of(torch.bfloat16)(torch.randn(16, 48))

    def test_compile(self, emulated, widened):
        layer = layer_of(torch.bfloat16)
        x = torch.randn(16, 48).bfloat16()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
        assert not widened

    def test_another_device(self, emulated):
        layer = layer_of(torch.bfloat16).to("meta")
        assert layer(torch.empty(16, 48, dtype=torch.bfloat16, device="meta")).shape == (16, 37)


def test_a_layer_to_be_trained_is_refused():
    with pytest.raises(ValueError, match="requires grad"):
        qnn.FrozenLinear.from_linear(nn.Linear(48, 37))


@pytest.mark.parametrize("tie", [True, False])
def test_prepare_for_training_replaces_what_stays_dense(tie):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 70}
    model = tiny_llama(**sizes, num_hidden_layers=1, tie_word_embeddings=tie).bfloat16()
    qnn.quantize_model(model, lora=qnn.LoRAConfig(r=2))
    names = list(model.state_dict())
    weight, seen = model.lm_head.weight, []
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    qnn.prepare_for_training(model)
    assert type(model.lm_head) is qnn.FrozenLinear
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.training
    assert model.lm_head.weight is weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert list(model.state_dict()) == names
    assert not any(type(module) is nn.Linear for module in model.modules())
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen
    handle.remove()
    assert not model.lm_head._forward_hooks


def test_prepare_for_training_leaves_trained_and_float32_layers():
    model = nn.ModuleDict(
        {
            "lora": qnn.LoRALinear(qnn.Linear4bit.from_linear(nn.Linear(64, 64)), 8, 16),
            "trained": nn.Linear(64, 64, dtype=torch.bfloat16),
            "wide": nn.Linear(64, 64).requires_grad_(False),
        }
    )
    qnn.prepare_for_training(model, gradient_checkpointing=False)
    assert type(model["trained"]) is nn.Linear
    assert type(model["wide"]) is nn.Linear


def test_lora_can_be_put_on_a_frozen_layer():
    model = nn.ModuleDict({"head": layer_of(torch.float32)})
    qnn.add_lora(model, qnn.LoRAConfig(r=2), skip=())
    assert type(model["head"].base_layer) is qnn.FrozenLinear
    x = torch.randn(4, 48)
    torch.testing.assert_close(
        model["head"](x), F.linear(x, *model["head"].base_layer.parameters())
    )


@pytest.mark.skipif(cpu.missing_reason() is not None, reason="no native kernels")
def test_a_chosen_instruction_set_hides_wider_ones():
    isas = cpu.available_isas()
    try:
        for isa in isas:
            cpu.set_isa(isa)
            if isas != ["scalar"]:
                assert cpu.has_matmul(torch.bfloat16) == (isa in ("avx512bf16", "amx"))
            assert cpu.has_matmul(torch.float32)
            assert not cpu.has_matmul(torch.float16)
    finally:
        cpu.set_isa("")
    if "amx" in isas:
        assert cpu.has_matmul(torch.bfloat16)


@dtypes
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_changes_nothing(dtype, default, emulated):
    layer = layer_of(dtype)
    x = torch.randn(16, 48).to(dtype).requires_grad_()
    dy = torch.randn(16, 37).to(dtype)
    expected = layer(x)
    expected_dx = torch.autograd.grad(expected, x, dy)
    torch.set_default_dtype(default)
    try:
        found = layer(x)
        found_dx = torch.autograd.grad(found, x, dy)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(*found_dx, *expected_dx)
