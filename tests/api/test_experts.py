"""QuantizedExperts: each expert as if quantised alone, in one set of tensors."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedExperts, QuantizedTensor, formats

KINDS = [(f, dq) for f in formats.FORMATS for dq in (True, False)]
kinds = pytest.mark.parametrize(("format", "double_quant"), KINDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def options_of(format: str, double_quant: bool) -> dict[str, Any]:
    codebook = torch.linspace(-1, 0.9, 16) if format == "custom" else None
    return {"format": format, "double_quant": double_quant, "codebook": codebook}


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices whose scales differ from one to the next, and so do nested offsets."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (w * (1 + torch.arange(shape[0]))[:, None, None]).to(dtype)


def make(format: str = "nf4", double_quant: bool = True, **changes: Any) -> QuantizedExperts:
    """Of an odd number of elements an expert, which no block divides."""
    return qkern.quantize_experts(dense(3, 33, 67), **options_of(format, double_quant) | changes)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name
        assert tensor.dtype == expected.tensors()[name].dtype
    for name in ("format", "block_size", "shape", "dtype"):
        assert getattr(found, name) == getattr(expected, name), name


def one_by_one(w: Tensor, **options: Any) -> list[QuantizedTensor]:
    return [qkern.quantize_4bit(matrix.contiguous(), **options) for matrix in w]


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_expert_is_quantised_alone(
    dtype: torch.dtype, format: str, double_quant: bool
) -> None:
    options = options_of(format, double_quant)
    w = dense(3, 33, 67, dtype=dtype)
    alone = one_by_one(w, **options)
    as_list = qkern.quantize_experts(list(w), **options)
    transposed = qkern.quantize_experts(w.mT.contiguous(), transposed=True, **options)
    for found in (qkern.quantize_experts(w, **options), as_list, transposed):
        assert found.shape == (3, 33, 67)
        assert found.dtype == dtype
        for expert, expected in zip(found, alone, strict=True):
            assert_same(expert, expected)
    assert_same(QuantizedExperts.stack(alone), as_list)
    if double_quant:
        assert len(set(as_list.nested_offset.tolist())) == 3


@pytest.mark.parametrize("block_size", [32, 4096])
def test_arguments_of_quantize_4bit_are_taken_by_place_and_name(block_size: int) -> None:
    w = dense(2, 8, 64)
    expected = one_by_one(w, format="fp4", block_size=block_size, double_quant=False)
    for found in (
        qkern.quantize_experts(w, "fp4", block_size, False),
        qkern.quantize_experts(w, format="fp4", block_size=block_size, double_quant=False),
    ):
        for expert, one in zip(found, expected, strict=True):
            assert_same(expert, one)
    w[1, 3, 5] = torch.inf
    found = qkern.quantize_experts(w, double_quant=False, check_finite=False)
    assert found[0].dequantize().isfinite().all()
    assert not found[1].dequantize().isfinite().all()


@kinds
def test_parts(format: str, double_quant: bool) -> None:
    qw = make(format, double_quant)
    n, blocks = 33 * 67, 35
    assert qw.packed.shape == (3, (n + 1) // 2)
    assert qw.absmax.shape == (3, blocks)
    assert qw.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
    if double_quant:
        assert qw.nested_absmax.shape == (3, 1)
        assert qw.nested_offset.shape == (3,)
    assert (qw.codebook is None) == (format != "custom")
    assert (len(qw), qw.ndim, qw.numel(), qw.double_quant) == (3, 3, 3 * n, double_quant)
    scales = 3 * (blocks + 8) if double_quant else 3 * 4 * blocks
    assert qw.nbytes == 3 * (n + 1) // 2 + scales + (64 if format == "custom" else 0)
    assert qw.device == torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 0, 8), (3, 8, 0)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    qw = qkern.quantize_experts(torch.randn(shape))
    assert qw.shape == shape
    assert qw.dequantize().shape == shape


@kinds
def test_an_expert_is_in_the_same_memory(format: str, double_quant: bool) -> None:
    qw = make(format, double_quant)
    one = qw[1]
    assert type(one) is QuantizedTensor
    assert one.shape == (33, 67)
    for name, tensor in one.tensors().items():
        whole = qw.tensors()[name]
        assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name
    before = qw[0].dequantize(), qw[2].dequantize()
    one.packed.fill_(0x11)
    assert (qw.packed[1] == 0x11).all()
    assert torch.equal(qw[0].dequantize(), before[0])
    assert torch.equal(qw[2].dequantize(), before[1])
    assert_same(qw[-2], one)
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"expert: got {wrong}; takes one of 3"):
            qw[wrong]


@kinds
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_dequantize(dtype: torch.dtype | None, format: str, double_quant: bool) -> None:
    qw = make(format, double_quant).to(torch.bfloat16)
    found = qw.dequantize(dtype)
    assert found.dtype == (dtype or torch.bfloat16)
    assert torch.equal(found, torch.stack([expert.dequantize(dtype) for expert in qw]))
    with pytest.raises(TypeError, match=r"dtype: got torch\.float64; takes"):
        qw.dequantize(torch.float64)


def by_pickle(qw: QuantizedExperts) -> QuantizedExperts:
    return pickle.loads(pickle.dumps(qw))


def by_torch_save(qw: QuantizedExperts) -> QuantizedExperts:
    file = io.BytesIO()
    torch.save({"experts": qw}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["experts"]


@pytest.mark.parametrize(
    "duplicate", [by_pickle, by_torch_save, copy.copy, copy.deepcopy], ids=lambda f: f.__name__
)
@kinds
def test_copies(
    duplicate: Callable[[QuantizedExperts], QuantizedExperts], format: str, double_quant: bool
) -> None:
    qw = make(format, double_quant)
    found = duplicate(qw)
    assert_same(found, qw)
    x, offsets = torch.randn(4, 67), torch.tensor([1, 1, 4])
    expected = qkern.grouped_linear_4bit(x, qw, offsets)
    assert torch.equal(qkern.grouped_linear_4bit(x, found, offsets), expected)
    if duplicate is copy.copy:
        assert found.packed is qw.packed
    else:
        found.packed.zero_()
        assert qw.packed.any()


def test_a_tampered_pickle_is_refused() -> None:
    qw = make()
    state = qw.__getstate__() | {"packed": qw.packed[:2]}
    with pytest.raises(ValueError, match=r"packed: got shape \[2, 1106\]; takes \[3, 1106\]"):
        QuantizedExperts.__new__(QuantizedExperts).__setstate__(state)


def test_immutable_and_compared_by_identity() -> None:
    qw = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        qw.block_size = 128  # type: ignore[misc]
    assert qw != make()
    assert len({qw, copy.copy(qw)}) == 2


def test_its_fields_make_another_one() -> None:
    qw = make()
    assert_same(QuantizedExperts(**dataclasses.asdict(qw)), qw)
    assert_same(QuantizedExperts(*dataclasses.astuple(qw)), qw)


def test_to() -> None:
    qw = make()
    assert qw.to("cpu") is qw
    assert qw.to(torch.float32) is qw
    half = qw.to(torch.float16)
    assert type(half) is QuantizedExperts
    assert half.packed is qw.packed
    assert half[0].dtype == half.dequantize().dtype == torch.float16
    moved = qw.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert (moved.shape, moved.dtype) == (qw.shape, torch.bfloat16)
    assert moved.dequantize().is_meta
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8"):
        qw.to(torch.int8)


def test_repr_does_not_print_values() -> None:
    assert repr(make()) == (
        "QuantizedExperts(shape=[3, 33, 67], format='nf4', block_size=64, double_quant=True, "
        f"dtype=torch.float32, device='cpu', nbytes={make().nbytes})"
    )


def test_torch_functions_are_refused_by_name() -> None:
    with pytest.raises(
        TypeError,
        match=r"linear: got a QuantizedExperts; takes a Tensor.*"
        r"qkern\.grouped_linear_4bit\(x, weight, offsets\)",
    ):
        torch.nn.functional.linear(torch.randn(2, 67), make())
    with pytest.raises(TypeError, match="add: got a QuantizedExperts"):
        torch.add(make(), 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (33, 67)}, ValueError, r"shape: got \[33, 67\]; takes \[experts, out_feat"),
        ({"shape": (4, 33, 67)}, ValueError, r"packed: got shape \[3, 1106\]; takes \[4, 1106\]"),
        ({"shape": (3, 33, 99)}, ValueError, r"packed: got shape \[3, 1106\]; takes \[3, 1634\]"),
        ({"nested_absmax": None}, ValueError, "nested_absmax, nested_offset: got only one"),
        ({"nested_absmax": torch.zeros(3)}, ValueError, r"nested_absmax: got shape \[3\]; takes"),
        ({"nested_offset": torch.zeros(())}, ValueError, r"nested_offset: got shape \[\]; takes"),
        ({"nested_offset": torch.zeros(3, 1)}, ValueError, r"nested_offset: got shape \[3, 1\]"),
        ({"absmax": torch.zeros(3, 35)}, TypeError, "absmax: got torch.float32; takes"),
        ({"packed": torch.zeros(3 * 1106).byte()}, ValueError, r"packed: got shape \[3318\]"),
        ({"packed": torch.zeros(1106, 3).byte().mT}, ValueError, "packed: got strides"),
        ({"codebook": torch.zeros(16)}, ValueError, 'codebook: got a tensor with format="nf4"'),
        ({"block_size": 48}, ValueError, "block_size: got 48; takes a power of two"),
        ({"dtype": torch.int8}, TypeError, r"dtype: got torch\.int8"),
        ({"absmax": torch.zeros(3, 35, device="meta").byte()}, ValueError, "absmax: got a tens"),
    ],
)
def test_parts_that_do_not_fit(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(make(), **changes)


BOOK = torch.linspace(-1, 1, 16)
W = torch.randn(8, 64)
UNEQUAL = {
    "shape": (qkern.quantize_4bit(W[:7]), r"got shape \(7, 64\) of expert 1; takes \(8, 64\)"),
    "format": (qkern.quantize_4bit(W, "fp4"), "got format fp4 of expert 1; takes nf4"),
    "block_size": (
        qkern.quantize_4bit(W, block_size=32),
        "got block_size 32 of expert 1; takes 64",
    ),
    "double_quant": (
        qkern.quantize_4bit(W, double_quant=False),
        "got double_quant False of expert 1; takes True",
    ),
    "dtype": (qkern.quantize_4bit(W.half()), "got dtype torch.float16 of expert 1; takes torch.f"),
    "device": (qkern.quantize_4bit(W.to("meta")), "got device meta of expert 1; takes cpu"),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_stack_refuses_weights_that_differ(name: str) -> None:
    other, message = UNEQUAL[name]
    with pytest.raises(ValueError, match=f"^experts: {message}"):
        QuantizedExperts.stack([qkern.quantize_4bit(W), other])


def test_stack_refuses_other_codebooks_none_and_other_dimensions() -> None:
    one, same, other = (
        qkern.quantize_4bit(W, "custom", codebook=book)
        for book in (BOOK, BOOK.clone(), BOOK.flip(0).contiguous())
    )
    found = QuantizedExperts.stack([one, same])
    assert found.codebook is one.codebook
    with pytest.raises(ValueError, match="experts: got another codebook of expert 2 than expert"):
        QuantizedExperts.stack([one, same, other])
    with pytest.raises(ValueError, match="experts: got none; takes one or more"):
        QuantizedExperts.stack([])
    with pytest.raises(ValueError, match=r"shape: got \[2, 64\]; takes \[experts, out_features"):
        QuantizedExperts.stack([qkern.quantize_4bit(W[0])] * 2)


def test_stack_copies() -> None:
    parts = one_by_one(dense(2, 8, 64))
    found = QuantizedExperts.stack(parts)
    parts[0].packed.zero_()
    assert found.packed[0].any()


def test_weights_that_require_grad_are_quantised_without_a_graph() -> None:
    w = torch.nn.Parameter(dense(2, 8, 64))
    for found in (qkern.quantize_experts(w), qkern.quantize_experts(list(w))):
        assert not any(tensor.requires_grad for tensor in found.tensors().values())


def test_meta_weights_give_meta_parts() -> None:
    found = qkern.quantize_experts(torch.empty(3, 33, 67, device="meta"))
    assert {tensor.device.type for tensor in found.tensors().values()} == {"meta"}
    for name, tensor in make().tensors().items():
        assert found.tensors()[name].shape == tensor.shape
    y = qkern.grouped_linear_4bit(
        torch.empty(5, 67, device="meta"), found, torch.empty(3, device="meta", dtype=torch.int32)
    )
    assert (y.is_meta, y.shape) == (True, (5, 33))
