"""Adapters on experts: values, gradients, merging, selection, training of a mixture."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import qkern
from qkern import nn as qnn
from tests.experts_of_models import dense as mixture

E, N, K, R = 4, 48, 64, 8
ENDS = torch.tensor([2, 2, 7, 9])
each_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])


def adapted(shared: bool = False, dropout: float = 0.0, **options: object) -> qnn.LoRAExperts:
    torch.manual_seed(0)
    base = qnn.Experts4bit.from_dense(torch.randn(E, N, K), block_size=32, **options)
    layer = qnn.LoRAExperts(base, R, 2 * R, dropout, shared=shared)
    with torch.no_grad():
        layer.lora_b.normal_()
    return layer


def dense(layer: qnn.LoRAExperts, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float64, expert by expert, with gradients."""
    weight = layer.quantized.dequantize().double()
    parts, begin = [], 0
    for expert, end in enumerate(ENDS.tolist()):
        a = (layer.lora_a if layer.shared else layer.lora_a[expert]).double()
        b = (layer.lora_b if layer.shared else layer.lora_b[expert]).double()
        own = x[begin:end].double()
        y = own @ weight[expert].T + layer.scaling * (own @ a.T) @ b.T
        parts.append(y if bias is None else y + bias[expert].double())
        begin = end
    return torch.cat([*parts, torch.zeros(len(x) - begin, N, dtype=torch.float64)])


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


@each_or_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(shared: bool, dtype: torch.dtype) -> None:
    layer = adapted(shared)
    x = torch.randn(10, K).to(dtype).requires_grad_()
    bias = torch.randn(E, N).to(dtype).requires_grad_()
    dy = torch.randn(10, N).to(dtype)
    leaves = (x, layer.lora_a, layer.lora_b, bias)
    y = layer(x, ENDS, bias=bias)
    assert y.dtype == dtype
    assert (y[9:] == 0).all()
    expected = dense(layer, x, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert_near(y, expected, tolerance)
    found = torch.autograd.grad(y, leaves, dy)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, dy.double()), strict=True):
        assert_near(ours, theirs, tolerance)
    assert (found[0][9:] == 0).all()


@each_or_shared
def test_gradients_of_gradients(shared: bool) -> None:
    layer = adapted(shared)
    x = torch.randn(10, K, requires_grad=True)
    leaves = (x, layer.lora_a, layer.lora_b)
    found = []
    for product in (lambda x: layer(x, ENDS), lambda x: dense(layer, x)):
        (dx,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)


def test_a_compiled_graph_computes_the_same() -> None:
    layer = adapted()
    x = torch.randn(10, K, requires_grad=True)
    leaves = (x, layer.lora_a, layer.lora_b)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x, ENDS), fullgraph=True)
    results = []
    for product in (layer, lambda x, ends: compiled(x)):
        y = product(x, ENDS)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert_near(other, one)


def test_a_fresh_adapter_changes_nothing_and_dropout_only_in_training() -> None:
    layer = adapted(dropout=0.5)
    x = torch.randn(10, K)
    fresh = qnn.LoRAExperts(layer.base_layer, R, R)
    assert_near(fresh(x, ENDS), layer.base_layer(x, ENDS))
    assert torch.equal(layer.eval()(x, ENDS), layer(x, ENDS))
    layer.train()
    first, second = layer(x, ENDS), layer(x, ENDS)
    assert not torch.equal(first, second)


@each_or_shared
def test_merging_quantises_the_sum_and_can_be_undone(shared: bool) -> None:
    layer = adapted(shared).eval()
    x = torch.randn(10, K)
    before = layer(x, ENDS)
    layer.merge()
    merged = layer(x, ENDS)
    sums = layer.quantized.dequantize() + layer.scaling * (
        layer.of_each(layer.lora_b) @ layer.of_each(layer.lora_a)
    )
    again = qkern.quantize_experts(sums.detach(), block_size=32)
    assert torch.equal(merged, qkern.grouped_linear_4bit(x, again, ENDS))
    assert "lora_a" in layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer(x, ENDS), before)


def test_hooks_on_the_base_are_called() -> None:
    layer, seen = adapted(), []
    x = torch.randn(10, K, requires_grad=True)
    expected = layer(x, ENDS)
    layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    y = layer(x, ENDS)
    assert seen
    assert_near(y, expected)
    (found,) = torch.autograd.grad(y.sum(), layer.lora_a, retain_graph=True)
    assert_near(found, torch.autograd.grad(expected.sum(), layer.lora_a)[0])


def test_a_compute_dtype_is_the_products() -> None:
    layer = adapted(compute_dtype=torch.float32)
    x = torch.randn(10, K).bfloat16()
    y = layer(x, ENDS)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float(), ENDS).bfloat16())


def test_copies_and_state_dicts() -> None:
    layer = adapted()
    x = torch.randn(10, K)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, ENDS), layer(x, ENDS))
    fresh = qnn.LoRAExperts(copy.deepcopy(layer.base_layer), R, 2 * R)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, ENDS), layer(x, ENDS))


def test_what_is_refused() -> None:
    base = adapted().base_layer
    with pytest.raises(TypeError, match="base_layer: got Linear; takes an Experts4bit"):
        qnn.LoRAExperts(torch.nn.Linear(2, 2), 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r: got 0"):
        qnn.LoRAExperts(base, 0, 1)
    x, a, b = torch.randn(10, K), torch.randn(E, R, K), torch.randn(E, N, R)
    qw = base.quantized
    with pytest.raises(ValueError, match=r"lora_a: got shape \[3, 8, 64\]; takes \[4, r, 64\]"):
        qkern.grouped_lora_linear(x, qw, ENDS, a[:3], b, 1.0)
    with pytest.raises(ValueError, match=r"lora_b: got shape \[4, 48, 7\]; takes \[4, 48, 8\]"):
        qkern.grouped_lora_linear(x, qw, ENDS, a, b[..., :7], 1.0)
    with pytest.raises(ValueError, match=r"dropout_p: got 1\.0"):
        qkern.grouped_lora_linear(x, qw, ENDS, a, b, 1.0, dropout_p=1.0)


@each_or_shared
def test_a_mixture_is_trained(shared: bool) -> None:
    """With checkpointing and the loss that balances the experts, down to the first layer."""
    model = mixture()
    config = qnn.LoRAConfig(r=4, share_experts=shared)
    qnn.quantize_model(model, block_size=32, lora=config)
    kinds = [type(layer) for _, layer in qnn.lora_layers(model)]
    assert kinds.count(qnn.LoRAExperts) == 4
    qnn.prepare_for_training(model)
    ids = torch.randint(128, (4, 16))
    optimizer = torch.optim.AdamW(qnn.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(6):
        out = model(ids, labels=ids, use_cache=False)
        assert out.aux_loss > 0
        out.loss.backward()
        losses.append(out.loss.item())
        # B starts at zero, so that in the first step A has no gradient.
        assert all(layer.lora_b.grad.abs().sum() > 0 for _, layer in qnn.lora_layers(model))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    with qnn.disable_lora(model), torch.no_grad():
        base = model(ids, use_cache=False).logits
    model.eval()
    qnn.merge_lora(model)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["gate_up_proj"], 2),
        (["experts.down_proj"], 2),
        ([r"q_proj"], 0),
        (r"model\.layers\.1\.mlp\.experts\..*", 2),
    ],
)
def test_targets_name_experts(targets: object, count: int) -> None:
    config = qnn.LoRAConfig(r=2, targets=targets)
    at_once = mixture()
    qnn.quantize_model(at_once, block_size=32, lora=config)
    later = qnn.add_lora(qnn.quantize_model(mixture(), block_size=32), config)
    for model in (at_once, later):
        kinds = [type(layer) for _, layer in qnn.lora_layers(model)]
        assert kinds.count(qnn.LoRAExperts) == count
        assert len(kinds) > 0


def test_a_model_with_adapters_on_experts_is_not_dequantised() -> None:
    model = qnn.quantize_model(mixture(), block_size=32, lora=qnn.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"gate_up_proj has adapters, and its experts would"):
        qnn.dequantize_model(model)
    assert any(isinstance(module, qnn.Experts4bit) for module in model.modules())


def test_skipped_experts_get_no_adapter_and_the_report_counts_none() -> None:
    model = mixture()
    qnn.quantize_model(model, block_size=32)
    qnn.add_lora(model, qnn.LoRAConfig(r=2), skip=["experts"])
    assert not any(isinstance(layer, qnn.LoRAExperts) for _, layer in qnn.lora_layers(model))
    model = mixture()
    _, report = qnn.quantize_model(
        model, block_size=32, lora=qnn.LoRAConfig(r=2), return_report=True
    )
    assert not any("lora" in weights.name for weights in report.dense)
    assert report.quantized_elements > 0.8 * qnn.count_parameters(model, exclude_embeddings=True)
