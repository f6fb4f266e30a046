"""What a 4-bit layer, an adapter or a frozen layer may stand in for, and what comes along."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_submodules,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.bart.modeling_bart import (
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from qkern import io, testing
from qkern import nn as qnn

X = torch.linspace(-1, 1, 192).view(3, 64)
CONFIG = qnn.LoRAConfig(r=4)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Bare(nn.Linear):
    """Its parent may still read its weight."""


class Doubled4bit(qnn.Linear4bit):
    @staticmethod
    def made() -> nn.Module:
        return Doubled4bit(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Marked(torch.Tensor):
    """A tensor that computes something of its own, as torchao's and bitsandbytes' do."""


def dense() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def model_of(layer: nn.Module) -> nn.ModuleDict:
    """The layer at ``odd`` and a plain one at ``plain``."""
    return nn.ModuleDict({"plain": dense(), "odd": layer})


def untouched(model: nn.Module) -> bool:
    return not any(isinstance(m, qnn.Linear4bit | qnn.LoRALinear) for m in model.modules())


def own_forward() -> nn.Linear:
    layer = dense()
    layer.forward = functools.partial(lambda self, x: -nn.Linear.forward(self, x), layer)
    return layer


def parametrised() -> nn.Module:
    return parametrize.register_parametrization(dense(), "weight", Twice())


def pruned() -> nn.Linear:
    return prune.l1_unstructured(dense(), "weight", amount=0.5)


def marked() -> nn.Linear:
    layer = dense()
    data = layer.weight.detach().as_subclass(Marked)
    layer.weight = nn.Parameter(data)
    assert type(layer.weight) is not nn.Parameter
    return layer


def with_buffer() -> nn.Linear:
    layer = dense()
    layer.register_buffer("scale", torch.ones(1))
    return layer


def with_child() -> nn.Linear:
    layer = dense()
    layer.norm = nn.LayerNorm(64)
    return layer


def with_state_hook() -> nn.Linear:
    layer = dense()
    layer._register_state_dict_hook(lambda *_: None)
    return layer


def of_bitsandbytes() -> nn.Module:
    return bnb.nn.Linear4bit(64, 64).to("cpu")


COMPUTED = [parametrised, pruned, marked, with_buffer, with_child]
NORMS = [
    pytest.param(lambda: old_weight_norm(dense()), id="weight_norm"),
    pytest.param(lambda: old_spectral_norm(dense()), id="spectral_norm"),
    pytest.param(lambda: parametrizations.weight_norm(dense()), id="parametrised_weight_norm"),
    pytest.param(lambda: parametrizations.orthogonal(dense()), id="orthogonal"),
]
SUBCLASSES = [
    pytest.param(lambda: Doubled(64, 64), id="own_forward_by_class"),
    pytest.param(lambda: Bare(64, 64), id="bare_subclass"),
    pytest.param(lambda: nn.LazyLinear(64), id="lazy"),
    of_bitsandbytes,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("make", [*COMPUTED, *NORMS, *SUBCLASSES, own_forward, with_state_hook])
@pytest.mark.parametrize("targets", ["all-linear", ["plain", "odd"]])
def test_a_layer_that_does_more_is_refused_and_nothing_changes(
    make: Callable[[], nn.Module], targets: Any
) -> None:
    model = model_of(make())
    kind = type(model["odd"]).__name__
    with pytest.raises((TypeError, ValueError), match=rf"odd.*{kind}"):
        qnn.quantize_model(model, targets=targets, lora=CONFIG)
    assert untouched(model)
    assert all(p.requires_grad for p in model["plain"].parameters())
    # Left alone it does what it did.
    if not isinstance(model["odd"], nn.LazyLinear | bnb.nn.Linear4bit):
        model.eval()
        expected = model["odd"](X)
        qnn.quantize_model(model, skip=["odd"], lora=CONFIG)
        assert isinstance(model["plain"].base_layer, qnn.Linear4bit)
        torch.testing.assert_close(model["odd"](X), expected)


@pytest.mark.parametrize("make", [*SUBCLASSES[:2], *COMPUTED, own_forward, with_state_hook])
def test_layers_made_by_hand_refuse_them_too(make: Callable[[], nn.Module]) -> None:
    layer = make().requires_grad_(False)
    for maker in (qnn.Linear4bit.from_linear, qnn.FrozenLinear.from_linear):
        with pytest.raises((TypeError, ValueError), match=r"^linear: "):
            maker(layer)


@pytest.mark.parametrize("make", [*SUBCLASSES[:2], *COMPUTED, Doubled4bit.made])
def test_adapters_refuse_bases_that_merging_would_change(make: Callable[[], nn.Module]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^base_layer: "):
        qnn.LoRALinear(make(), 4, 8)
    model = model_of(make())
    with pytest.raises((TypeError, ValueError), match="odd"):
        qnn.add_lora(model, qnn.LoRAConfig(r=4, targets=["plain", "odd"]))
    assert not list(qnn.lora_layers(model))
    assert any(p.requires_grad for p in model.parameters())


def test_falcon_is_known() -> None:
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = FalconForCausalLM(config).eval()
    twin = copy.deepcopy(model)
    qnn.quantize_model(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, qnn.Linear4bit)]
    assert len(layers) == 4
    with torch.no_grad():
        for name in layers:
            layer = twin.get_submodule(name)
            layer.weight.copy_(model.get_submodule(name).quantized.dequantize())
        ids = torch.arange(8).view(1, 8)
        torch.testing.assert_close(model(ids).logits, twin(ids).logits)


def test_attention_is_passed_over_and_refused_by_name() -> None:
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    model = model_of(attention)
    expected = attention(X[None], X[None], X[None])[0]
    qnn.quantize_model(model, lora=CONFIG)
    assert isinstance(model["plain"], qnn.LoRALinear)
    torch.testing.assert_close(attention(X[None], X[None], X[None])[0], expected)
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        qnn.add_lora(model_of(attention), qnn.LoRAConfig(targets=["out_proj"]))


def test_a_class_called_conv1d_is_refused() -> None:
    """Transformers' own is known; one of that name may compute anything."""
    kind = type("Conv1D", (nn.Module,), {})
    model = model_of(kind())
    with pytest.raises(TypeError, match=r"odd is a Conv1D; takes exactly nn.Linear"):
        qnn.quantize_model(model)
    assert untouched(model)
    assert isinstance(qnn.quantize_model(model, skip=["odd"])["plain"], qnn.Linear4bit)
    # The advice is enough where there are several.
    model = nn.ModuleDict({"plain": dense(), "a": model_of(kind())})
    model["a"]["more"] = kind()
    with pytest.raises(TypeError, match=r"skip=\['more', 'odd'\] leaves all such layers"):
        qnn.quantize_model(model)
    qnn.quantize_model(model, skip=["more", "odd"])
    # Torch's convolution of one dimension is no linear layer.
    qnn.quantize_model(model_of(nn.Conv1d(4, 4, 1)))


def test_frozen_layers_are_made_of_plain_ones_only() -> None:
    """`prepare_for_training` makes layers faster, and leaves those it would change."""
    layers = [own_forward(), pruned(), parametrised(), dense()]
    model = nn.ModuleList(layer.bfloat16().requires_grad_(False) for layer in layers)
    model.append(qnn.LoRALinear(dense(), 2, 2))
    before = [layer(X.bfloat16()) for layer in layers[:3]]
    qnn.prepare_for_training(model, gradient_checkpointing=False)
    assert [type(m) is qnn.FrozenLinear for m in model] == [False, False, False, True, False]
    for layer, expected in zip(model, before, strict=False):
        testing.assert_bitwise(layer(X.bfloat16()), expected)


# Embeddings


class ScaledTable(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8


def test_tables_that_do_more_are_refused() -> None:
    hooked = nn.Embedding(8, 64)
    hooked.forward = lambda ids: torch.zeros(1)
    for table in (
        ScaledTable(8, 64),
        BartLearnedPositionalEmbedding(8, 64),
        T5Gemma2TextScaledWordEmbedding(8, 64, 0, 3),
        bnb.nn.StableEmbedding(8, 64),
        hooked,
    ):
        with pytest.raises((TypeError, ValueError), match=r"^embedding: "):
            qnn.Embedding4bit.from_embedding(table)


@pytest.mark.parametrize("make", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_tables_keep_their_scale(make: type[nn.Embedding], dtype: torch.dtype) -> None:
    """Bit for bit: Gemma's scale is rounded to the dtype first, BART's is not."""
    torch.manual_seed(0)
    table = make(50, 64, 0, embed_scale=33.9411)
    layer = qnn.Embedding4bit.from_embedding(table)
    assert "embed_scale=33.94" in repr(layer)
    layer, table = layer.to(dtype), table.to(dtype)
    table.weight.data = layer.quantized.dequantize()
    ids = torch.arange(50).view(5, 10)
    testing.assert_bitwise(layer(ids), table(ids))
    testing.assert_bitwise(copy.deepcopy(layer)(ids), table(ids))
    on_meta = qnn.Embedding4bit.from_embedding(make(50, 64, 0, embed_scale=33.9411).to("meta"))
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    testing.assert_bitwise(on_meta.to(dtype)(ids), table(ids))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    testing.assert_bitwise(compiled(ids), table(ids))


@pytest.mark.slow
def test_every_scaled_table_of_transformers_is_as_it_is_taken_for() -> None:
    """Its name says how it computes; a class of this name that does something else fails here."""
    folder = Path(transformers.models.__path__[0])
    names = re.compile(r"^class (\w+ScaledWordEmbedding)\(nn.Embedding\)", re.MULTILINE)
    found = 0
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name in names.findall(file.read_text()):
            module = f"transformers.models.{file.parent.name}.{file.stem}"
            kind = getattr(importlib.import_module(module), name)
            if name.startswith("T5Gemma2"):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                table = kind(20, 64, 0, embed_scale=33.9411)
                layer = qnn.Embedding4bit.from_embedding(table).to(dtype)
                table = table.to(dtype)
                table.weight.data = layer.quantized.dequantize()
                testing.assert_bitwise(layer(torch.arange(20)), table(torch.arange(20)), name)
            found += 1
    assert found > 20


# What comes along


def test_hooks_and_attributes_come_along() -> None:
    for source, make, x in (
        (dense(), qnn.Linear4bit.from_linear, X),
        (dense().requires_grad_(False), qnn.FrozenLinear.from_linear, X),
        (nn.Embedding(8, 64), qnn.Embedding4bit.from_embedding, torch.arange(3)),
    ):
        calls: list[str] = []
        handles = [
            source.register_forward_pre_hook(lambda *_, c=calls: c.append("pre")),
            source.register_forward_hook(
                lambda _m, _x, options, y, c=calls: c.append(f"post {options}") or 2 * y,
                with_kwargs=True,
            ),
        ]
        source.note = "kept"
        expected = make(copy.deepcopy(source))
        layer = make(source.eval())
        assert (layer.note, layer.training) == ("kept", False)
        calls.clear()
        y = layer(x)
        assert calls == ["pre", "post {}"]
        torch.testing.assert_close(y, expected(x))
        for handle in handles:
            handle.remove()
        calls.clear()
        torch.testing.assert_close(layer(x) * 2, y)
        assert not calls


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_acts_on_a_layer_with_an_adapter(four_bit: bool, merged: bool, when: str) -> None:
    """Before or after the adapter came, merged or not: a hook that doubles, doubles."""

    def build(hooked: bool) -> nn.Sequential:
        model = nn.Sequential(dense())
        if hooked and when == "before":
            model[0].register_forward_hook(double, with_kwargs=True)
            model[0].register_full_backward_hook(seen)
        if four_bit:
            qnn.quantize_model(model)
        qnn.add_lora(model, CONFIG)
        if merged:
            qnn.merge_lora(model)
        if hooked and when == "after":
            model[0].base_layer.register_forward_hook(double, with_kwargs=True)
            model[0].base_layer.register_full_backward_hook(seen)
        return model

    gradients: list[tuple[Tensor, ...]] = []

    def double(module: nn.Module, inputs: Any, options: dict[str, Any], y: Tensor) -> Tensor:
        return 2 * y

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        gradients.append(inputs)

    x = X.clone().requires_grad_()
    expected = 2 * build(False)(X)  # a fresh adapter adds nothing
    y = build(True)(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert [tuple(g.shape for g in inputs) for inputs in gradients] == [((3, 64),)]


def test_hooks_on_all_modules_see_the_base_of_an_adapter() -> None:
    layer = qnn.LoRALinear(qnn.Linear4bit.from_linear(dense()), 4, 8)
    nn.init.normal_(layer.lora_b)
    expected, seen = layer(X), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        torch.testing.assert_close(layer(X), expected)
    finally:
        handle.remove()
    assert seen == [qnn.Linear4bit, qnn.LoRALinear]
    seen.clear()
    testing.assert_bitwise(layer(X), expected)
    assert not seen


# accelerate


class Negated(ModelHook):
    """Changes the sign of the result, and has no device."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return -output


def test_hooks_of_accelerate_that_do_not_offload_come_along() -> None:
    for hook in (Negated(), SequentialHook(AlignDevicesHook("cpu"), Negated())):
        model = nn.Sequential(dense())
        plain = qnn.quantize_model(copy.deepcopy(model))
        add_hook_to_module(model[0], hook)
        qnn.quantize_model(model, lora=CONFIG)
        testing.assert_bitwise(model(X), -plain(X))
        remove_hook_from_submodules(model)
        testing.assert_bitwise(model(X), plain(X))


def test_what_accelerate_left_behind_is_no_forward_of_its_own() -> None:
    model = nn.Sequential(dense())
    expected = qnn.quantize_model(copy.deepcopy(model))(X)
    add_hook_to_module(model[0], Negated())
    remove_hook_from_submodules(model)
    assert "forward" in vars(model[0])
    qnn.quantize_model(model, lora=CONFIG)
    testing.assert_bitwise(model(X), expected)


def test_a_forward_below_accelerates_hooks_is_refused() -> None:
    layer = own_forward()
    add_hook_to_module(layer, Negated())
    with pytest.raises(ValueError, match="forward of its own below accelerate"):
        qnn.quantize_model(nn.Sequential(layer))


def test_offloaded_layers_are_not_quantised() -> None:
    model = cpu_offload(nn.Sequential(dense()), "cpu")
    expected = model(X)
    with pytest.raises(ValueError, match=r"0 \(Linear\) is offloaded by accelerate"):
        qnn.quantize_model(model)
    testing.assert_bitwise(model(X), expected)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("way", ["cpu_offload", "attach", "dispatch"])
def test_adapters_on_layers_that_are_offloaded(four_bit: bool, way: str) -> None:
    """They are where the layer is computed, act, and are trained; nothing is merged."""
    model = nn.Sequential(dense(), nn.Tanh(), dense())
    if four_bit:
        qnn.quantize_model(model)
    twin = qnn.add_lora(copy.deepcopy(model), CONFIG)
    if way == "cpu_offload":
        cpu_offload(model, "cpu")
    elif way == "attach":
        attach_align_device_hook(
            model,
            "cpu",
            offload=True,
            weights_map={k: v.clone() for k, v in model.state_dict().items()},
        )
    else:
        dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    qnn.add_lora(model, CONFIG)
    for one, other in zip(qnn.lora_parameters(model), qnn.lora_parameters(twin), strict=True):
        assert not one.is_meta
        with torch.no_grad():
            one.copy_(nn.init.normal_(other, std=0.1))
    qnn.prepare_for_training(model, gradient_checkpointing=False)
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    torch.testing.assert_close(model(X), twin(X))
    for one, other in zip(qnn.lora_parameters(model), qnn.lora_parameters(twin), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    qnn.merge_lora(twin)
    if way == "dispatch":  # which leaves all where they are
        qnn.merge_lora(model)
        testing.assert_bitwise(model(X), twin(X))
        qnn.unmerge_lora(model)
    else:
        with pytest.raises(RuntimeError, match="forward was replaced"):
            qnn.merge_lora(model)
    remove_hook_from_submodules(model)
    qnn.merge_lora(model)
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_merged_layer_has_the_hooks_of_accelerate(four_bit: bool) -> None:
    """Those of a model spread over devices, which a layer needs to be called there."""
    base = qnn.Linear4bit.from_linear(dense()) if four_bit else dense()
    layer = qnn.LoRALinear(base, 4, 8)
    nn.init.normal_(layer.lora_b)
    layer.merge()
    expected = layer(X)
    layer.unmerge()
    add_hook_to_module(layer.base_layer, Negated())
    layer.merge()
    testing.assert_bitwise(layer(X), -expected)
    remove_hook_from_submodules(layer)
    testing.assert_bitwise(layer(X), expected)
    layer.base_layer.forward = lambda x: x
    with pytest.raises(RuntimeError, match="replaced after merging"):
        layer(X)


def test_a_merged_layer_refuses_hooks_of_accelerate() -> None:
    layer = qnn.LoRALinear(dense(), 4, 8)
    layer.merge()
    add_hook_to_module(layer.base_layer, Negated())
    with pytest.raises(RuntimeError, match="replaced after merging"):
        layer(X)
    layer.unmerge()
    layer(X)


# Models that others have taken hold of


def test_models_of_peft_are_refused() -> None:
    """Its adapters are linear layers, which would be put in 4 bits and frozen."""
    for config in (
        peft.LoraConfig(r=2, target_modules=["plain"]),
        peft.LoraConfig(r=2, target_modules=["plain"], modules_to_save=["odd"]),
    ):
        model = peft.get_peft_model(model_of(dense()), config)
        before = [p.requires_grad for p in model.parameters()]
        for change in (qnn.quantize_model, lambda m: qnn.add_lora(m, CONFIG)):
            with pytest.raises(ValueError, match=r"model: .*PEFT"):
                change(model)
        assert untouched(model)
        assert [p.requires_grad for p in model.parameters()] == before


def test_a_model_with_adapters_is_not_quantised() -> None:
    """They would be frozen, and a merged weight would be stale."""
    model = qnn.add_lora(nn.Sequential(dense(), dense()), qnn.LoRAConfig(r=2, targets=["0"]))
    with pytest.raises(ValueError, match="model: has LoRA already, at 0; quantise first"):
        qnn.quantize_model(model)
    assert all(p.requires_grad for p in qnn.lora_parameters(model))


@pytest.mark.parametrize(
    "hold",
    [lambda m: [m], lambda m: (m, 1), lambda m: {"a": m}, lambda m: [1, {"a": ("b", [m])}]],
)
def test_a_layer_that_a_module_keeps_in_a_list_is_refused(hold: Callable[[nn.Module], Any]) -> None:
    """It would go on calling the dense layer, and an adapter would never be trained."""

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = dense()
            self.held = hold(self.layer)

    for change in (qnn.quantize_model, lambda m: qnn.add_lora(m, CONFIG)):
        model = nn.ModuleDict({"plain": dense(), "looped": Looped()})
        with pytest.raises(ValueError, match=r"looped.held is a \w+ that holds a layer"):
            change(model)
        assert untouched(model)
    qnn.quantize_model(model, skip=["looped"], lora=CONFIG)
    assert isinstance(model["plain"], qnn.LoRALinear)


def test_a_layer_that_a_module_keeps_past_its_submodules_is_refused() -> None:
    model = nn.ModuleDict({"plain": dense(), "odd": nn.Sequential(dense())})
    vars(model["odd"])["first"] = model["odd"][0]
    for change in (qnn.quantize_model, lambda m: qnn.add_lora(m, CONFIG)):
        with pytest.raises(
            ValueError, match=r"model: odd.first is no submodule, but it is a layer"
        ):
            change(model)
        assert untouched(model)


def test_a_checkpoint_of_bitsandbytes_takes_the_place_of_the_same_layers(tmp_path: Path) -> None:
    saved = qnn.quantize_model(nn.Sequential(dense()))
    io.save_bnb(saved, tmp_path / "model.safetensors")
    for make in (dense, lambda: qnn.Linear4bit.from_linear(dense())):
        model = nn.Sequential(make())
        handle = model[0].register_forward_hook(lambda _m, _x, y: 2 * y)
        model[0].note = "kept"
        io.load_bnb(model, tmp_path / "model.safetensors")
        assert model[0].note == "kept"
        testing.assert_bitwise(model(X), 2 * saved(X))
        handle.remove()
        testing.assert_bitwise(model(X), saved(X))
    for odd in (own_forward, with_state_hook):
        model = nn.Sequential(odd())
        with pytest.raises(ValueError, match="0 has "):
            io.load_bnb(model, tmp_path / "model.safetensors")
        assert type(model[0]) is nn.Linear


def test_an_adapter_of_falcon_goes_back_on_the_dense_model(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = qnn.add_lora(FalconForCausalLM(config).eval(), CONFIG)
    for parameter in qnn.lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    io.save_adapter(model, tmp_path)
    other = FalconForCausalLM(config).eval()
    other.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    )
    io.load_adapter(other, tmp_path)
    ids = torch.arange(8).view(1, 8)
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_quantising_does_not_bring_the_compiler() -> None:
    """It takes longer than quantising a small model; a layer on meta brings it."""
    code = (
        "import sys; from torch import nn; import qkern.nn as qnn\n"
        "model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))\n"
        "qnn.quantize_model(model, lora=qnn.LoRAConfig(r=2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
