"""A small call of each public name, with its result checked against something else than itself.

`CHECKS` maps a name to the checks that are said to notice when it computes something wrong;
test_public_names.py breaks each name and sees to it that they do. No other test is replaced: these
are here so that none of what users call goes without one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qkern
from lab.fake_gpu import FakeGpu
from qkern import backends, formats, reference, testing
from qkern import nn as qnn
from qkern.optim import _driver
from qkern.testing import Case, Target

CHECKS: dict[str, list[Callable[[], None]]] = {}
F32, BF16 = torch.float32, torch.bfloat16


def checks(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Says which public names a check is for."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        for name in names:
            CHECKS.setdefault(name, []).append(check)
        return check

    return register


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.detach() - expected.detach()).abs().max()
    assert error <= tolerance * expected.detach().abs().max()


def dense(qw: qkern.QuantizedTensor) -> Tensor:
    """The values of a quantised tensor without nested scales, from the table itself."""
    high, low = qw.packed >> 4, qw.packed & 15
    codes = torch.stack([high, low], -1).flatten()[: qw.packed.numel() * 2]
    table = qw.codebook
    if table is None:
        table = torch.tensor({"nf4": formats.NF4_CODES, "fp4": formats.FP4_CODES}[qw.format])
    values = table[codes.long()].view(-1, qw.block_size) * qw.absmax[:, None]
    return values.view(qw.shape)


def weight(format: str = "nf4", seed: int = 0) -> qkern.QuantizedTensor:
    codebook = torch.linspace(-1, 1, 16) if format == "custom" else None
    return qkern.quantize_4bit(drawn(32, 64, seed=seed), format, 64, False, codebook)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@checks("qkern.quantize_4bit")
def values_are_near_those_that_were_quantised() -> None:
    w = drawn(32, 64)
    for format in ("nf4", "fp4", "custom"):
        error = (dense(weight(format)) - w).abs().max() / w.abs().max()
        assert 0 < error < 0.2, format
    nested = qkern.quantize_4bit(w)
    assert nested.double_quant
    near(nested.dequantize(), dense(weight()), 0.02)


@checks("qkern.dequantize_4bit", "qkern.QuantizedTensor.dequantize")
def values_are_the_tables() -> None:
    qw = weight()
    for values in (qkern.dequantize_4bit(qw), qw.dequantize()):
        testing.assert_bitwise(values, dense(qw))
    testing.assert_bitwise(qkern.dequantize_4bit(qw, BF16), dense(qw).to(BF16))
    testing.assert_bitwise(qw.dequantize(BF16), dense(qw).to(BF16))
    out = torch.empty(32, 64)
    assert qw.dequantize(out=out) is out
    testing.assert_bitwise(out, dense(qw))


@checks("qkern.QuantizedTensor.to_bnb", "qkern.QuantizedTensor.from_bnb")
def a_weight_in_the_layout_of_bitsandbytes() -> None:
    qw = weight()
    tensors = qw.to_bnb("w")
    state = "w.quant_state.bitsandbytes__nf4"
    assert tensors.keys() == {"w", "w.absmax", "w.quant_map", state}
    assert torch.equal(tensors["w"].flatten(), qw.packed)
    testing.assert_bitwise(tensors["w.quant_map"], formats.code_tensor("nf4", "cpu"))
    back = qkern.QuantizedTensor.from_bnb(tensors, "w")
    testing.assert_bitwise(dense(back).view(32, 64), dense(qw))


@checks("qkern.quantize_8bit", "qkern.dequantize_8bit")
def eight_bits_are_near() -> None:
    x = drawn(4, 128)
    codes, absmax = qkern.quantize_8bit(x, block_size=128)
    testing.assert_bitwise(absmax, x.abs().amax(1))
    values = formats.map_tensor("signed", "cpu")[codes.long()] * absmax[:, None]
    near(values, x, 0.03)
    testing.assert_bitwise(qkern.dequantize_8bit(codes, absmax, block_size=128), values)


@checks("qkern.linear_4bit", "qkern.nf4_linear", "qkern.fp4_linear")
def products_are_those_of_the_dense_weight() -> None:
    x, bias = drawn(5, 64, seed=1), drawn(32, seed=2)
    of_format = {"nf4": qkern.nf4_linear, "fp4": qkern.fp4_linear}
    for format in ("nf4", "fp4", "custom"):
        qw = weight(format)
        for call in (qkern.linear_4bit, of_format.get(format, qkern.linear_4bit)):
            near(call(x, qw, bias), x @ dense(qw).T + bias)
            leaf = x.clone().requires_grad_()
            call(leaf, qw).square().sum().backward()
            near(leaf.grad, 2 * (x @ dense(qw).T) @ dense(qw))


@checks("qkern.linears_4bit")
def several_products_are_those_of_the_dense_weights() -> None:
    x, bias, qws = drawn(5, 64, seed=1), drawn(32, seed=2), [weight("nf4"), weight("fp4", seed=3)]
    leaf = x.clone().requires_grad_()
    first, second = qkern.linears_4bit(leaf, qws, [bias, None])
    near(first.detach(), x @ dense(qws[0]).T + bias)
    near(second.detach(), x @ dense(qws[1]).T)
    (first.sum() + second.sum()).backward()
    near(leaf.grad, (dense(qws[0]).sum(0) + dense(qws[1]).sum(0)).expand(5, 64))


@checks("qkern.lora_linear")
def an_adapter_adds_its_product() -> None:
    x, a, b, qw = drawn(5, 64, seed=1), drawn(4, 64, seed=2), drawn(32, 4, seed=3), weight()
    a.requires_grad_()
    y = qkern.lora_linear(x, qw, a, b, 0.5)
    near(y, x @ dense(qw).T + 0.5 * (x @ a.detach().T) @ b.T)
    y.sum().backward()
    near(a.grad, 0.5 * b.sum(0)[:, None] * x.sum(0))


@checks("qkern.linear_cross_entropy")
def a_loss_is_that_of_all_logits() -> None:
    hidden, qw = drawn(7, 64).requires_grad_(), weight()
    labels = torch.tensor([0, 5, -100, 31, 2, -100, 9])
    loss = qkern.linear_cross_entropy(hidden, qw, labels, scale=0.5, softcap=4.0)
    other = hidden.detach().requires_grad_()
    logits = 4.0 * torch.tanh(other @ dense(qw).t() * 0.5 / 4.0)
    expected = nn.functional.cross_entropy(logits, labels)
    near(loss, expected)
    loss.backward()
    expected.backward()
    near(hidden.grad, other.grad)


@checks("qkern.batch_invariant")
def a_row_is_the_same_with_any_others() -> None:
    seen: list[bool] = []

    class Noting(backends.Backend):
        def linear_4bit(self, x: Tensor, *args: Any) -> Tensor:
            seen.append(args[-1])
            return x.new_zeros(x.shape[0], args[1])

    with backends.use(Noting("noting")):
        qkern.linear_4bit(drawn(3, 64), weight())
        with qkern.batch_invariant():
            qkern.linear_4bit(drawn(3, 64), weight())
        qkern.linear_4bit(drawn(3, 64), weight())
    assert seen == [False, True, False]


@checks("qkern.precision")
def a_block_takes_activations_to_8_bits() -> None:
    x, qw = drawn(3, 64), weight()
    usual = qkern.linear_4bit(x, qw)
    with qkern.precision("int8"):
        rounded = qkern.linear_4bit(x, qw)
        with qkern.precision(None):
            assert torch.equal(qkern.linear_4bit(x, qw), usual)
    expected = torch.ops.qkern.linear_4bit_int8(x, *qw.weight, 32, None, False)
    assert torch.equal(rounded, expected)
    assert not torch.equal(rounded, usual)


@checks(
    *(
        f"qkern.Stored.{name}"
        for name in ("weight", "tensors", "device", "double_quant", "ndim", "nbytes", "numel", "to")
    )
)
def what_a_quantised_tensor_says_of_itself() -> None:
    qw, nested = weight(), qkern.quantize_4bit(drawn(32, 64))
    y = torch.ops.qkern.linear_4bit(drawn(5, 64), *qw.weight, 32, None, False)
    near(y, drawn(5, 64) @ dense(qw).T)
    assert set(qw.tensors()) == {"packed", "absmax"}
    assert qw.tensors()["packed"] is qw.packed
    assert qw.device == torch.device("cpu")
    assert nested.double_quant
    assert not qw.double_quant
    assert (qw.ndim, qw.numel(), qw.nbytes) == (2, 32 * 64, 32 * 32 + 32 * 4)
    assert qw.to(BF16).dequantize().dtype == BF16
    assert qw.to("meta").device.type == "meta"
    assert qw.to("cpu") is qw


@checks("qkern.QuantizedTensor")
def a_quantised_tensor_of_its_parts() -> None:
    qw = weight()
    made = qkern.QuantizedTensor(
        qw.packed, qw.absmax, None, None, None, "nf4", 64, (32, 64), torch.float32
    )
    testing.assert_bitwise(made.dequantize(), dense(qw))
    with pytest.raises(ValueError, match="packed"):
        replace(made, packed=qw.packed[:-1])


def experts() -> qkern.QuantizedExperts:
    """Of two weights, put together by hand."""
    one, two = weight(), weight(seed=3)
    parts = torch.stack([one.packed, two.packed]), torch.stack([one.absmax, two.absmax])
    return qkern.QuantizedExperts(*parts, None, None, None, "nf4", 64, (2, 32, 64), torch.float32)


ENDS = torch.tensor([2, 5])


def by_experts(x: Tensor) -> Tensor:
    """Rows of `x` by the weights of `experts`, where those of each end at `ENDS`."""
    return torch.cat([x[:2] @ dense(weight()).T, x[2:5] @ dense(weight(seed=3)).T])


@checks(
    "qkern.QuantizedExperts",
    *(f"qkern.QuantizedExperts.{name}" for name in ("stack", "dequantize")),
)
def experts_of_their_parts() -> None:
    both = torch.stack([dense(weight()), dense(weight(seed=3))])
    for qw in (experts(), qkern.QuantizedExperts.stack([weight(), weight(seed=3)])):
        assert len(qw) == 2
        testing.assert_bitwise(qw.dequantize(), both)
        testing.assert_bitwise(qw.dequantize(BF16), both.to(BF16))
        testing.assert_bitwise(dense(qw[1]), both[1])
        assert qw.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="packed"):
        replace(experts(), packed=experts().packed[:1])


@checks("qkern.QuantizedExperts.to_bnb", "qkern.QuantizedExperts.from_bnb")
def experts_as_bitsandbytes_has_them() -> None:
    found = experts().to_bnb(["a", "b"])
    testing.assert_bitwise(found["b"].flatten(), experts().packed[1])
    again = qkern.QuantizedExperts.from_bnb(found, ["b", "a"])
    testing.assert_bitwise(again.dequantize(), experts().dequantize().flip(0))


@checks("qkern.quantize_experts")
def experts_are_quantised_each_alone() -> None:
    w = torch.stack([drawn(32, 64), drawn(32, 64, seed=3)])
    for qw in (
        qkern.quantize_experts(w, double_quant=False),
        qkern.quantize_experts(list(w.mT), double_quant=False, transposed=True),
    ):
        assert torch.equal(qw.packed, experts().packed)
        testing.assert_bitwise(qw.absmax, experts().absmax)


@checks("qkern.grouped_linear_4bit")
def products_by_experts_are_those_of_their_weights() -> None:
    x, bias = drawn(6, 64, seed=1), drawn(2, 32, seed=2)
    zeros = torch.zeros(1, 32)
    expected = torch.cat([by_experts(x), zeros])
    near(qkern.grouped_linear_4bit(x, experts(), ENDS), expected)
    biases = torch.cat([bias[0].expand(2, -1), bias[1].expand(3, -1), zeros])
    leaf = x.clone().requires_grad_()
    y = qkern.grouped_linear_4bit(leaf, experts(), ENDS, bias)
    near(y, expected + biases)
    y.sum().backward()
    sums = [dense(weight(seed=seed)).sum(0).expand(rows, -1) for seed, rows in ((0, 2), (3, 3))]
    near(leaf.grad, torch.cat([*sums, torch.zeros(1, 64)]))


@checks(
    "qkern.nn.Experts4bit",
    *(f"qkern.nn.Experts4bit.{name}" for name in ("from_quantized", "from_dense", "quantized")),
    *(f"qkern.nn.Experts4bit.{name}" for name in ("to_dense", "forward", "bias_for", "extra_repr")),
)
def a_module_of_experts() -> None:
    x, both = drawn(5, 64, seed=1), torch.stack([dense(weight()), dense(weight(seed=3))])
    w = torch.stack([drawn(32, 64), drawn(32, 64, seed=3)])
    made = qnn.Experts4bit.from_dense(w.mT, double_quant=False, transposed=True)
    for module in (qnn.Experts4bit.from_quantized(experts()), made):
        near(module(x, ENDS), by_experts(x))
        testing.assert_bitwise(module.quantized.dequantize(), both)
        assert module.as_operand().packed is module.weight
        assert "num_experts=2" in module.extra_repr()
    testing.assert_bitwise(qnn.Experts4bit.from_quantized(experts()).to_dense(), both)
    testing.assert_bitwise(made.to_dense(BF16), both.mT.to(BF16))
    empty = qnn.Experts4bit(2, 64, 32, double_quant=False, transposed=True)
    empty.load_state_dict(made.state_dict())
    near(empty(x, ENDS), by_experts(x))
    bias = drawn(2, 32, seed=2).to(BF16)
    testing.assert_bitwise(made.bias_for(x, bias), bias.float())


def adapted_experts() -> tuple[qnn.LoRAExperts, Tensor, Tensor]:
    """A module whose adapters do something, and their A and B."""
    layer = qnn.LoRAExperts(qnn.Experts4bit.from_quantized(experts()), 4, 8)
    with torch.no_grad():
        layer.lora_b.copy_(drawn(2, 32, 4, seed=5) * 0.1)
    return layer, layer.lora_a.detach().clone(), layer.lora_b.detach().clone()


def by_adapters(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What adapters add to `by_experts`, times one."""
    return torch.cat([x[:2] @ a[0].T @ b[0].T, x[2:5] @ a[1].T @ b[1].T])


@checks("qkern.grouped_lora_linear")
def products_by_experts_with_adapters() -> None:
    x, a, b = drawn(5, 64, seed=1), drawn(2, 4, 64, seed=6), drawn(2, 32, 4, seed=7)
    leaf = a.clone().requires_grad_()
    y = qkern.grouped_lora_linear(x, experts(), ENDS, leaf, b, 0.5)
    near(y, by_experts(x) + 0.5 * by_adapters(x, a, b))
    y.sum().backward()
    sums = [0.5 * b[e].sum(0)[:, None] * x[rows].sum(0) for e, rows in enumerate(PARTS)]
    near(leaf.grad, torch.stack(sums))


PARTS = (slice(0, 2), slice(2, 5))


@checks(
    "qkern.nn.LoRAExperts",
    *(
        f"qkern.nn.LoRAExperts.{name}"
        for name in ("num_experts", "in_features", "out_features", "weight", "quantized", "bias")
    ),
    *(f"qkern.nn.LoRAExperts.{name}" for name in ("forward", "to_merged", "extra_repr")),
    *(f"qkern.nn.LoRAExperts.{name}" for name in ("of_each", "from_config")),
    "qkern.nn.LoRAExperts.reset_parameters",
)
def experts_with_adapters() -> None:
    x, (layer, a, b) = drawn(5, 64, seed=1), adapted_experts()
    assert (layer.num_experts, layer.in_features, layer.out_features) == (2, 64, 32)
    assert layer.weight is layer.base_layer.weight
    testing.assert_bitwise(layer.quantized.dequantize(), experts().dequantize())
    expected = by_experts(x) + 2 * by_adapters(x, a, b)
    near(layer(x, ENDS), expected)
    merged = layer.to_merged()
    assert type(merged) is qnn.Experts4bit
    near(merged(x, ENDS), expected, 0.2)
    assert "shared=False" in layer.extra_repr()
    bias = nn.Parameter(drawn(2, 32, seed=2))
    biased = qnn.LoRAExperts(qnn.Experts4bit.from_quantized(experts(), bias), 4, 8)
    assert biased.bias is bias
    config = qnn.LoRAConfig(8, 4, rank_pattern={"up": 2}, share_experts=True)
    shared = qnn.LoRAExperts.from_config(layer.base_layer, config, "a.up")
    assert (shared.r, shared.alpha, tuple(shared.lora_a.shape)) == (2, 4, (2, 64))
    testing.assert_bitwise(shared.of_each(shared.lora_a)[1].detach(), shared.lora_a.detach())
    assert shared.lora_a.abs().max() > 0
    before = shared.lora_a.detach().clone()
    with torch.no_grad():
        shared.lora_b.fill_(1)
    shared.reset_parameters()
    assert (shared.lora_b == 0).all()
    assert (shared.lora_a != before).all()


@checks(
    "qkern.nn.Embedding4bit",
    *(f"qkern.nn.Embedding4bit.{name}" for name in ("from_embedding", "forward", "extra_repr")),
    "qkern.nn.Embedding4bit.to_embedding",
)
def an_embedding_looks_up_rows() -> None:
    ids = torch.tensor([[3, 0], [31, 3]])
    table = nn.Embedding(32, 64, _weight=drawn(32, 64))
    layer = qnn.Embedding4bit.from_embedding(table, double_quant=False)
    testing.assert_bitwise(layer(ids), dense(weight())[ids])
    testing.assert_bitwise(qnn.Embedding4bit(weight())(ids), dense(weight())[ids])
    testing.assert_bitwise(layer.to_embedding().weight.detach(), dense(weight()))
    assert "32, 64" in repr(layer)


@checks(
    "qkern.nn.FrozenLinear",
    *(f"qkern.nn.FrozenLinear.{name}" for name in ("from_linear", "forward")),
)
def a_frozen_layer_shares_its_weight() -> None:
    linear = nn.Linear(64, 32, dtype=BF16)
    expected = linear(drawn(5, 64).to(BF16)).detach()
    layer = qnn.FrozenLinear.from_linear(linear.requires_grad_(False))
    assert layer.weight is linear.weight
    near(layer(drawn(5, 64).to(BF16)), expected, 0.02)
    assert qnn.FrozenLinear(64, 32).weight.shape == (32, 64)


def linear_layer() -> tuple[nn.Linear, qnn.Linear4bit]:
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.copy_(drawn(32, 64))
        linear.bias.copy_(drawn(32, seed=2))
    return linear, qnn.Linear4bit.from_linear(linear, double_quant=False)


@checks(
    "qkern.nn.Linear4bit",
    *(
        f"qkern.nn.Linear4bit.{name}"
        for name in ("from_quantized", "from_linear", "with_same_weight", "forward", "bias_for")
    ),
    "qkern.nn.Linear4bit.reset_parameters",
    "qkern.nn.Linear4bit.extra_repr",
    "qkern.nn.Linear4bit.to_linear",
    *(f"qkern.nn.QuantizedModule.{name}" for name in ("quantized", "as_operand")),
)
def a_layer_multiplies_by_its_weight() -> None:
    linear, layer = linear_layer()
    x, qw = drawn(5, 64, seed=1), weight()
    expected = x @ dense(qw).T + linear.bias.detach()
    near(layer(x), expected)
    near(qnn.Linear4bit.from_quantized(qw, linear.bias)(x), expected)
    other = layer.with_same_weight(None)
    assert other.weight is layer.weight
    near(other(x), expected - linear.bias.detach())
    testing.assert_bitwise(layer.to_linear().weight.detach(), dense(qw))
    assert layer.to_linear().bias is linear.bias
    assert torch.equal(layer.bias_for(x.to(BF16)), layer.bias.to(BF16))
    testing.assert_bitwise(layer.quantized.dequantize(), dense(qw))
    assert layer.as_operand().packed is layer.weight
    assert "nf4" in repr(layer)
    with pytest.raises(TypeError, match="no parameters to reset"):
        layer.reset_parameters()
    assert qnn.Linear4bit(64, 32, double_quant=False).quantized.shape == (32, 64)


@checks("qkern.nn.Linear4bit.take_over")
def a_layer_stands_in_for_another_with_its_hooks() -> None:
    linear, _ = linear_layer()
    seen: list[nn.Module] = []
    linear.register_forward_hook(lambda module, *_: seen.append(module))
    linear.note = "kept"
    layer = qnn.Linear4bit.from_quantized(weight())
    layer.take_over(linear.eval())
    layer(drawn(5, 64))
    assert seen == [layer]
    assert layer.note == "kept"
    assert not layer.training


@checks(*(f"qkern.nn.QuantizedModule.{name}" for name in ("register_parameter", "requires_grad_")))
def a_4_bit_weight_stays_frozen_and_whole() -> None:
    linear, layer = linear_layer()
    assert layer.requires_grad_(False) is layer
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.requires_grad_() is layer
    near(layer(drawn(5, 64)), drawn(5, 64) @ dense(weight()).T + linear.bias)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    bias = nn.Parameter(torch.ones(32))
    layer.register_parameter("bias", bias)
    assert layer.bias is bias
    with pytest.raises((TypeError, ValueError), match="weight"):
        layer.register_parameter("weight", nn.Parameter(torch.ones(32, 64)))


@checks("qkern.nn.LoRAConfig", *(f"qkern.nn.LoRAConfig.{n}" for n in ("r_for", "alpha_for")))
def ranks_and_alphas_by_name() -> None:
    config = qnn.LoRAConfig(8, 4, rank_pattern={"up": 2}, alpha_pattern={"up": 6})
    assert (config.r_for("a.up"), config.alpha_for("a.up")) == (2, 6)
    assert (config.r_for("a.down"), config.alpha_for("a.down")) == (8, 4)
    with pytest.raises(ValueError, match="r: got 0"):
        qnn.LoRAConfig(0)


def adapted(seed: int = 5) -> tuple[qnn.LoRALinear, Callable[[Tensor], Tensor]]:
    """A layer whose adapter does something, and what it computes."""
    linear, base = linear_layer()
    layer = qnn.LoRALinear(base, 4, 8)
    with torch.no_grad():
        layer.lora_b.copy_(drawn(32, 4, seed=seed) * 0.1)
    a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
    bias = linear.bias.detach()
    return layer, lambda x: x @ (dense(weight()) + 2 * b @ a).T + bias


@checks(
    "qkern.nn.LoRALinear",
    *(
        f"qkern.nn.LoRALinear.{name}"
        for name in ("in_features", "out_features", "weight", "quantized", "bias", "forward")
    ),
    "qkern.nn.LoRALinear.to_merged",
    *(f"qkern.nn.LoRALayer.{name}" for name in ("scaling", "merged", "merge", "unmerge")),
    *(f"qkern.nn.LoRALayer.{name}" for name in ("requires_grad_", "extra_repr")),
)
def a_layer_with_an_adapter() -> None:
    layer, expected = adapted()
    x = drawn(5, 64, seed=1)
    assert (layer.scaling, layer.in_features, layer.out_features) == (2.0, 64, 32)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.bias is not None
    testing.assert_bitwise(layer.quantized.dequantize(), dense(weight()))
    near(layer(x), expected(x))
    near(layer.to_merged()(x), expected(x), 0.2)
    assert not layer.merged
    with torch.no_grad():
        layer.merge()
        assert layer.merged
        near(layer(x), expected(x), 0.2)
        layer.unmerge()
        assert not layer.merged
        near(layer(x), expected(x))
    assert layer.requires_grad_() is layer
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert {"lora_a", "lora_b"} <= trained <= {"lora_a", "lora_b", "base_layer.bias"}
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.parameters())
    near(layer(x), expected(x))
    assert "r=4" in layer.extra_repr()


@checks("qkern.nn.LoRALinear.from_config", "qkern.nn.LoRALayer.reset_parameters")
def an_adapter_as_configured_starts_at_nothing() -> None:
    _, base = linear_layer()
    layer = qnn.LoRALinear.from_config(base, qnn.LoRAConfig(8, 4, rank_pattern={"up": 2}), "a.up")
    assert (layer.r, layer.alpha, tuple(layer.lora_a.shape)) == (2, 4, (2, 64))
    assert layer.lora_a.abs().max() > 0
    before = layer.lora_a.detach().clone()
    with torch.no_grad():
        layer.lora_b.fill_(1)
    layer.reset_parameters()
    assert (layer.lora_b == 0).all()
    assert (layer.lora_a != before).all()


def model(dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).to(dtype)


def adapted_model() -> nn.Module:
    made = qnn.quantize_model(model(), lora=qnn.LoRAConfig(4, 8))
    for number, (_, layer) in enumerate(lora_layers(made)):
        with torch.no_grad():
            layer.lora_b.copy_(drawn(*layer.lora_b.shape, seed=number) * 0.1)
    return made


def lora_layers(made: nn.Module) -> list[tuple[str, qnn.LoRALinear]]:
    """Not by the function that is checked."""
    return [(name, m) for name, m in made.named_modules() if isinstance(m, qnn.LoRALinear)]


@checks("qkern.nn.quantize_model", "qkern.nn.add_lora")
def a_model_becomes_one_in_4_bits() -> None:
    made, x = model(), drawn(5, 64)
    expected = made(x).detach()
    assert qnn.quantize_model(made) is made
    assert [type(m) for m in made] == [qnn.Linear4bit, nn.ReLU, qnn.Linear4bit]
    assert not any(p.requires_grad for p in made.parameters())
    before = made(x)
    assert 0 < (before - expected).abs().max() < 0.5 * expected.abs().max()
    assert qnn.add_lora(made, qnn.LoRAConfig(4, targets=("2",))) is made
    assert [type(m) for m in made] == [qnn.Linear4bit, nn.ReLU, qnn.LoRALinear]
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"2.lora_a", "2.lora_b"}
    near(made(x), before)


@checks("qkern.nn.dequantize_model", "qkern.nn.count_parameters")
def a_model_becomes_dense_again() -> None:
    made, x = qnn.quantize_model(model()), drawn(5, 64)
    expected = made(x)
    assert qnn.count_parameters(made) == 2 * 64 * 32 + 32 + 64
    assert qnn.dequantize_model(made) is made
    assert [type(m) for m in made] == [nn.Linear, nn.ReLU, nn.Linear]
    near(made(x), expected)


@checks("qkern.nn.quantization_report", "qkern.nn.QuantizationReport", "qkern.nn.DenseWeights")
def what_stays_dense_is_reported() -> None:
    made = qnn.quantize_model(model(), targets=["0"])
    report = qnn.quantization_report(made)
    assert type(report) is qnn.QuantizationReport
    assert report.quantized_elements == 64 * 32
    expected = qnn.DenseWeights("2.weight", ("2.weight",), (64, 32), F32, 4 * 64 * 32, False)
    assert report.dense == (expected,)


@checks("qkern.nn.quantize_head")
def a_head_is_in_4_bits() -> None:
    made, x = nn.ModuleDict({"lm_head": nn.Linear(64, 32)}), drawn(5, 64)
    expected = made["lm_head"](x).detach()
    assert qnn.quantize_head(made) is made
    assert type(made["lm_head"]) is qnn.Linear4bit
    assert 0 < (made["lm_head"](x) - expected).abs().max() < 0.5 * expected.abs().max()


@checks("qkern.nn.from_bnb")
def a_model_of_bitsandbytes_is_turned_over() -> None:
    from bitsandbytes.nn import LinearNF4

    theirs = LinearNF4(64, 32, compress_statistics=False)
    with torch.no_grad():
        theirs.weight.copy_(drawn(32, 64))
    packed = theirs.to("cpu").weight
    made = nn.Sequential(theirs)
    assert qnn.from_bnb(made) is made
    assert type(made[0]) is qnn.Linear4bit
    assert made[0].weight.data_ptr() == packed.data_ptr()
    near(made[0](drawn(5, 64)), drawn(5, 64) @ dense(weight()).T + theirs.bias.detach())


@checks("qkern.nn.lora_layers", "qkern.nn.lora_parameters")
def adapters_of_a_model() -> None:
    made = adapted_model()
    assert list(qnn.lora_layers(made)) == lora_layers(made)
    expected = [p for name, p in made.named_parameters() if "lora_" in name]
    found = list(qnn.lora_parameters(made))
    assert len(found) == 4
    assert {id(p) for p in found} == {id(p) for p in expected}


@checks("qkern.nn.disable_lora", "qkern.nn.merge_lora", "qkern.nn.unmerge_lora")
def adapters_off_and_merged() -> None:
    made, x = adapted_model().eval(), drawn(5, 64)
    layers = [layer for _, layer in lora_layers(made)]
    with torch.no_grad():
        base = made[2].base_layer(made[1](made[0].base_layer(x)))
        expected = made(x)
        assert (expected - base).abs().max() > 0.01
        layers[1].adapter_enabled = False
        half = made(x)
        with qnn.disable_lora(made):
            with qnn.disable_lora(made):
                near(made(x), base)
            near(made(x), base)
        near(made(x), half)
        layers[1].adapter_enabled = True
        qnn.merge_lora(made)
        assert all(layer.merged for layer in layers)
        assert (made(x) - expected).abs().max() < 0.2 * expected.abs().max()
        qnn.unmerge_lora(made)
        assert not any(layer.merged for layer in layers)
        testing.assert_bitwise(made(x), expected)


@checks("qkern.nn.prepare_for_training")
def a_model_ready_to_train() -> None:
    made = qnn.quantize_model(model(BF16), targets=["0"], lora=qnn.LoRAConfig(4)).eval()
    x = drawn(5, 64).to(BF16)
    before = made(x).detach()
    assert qnn.prepare_for_training(made, gradient_checkpointing=False) is made
    assert made.training
    near(made(x), before, 0.02)
    plain = nn.Sequential(nn.Linear(64, 32, dtype=BF16), nn.Linear(32, 8)).requires_grad_(False)
    plain[1].bias.requires_grad_()
    assert type(qnn.prepare_for_training(plain, False)[0]) is qnn.FrozenLinear


@checks("qkern.io.save_adapter", "qkern.io.load_adapter")
def an_adapter_comes_back() -> None:
    made, x = adapted_model(), drawn(5, 64)
    with folder() as path:
        qkern.io.save_adapter(made, path)
        saved = load_file(path / "adapter_model.safetensors")
        assert torch.equal(saved["base_model.model.2.lora_B.weight"], made[2].lora_b)
        other = qnn.quantize_model(model())
        assert qkern.io.load_adapter(other, path) is other
        testing.assert_bitwise(other(x), made(x))


@checks("qkern.io.save_bnb", "qkern.io.load_bnb")
def a_checkpoint_comes_back_frozen() -> None:
    made, x = qnn.quantize_model(model()), drawn(5, 64)
    with folder() as path:
        qkern.io.save_bnb(made, path / "model.safetensors")
        saved = load_file(path / "model.safetensors")
        assert torch.equal(saved["0.weight"].flatten(), made[0].weight.flatten())
        for training in (True, False):
            torch.manual_seed(1)
            other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).train(training)
            assert qkern.io.load_bnb(other, path) is other
            testing.assert_bitwise(other(x), made(x))
            assert not any(p.requires_grad for p in other.parameters())
            assert all(module.training is training for module in other.modules())


def trained(optimizer: type[torch.optim.Optimizer], steps: int = 3, **options: Any) -> Tensor:
    param = nn.Parameter(drawn(4096))
    made = optimizer([param], lr=0.1, **options)
    for step in range(steps):
        param.grad = drawn(4096, seed=step + 1)
        made.step()
    return param.detach()


@checks("qkern.optim.PagedAdamW", "qkern.optim.PagedAdamW8bit", "qkern.optim.PagedAdamW.step")
def steps_are_those_of_adamw() -> None:
    expected = trained(torch.optim.AdamW)
    near(trained(qkern.optim.PagedAdamW), expected)
    in_8_bits = trained(qkern.optim.PagedAdamW8bit)
    assert 0 < (in_8_bits - expected).abs().mean() < 0.02
    assert qkern.optim.PagedAdamW8bit([nn.Parameter(drawn(8))]).param_groups[0]["bits"] == 8
    param = nn.Parameter(drawn(8))
    assert qkern.optim.PagedAdamW([param]).step(lambda: 3.5) == 3.5


@checks("qkern.optim.parameter_groups")
def groups_have_their_options() -> None:
    model = nn.Linear(4, 3)
    groups = qkern.optim.parameter_groups(model, {"bias": {"bits": 8}})
    assert [group.get("bits") for group in groups] == [None, 8]
    assert groups[1]["params"][0] is model.bias


@checks(
    *(
        f"qkern.optim.PagedAdamW.{name}"
        for name in ("add_param_group", "state_dict", "load_state_dict", "held_bytes")
    ),
    "qkern.optim.PagedAdamW.close",
)
def an_optimizers_state() -> None:
    one, two = (nn.Parameter(drawn(8, seed=seed)) for seed in (1, 2))
    optimizer = qkern.optim.PagedAdamW([one], lr=0.1)
    optimizer.add_param_group({"params": [two], "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    for param in (one, two):
        param.grad = torch.ones(8)
    optimizer.step()
    state = optimizer.state_dict()
    near(state["state"][1]["exp_avg"], torch.full((8,), 0.1))
    other = qkern.optim.PagedAdamW([{"params": [one]}, {"params": [two]}])
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    near(other.state_dict()["state"][1]["exp_avg"], torch.full((8,), 0.1))
    with folder() as path:
        file = path / "state"
        param = nn.Parameter(drawn(5000))
        paged = qkern.optim.PagedAdamW([param], path=file)
        assert paged.paging == {}
        param.grad = torch.ones(5000)
        paged.step()
        assert isinstance(paged.held_bytes, int)
        assert paged.held_bytes > 0
        paged.close()
        with pytest.raises((RuntimeError, ValueError), match="closed"):
            paged.step()
        with qkern_resumed(param, file) as resumed:
            assert resumed.state_dict()["state"][0]["step"] == 1


@checks("qkern.optim.PagedAdamW.paging")
def where_moments_are() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_driver, "current", FakeGpu())
        param = nn.Parameter(drawn(8))
        assert qkern.optim.PagedAdamW([param], pager="unified").paging == {"cpu": "managed memory"}


@contextmanager
def qkern_resumed(param: nn.Parameter, file: Path) -> Iterator[qkern.optim.PagedAdamW]:
    optimizer = qkern.optim.PagedAdamW([param], path=file, resume=True)
    try:
        yield optimizer
    finally:
        optimizer.close()


@checks("qkern.optim.ChunkFileError", "qkern.optim.DamagedChunksError")
def damage_is_an_error_of_its_own() -> None:
    assert issubclass(qkern.optim.DamagedChunksError, qkern.optim.ChunkFileError)
    with folder() as path:
        (path / "state").write_bytes(b"no such file")
        with pytest.raises(qkern.optim.ChunkFileError):
            qkern.optim.PagedAdamW([nn.Parameter(drawn(8))], path=path / "state", resume=True)


CASE = Case((3, 64), layout="offset", bits=8)
MATMUL = Case((3, 32, 64))


@checks(*(f"qkern.testing.{name}" for name in ("Case", "Case.numel", "OpSpec.id")))
def a_case_says_what_it_is() -> None:
    assert Case((3, 64)).shape == (3, 64)
    assert CASE.numel == 192
    assert str(CASE) == "fp32-3x64-nf4-b64-8bit-offset"
    assert testing.OPS["linear_4bit"].id(CASE, "cpu") == f"linear_4bit-cpu-{CASE}"


@checks(
    *(f"qkern.testing.OpSpec.{name}" for name in ("op", "writes", "arguments", "by_name", "run")),
    *(
        f"qkern.testing.OpSpec.{name}"
        for name in ("reference", "exact_weight", "multiplies", "rows")
    ),
    "qkern.testing.OpSpec",
)
def an_op_of_the_table() -> None:
    spec = testing.OPS["linear_4bit"]
    inputs = spec.make_inputs(MATMUL, torch.device("cpu"), torch.Generator().manual_seed(0))
    exact = spec.exact_weight(inputs, MATMUL)
    assert exact.shape == (32, 64)
    for (y,) in (spec.run(inputs), spec.reference(inputs)):
        near(y, inputs["x"] @ exact.T)
    assert spec.op.name == "linear_4bit"
    assert torch.equal(spec.arguments(inputs)[0], inputs["x"])
    assert len(spec.arguments(inputs)) == 11
    assert spec.by_name(inputs)["packed"] is inputs["weight"].packed
    assert torch.equal(spec.rows(inputs, slice(1, 3))["x"], inputs["x"][1:3])
    assert spec.writes == ()
    assert spec.flops(MATMUL) == 2 * 3 * 32 * 64
    assert spec.multiplies
    assert not testing.OPS["quantize_4bit"].multiplies
    assert testing.OPS["quantize_4bit"].flops(CASE) == 0
    assert testing.OPS["adamw_step"].writes[0] == "params"
    assert replace(spec, name="other").name == "other"


@checks(*(f"qkern.testing.{n}" for n in ("Target", "Target.activate", "targets")))
def targets_are_run_on() -> None:
    found = [target for target in testing.targets() if target.reason is None]
    assert "reference" in {str(target) for target in found}
    for target in found:
        with target.activate():
            assert backends.selected_name() == target.backend


class Doubling(backends.Backend):
    """One op of its own, and that is wrong."""

    def dequantize_8bit(self, *args: Any) -> Tensor:
        return 2 * reference.dequantize_8bit(*args)


@checks("qkern.testing.check", "qkern.testing.register_target")
def a_backend_is_judged() -> None:
    spec = testing.OPS["dequantize_8bit"]
    testing.check(spec, spec.cases[0], Target("reference"))
    wrong = Target(Doubling("doubling"))
    with pytest.raises(AssertionError, match="differ"):
        testing.check(spec, spec.cases[-1], wrong)
    from qkern.testing import _targets

    try:
        testing.register_target(wrong)
        assert wrong in _targets._registered_targets
        with pytest.raises(ValueError, match="registered already"):
            testing.register_target(wrong)
    finally:
        _targets._registered_targets.clear()


@checks(
    *(f"qkern.testing.{n}" for n in ("assert_bitwise", "assert_matmul", "matmul_error")),
    "qkern.testing.assert_product",
)
def judges_notice() -> None:
    x, w = drawn(20, 64), drawn(32, 64, seed=1)
    testing.assert_bitwise(x, x.clone())
    with pytest.raises(AssertionError, match="1 of 1280 differ"):
        testing.assert_bitwise(x, x.index_put((torch.tensor(3), torch.tensor(4)), x[3, 4] + 1))
    testing.assert_matmul(x @ w.T, x, w)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_matmul(x @ w.T * 1.01, x, w)
    before = drawn(20, 32, seed=2)
    testing.assert_product(before + 2 * x @ w.T, x, w.T, 2.0, before)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_product(before + 2 * x @ w.T, x, w.T, 2.0)
    one = torch.ones(2, 2, dtype=torch.float64)
    error = testing.matmul_error(1 + 0.25 * torch.eye(2), one, one)
    assert (error.max, round(error.rms, 4)) == (0.25, 0.1768)


@checks("qkern.testing.MatmulError")
def an_error_has_two_figures() -> None:
    assert testing.MatmulError(1.0, 2.0).max == 2.0


@checks(
    *(f"qkern.testing.{n}" for n in ("codebook_tensor", "map_tensors", "neighbours", "tie_values")),
    *(f"qkern.testing.{n}" for n in ("poisoned_outputs", "with_layout")),
)
def inputs_that_stress() -> None:
    codebook = testing.codebook_tensor(Case((1,), format="custom", codebook="asymmetric"))
    assert codebook.tolist() == pytest.approx(testing.CODEBOOKS["asymmetric"])
    assert testing.map_tensors([torch.ones(2), 3], lambda t: t + 1)[0].tolist() == [2, 2]
    around = testing.neighbours(torch.ones(1))
    assert around.tolist() == [[1 - 2**-24, 1, 1 + 2**-23]]
    ties = testing.tie_values([-1.0, 0.5, 1.0], torch.tensor([2.0]), F32, 32)
    assert ties[0, 0] == 2
    assert {-0.5, 1.5} <= set(ties.flatten().tolist())
    with testing.poisoned_outputs():
        assert torch.empty(4).isnan().all()
    rows = testing.with_layout(drawn(3, 4), "rows")
    assert torch.equal(rows, drawn(3, 4))
    assert rows.stride(0) > 4


@checks(
    *(f"qkern.backends.{name}" for name in ("use", "select", "selected_name", "available")),
    *(f"qkern.backends.Backend{name}" for name in ("", ".has", ".missing_reason", ".unfit_reason")),
)
def a_backend_is_chosen() -> None:
    assert backends.available()["reference"] is None
    assert set(backends.available("cuda")) == {"cuda", "triton", "reference"}
    codes, absmax = qkern.quantize_8bit(drawn(64))
    right = qkern.dequantize_8bit(codes, absmax)
    own = Doubling("doubling")
    assert own.has("dequantize_8bit")
    assert own.missing_reason() is own.unfit_reason(torch.device("cpu")) is None
    before = backends.selected_name()
    with backends.use(own):
        assert backends.select(torch.device("cpu")) is own
        assert backends.selected_name() == "doubling"
        testing.assert_bitwise(qkern.dequantize_8bit(codes, absmax), 2 * right)
    with backends.use("reference"):
        assert backends.selected_name() == "reference"
    assert backends.selected_name() == before
    assert not own.has("no_such_op")
