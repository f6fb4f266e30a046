"""Experts4bit: the weights of experts as parameters that survive what models go through."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import qkern
from qkern import QuantizedExperts
from qkern import nn as qnn
from qkern.nn import Experts4bit

KINDS = {
    "nested": {},
    "plain": {"double_quant": False},
    "custom": {"format": "custom", "block_size": 32},
}
kinds = pytest.mark.parametrize("kind", KINDS)
OFFSETS = torch.tensor([2, 2, 5])


def dense(dtype: torch.dtype = torch.float32) -> Tensor:
    """Three experts ``[33, 67]`` whose nested offsets differ."""
    w = torch.randn(3, 33, 67, generator=torch.Generator().manual_seed(0))
    return (w * torch.tensor([1.0, 3.0, 0.2])[:, None, None]).to(dtype)


def make(kind: str = "nested", bias: bool = True, **changes: Any) -> Experts4bit:
    options: dict[str, Any] = KINDS[kind] | changes
    if options.get("format") == "custom":
        options["codebook"] = torch.linspace(-1, 0.9, 16)
    w = dense(options.pop("dtype", torch.float32))
    own = nn.Parameter(torch.randn(3, 33).to(w.dtype)) if bias else None
    w = w.mT if options.get("transposed") else w
    return Experts4bit.from_dense(w, bias=own, **options)


def empty(kind: str = "nested", bias: bool = True, **changes: Any) -> Experts4bit:
    """As the constructor makes it, for a state dict."""
    return Experts4bit(3, 67, 33, bias, **KINDS[kind] | changes)


def rows() -> Tensor:
    return torch.randn(6, 67, generator=torch.Generator().manual_seed(1))


def assert_same(found: Experts4bit, expected: Experts4bit) -> None:
    for name, tensor in expected.quantized.tensors().items():
        assert torch.equal(found.quantized.tensors()[name], tensor), name
    for name in ("format", "block_size", "shape"):
        assert getattr(found.quantized, name) == getattr(expected.quantized, name)
    assert found.transposed == expected.transposed
    assert torch.equal(found(rows(), OFFSETS), expected(rows(), OFFSETS))


@kinds
def test_the_parameters_are_the_weight(kind: str) -> None:
    module = make(kind)
    w = dense()
    qw = qkern.quantize_experts(
        w, **KINDS[kind], codebook=torch.linspace(-1, 0.9, 16) if kind == "custom" else None
    )
    for name, tensor in qw.tensors().items():
        assert torch.equal(module.quantized.tensors()[name], tensor), name
    expected = {"weight": torch.uint8, "quant_meta": torch.uint8, "bias": torch.float32}
    expected["absmax"] = torch.int32 if kind == "plain" else torch.uint8
    if kind != "plain":
        expected |= {"nested_absmax": torch.int32, "nested_offset": torch.int32}
    if kind == "custom":
        expected["codebook"] = torch.int32
    assert {name: p.dtype for name, p in module.named_parameters()} == expected
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    assert module.weight.shape == (3, (33 * 67 + 1) // 2)
    assert (len(module), module.num_experts) == (3, 3)
    assert (module.in_features, module.out_features) == (67, 33)
    assert json.loads(bytes(module.quant_meta.tolist())) == {
        "block_size": qw.block_size,
        "double_quant": kind != "plain",
        "experts": 1,
        "format": qw.format,
        "shape": [3, 33, 67],
        "transposed": False,
    }
    y = module(rows(), OFFSETS)
    assert torch.equal(y, qkern.grouped_linear_4bit(rows(), qw, OFFSETS, module.bias))
    assert (y[5:] == 0).all()


def test_gradients_reach_the_input_and_the_bias() -> None:
    module, x = make(), rows().requires_grad_()
    module(x, OFFSETS).square().sum().backward()
    w, inner = module.to_dense(), x.detach().requires_grad_()
    own = module.bias.detach().requires_grad_()
    expert = (0, 0, 2, 2, 2)
    torch.stack(
        [inner[row] @ w[e].mT + own[e] for row, e in enumerate(expert)]
    ).square().sum().backward()
    torch.testing.assert_close(x.grad, inner.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad, own.grad, rtol=1e-4, atol=1e-4)
    assert (module.bias.grad[1] == 0).all()
    assert (x.grad[5] == 0).all()


@kinds
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("transposed", [False, True])
def test_state_dict_round_trip(transposed: bool, device: str, assign: bool, kind: str) -> None:
    module = make(kind, transposed=transposed)
    state = module.state_dict()
    assert set(state) == {name for name, _ in module.named_parameters()}
    other = empty(kind, transposed=transposed, device=device)
    assert set(other.state_dict()) == set(state)
    if device == "meta" and not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(state, assign=assign)
    assert_same(other, module)
    assert (other.weight.data_ptr() == module.weight.data_ptr()) is assign
    assert not any(p.requires_grad for n, p in other.named_parameters() if n != "bias")


@kinds
def test_safetensors_hold_it(kind: str) -> None:
    module = make(kind)
    other = empty(kind)
    other.load_state_dict(load(save({n: t.contiguous() for n, t in module.state_dict().items()})))
    assert_same(other, module)


def test_a_model_with_experts_has_their_keys() -> None:
    model = nn.ModuleDict({"up": make(), "down": make(bias=False)})
    names = ("weight", "absmax", "nested_absmax", "nested_offset", "quant_meta")
    expected = {f"{m}.{n}" for m in model for n in names} | {"up.bias"}
    assert set(model.state_dict()) == expected


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (
        lambda: Experts4bit(3, 66, 33, True),
        r"weight: the checkpoint holds .*\[3, 33, 67\].*; this module takes .*\[3, 33, 66\]",
    ),
    "swapped": (
        lambda: Experts4bit(3, 33, 67, True),
        r"holds .*\[3, 33, 67\].*takes .*\[3, 67, 33",
    ),
    "experts": (
        lambda: Experts4bit(4, 67, 33, True),
        r"holds .*\[3, 33, 67\].*takes .*\[4, 33, 67",
    ),
    "transposed": (
        lambda: empty(transposed=True),
        "holds .*'transposed': False.*takes .*'transposed': True",
    ),
    "format": (lambda: empty(format="fp4"), "holds .*'nf4'.*takes .*'fp4'"),
    "block_size": (lambda: empty(block_size=128), "holds .*'block_size': 64.*takes .*: 128"),
    "double_quant": (lambda: empty("plain"), "holds .*'double_quant': True.*takes .*: False"),
    "linear": (
        lambda: qnn.Linear4bit(67, 99),
        r"holds .*'experts': 1.*takes .*'shape': \[99, 67\]",
    ),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_of_another_weight_is_refused(what: str, assign: bool) -> None:
    other, message = WRONG[what]
    module = other()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(make().state_dict(), assign=assign)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_checkpoint_of_one_weight_is_refused() -> None:
    layer = qnn.Linear4bit.from_linear(nn.Linear(67, 99))
    with pytest.raises(RuntimeError, match=r"weight: the checkpoint holds .*this module takes"):
        empty(bias=True).load_state_dict(layer.state_dict())


def test_a_dense_checkpoint_is_refused() -> None:
    state = make(bias=False).state_dict()
    del state["quant_meta"]
    with pytest.raises(RuntimeError, match="weight: the checkpoint holds a dense weight; load it"):
        empty(bias=False).load_state_dict(state | {"weight": dense()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_codes_and_scales(dtype: torch.dtype) -> None:
    module = make()
    before = {n: p.detach().clone() for n, p in module.named_parameters() if n != "bias"}
    assert module.to(dtype) is module
    for name, tensor in before.items():
        assert torch.equal(getattr(module, name), tensor), name
    assert module.bias.dtype == module.quantized.dtype == module.to_dense().dtype == dtype
    y = module(rows().to(dtype), OFFSETS)
    assert y.dtype == dtype
    assert module(rows(), OFFSETS).dtype == torch.float32
    for integers in (torch.int8, torch.uint8):
        with pytest.raises(TypeError, match="only accepts floating point"):
            module.to(integers)


@kinds
@pytest.mark.parametrize("transposed", [False, True])
def test_to_dense(transposed: bool, kind: str) -> None:
    module = make(kind, transposed=transposed)
    plain = make(kind).quantized.dequantize()
    found = module.to_dense()
    assert torch.equal(found, plain.mT if transposed else plain)
    assert found.shape == ((3, 67, 33) if transposed else (3, 33, 67))
    assert found.is_contiguous()
    half = module.to_dense(torch.float16)
    assert torch.equal(half, found.half())
    for expert in range(3):
        assert torch.equal(module[expert], found[expert])
        assert torch.equal(module[torch.tensor(expert)], found[expert])
    with torch.inference_mode():
        assert not module.to_dense().is_inference()
    with pytest.raises(TypeError, match=r"dtype: got torch\.float64"):
        module.to_dense(torch.float64)
    with pytest.raises(IndexError, match="expert: got 3; takes one of 3"):
        module[3]


def test_from_a_sequence() -> None:
    found = Experts4bit.from_dense([matrix.mT.contiguous() for matrix in dense()], transposed=True)
    for name, tensor in make().quantized.tensors().items():
        assert torch.equal(found.quantized.tensors()[name], tensor)


def test_from_quantized_shares_and_checks() -> None:
    qw = qkern.quantize_experts(dense())
    module = Experts4bit.from_quantized(qw)
    assert module.bias is None
    assert module.weight.data_ptr() == qw.packed.data_ptr()
    assert module.nested_offset.data_ptr() == qw.nested_offset.data_ptr()
    given = nn.Parameter(torch.randn(3, 33))
    assert Experts4bit.from_quantized(qw, given).bias is given
    taken = Experts4bit.from_quantized(qw, given.detach()).bias
    assert isinstance(taken, nn.Parameter)
    assert not taken.requires_grad
    one = qkern.quantize_4bit(dense()[0])
    for wrong in (one, dense(), None):
        with pytest.raises(TypeError, match=r"qw: got .*; takes a QuantizedExperts"):
            Experts4bit.from_quantized(wrong)  # type: ignore[arg-type]
    for bias in (torch.zeros(33), torch.zeros(3, 67), torch.zeros(3, 33, 1)):
        shape = re.escape(str(tuple(bias.shape)))
        with pytest.raises(ValueError, match=rf"bias: got shape {shape}; takes \[3, 33\]"):
            Experts4bit.from_quantized(qw, bias)
    with pytest.raises(TypeError, match=r"compute_dtype: got torch\.int8"):
        Experts4bit.from_quantized(qw, compute_dtype=torch.int8)


def test_from_dense_takes_a_copy_of_a_codebook_and_names_the_expert() -> None:
    codebook = torch.linspace(-1, 1, 16)
    module = Experts4bit.from_dense(dense(), "custom", codebook=codebook)
    assert module.codebook.data_ptr() != codebook.data_ptr()
    w = dense()
    w[2, 0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^expert 2: w: got a NaN or an infinity in block 0"):
        Experts4bit.from_dense(w)
    assert Experts4bit.from_dense(w, check_finite=False).quantized[0].dequantize().isfinite().all()


def test_compute_dtype() -> None:
    module = make(compute_dtype=torch.bfloat16)
    x = rows().requires_grad_()
    y = module(x, OFFSETS)
    assert y.dtype == torch.float32
    low = qkern.grouped_linear_4bit(
        x.detach().bfloat16(), module.quantized, OFFSETS, module.bias.detach().bfloat16()
    )
    assert torch.equal(y, low.float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert "compute_dtype=torch.bfloat16" in repr(module)
    module.compute_dtype = None
    assert torch.equal(module(rows(), OFFSETS), make_like(module)(rows(), OFFSETS))
    with pytest.raises(TypeError, match=r"compute_dtype: got torch\.float64"):
        module.compute_dtype = torch.float64


def make_like(module: Experts4bit) -> Experts4bit:
    return Experts4bit.from_quantized(module.quantized, module.bias)


def test_a_bias_given_to_a_call_stands_in_for_its_own() -> None:
    module, other = make(), torch.randn(3, 33)
    expected = Experts4bit.from_quantized(module.quantized, other)(rows(), OFFSETS)
    assert torch.equal(module(rows(), OFFSETS, bias=other), expected)
    assert torch.equal(make(bias=False)(rows(), OFFSETS, bias=other), expected)
    # Cast, as its own is.
    low = module(rows().bfloat16(), OFFSETS, bias=other)
    assert torch.equal(low, module(rows().bfloat16(), OFFSETS, bias=other.bfloat16()))


@pytest.mark.parametrize("check", [False, True])
def test_a_call_checks_what_the_function_checks(check: bool) -> None:
    module = make()
    with pytest.raises(ValueError, match=r"^offsets: got 1 for expert 1 after 2; takes"):
        module(rows(), torch.tensor([2, 1, 5]), check_offsets=check)
    with pytest.raises(ValueError, match=r"^x: got shape \[6, 66\]; takes \[rows, 67\]"):
        module(rows()[:, :66], OFFSETS)
    with pytest.raises(TypeError, match=r"^offsets: got list"):
        module(rows(), [2, 2, 5])


def by_file(module: Experts4bit) -> Experts4bit:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), by_file],
    ids=["deepcopy", "pickle", "file"],
)
@kinds
def test_copies(kind: str, duplicate: Callable[[Experts4bit], Experts4bit]) -> None:
    module = make(kind, transposed=True).eval()
    other = duplicate(module)
    assert_same(other, module)
    assert other.compute_dtype is module.compute_dtype
    assert not other.training
    assert all(p._is_hf_initialized for n, p in other.named_parameters() if n != "bias")
    with torch.no_grad():
        other.weight.zero_()
    assert module.weight.any()


def test_it_says_what_it_is() -> None:
    assert repr(make(transposed=True)) == (
        "Experts4bit(num_experts=3, in_features=67, out_features=33, bias=True, format=nf4, "
        "block_size=64, double_quant=True, transposed)"
    )
    assert "transposed" not in repr(make(bias=False))


def test_the_weight_stays_frozen_and_whole() -> None:
    module = make()
    assert module.requires_grad_() is module
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]
    with pytest.raises(ValueError, match=r"weight: got torch.uint8 \[2\]; takes torch.uint8 \[3, "):
        module.weight = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"weight: got .*Experts4bit\.from_dense makes a new layer"):
        module.weight = dense()
    assert isinstance(module.quantized, QuantizedExperts)


def test_made_under_inference_mode_it_can_be_trained_with() -> None:
    with torch.inference_mode():
        made = empty(), make()
    for module in made:
        x = rows().requires_grad_()
        module(x, OFFSETS).sum().backward()
        assert x.grad is not None
