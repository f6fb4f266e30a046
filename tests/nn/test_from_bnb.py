"""`from_bnb`: a model that bitsandbytes quantised, turned over in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qkern import nn as qnn
from qkern import quantize_4bit, testing
from tests.models import tiny_llama

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def layer(kind: Any = bnb.nn.LinearNF4, rows: int = 64, **options: Any) -> Any:
    """A layer of bitsandbytes with 128 columns, quantised."""
    torch.manual_seed(0)
    dense = nn.Linear(128, rows, options.pop("bias", True))
    made = kind(128, rows, bias=dense.bias is not None, **options)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")


def model_of(*layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({chr(ord("a") + i): layer for i, layer in enumerate(layers)})


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def values_of(theirs: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("storage", [torch.uint8, F32, BF16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", [bnb.nn.LinearNF4, bnb.nn.LinearFP4])
def test_the_same_memory_and_values(kind: Any, nested: bool, storage: torch.dtype) -> None:
    theirs = layer(kind, compress_statistics=nested, quant_storage=storage, compute_dtype=BF16)
    expected, y = values_of(theirs), theirs.train()(X)
    state = theirs.weight.quant_state
    memory = {theirs.weight.data_ptr(), state.absmax.data_ptr(), theirs.bias.data_ptr()}
    if nested:
        memory |= {state.state2.absmax.data_ptr(), state.offset.data_ptr()}
    bias = theirs.bias
    model = model_of(theirs)
    assert qnn.from_bnb(model) is model
    ours = model["a"]
    assert type(ours) is qnn.Linear4bit
    named = {n: p for n, p in ours.named_parameters() if n != "quant_meta"}
    assert {p.data_ptr() for p in named.values()} == memory
    assert ours.bias is bias
    assert bias.requires_grad
    assert not any(p.requires_grad for n, p in named.items() if n != "bias")
    assert ours.compute_dtype == BF16
    assert ours.training
    assert ours.quantized.double_quant == nested
    testing.assert_bitwise(ours.quantized.dequantize() + 0.0, expected + 0.0)
    torch.testing.assert_close(ours(X), y, rtol=0.02, atol=0.02)
    assert "quant_state" not in vars(ours)


def test_what_hangs_on_a_layer_comes_along() -> None:
    theirs = layer(bias=False).eval()
    seen: list[str] = []
    handle = theirs.register_forward_hook(lambda *_: seen.append("hook"))
    theirs.noted = "kept"
    model = qnn.from_bnb(model_of(theirs, nn.LayerNorm(128)))
    assert (model["a"].noted, model["a"].training, model["a"].bias) == ("kept", False, None)
    model["a"](X)
    handle.remove()
    model["a"](X)
    assert seen == ["hook"]
    assert model["b"].weight.requires_grad


def test_a_layer_at_two_places_and_a_shared_weight() -> None:
    first, second = layer(), layer()
    second.weight = first.weight
    model = model_of(first, second, first)
    qnn.from_bnb(model)
    assert model["a"] is model["c"]
    assert model["a"].weight is model["b"].weight
    assert model["a"].absmax is model["b"].absmax
    assert model["b"].bias is second.bias


def test_accelerate_goes_on_calling_it() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    theirs = layer()
    hooks.add_hook_to_module(theirs, hooks.AlignDevicesHook(execution_device="cpu"))
    model = qnn.from_bnb(model_of(theirs))
    assert model["a"]._hf_hook is theirs._hf_hook
    torch.testing.assert_close(model["a"](X), theirs.train()(X))


def test_a_layer_that_is_not_quantised_yet() -> None:
    """bitsandbytes would quantise it on the way to a device."""
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="fp4", compress_statistics=False)
    dense = theirs.weight.data.clone().as_subclass(Tensor)
    model = qnn.from_bnb(model_of(theirs))
    qw = quantize_4bit(dense, "fp4", double_quant=False)
    for name, tensor in qw.tensors().items():
        testing.assert_bitwise(model["a"].quantized.tensors()[name], tensor)
    theirs = bnb.nn.LinearNF4(128, 64)
    theirs.weight.data[0, 0] = float("nan")
    model = model_of(layer(), theirs)
    with pytest.raises(ValueError, match=r"b.weight: w: got"):
        qnn.from_bnb(model)
    assert isinstance(model["a"], bnb.nn.LinearNF4)


@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_was_repacked_for_inference(nested: bool) -> None:
    """Codes come back to their order; the scales are what bitsandbytes left of them."""
    theirs = layer(compress_statistics=nested)
    twin = layer(compress_statistics=nested)
    codes = twin.weight.data.clone().flatten()
    convert = bnb.functional._convert_weight_packed_for_cpu
    theirs.weight.data, state = convert(theirs.weight.data, theirs.weight.quant_state)
    scales = state.absmax.T.reshape(-1).float()
    ours = qnn.from_bnb(model_of(theirs))["a"].quantized
    assert ours.dtype == F32
    testing.assert_bitwise(ours.packed, codes.as_subclass(Tensor))
    testing.assert_bitwise(ours.absmax, scales)


def test_scales_by_another_map_are_restored() -> None:
    theirs = layer(rows=256)
    code = theirs.weight.quant_state.state2.code
    code[:100] = torch.nextafter(code[:100], torch.tensor(2.0))
    expected = values_of(theirs)
    ours = qnn.from_bnb(model_of(theirs))["a"].quantized
    assert not ours.double_quant
    testing.assert_bitwise(ours.dequantize(), expected)


@pytest.mark.parametrize("columns", [64, 96])
@pytest.mark.parametrize("kind", [bnb.nn.EmbeddingNF4, bnb.nn.EmbeddingFP4])
def test_embeddings(kind: Any, columns: int) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(33, columns, dtype=BF16)
    theirs = kind(33, columns, dtype=BF16)
    theirs.load_state_dict(table.state_dict())
    theirs = theirs.to("cpu")
    expected = values_of(theirs)
    ids = torch.arange(33).view(3, 11)
    ours = qnn.from_bnb(model_of(theirs))["a"]
    assert type(ours) is qnn.Embedding4bit
    if columns == 64:  # whole blocks
        assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    testing.assert_bitwise(ours(ids) + 0.0, expected[ids] + 0.0)


def gone(model: nn.ModuleDict) -> None:
    model["b"].weight.quant_state = model["b"].quant_state = None


def state_hook(model: nn.ModuleDict) -> None:
    model["b"].register_state_dict_post_hook(lambda *_: None)


def tied(model: nn.ModuleDict) -> None:
    model["c"] = nn.Embedding(1, 1)
    model["c"].weight = model["b"].weight


def replaced(model: nn.ModuleDict) -> None:
    model["b"].forward = lambda x: x


def held(model: nn.ModuleDict) -> None:
    model.also = [model["b"]]


def damaged(model: nn.ModuleDict) -> None:
    model["b"].weight.quant_state.absmax = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, "b.weight has lost its quant_state"),
        (state_hook, "b .* has hooks on its state dict"),
        (tied, "c.weight is also the weight of a 4-bit layer"),
        (replaced, "b .* has a forward of its own"),
        (held, "also is a list that holds a layer"),
        (damaged, "b.weight: absmax: got"),
        (lambda m: m.update({"c": bnb.nn.Linear8bitLt(8, 8)}), "c is a Linear8bitLt .* 8 bits"),
        (lambda m: m.update({"c": bnb.nn.Embedding8bit(8, 8)}), "c is a Embedding8bit"),
    ],
)
def test_all_or_nothing(change: Callable[[nn.ModuleDict], Any], message: str) -> None:
    model = model_of(layer(), layer())
    change(model)
    before = list(model.values())
    with pytest.raises(ValueError, match=message):
        qnn.from_bnb(model)
    assert all(now is then for now, then in zip(model.values(), before, strict=True))


def test_what_is_no_model_of_bitsandbytes() -> None:
    with pytest.raises(ValueError, match="no layer that bitsandbytes quantised"):
        qnn.from_bnb(model_of(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match="got a single layer"):
        qnn.from_bnb(layer())

    class Doubled(bnb.nn.LinearNF4):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"a is a Doubled, .* forward of its own"):
        qnn.from_bnb(model_of(layer(Doubled)))
    renamed = type("Renamed", (bnb.nn.LinearNF4,), {})
    assert type(qnn.from_bnb(model_of(layer(renamed)))["a"]) is qnn.Linear4bit


def test_the_layer_lives_on_like_any_other() -> None:
    model = qnn.from_bnb(model_of(layer()))
    twin = copy.deepcopy(model)
    qnn.add_lora(model, qnn.LoRAConfig(r=2, targets=["a"]))
    model["a"](X).sum().backward()
    assert type(qnn.dequantize_model(twin)["a"]) is nn.Linear
    assert qnn.count_parameters(twin) == 128 * 64 + 64


def test_a_packed_weight_answers_as_that_of_bitsandbytes() -> None:
    """What code for bitsandbytes asks of ``layer.weight``, and what it cannot do with either."""
    theirs = layer()
    ours = qnn.from_bnb(model_of(layer()))["a"]
    for weight in (theirs.weight, ours.weight):
        assert (weight.data.dtype, list(weight.data.shape)) == (torch.uint8, [4096, 1])
        assert (list(weight.t().shape), weight.requires_grad) == ([1, 4096], False)
        assert (weight.device, weight.numel()) == (CPU, 4096)
        for product in (lambda w: X @ w, lambda w: X @ w.t()):
            with pytest.raises(RuntimeError):
                product(weight)
        weight.data = weight.data.clone()
    assert getattr(ours.weight, "quant_state", None) is None


@pytest.mark.parametrize("made", [tiny_gpt2, tiny_llama])
def test_a_model_that_transformers_loaded(made: Callable[[], Any], tmp_path: Path) -> None:
    """Its layers say of what class they were made; a ``Conv1D`` comes back as one."""
    made().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        logits = model.train()(ids).logits  # not in eval mode, which may repack the weights
    memory = {m.weight.data_ptr() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    qnn.from_bnb(model)
    layers = [m for m in model.modules() if isinstance(m, qnn.Linear4bit)]
    assert {layer.weight.data_ptr() for layer in layers} == memory
    assert {layer.compute_dtype for layer in layers} == {F32}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-3)
    assert qnn.count_parameters(model) == qnn.count_parameters(made())
    qnn.dequantize_model(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in made().modules()]
