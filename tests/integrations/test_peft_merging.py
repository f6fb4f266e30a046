"""Merging LoRA into 4-bit weights, and taking it out again to the very codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qkern.nn import Embedding4bit, Linear4bit, dequantize_model, quantize_model
from tests.integrations.twins import IDS, dense, error, linears, quantized, shake

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")


def adapted(model: nn.Module | None = None, std: float = 0.05, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 8} | options)
    torch.manual_seed(0)
    return shake(get_peft_model(quantized() if model is None else model, config), std).eval()


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every tensor that is not LoRA's."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_unmerging_gives_the_very_codes(name: str, double_quant: bool) -> None:
    model = adapted(quantized(double_quant=double_quant), **OPTIONS[name])
    before, logits = codes(model), model(IDS).logits
    parameters = dict(model.named_parameters())
    model.merge_adapter()
    assert not same(codes(model), before)
    model.merge_adapter()  # all are merged already
    assert error(model(IDS).logits, logits) > 1e-4
    model.unmerge_adapter()
    assert same(codes(model), before)
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("name", OPTIONS)
def test_merged_weights_are_the_sum_quantised_once(name: str) -> None:
    model = adapted(**OPTIONS[name])
    twin = adapted(dense(quantized()), **OPTIONS[name])
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, False)
    merged, wanted = model.merge_and_unload(), twin.merge_and_unload()
    for path, layer in linears(merged):
        expected = Linear4bit.from_linear(wanted.get_submodule(path))
        got = layer.quantized.dequantize(torch.float32)
        assert error(got, expected.quantized.dequantize(torch.float32)) < 1e-3
        # The error of NF4 of a Gaussian matrix is 0.092.
        assert error(got, wanted.get_submodule(path).weight) < 0.1


@pytest.mark.parametrize("name", OPTIONS)
def test_dequantised_first_nothing_is_rounded_to_four_bits(name: str) -> None:
    model = adapted(**OPTIONS[name])
    logits = model(IDS).logits
    dequantize_model(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    assert error(model(IDS).logits, logits) < 1e-5
    merged = model.merge_and_unload()
    assert error(merged(IDS).logits, logits) < 1e-5
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_that_were_transposed(name: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 32}
    model = quantize_model(GPT2LMHeadModel(GPT2Config(**sizes)).eval())
    twin = dequantize_model(copy.deepcopy(model))
    assert isinstance(twin.transformer.h[0].attn.c_attn, Conv1D)
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} | OPTIONS[name]
    both = adapted(model, **options), adapted(twin, **options)
    logits = both[0](IDS).logits
    assert error(logits, both[1](IDS).logits) < 1e-5
    both[0].merge_adapter()
    both[0].unmerge_adapter()
    dequantize_model(both[0])
    assert error(both[0](IDS).logits, logits) < 1e-5
    assert error(both[0].merge_and_unload()(IDS).logits, logits) < 1e-5


def test_dequantised_while_merged_it_cannot_go_back() -> None:
    model = adapted()
    model.merge_adapter()
    dequantize_model(model)
    with pytest.raises(RuntimeError, match="base_layer: is a Linear now"):
        model.unmerge_adapter()


# Of the weight's norm, the update's: what merging into NF4 loses of the update, by its own norm.
LOST = {0.01: (1.0, 1.5), 0.1: (0.7, 0.95), 0.3: (0.3, 0.33), 1.0: (0.12, 0.14)}


@pytest.mark.parametrize("gaussian", [False, True])
def test_what_is_lost_of_a_small_update(gaussian: bool) -> None:
    """The documented figures: nothing of an update of a hundredth of the weight survives."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False)
    if gaussian:
        nn.init.normal_(linear.weight, std=0.02)
    layer = Linear4bit.from_linear(linear)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=8, target_modules=["0"]))
    before = layer.quantized.dequantize()
    for part, (least, most) in LOST.items():
        shake(model)
        lora = model.base_model.model[0]
        scale = part * before.norm() / lora.get_delta_weight("default").norm()
        lora.lora_B.default.weight.data *= scale
        delta = lora.get_delta_weight("default").detach()
        model.merge_adapter()
        change = layer.quantized.dequantize() - before
        model.unmerge_adapter()
        assert least < error(change, delta) < most, part
        arrived = float((change * delta).sum() / delta.norm() ** 2)
        assert arrived < 0.05 if part == 0.01 else arrived > 0.8, part


def test_two_adapters_are_quantised_together() -> None:
    def prepared() -> Any:
        model = adapted()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return shake(model, seed=4)

    one, other = prepared(), prepared()
    before = codes(one)
    one.merge_adapter(["default", "second"])
    other.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        other.merge_adapter(["second"])
    assert same(codes(one), codes(other))
    other.unmerge_adapter()
    assert same(codes(other), before)


def test_a_disabled_merged_model_answers_as_the_base() -> None:
    model = quantized()
    base = model(IDS).logits
    model = adapted(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("safe", [False, True])
def test_what_is_not_finite_is_not_merged(safe: bool) -> None:
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = codes(layer)
    layer.lora_B.default.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="default: the merged weight is not finite"):
        layer.merge(safe_merge=safe)
    assert same(codes(layer), before)
    assert not layer.merged


def test_merging_more_that_fails_leaves_what_is_merged() -> None:
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = codes(layer)
    layer.merge(adapter_names=["default"])
    merged = codes(layer)
    layer.lora_B.second.weight.data.fill_(torch.inf)
    with (
        pytest.warns(UserWarning, match="additionally"),
        pytest.raises(ValueError, match="second: the merged weight"),
    ):
        layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default"]
    assert same(codes(layer), merged)
    layer.unmerge()
    assert same(codes(layer), before)


def test_a_bias_of_lora_is_merged_into_the_base() -> None:
    layer = Linear4bit.from_linear(nn.Linear(64, 96))
    config = LoraConfig(r=4, target_modules=["0"], lora_bias=True)
    model = shake(get_peft_model(nn.Sequential(layer), config))
    before, bias = codes(model), layer.bias
    added = model.base_model.model[0].lora_B.default.bias * 2  # lora_alpha is 8
    model.merge_adapter()
    assert torch.allclose(layer.bias, bias + added)
    x = torch.randn(3, 64)
    merged = model(x)
    model.unmerge_adapter()
    assert layer.bias is bias
    assert same(codes(model), before)
    assert error(merged, model(x)) < 0.1


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_with_no_place_is_refused() -> None:
    model = adapted(lora_bias=True)
    before = codes(model)
    with pytest.raises(RuntimeError, match="default: has a bias"):
        model.merge_adapter()
    assert same(codes(model), before)


def test_shared_weights_are_merged_for_their_layer_alone() -> None:
    first = Linear4bit.from_linear(nn.Linear(64, 64))
    model = nn.ModuleDict({"a": first, "b": first.with_same_weight(None)})
    before = model["b"].quantized.dequantize()
    tuned = shake(get_peft_model(model, LoraConfig(r=4, target_modules=["a"])), 0.3)
    tuned.merge_adapter()
    assert torch.equal(model["b"].quantized.dequantize(), before)
    assert error(first.quantized.dequantize(), before) > 0.05


def test_a_merged_model_moves_and_is_copied_with_its_old_codes() -> None:
    model = adapted()
    before = codes(model)
    model.merge_adapter()
    copied = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    copied.unmerge_adapter()
    kept = codes(copied)
    assert all(torch.equal(kept[n], t) for n, t in before.items() if not t.is_floating_point())
    model.to("meta").unmerge_adapter()
    assert all(t.is_meta for t in model.state_dict().values())
    with pytest.raises(RuntimeError, match="weight: is on the meta device"):
        model.merge_adapter()


def test_merging_an_embedding_in_four_bits() -> None:
    torch.manual_seed(0)
    table = Embedding4bit.from_embedding(nn.Embedding(64, 32))
    model = nn.Sequential(table)
    tuned = shake(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])), 0.3)
    ids = torch.arange(20)
    base = dense_embedding(table)
    layer = tuned.base_model.model[0]
    want = base + (layer.lora_embedding_B.default @ layer.lora_embedding_A.default).T * 2
    assert error(tuned(ids), want[:20]) < 1e-5
    tuned.merge_adapter()
    assert error(tuned(ids), want[:20]) < 0.12
    tuned.unmerge_adapter()
    assert torch.equal(dense_embedding(table), base)


def dense_embedding(table: Embedding4bit) -> torch.Tensor:
    return table.quantized.dequantize(torch.float32)


def test_the_adapter_of_a_scaled_embedding_is_scaled_too() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    scaled = Gemma3TextScaledWordEmbedding(64, 32, 0, embed_scale=4.0)
    values = Embedding4bit.from_embedding(scaled)
    twin = copy.deepcopy(scaled)
    twin.weight.data = dense_embedding(values)
    config = LoraConfig(r=4, target_modules=["0"])
    both = [shake(get_peft_model(nn.Sequential(m), config), 0.3) for m in (values, twin)]
    ids = torch.arange(20)
    assert error(both[0](ids), both[1](ids)) < 1e-5


def test_minor_components_merge_as_they_compute() -> None:
    model = adapted(target_modules=["q_proj"], init_lora_weights="mica")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.eye(64)
    base = layer.base_layer.quantized.dequantize()
    want = layer(x).T
    assert error(want, base) > 0.01
    layer.merge()
    assert error(layer(x).T, want) < 0.1
    layer.unmerge()
    assert torch.equal(layer.base_layer.quantized.dequantize(), base)
