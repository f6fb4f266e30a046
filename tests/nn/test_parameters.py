"""4-bit weights as frozen parameters: what code that handles parameters does to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qkern
from qkern import nn as qnn
from qkern import testing
from qkern.backends import cpu

X = torch.linspace(-1, 1, 300).view(3, 100)


def linear(bias: bool = True, **options: object) -> qnn.Linear4bit:
    torch.manual_seed(1)
    return qnn.Linear4bit.from_linear(nn.Linear(100, 70, bias), **options)


def codes(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of all 4-bit weights."""
    named = module.state_dict().items()
    return {name: t.clone() for name, t in named if t.dtype in (torch.uint8, torch.int32)}


def assert_same_codes(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = codes(module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        testing.assert_bitwise(found[name], tensor, name)


@contextmanager
def swapped_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Casts and copies


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.complex64),
        lambda m: m.to("cpu", torch.float16, non_blocking=True),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.share_memory(),
        lambda m: m.train().eval().zero_grad(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["half", "double", "bf16", "complex", "to", "format", "share", "grad", "copy", "pickle"],
)
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("swap", [False, True])
def test_no_cast_or_copy_changes_a_bit(
    change: Callable[[nn.Module], nn.Module | None], swap: bool
) -> None:
    model = nn.Sequential(linear(double_quant=False), qnn.LoRALinear(linear(bias=False), 4, 8))
    model.append(qnn.Embedding4bit.from_embedding(nn.Embedding(7, 33)))
    before = codes(model)
    if swap:
        with swapped_parameters():
            changed = change(model) or model
    else:
        changed = change(model) or model
    assert_same_codes(changed, before)
    integers = [p for p in changed.parameters() if p.dtype in (torch.uint8, torch.int32)]
    assert len(integers) == len(before)
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in integers)


def test_swapped_parameters_load_and_move() -> None:
    with swapped_parameters():
        layer, other = linear(), qnn.Linear4bit(100, 70)
        parameter = other.weight
        other.load_state_dict(layer.state_dict())
        assert other.weight is parameter
        assert_same_codes(other, codes(layer))
        other = qnn.Linear4bit(100, 70, device="meta")
        other.load_state_dict(layer.state_dict(), assign=True)
        assert_same_codes(other, codes(layer))
        assert layer.to("meta").weight.is_meta


# Gradients and optimizers


def lora_model() -> nn.Sequential:
    return nn.Sequential(qnn.LoRALinear(linear(), 4, 8), nn.Tanh(), nn.LayerNorm(70))


def test_requires_grad_leaves_the_weight() -> None:
    layer = linear()
    assert layer.requires_grad_(True) is layer
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad
    lora = qnn.LoRALinear(layer, 4, 8)
    assert not layer.bias.requires_grad
    assert lora.requires_grad_(True) is lora
    trainable = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a", "lora_b", "base_layer.bias"}
    assert not any(p.requires_grad for p in lora.requires_grad_(False).parameters())


def test_a_whole_model_cannot_require_grad() -> None:
    """As with bitsandbytes' layers: torch says that integers have no gradients."""
    model = lora_model()
    before = codes(model)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="floating point"):
        model[0].base_layer.weight.requires_grad = True
    assert_same_codes(model, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: qkern.optim.PagedAdamW(p, lr=0.1, weight_decay=0.5),
    ],
    ids=["adamw", "foreach", "sgd", "paged"],
)
def test_an_optimizer_of_all_parameters_trains_those_with_gradients(
    make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model = lora_model()
    before, trained = codes(model), model[0].lora_b.detach().clone()
    optimizer = make(model.parameters())
    for _ in range(2):
        model(X).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert_same_codes(model, before)
    assert all(p.grad is None for p in model.parameters() if not p.is_floating_point())
    assert not torch.equal(model[0].lora_b, trained)


def test_paged_adamw_takes_what_is_trained() -> None:
    model = lora_model()
    before = codes(model)
    optimizer = qkern.optim.PagedAdamW(p for p in model.parameters() if p.requires_grad)
    model(X).square().sum().backward()
    optimizer.step()
    assert_same_codes(model, before)


def lbfgs(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """It searches along its direction, or a step may raise the loss."""
    return torch.optim.LBFGS(params, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("make", [lbfgs, torch.optim.Muon])
def test_optimizers_that_need_what_is_trained(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Of all parameters, one makes a float vector and the other wants matrices only."""
    model = lora_model()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(X).square().sum()
        value.backward()
        return value

    def step(params: Iterator[nn.Parameter]) -> None:
        nonlocal optimizer
        optimizer = make(params)
        optimizer.step(loss)

    optimizer = torch.optim.SGD(qnn.lora_parameters(model))
    with pytest.raises((RuntimeError, ValueError), match=r"Float can't be cast|only supports 2D"):
        step(model.parameters())
    before = loss().item()
    step(qnn.lora_parameters(model))
    assert loss().item() < before


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_of_all_parameters_destroys_codes(decay: float) -> None:
    """Even of parameters that never change; of the trained ones alone it is right."""
    model = lora_model()
    average = get_ema_multi_avg_fn(decay)
    whole = AveragedModel(model, multi_avg_fn=average)
    trained = AveragedModel(nn.ParameterList(qnn.lora_parameters(model)), multi_avg_fn=average)
    for _ in range(100):
        whole.update_parameters(model)
        trained.update_parameters(nn.ParameterList(qnn.lora_parameters(model)))
    weight = model[0].base_layer.weight
    assert (whole.module[0].base_layer.weight != weight).float().mean() > 0.1
    for mine, right in zip(trained.module, qnn.lora_parameters(model), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_vector_of_what_is_trained() -> None:
    """Of all parameters it would hold codes as numbers: that is noticed when they are put back."""
    model = lora_model()
    expected = model(X)
    trained = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(trained)
    nn.utils.vector_to_parameters(vector, trained)
    assert torch.equal(model(X), expected)
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    )
    with pytest.raises(TypeError, match=r"packed: got torch.float32; takes torch.uint8"):
        model(X)


# Assignment


def bnb_weight() -> bnb.nn.Params4bit:
    layer = bnb.nn.Linear4bit(100, 70, quant_type="nf4")
    return layer.to("cpu").weight


REFUSED = [
    ("weight", lambda: nn.Parameter(torch.zeros(70, 100)), TypeError, r"from_linear"),
    ("weight", lambda: torch.zeros(70, 100, dtype=torch.bfloat16), TypeError, r"from_linear"),
    (
        "weight",
        lambda: nn.Parameter(torch.zeros(70, 100)),
        TypeError,
        r"weight: got torch.float32 \[70, 100\]; takes torch.uint8 \[3500, 1\]",
    ),
    (
        "weight",
        lambda: torch.zeros(3500, dtype=torch.uint8),
        ValueError,
        r"weight: got torch.uint8 \[3500\]; takes torch.uint8 \[3500, 1\]",
    ),
    ("weight", lambda: None, TypeError, r"weight: got NoneType; takes torch.uint8 \[3500, 1\]"),
    ("weight", bnb_weight, TypeError, r"weight: got a Params4bit, whose scales .*load_state_dict"),
    ("absmax", lambda: torch.zeros(110), TypeError, r"absmax: got torch.float32 \[110\]; takes"),
    ("codebook", lambda: torch.zeros(16), TypeError, r"codebook: got .*; takes None"),
    ("nested_offset", lambda: None, TypeError, r"nested_offset: got NoneType; takes torch.int32"),
    ("weight", lambda: "w", TypeError, r"cannot assign 'str'|cannot assign 'str' as parameter"),
]


@pytest.mark.parametrize(("name", "make", "error", "message"), REFUSED)
def test_what_cannot_be_assigned(
    name: str, make: Callable[[], object], error: type[Exception], message: str
) -> None:
    layer = linear()
    before, y = codes(layer), layer(X)
    with pytest.raises(error, match=message):
        setattr(layer, name, make())
    assert_same_codes(layer, before)
    assert torch.equal(layer(X), y)


@pytest.mark.parametrize("as_parameter", [True, False])
def test_packed_codes_can_be_assigned(as_parameter: bool) -> None:
    """As accelerate does for a class of this name: ``module.weight = module.weight.to(0)``."""
    layer, other = linear(), qnn.Linear4bit.from_linear(nn.Linear(100, 70))
    for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
        tensor = getattr(other, name).data
        value = nn.Parameter(tensor, requires_grad=False) if as_parameter else tensor
        setattr(layer, name, value)
        held = getattr(layer, name)
        assert type(held) is nn.Parameter
        assert (held is value) == as_parameter
        assert held.data_ptr() == tensor.data_ptr()
        assert not held.requires_grad
    layer.bias = other.bias
    assert torch.equal(layer(X), other(X))
    layer.weight = layer.weight.to("meta")
    assert layer.weight.is_meta
    layer.weight = other.weight
    assert torch.equal(layer(X), other(X))


def test_new_attributes_and_the_bias_are_those_of_any_module() -> None:
    layer = linear()
    layer.note = "x"
    layer.extra = nn.Parameter(torch.zeros(2))
    layer.bias = None
    assert {"note"} <= layer.__dict__.keys()
    assert "extra" in layer._parameters
    assert layer(X).shape == (3, 70)


def test_data_of_another_dtype_is_refused_by_the_forward() -> None:
    """PEFT's LoftQ assigns ``weight.data``, which no module can see."""
    layer = linear()
    layer.weight.data = layer.weight.data.float()
    with pytest.raises(TypeError, match=r"packed: got torch.float32; takes torch.uint8"):
        layer(X)
    layer = linear()
    layer.weight.data = torch.zeros(70, 50, dtype=torch.uint8)[:-1]
    with pytest.raises(ValueError, match="packed: got 3450 elements; takes 3500"):
        layer(X)


# Other ways parameters are held


def test_layers_tied_by_quantize_model_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    qnn.quantize_model(model)
    for changed in (copy.deepcopy(model), model.half()):
        assert changed[0].weight is changed[1].weight
        assert changed[0].absmax is changed[1].absmax
    unique = {id(p) for p in model.parameters()}
    assert len(unique) == len(list(model.parameters())) == 5 + 2


def test_a_parametrised_weight_is_found() -> None:
    class Flipped(nn.Module):
        def forward(self, packed: Tensor) -> Tensor:
            return packed ^ 0xFF

    layer = linear()
    expected = copy.deepcopy(layer)
    expected.weight.data ^= 0xFF
    parametrize.register_parametrization(layer, "weight", Flipped())
    assert "weight" not in layer._parameters
    assert torch.equal(layer(X), expected(X))


def test_functional_call_takes_other_codes() -> None:
    layer, other = linear(), qnn.Linear4bit.from_linear(nn.Linear(100, 70))
    before = layer(X)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (X,))
    assert torch.equal(y, other(X))
    assert torch.equal(layer(X), before)


def test_replicas_of_data_parallel() -> None:
    """They hold plain tensors as attributes and have no parameters."""
    layer = linear()
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone())
    replica.nested_absmax = layer.nested_absmax.detach().clone()
    replica.codebook = None
    assert not replica._parameters
    assert torch.equal(replica(X), layer(X))


# Libraries' fast paths and adapters


def test_hooks_are_called_and_can_be_removed() -> None:
    layer = linear()
    assert not layer._forward_pre_hooks
    calls: list[str] = []
    handle = layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    first = layer.register_forward_pre_hook(lambda *_: calls.append("first"), prepend=True)
    assert layer._forward_pre_hooks
    layer(X)
    assert calls == ["first", "pre"]
    copied = copy.deepcopy(layer)
    copied(X)
    assert calls == ["first", "pre"] * 2
    handle.remove()
    first.remove()
    layer(X)
    assert calls == ["first", "pre"] * 2
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("emulated", [False, True])
def test_hooks_on_the_base_of_an_adapter_are_called(
    dtype: torch.dtype,
    adapter: torch.dtype | None,
    dropout: float,
    emulated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They see the base's own result, and change no bit of what comes out."""
    if emulated:
        monkeypatch.setattr(cpu, "has_matmul", lambda d: d == torch.float32)
    layer = qnn.LoRALinear(linear(), 4, 8, dropout, dtype=adapter).train()
    nn.init.normal_(layer.lora_b)
    results = []
    seen: list[Tensor] = []
    for hooked in (False, True):
        if hooked:
            layer.base_layer.register_forward_hook(lambda _m, _x, y: seen.append(y.detach()))
        x = X.to(dtype).view(1, 3, 100).requires_grad_()
        torch.manual_seed(3)
        y = layer(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, layer.lora_a.grad, layer.lora_b.grad))
        layer.zero_grad()
    testing.assert_bitwise(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {}
        torch.testing.assert_close(one, other, **close)
    with torch.no_grad():
        testing.assert_bitwise(seen[0], layer.base_layer(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_a_quantised_transformer_encoder_keeps_off_its_fast_paths(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    dense = copy.deepcopy(encoder)
    qnn.quantize_model(encoder, targets=["linear1", "linear2"])
    for name, module in encoder.named_modules():
        if isinstance(module, qnn.Linear4bit):
            dense.get_submodule(name).weight.data = module.quantized.dequantize()
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask)
        expected = dense(x, src_key_padding_mask=mask)
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(y[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_refuses_what_would_change_the_weight(init: str) -> None:
    model = nn.Sequential(linear())
    before = codes(model)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)
    with pytest.raises(TypeError, match=r"float32, float16, or bfloat16|Unsupported data type"):
        peft.get_peft_model(model, config)
    assert_same_codes(model, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal"),
        lambda: peft.LoraConfig(r=4, target_modules=["0"], use_dora=True),
        lambda: peft.LoraConfig(r=4, target_modules=["1"], modules_to_save=["0"]),
        lambda: peft.LoHaConfig(r=4, target_modules=["0"]),
        lambda: peft.LoKrConfig(r=4, target_modules=["0"]),
        lambda: peft.HRAConfig(r=4, target_modules=["0"]),
    ],
    ids=["orthogonal", "dora", "modules_to_save", "loha", "lokr", "hra"],
)
def test_peft_methods_that_raise(make: Callable[[], peft.PeftConfig]) -> None:
    model = nn.Sequential(linear(), nn.Linear(70, 8))
    with pytest.raises(RuntimeError):
        peft.get_peft_model(model, make())(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.LoraConfig(r=4, target_modules=["0"], use_rslora=True),
        lambda: peft.AdaLoraConfig(target_modules=["0"], total_step=10),
        lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        lambda: peft.OFTConfig(target_modules=["0"], oft_block_size=10),
        lambda: peft.BOFTConfig(target_modules=["0"], boft_block_size=10),
        lambda: peft.VeraConfig(r=4, target_modules=["0"]),
        lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["0"]),
    ],
    ids=["rslora", "adalora", "ia3", "oft", "boft", "vera", "fourierft"],
)
def test_peft_methods_that_train(make: Callable[[], peft.PeftConfig]) -> None:
    model = nn.Sequential(linear())
    before = codes(model)
    wrapped = peft.get_peft_model(model, make())
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    wrapped(X).square().sum().backward()
    assert trained
    assert all(p.grad is not None for p in trained)
    assert any(bool(p.grad.any()) for p in trained)
    found = [p for p in wrapped.parameters() if p.dtype in (torch.uint8, torch.int32)]
    for param, right in zip(found, before.values(), strict=True):
        testing.assert_bitwise(param, right)


def test_peft_does_not_merge_into_the_codes() -> None:
    model = nn.Sequential(linear())
    before = codes(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(wrapped.base_model.model[0].lora_B["default"].weight)
    with pytest.raises(RuntimeError):
        wrapped.merge_and_unload()
    found = codes(wrapped)
    assert {k.rpartition(".")[2]: v.tolist() for k, v in found.items()} == {
        k.rpartition(".")[2]: v.tolist() for k, v in before.items()
    }


def test_peft_trains_its_adapters_only() -> None:
    model = peft.get_peft_model(
        nn.Sequential(linear()), peft.LoraConfig(r=4, target_modules=["0"], bias="all")
    )
    before = codes(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"weight", "bias"}
    assert all("lora_" in name or name.endswith("bias") for name in trainable)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_codes(model, before)


def test_the_dense_forward_is_not_taken_for_it() -> None:
    """Code that computes with ``weight`` itself fails rather than being wrong."""
    with pytest.raises(RuntimeError):
        F.linear(X, linear().weight)
