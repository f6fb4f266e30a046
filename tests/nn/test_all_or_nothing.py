"""Calls that change a model change all of it or nothing, and what fails can be called again."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import qkern
from qkern import nn as qnn
from qkern import testing
from qkern.nn import _options as implementation
from tests.models import tiny_llama

X = torch.linspace(-1, 1, 128).view(2, 64)
LORA = qnn.LoRAConfig(r=2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def state(model: nn.Module) -> dict[str, Any]:
    """All that a failed call must leave: modules, parameters, flags, values, modes."""
    return {
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for key in ("modules", "parameters"):
        assert after[key] == before[key]
    for one, other in zip(after["values"], before["values"], strict=True):
        testing.assert_bitwise(one, other)


# Whatever is wrong, it is wrong of the last layer here.


def not_finite(model: nn.Sequential) -> dict[str, Any]:
    with torch.no_grad():
        model[3].weight[5, 5] = float("inf")
    return {}


def not_a_number(model: nn.Sequential) -> dict[str, Any]:
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    return {}


def of_another_dtype(model: nn.Sequential) -> dict[str, Any]:
    model[3].double()
    return {}


def of_another_class(model: nn.Sequential) -> dict[str, Any]:
    model[3] = type("Mine", (nn.Linear,), {})(64, 64)
    return {}


def tied(model: nn.Sequential) -> dict[str, Any]:
    model.append(nn.Embedding(64, 64))
    model[4].weight = model[3].weight
    return {"targets": ["0", "3"]}


def options(**given: Any) -> Callable[[nn.Sequential], dict[str, Any]]:
    return lambda _: given


WRONG = [
    not_finite,
    not_a_number,
    of_another_dtype,
    of_another_class,
    tied,
    pytest.param(options(lora=qnn.LoRAConfig(targets=["0", "typo"])), id="lora_target"),
    pytest.param(options(lora={"r": 8}), id="lora_is_a_dict"),
    pytest.param(options(targets=["0", "typo"]), id="target"),
    pytest.param(options(targets="("), id="regular_expression"),
    pytest.param(options(format="nf5"), id="format"),
    pytest.param(options(block_size=48), id="block_size"),
    pytest.param(options(format="custom"), id="no_codebook"),
    pytest.param(
        options(format="custom", codebook=torch.full((16,), torch.nan)), id="bad_codebook"
    ),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_quantize_model_changes_nothing_where_it_raises(
    wrong: Callable[[nn.Sequential], dict[str, Any]],
) -> None:
    model = net()
    call = {"lora": LORA} | wrong(model)
    before = state(model)
    with pytest.raises(Exception):  # noqa: B017  # of many kinds; what stays is asked here
        qnn.quantize_model(model, **call)
    assert_same(model, before)
    # The corrected call works on the same model.
    qnn.quantize_model(model, targets=["0", "1"], lora=qnn.LoRAConfig(r=2, targets=["0"]))
    assert isinstance(model[0].base_layer, qnn.Linear4bit)


@pytest.mark.parametrize(
    "targets", [["0", "typo"], ["0", "4"], "(", r"nothing"], ids=["typo", "kind", "regex", "none"]
)
def test_add_lora_changes_nothing_where_it_raises(targets: Any) -> None:
    model = net().append(nn.LayerNorm(64))
    before = state(model)
    with pytest.raises(Exception):  # noqa: B017
        qnn.add_lora(model, qnn.LoRAConfig(targets=targets))
    assert_same(model, before)
    with pytest.raises(TypeError, match="config: got dict; takes a LoRAConfig"):
        qnn.add_lora(model, {"r": 4})
    qnn.add_lora(model, LORA)


def test_add_lora_without_memory_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = net(), []
    original = qnn.LoRALinear.from_config.__func__

    def fails(cls: type, *args: Any) -> qnn.LoRALinear:
        made.append(1)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no memory")
        return original(cls, *args)

    monkeypatch.setattr(qnn.LoRALinear, "from_config", classmethod(fails))
    with pytest.raises(torch.OutOfMemoryError):
        qnn.add_lora(model, LORA)
    assert all(type(layer) is nn.Linear for layer in model)
    monkeypatch.undo()
    assert len(list(qnn.lora_layers(qnn.add_lora(model, LORA)))) == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("targets", ["all-linear", ["0", "1", "2", "3"], r"\d"])
def test_a_call_that_is_stopped_goes_on_where_it_was(
    error: BaseException, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    expected = qnn.quantize_model(copy.deepcopy(model))
    before, made = [p.requires_grad for p in model.parameters()], []
    original = qnn.Linear4bit.from_linear.__func__

    def stops(cls: type, *args: Any, **kwargs: Any) -> qnn.Linear4bit:
        made.append(1)
        if len(made) == 3:
            raise error
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(qnn.Linear4bit, "from_linear", classmethod(stops))
    with pytest.raises(type(error)) as caught:
        qnn.quantize_model(model, targets=targets, lora=LORA)
    monkeypatch.undo()
    if sys.version_info >= (3, 11):
        assert "2 of 4 weights are in 4 bits" in caught.value.__notes__[-1]
    assert [type(layer) for layer in model] == [qnn.Linear4bit] * 2 + [nn.Linear] * 2
    assert model[3].weight.requires_grad == before[-1]
    model(X)  # as it is, it works
    qnn.quantize_model(model, targets=targets, lora=LORA)
    assert len(list(qnn.lora_layers(model))) == 4
    testing.assert_bitwise(model(X), expected(X))
    assert sum(p.requires_grad for p in model.parameters()) == 8


def test_a_second_call_does_what_it_says_or_raises() -> None:
    model = qnn.quantize_model(net(), "fp4", 32, targets=["0"])
    first = model[0]
    qnn.quantize_model(model)
    assert model[0] is first  # another format, made before on purpose
    assert model[1]._format == "nf4"
    qnn.quantize_model(model, targets=["1", "2"])  # done already
    for call in ({"targets": ["0"]}, {"targets": ["1"], "block_size": 128}, {}):
        with pytest.raises(ValueError, match="is in 4 bits already, in another format"):
            qnn.quantize_model(model, **call)
    codebook = torch.linspace(-1, 1, 16)
    model = qnn.quantize_model(net(), "custom", codebook=codebook)
    qnn.quantize_model(model, "custom", codebook=codebook)
    with pytest.raises(ValueError, match="in another format"):
        qnn.quantize_model(model, "custom", codebook=codebook / 2)


def test_finite_weights_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of suspects is the whole weight quantised for the check; not of huge but fair ones."""
    calls = []
    original = implementation.quantize_4bit

    def spy(weight: Tensor, *args: Any) -> qkern.QuantizedTensor:
        calls.append(weight.device.type)
        return original(weight, *args)

    monkeypatch.setattr(implementation, "quantize_4bit", spy)
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e6
    qnn.quantize_model(model)
    assert calls == ["meta", "cpu"]
    calls.clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(64, 64).to(dtype))
        with torch.no_grad():
            model[0].weight[3, 5] = -6e4
        qnn.quantize_model(model, double_quant=False)
    assert calls == ["meta", "cpu"] * 3
    calls.clear()
    model = net()
    model[3].weight.data[0, 0] = float("nan")
    qnn.quantize_model(model, check_finite=False)
    assert calls == ["meta"]


# Inference tensors


@torch.inference_mode()
def inference_net() -> nn.Sequential:
    return net()


def test_models_made_in_inference_mode_are_refused() -> None:
    model = inference_net()
    for change in (
        qnn.quantize_model,
        lambda m: qnn.add_lora(m, LORA),
        lambda m: qnn.LoRALinear(m[0], 2, 2),
        lambda m: qnn.prepare_for_training(m, gradient_checkpointing=False),
    ):
        with pytest.raises(ValueError, match=r"weight was made under torch.inference_mode"):
            change(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_what_is_made_within_inference_mode_can_be_trained() -> None:
    model, table = net(), nn.Embedding(4, 64)
    with torch.inference_mode():
        qnn.quantize_model(model, lora=LORA)
        table = qnn.Embedding4bit.from_embedding(table)
        empty = qnn.Linear4bit(64, 64)
    for module in (model, table, empty):
        assert not any(p.is_inference() for p in module.parameters())
    model(table(torch.arange(4))).sum().backward()
    assert all(p.grad is not None for p in qnn.lora_parameters(model))


@pytest.mark.parametrize("lora_dtype", [None, torch.bfloat16])
def test_training_after_a_forward_in_inference_mode(lora_dtype: torch.dtype | None) -> None:
    def build() -> nn.Module:
        model = tiny_llama().bfloat16()
        qnn.quantize_model(model, lora=qnn.LoRAConfig(r=2, dtype=lora_dtype))
        torch.manual_seed(1)
        for parameter in qnn.lora_parameters(model):
            nn.init.normal_(parameter, std=0.1)
        return qnn.prepare_for_training(model)

    ids, gradients = torch.arange(12).view(2, 6), []
    for looked in (False, True):
        model = build()
        if looked:
            with torch.inference_mode():
                model.eval()
                model(ids)
                model.generate(ids, max_new_tokens=2, pad_token_id=0)
                model.train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in qnn.lora_parameters(model)])
    for one, other in zip(*gradients, strict=True):
        testing.assert_bitwise(one, other)


# The meta device


def test_half_a_model_on_meta_is_refused() -> None:
    model = net()
    model[2].to("meta")
    before = state(model)
    for change in (qnn.quantize_model, lambda m: qnn.add_lora(m, LORA)):
        with pytest.raises(ValueError, match=r"2.weight is on the meta device and 0.weight is not"):
            change(model)
    assert [name for name, *_ in before["modules"]] == [name for name, _ in model.named_modules()]
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_structure_is_made_on_meta_and_cannot_be_trained_or_merged() -> None:
    model = qnn.quantize_model(net().to("meta"), lora=LORA)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="is on the meta device; load the weights first"):
        qnn.prepare_for_training(model, gradient_checkpointing=False)
    with pytest.raises(RuntimeError, match="weight: is on the meta device"):
        qnn.merge_lora(model)
    assert not any(layer.merged for _, layer in qnn.lora_layers(model))
    full = qnn.quantize_model(net(), lora=LORA)
    model.load_state_dict(full.state_dict(), assign=True)
    testing.assert_bitwise(model(X), full(X))
    qnn.prepare_for_training(model, gradient_checkpointing=False)


def test_offloaded_parameters_cannot_be_trained() -> None:
    model = cpu_offload(qnn.quantize_model(net(), lora=LORA), "cpu")
    with pytest.raises(ValueError, match=r"lora_a is on the meta device.*cannot be trained"):
        qnn.prepare_for_training(model, gradient_checkpointing=False)


# Merging


def test_merge_lora_merges_all_or_none() -> None:
    model = qnn.quantize_model(net(), lora=LORA)
    x = torch.randn(2, 64)
    for parameter in qnn.lora_parameters(model):
        nn.init.normal_(parameter)
    model[1].merge()
    before = model(x)
    nn.init.constant_(model[3].lora_b, float("nan"))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        qnn.merge_lora(model)
    assert [layer.merged for layer in model] == [False, True, False, False]
    nn.init.zeros_(model[3].lora_b)
    qnn.merge_lora(model)
    assert not torch.equal(model(x), before)


# Models that were wrapped or are not complete


def test_models_that_are_wrapped_or_have_no_weights_yet() -> None:
    class DistributedDataParallel(nn.Module):
        """As torch's, which needs other processes."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    for change in (qnn.quantize_model, lambda m: qnn.add_lora(m, LORA)):
        with pytest.raises(ValueError, match=r"it is a DistributedDataParallel.*afterwards"):
            change(DistributedDataParallel(net()))
        with pytest.raises(ValueError, match=r"4.weight \(LazyConv1d\) has no shape yet"):
            change(net().append(nn.LazyConv1d(4, 1)))


# Memory


def test_quantising_in_place_needs_no_memory_beyond_one_layer() -> None:
    """Counted by what torch allocates: at the peak the model, and a part of one layer.

    The check of finite values comes before, and needs none.
    """
    elements, layers = 1 << 20, 6
    qnn.quantize_model(net())  # whatever is made once
    gc.disable()
    try:
        # The profiler knows only of memory that it saw allocated.
        with torch.profiler.profile(profile_memory=True) as profile:
            model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
            qnn.quantize_model(model)
    finally:
        gc.enable()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    dense = 4 * elements
    assert layers * dense <= peak < layers * dense + 1.5 * elements
    assert held < layers * 0.6 * elements


def test_a_model_that_cannot_checkpoint_as_asked_is_left_in_eval_mode() -> None:
    class Checkpointing(nn.Sequential):
        asked: dict[str, Any] | None = None

        def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
            self.asked = options

    model = qnn.add_lora(Checkpointing(nn.Linear(64, 64)), LORA).eval()
    with pytest.raises(TypeError, match="use_reentrant: got True for Checkpointing, which has no"):
        qnn.prepare_for_training(model, use_reentrant=True)
    assert model.asked is None
    assert not model.training
    assert qnn.prepare_for_training(model).asked == {"use_reentrant": False}
    assert model.training
