"""Which experts of a model are quantised, what is refused, and adapters beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import nn as qnn
from qkern.nn import Experts4bit
from tests.experts_of_models import IDS, MODELS, dense, eager, experts_of, near, quantised


def test_skipped_experts_stay_dense() -> None:
    for skip in (["experts"], ["model.layers.0.mlp.experts", "layers.1.mlp.experts"]):
        before = dense()
        parameters = {n: p for n, p in before.named_parameters() if ".experts." in n}
        model = qnn.quantize_model(before, block_size=32, skip=skip)
        assert not experts_of(model)
        assert parameters.items() <= dict(model.named_parameters()).items()
        assert not any(p.requires_grad for p in parameters.values())
        assert model.config._experts_implementation != "qkern"
        assert isinstance(model.model.layers[0].self_attn.q_proj, qnn.Linear4bit)


CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["down_proj"]}, r".*\.down_proj"),
    ({"targets": ["experts.gate_up_proj"]}, r".*\.gate_up_proj"),
    ({"targets": ["layers.1.mlp.experts.down_proj"]}, r"model\.layers\.1\.mlp\.experts\.down_proj"),
    ({"targets": r"model\.layers\.0\.mlp\.experts\..*"}, r"model\.layers\.0\..*"),
    ({"targets": ["q_proj", "down_proj"], "skip": ["layers.0"]}, r".*layers\.1\..*\.down_proj"),
    ({"skip": ["experts.down_proj"]}, r".*\.gate_up_proj"),
    ({"skip": ["down_proj", "layers.0.mlp"]}, r".*layers\.1\..*\.gate_up_proj"),
    ({"targets": ["q_proj"]}, "none"),
]


@pytest.mark.parametrize(("options", "chosen"), CHOICES, ids=[str(o) for o, _ in CHOICES])
def test_targets_and_skip_choose_tensors(options: dict[str, Any], chosen: str) -> None:
    """What is mixed, with one of two tensors dense, computes what eager does."""
    before = dense()
    every = [n for n, p in before.named_parameters() if ".experts." in n]
    assert len(every) == 4
    model = qnn.quantize_model(before, block_size=32, **options)
    assert set(experts_of(model)) == {n for n in every if re.fullmatch(chosen, n)}
    other = eager(model)
    results = []
    for each in (model, other):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = each(inputs_embeds=embedded, use_cache=False).logits
        results.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), embedded)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_one_of_two_transposed_tensors_in_4_bits(name: str, projection: str) -> None:
    model = qnn.quantize_model(dense(name), block_size=32, targets=[f"experts.{projection}"])
    assert {n.rpartition(".")[2] for n in experts_of(model)} == {projection}
    assert all(module.transposed for module in experts_of(model).values())
    with torch.no_grad():
        near(model(IDS).logits, eager(model)(IDS).logits)


def test_a_target_that_means_a_module_or_nothing_is_refused() -> None:
    model = dense()
    with pytest.raises(TypeError, match=r"targets: model\.layers\.0\.mlp\.experts is a Mixtral"):
        qnn.quantize_model(model, targets=["experts"])
    with pytest.raises(ValueError, match=r"targets: 'experts\.up_proj' matches no linear layer"):
        qnn.quantize_model(model, targets=["experts.up_proj"])
    assert not experts_of(model)


@pytest.mark.parametrize(
    "options", [{}, {"targets": ["down_proj"]}, {"targets": r".*experts\.(gate_up|down)_proj"}]
)
def test_quantising_twice_changes_nothing(options: dict[str, Any]) -> None:
    model = quantised(**options)
    before = {n: (type(m), id(m)) for n, m in model.named_modules()}
    assert qnn.quantize_model(model, block_size=32, **options) is model
    assert {n: (type(m), id(m)) for n, m in model.named_modules()} == before
    if options:
        message = r"targets: model\.layers\.0\S* is in 4 bits already, in another format \(num_exp"
        with pytest.raises(ValueError, match=message):
            qnn.quantize_model(model, block_size=64, **options)


def test_dequantised_and_quantised_again() -> None:
    model = qnn.dequantize_model(quantised())
    stacked = {n: p for n, p in model.named_parameters() if ".experts." in n}
    assert [tuple(p.shape) for p in stacked.values()] == [(4, 192, 64), (4, 64, 96)] * 2
    assert not any(p.requires_grad for p in stacked.values())
    with torch.no_grad():
        # Before anybody goes back to eager, too.
        near(model(IDS).logits, eager(quantised())(IDS).logits)
    again = qnn.quantize_model(model, block_size=32, double_quant=False)
    assert len(experts_of(again)) == 4
    with torch.no_grad():
        near(again(IDS).logits, eager(again)(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_report_has_experts_in_4_bits(name: str) -> None:
    model, report = quantised(name, return_report=True)
    assert report == qnn.quantization_report(model)
    assert all(weights.expected for weights in report.dense)
    held = [m for m in model.modules() if isinstance(m, Experts4bit | qnn.Linear4bit)]
    assert report.quantized_elements == sum(m.quantized.numel() for m in held)
    meta = sum(m.quant_meta.nbytes for m in held)
    assert report.quantized_nbytes == sum(m.quantized.nbytes for m in held) + meta


def refused(model: Any, error: type[Exception], message: str, **options: Any) -> None:
    """The call raises, and nothing has changed."""
    before = {n: (type(m), id(m)) for n, m in model.named_modules()}
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        qnn.quantize_model(model, **options)
    assert {n: (type(m), id(m)) for n, m in model.named_modules()} == before
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters


def test_experts_of_which_something_would_be_lost_are_refused() -> None:
    name = r"^model\.layers\.0\.mlp\.experts\.down_proj: "

    def changed(change: Callable[[Any, Any], None]) -> Any:
        model = dense()
        change(*(layer.mlp.experts for layer in model.model.layers))
        return model

    tied = changed(lambda first, second: setattr(second, "down_proj", first.down_proj))
    refused(tied, ValueError, name + r"is also a parameter of model\.layers\.1\.mlp\.experts; skip")
    skipped = qnn.quantize_model(tied, block_size=32, skip=["down_proj"])
    assert {n.rpartition(".")[2] for n in experts_of(skipped)} == {"gate_up_proj"}

    def parametrise(first: Any, _: Any) -> None:
        nn.utils.parametrizations.weight_norm(first, "gate_up_proj")

    refused(changed(parametrise), ValueError, name + "is computed ")

    class Own(nn.Parameter):
        pass

    def subclass(first: Any, _: Any) -> None:
        first.down_proj = Own(first.down_proj.detach())

    refused(changed(subclass), ValueError, name + "is a Own; takes a plain parameter")

    def fewer(first: Any, _: Any) -> None:
        first.down_proj = nn.Parameter(first.down_proj.detach()[:3])

    message = "has 3 experts; takes 4, the module's num_experts"
    refused(changed(fewer), ValueError, name + message)

    def infinite(first: Any, _: Any) -> None:
        first.down_proj.detach()[2, 3, 4] = torch.inf

    message = "expert 2: w: got a NaN or an infinity in block 4 "
    refused(changed(infinite), ValueError, name + message)
    refused(dense(), ValueError, "block_size: got 48; takes", block_size=48)


def test_a_call_that_is_stopped_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = dense(), quantised()
    made = Experts4bit.from_dense.__func__  # type: ignore[attr-defined]
    left = [3]

    def stops(cls: type, *args: Any, **options: Any) -> Experts4bit:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return made(cls, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Experts4bit, "from_dense", classmethod(stops))
        with pytest.raises(KeyboardInterrupt) as stopped:
            qnn.quantize_model(model, block_size=32)
    assert len(experts_of(model)) == 3
    assert "11 of 12 weights are in 4 bits" in "".join(getattr(stopped.value, "__notes__", ()))
    with torch.no_grad():
        model(IDS)
        qnn.quantize_model(model, block_size=32)
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_adapters_train_beside_experts() -> None:
    names = [f"{part}_proj" for part in "qkvo"]
    model = quantised(lora=qnn.LoRAConfig(4, targets=names))
    adapted = [name for name, _ in qnn.lora_layers(model)]
    assert len(adapted) == 8
    assert all(".self_attn." in name for name in adapted)
    qnn.prepare_for_training(model)
    for _, lora in qnn.lora_layers(model):
        nn.init.normal_(lora.lora_b, std=0.1)
    other = eager(model)
    gradients = []
    for each in (model, other):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if "lora_" in n})
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0
        near(gradients[0][name], expected, 1e-4)


class OldExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu())


def test_a_list_of_expert_modules_is_quantised_layer_by_layer() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList(OldExpert() for _ in range(3))})
    x = torch.randn(5, 64)
    qnn.quantize_model(model)
    assert not experts_of(model)
    assert sum(type(m) is qnn.Linear4bit for m in model.modules()) == 6
    with torch.no_grad():
        expected = qkern.linear_4bit(
            x, model.experts[1].up_proj.quantized, model.experts[1].up_proj.bias
        )
        assert torch.equal(model.experts[1].up_proj(x), expected)


def test_modules_that_only_look_like_experts_stay_dense() -> None:
    """Nothing says of these how their tensors lie."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 64))
            self.down_proj = nn.Parameter(torch.randn(2, 64, 64))

    model = nn.ModuleDict({"experts": Experts(), "proj": nn.Linear(64, 64)})
    qnn.quantize_model(model)
    assert not experts_of(model)
    assert type(model.proj) is qnn.Linear4bit


def router_of_a_gate() -> tuple[nn.Module, str]:
    """transformers', whose gate has its router in a linear layer."""
    import transformers

    config = transformers.HunYuanMoEV1Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_topk=2,
        head_dim=16,
        pad_token_id=0,
    )
    return transformers.HunYuanMoEV1ForCausalLM(config), "model.layers.0.mlp.gate.wg"


def router_beside_a_list() -> tuple[nn.Module, str]:
    """As older code has it; a gate of one column, as shared experts have, is none."""
    block = nn.ModuleDict(
        {
            "gate": nn.Linear(64, 4, bias=False),
            "experts": nn.ModuleList(nn.Linear(64, 64) for _ in range(4)),
            "shared_expert_gate": nn.Linear(64, 1),
            "up": nn.Linear(64, 4),
        }
    )
    return nn.ModuleDict({"mlp": block}), "mlp.gate"


@pytest.mark.parametrize("make", [router_of_a_gate, router_beside_a_list])
def test_routers_that_are_linear_layers_stay_dense(
    make: Callable[[], tuple[nn.Module, str]],
) -> None:
    model, path = make()
    others = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    qnn.quantize_model(model, block_size=32)
    assert [n for n in others if type(model.get_submodule(n)) is nn.Linear] == [path]
    (found,) = [
        weights for weights in qnn.quantization_report(model, 0.0).dense if path in str(weights)
    ]
    assert found.expected
    # Named, it is taken.
    chosen, path = make()
    qnn.quantize_model(chosen, block_size=32, targets=[path])
    assert isinstance(chosen.get_submodule(path), qnn.Linear4bit)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_a_forward_of_its_own_is_not_lost(name: str) -> None:
    model = dense(name)
    path = next(n for n, _ in model.named_modules() if n.endswith(".experts"))
    experts = model.get_submodule(path)
    experts.forward = lambda *given: type(experts).forward(experts, *given)
    with pytest.raises(ValueError, match=rf"{path}\.\w+: has a forward of its own"):
        qnn.quantize_model(model, block_size=32)
    assert not experts_of(model)
    del experts.forward
    # In two calls: the first one puts a forward on Llama 4's.
    qnn.quantize_model(model, block_size=32, targets=["experts.gate_up_proj"])
    qnn.quantize_model(model, block_size=32, targets=["experts.down_proj"])
    assert all(isinstance(m, Experts4bit) for m in experts.children() if hasattr(m, "weight"))


def test_a_bias_of_experts_is_no_weight() -> None:
    experts = Experts4bit.from_dense(torch.randn(8, 64, 32), bias=torch.randn(8, 64))
    report = qnn.quantization_report(nn.ModuleDict({"experts": experts}), 0.0)
    assert report.dense == ()


@pytest.mark.parametrize("kept", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_a_model_keeps_in_float32_stays_dense(kept: str) -> None:
    model = nn.ModuleDict({"weights_proj": nn.Linear(64, 8), "up": nn.Linear(64, 64)})
    setattr(model, kept, ["weights_proj"])
    qnn.quantize_model(model)
    assert type(model.weights_proj) is nn.Linear
    assert isinstance(model.up, qnn.Linear4bit)
