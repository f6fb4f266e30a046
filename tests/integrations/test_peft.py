"""PEFT's LoRA on 4-bit layers: what is dispatched where, and what it computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from qkern.nn import Embedding4bit, Linear4bit, LoRALinear
from tests.integrations.twins import IDS, dense, error, linears, quantized, shake

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")


def adapted(model: nn.Module | None = None, name: str = "default", **options: Any) -> Any:
    """``model`` or a 4-bit one with LoRA that is at work, in evaluation mode."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 8} | options)
    torch.manual_seed(0)
    model = quantized() if model is None else model
    return shake(get_peft_model(model, config, adapter_name=name)).eval()


def one_layer(bias: bool = True, **options: Any) -> Any:
    """PEFT's layer on a `Linear4bit` of 64 to 96, and its model."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 96, bias=bias)))
    return adapted(model, target_modules=["0"], **options).base_model.model[0]


def node_names(y: torch.Tensor) -> set[str]:
    """The names of all nodes in the graph of ``y``."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo += [before for before, _ in node.next_functions]
    return found


def test_every_linear_layer_gets_a_layer_of_qkern(qkern_peft: Any) -> None:
    model = adapted()
    wrapped = [m for m in model.modules() if isinstance(m, qkern_peft.QKernLinear)]
    assert len(wrapped) == 7
    assert all(isinstance(m.base_layer, Linear4bit) for m in wrapped)
    assert isinstance(model.get_base_model().lm_head, nn.Linear)


def test_dense_layers_and_models_stay_pefts_own(qkern_peft: Any) -> None:
    for layer in adapted(dense(quantized())).modules():
        assert not isinstance(layer, qkern_peft.QKernLinear)


def test_without_registering_peft_makes_its_own_layer(qkern_peft: Any) -> None:
    qkern_peft.unregister()
    assert not qkern_peft.registered()
    assert type(one_layer()) is peft.tuners.lora.Linear
    qkern_peft.register()
    qkern_peft.register()
    assert type(one_layer()) is qkern_peft.QKernLinear
    qkern_peft.unregister()
    assert type(one_layer()) is peft.tuners.lora.Linear


def test_a_class_of_the_configuration_comes_first() -> None:
    class Mine(peft.tuners.lora.Linear):
        pass

    config = LoraConfig(r=4, target_modules=["0"])
    config._register_custom_module({Linear4bit: Mine})
    model = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 96)))
    assert type(get_peft_model(model, config).base_model.model[0]) is Mine


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_are_those_of_the_dense_model(name: str) -> None:
    model = quantized()
    other = adapted(dense(model), **OPTIONS[name])
    mine = adapted(model, **OPTIONS[name])
    losses = [m(IDS, labels=IDS).loss for m in (mine, other)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-5)
    gradients = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (mine, other)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == (21 if name == "dora" else 14)
    for key, gradient in gradients[1].items():
        assert error(gradients[0][key], gradient) < 1e-4, key


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_one_function_computes_base_and_adapter(bias: bool, lora_bias: bool) -> None:
    layer = one_layer(bias, lora_bias=lora_bias)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    assert y.grad_fn.name() == "LoRALinear4bitBackward"
    expected = peft.tuners.lora.Linear.forward(layer, x)
    assert "LoRALinear4bitBackward" not in node_names(expected)
    assert error(y, expected) < 1e-5


def test_it_computes_the_bits_of_qkerns_own_layer() -> None:
    layer = one_layer()
    own = LoRALinear(layer.base_layer, 4, 8)
    own.lora_a.data, own.lora_b.data = layer.lora_A.default.weight, layer.lora_B.default.weight
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 64).to(dtype)
        assert torch.equal(layer(x), own(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert torch.equal(layer(x), own(x))


@pytest.mark.parametrize("names", [["default"], ["default", "second"]])
def test_a_compute_dtype_is_that_of_the_whole_sum(names: list[str]) -> None:
    torch.manual_seed(0)
    base = Linear4bit.from_linear(nn.Linear(64, 96), compute_dtype=torch.bfloat16)
    model = adapted(nn.Sequential(base), target_modules=["0"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    layer = shake(model).base_model.model[0]
    layer.set_adapter(names)
    x = torch.randn(5, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    base.compute_dtype = None
    assert torch.equal(y, layer(x.bfloat16()).float())
    assert 1e-4 < error(y, layer(x)) < 0.01


def test_dropout_is_of_training_alone() -> None:
    layer = one_layer(lora_dropout=0.5)
    x = torch.randn(64, 64, requires_grad=True)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert first.grad_fn.name() == "LoRALinear4bitBackward"
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    mean = torch.stack([layer(x) for _ in range(300)]).mean(0)
    assert error(mean, layer.eval()(x)) < 0.03


def test_two_active_adapters_are_one_function() -> None:
    model = adapted()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    shake(model, seed=2)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    assert y.grad_fn.name() == "LoRALinear4bitBackward"
    assert error(y, peft.tuners.lora.Linear.forward(layer, x)) < 1e-5
    down = model.get_base_model().model.layers[0].mlp.down_proj
    assert (
        error(down(torch.ones(1, 96)), peft.tuners.lora.Linear.forward(down, torch.ones(1, 96)))
        < 1e-5
    )


def test_switching_disabling_and_deleting_adapters() -> None:
    model = quantized()
    base = model(IDS).logits
    model = adapted(model)
    first = model(IDS).logits
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    shake(model, seed=3)
    model.set_adapter("second")
    second = model(IDS).logits
    assert error(second, first) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    model.set_adapter("default")
    default = model(IDS).logits
    model.delete_adapter("second")
    assert torch.equal(model(IDS).logits, default)
    assert not any("second" in name for name in model.state_dict())


def test_a_batch_of_several_adapters() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    shake(model, seed=3)
    ids = IDS[[0, 0, 0]]
    mixed = model(ids, adapter_names=["default", "__base__", "second"]).logits
    model.set_adapter("default")
    assert error(mixed[0], model(IDS[:1]).logits[0]) < 1e-5
    with model.disable_adapter():
        assert error(mixed[1], model(IDS[:1]).logits[0]) < 1e-5
    model.set_adapter("second")
    assert error(mixed[2], model(IDS[:1]).logits[0]) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_weighted_adapters(kind: str) -> None:
    model = quantized()
    twin = dense(model)
    both = [adapted(model), adapted(twin)]
    for one in both:
        one.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        shake(one, seed=3)
        one.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", kind, density=0.5)
        one.set_adapter("sum")
    assert error(both[0](IDS).logits, both[1](IDS).logits) < 1e-4


def test_hooks_on_the_modules_are_called() -> None:
    layer = one_layer()
    x = torch.randn(5, 64)
    expected = layer(x)
    called = []
    for name in ("base_layer", "lora_A.default", "lora_B.default"):
        module = layer.get_submodule(name)
        handle = module.register_forward_hook(lambda *_, name=name: called.append(name))
        assert error(layer(x), expected) < 1e-5
        handle.remove()
    assert called == ["base_layer", "lora_A.default", "lora_B.default"]


def test_what_replaced_a_factor_is_called() -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = one_layer()
    x = torch.randn(5, 64)
    base = layer.base_layer(x)
    expected = base + 2 * (layer(x) - base)
    parametrize.register_parametrization(layer.lora_A.default, "weight", Twice())
    assert error(layer(x), expected) < 1e-5


def test_a_scaling_that_is_a_tensor_is_taken() -> None:
    layer = one_layer()
    x = torch.randn(5, 64)
    expected = layer(x)
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert error(layer(x), expected) < 1e-5


def test_scaling_and_set_scale() -> None:
    layer = one_layer()
    x = torch.randn(5, 64)
    base = layer.base_layer(x)
    expected = base + 3 * (layer(x) - base)
    layer.set_scale("default", 3.0)
    assert error(layer(x), expected) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 14
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_bfloat16_model_keeps_its_dtype() -> None:
    model = adapted(quantized(torch.bfloat16))
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    twin = adapted(dense(quantized(torch.bfloat16)))
    assert error(logits.float(), twin(IDS).logits.float()) < 0.02


def test_copies_and_pickles() -> None:
    model = adapted()
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, expected)


def test_compiled_whole() -> None:
    layer = one_layer(lora_dropout=0.1)
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), layer(x)) < 1e-6


def test_what_transformers_own_methods_add() -> None:
    model = quantized()
    base = model(IDS).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"QKernLinear"}
    shake(model)
    assert error(model(IDS).logits, base) > 1e-3
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, base)


def test_counts_are_of_the_weights_that_codes_stand_for() -> None:
    model = quantized()
    expected = adapted(dense(model)).get_nb_trainable_parameters()
    assert adapted(model).get_nb_trainable_parameters() == expected
    tied = nn.ModuleDict({"a": Linear4bit.from_linear(nn.Linear(64, 64, bias=False))})
    tied["b"] = tied["a"].with_same_weight(None)
    got = adapted(tied, target_modules=["a"]).get_nb_trainable_parameters()
    assert got == (4 * 128, 64 * 64 + 4 * 128)


def test_codes_are_no_target_parameters() -> None:
    model = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 96)))
    config = LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"])
    with pytest.raises(ValueError, match=r"target_parameters: got weight of a Linear4bit"):
        get_peft_model(model, config)


def test_four_bit_modules_cannot_be_trained_whole() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(ValueError, match=r"ModulesToSaveWrapper: got a 4-bit Linear4bit"):
        get_peft_model(quantized(), config)
    model = quantized()
    model.set_input_embeddings(Embedding4bit.from_embedding(model.get_input_embeddings()))
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match=r"TrainableTokensWrapper: got a 4-bit Embedding4bit"):
        get_peft_model(model, config)


def test_modules_to_save_are_trained_beside() -> None:
    model = adapted(modules_to_save=["lm_head"]).train()
    model(IDS, labels=IDS).loss.backward()
    saved = model.get_base_model().lm_head.modules_to_save.default
    assert saved.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kasa_config", "velora_config"])
def test_variants_that_compute_with_the_weight_are_refused(name: str) -> None:
    made = {"kasa_config": "KasaConfig", "velora_config": "VeloraConfig"}[name]
    config = LoraConfig(r=4, target_modules=["q_proj"])
    setattr(config, name, getattr(peft.tuners.lora.config, made)())
    with pytest.raises(ValueError, match=rf"{name}: cannot be used with the 4-bit weight of model"):
        get_peft_model(quantized(), config)


def test_preparing_for_training_in_few_bits() -> None:
    model = quantized(torch.bfloat16)
    model.model.layers[0].self_attn.q_proj.bias = None
    codes = {name: layer.weight.clone() for name, layer in linears(model)}
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared.is_gradient_checkpointing
    assert not hasattr(prepared, "is_loaded_in_4bit")
    assert not any(p.requires_grad for p in prepared.parameters())
    for name, parameter in prepared.named_parameters():
        if parameter.is_floating_point():
            assert parameter.dtype == torch.float32, name
    for name, layer in linears(prepared):
        assert torch.equal(layer.weight, codes[name])
    assert prepared.get_input_embeddings()(IDS).requires_grad
    model = adapted(prepared).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_loading_a_saved_adapter_dispatches_too(tmp_path: Any, qkern_peft: Any) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.load_adapter(tmp_path, adapter_name="other")
    again.set_adapter("other")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    layers = [m for m in again.modules() if hasattr(m, "lora_A")]
    assert {type(m) for m in layers} == {qkern_peft.QKernLinear}
    plain = quantized()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_other_tuners_are_not_merged_into_codes() -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(quantized(), config)
    model(IDS)
    with pytest.raises(ValueError, match=r"q_proj: got a peft\.tuners\.ia3\.layer\.Linear"):
        model.merge_adapter()
