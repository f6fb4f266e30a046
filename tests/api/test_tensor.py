"""QuantizedTensor: consistent, immutable, movable, copyable, storable."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedTensor, backends, formats, reference
from qkern.weight import Weight

CODEBOOK = torch.linspace(-1.0, 1.0, 16)


def make(
    shape: tuple[int, ...] = (33, 67),
    format: str = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
) -> QuantizedTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codebook = CODEBOOK.clone() if format == "custom" else None
    return qkern.quantize_4bit(w, format, block_size, double_quant, codebook)


KINDS = [(f, dq) for f in formats.FORMATS for dq in (True, False)]


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
    assert (a.format, a.block_size, a.shape, a.dtype) == (b.format, b.block_size, b.shape, b.dtype)


def by_pickle(qw: QuantizedTensor) -> QuantizedTensor:
    return pickle.loads(pickle.dumps(qw))


def by_torch_save(qw: QuantizedTensor, weights_only: bool = True) -> QuantizedTensor:
    file = io.BytesIO()
    torch.save({"weight": qw}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["weight"]


@pytest.mark.parametrize(("format", "double_quant"), KINDS)
def test_parts(format: str, double_quant: bool) -> None:
    qw = make(format=format, double_quant=double_quant)
    n, blocks = 33 * 67, 35
    assert qw.packed.shape == ((n + 1) // 2,)
    assert qw.absmax.shape == (blocks,)
    assert qw.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
    assert qw.double_quant == double_quant == (qw.nested_offset is not None)
    assert (qw.codebook is not None) == (format == "custom")
    assert (qw.format, qw.block_size, qw.shape, qw.dtype) == (format, 64, (33, 67), torch.bfloat16)
    assert (qw.numel(), qw.ndim, qw.device) == (n, 2, torch.device("cpu"))
    scales = blocks + 4 + 4 if double_quant else 4 * blocks
    assert qw.nbytes == (n + 1) // 2 + scales + (64 if format == "custom" else 0)


def test_bits_per_weight() -> None:
    assert make((1024, 256)).nbytes * 8 / (1024 * 256) == pytest.approx(4.127, abs=5e-4)
    assert make((1024, 256), double_quant=False).nbytes * 8 / (1024 * 256) == 4.5


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7), (0, 4), (4, 0), (0,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    qw = make(shape, dtype=torch.float32)
    dense = qw.dequantize()
    assert dense.shape == shape
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Half the widest gap between neighbouring NF4 codes, plus the rounding of the scales.
    assert ((dense - w).abs() <= 0.17 * w.abs().max()).all() if w.numel() else True


@pytest.mark.parametrize(
    "duplicate", [by_pickle, by_torch_save, copy.copy, copy.deepcopy], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("format", "double_quant"), KINDS)
def test_copies(
    duplicate: Callable[[QuantizedTensor], QuantizedTensor], format: str, double_quant: bool
) -> None:
    qw = make(format=format, double_quant=double_quant)
    assert_same(duplicate(qw), qw)


def test_torch_load_without_weights_only() -> None:
    qw = make()
    assert_same(by_torch_save(qw, weights_only=False), qw)


def test_deepcopy_shares_no_memory() -> None:
    qw = make()
    duplicate = copy.deepcopy(qw)
    duplicate.packed.zero_()
    assert qw.packed.any()


def test_a_tampered_pickle_is_refused() -> None:
    qw = make()
    state = dict(qw.__dict__, packed=qw.packed[:10])
    with pytest.raises(ValueError, match=r"packed: got shape \[10\]; takes \[1106\]"):
        QuantizedTensor.__new__(QuantizedTensor).__setstate__(state)


def test_immutable_and_compared_by_identity() -> None:
    qw = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        qw.block_size = 128  # type: ignore[misc]
    assert qw != make()
    assert len({qw, qw, copy.copy(qw)}) == 2


def test_to() -> None:
    qw = make(double_quant=True)
    assert qw.to("cpu") is qw
    assert qw.to(torch.bfloat16) is qw
    half = qw.to(torch.float16)
    assert half.dtype == torch.float16
    assert half.packed is qw.packed
    assert half.dequantize().dtype == torch.float16
    for moved in (qw.to("meta"), qw.to(device="meta"), qw.to("meta", torch.float32)):
        assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
        assert moved.shape == qw.shape
    assert qw.to("meta", torch.float32).dtype == torch.float32
    assert qw.to("meta").dequantize().shape == (33, 67)
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8"):
        qw.to(torch.int8)
    with pytest.raises(TypeError, match="two dtypes"):
        qw.to(torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "double_quant"), KINDS)
def test_dequantize(format: str, double_quant: bool, dtype: torch.dtype) -> None:
    qw = make(format=format, double_quant=double_quant)
    codes = torch.stack((qw.packed >> 4, qw.packed & 15), dim=1).view(-1)[: qw.numel()]
    table = CODEBOOK if format == "custom" else formats.code_tensor(format)
    absmax = qw.absmax
    if double_quant:
        scales = qw.nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = formats.map_tensor("signed")[absmax.long()] * scales + qw.nested_offset
    expected = table[codes.long()] * absmax.repeat_interleave(64)[: qw.numel()]
    result = qw.dequantize(dtype)
    assert torch.equal(result, expected.view(33, 67).to(dtype))
    assert torch.equal(result, qkern.dequantize_4bit(qw, dtype))
    out = torch.empty(33, 67, dtype=dtype)
    assert qkern.dequantize_4bit(qw, out=out) is out
    assert torch.equal(out, result)


def test_dequantize_defaults_to_its_dtype() -> None:
    assert make(dtype=torch.float16).dequantize().dtype == torch.float16


def test_dequantize_into_out_is_seen_by_autograd() -> None:
    qw = make(dtype=torch.float32)
    out = torch.zeros(33, 67)
    y = torch.ones(33, 67, requires_grad=True) * out
    qw.dequantize(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(33, 66), ValueError, r"out: got shape \[33, 66\]; takes \[33, 67\]"),
        (torch.empty(67, 33).t(), ValueError, "out: got strides"),
        (torch.empty(33, 67, dtype=torch.float64), TypeError, "out: got torch.float64"),
        (torch.empty(33, 67, device="meta"), ValueError, "out: got a tensor on meta; takes cpu"),
        (torch.empty(33, 67, requires_grad=True), ValueError, "out: got a tensor that requires"),
        ([1.0], TypeError, "out: got list; takes a torch.Tensor"),
    ],
    ids=["shape", "strides", "dtype", "device", "grad", "type"],
)
def test_dequantize_rejects_out(out: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().dequantize(out=out)


def test_dequantize_rejects_a_dtype_other_than_outs() -> None:
    with pytest.raises(TypeError, match=r"out: got torch.float32; takes torch.bfloat16"):
        make().dequantize(torch.bfloat16, out=torch.empty(33, 67))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, ValueError, "packed: got shape"),
        ({"packed": torch.zeros(1106)}, TypeError, "packed: got torch.float32; takes torch.uint8"),
        ({"packed": None}, TypeError, "packed: got NoneType; takes a torch.Tensor"),
        ({"absmax": torch.zeros(35)}, TypeError, "absmax: got torch.float32; takes torch.uint8"),
        ({"nested_absmax": None}, ValueError, "nested_absmax, nested_offset: got only one"),
        ({"nested_absmax": torch.zeros(2)}, ValueError, r"nested_absmax: got shape \[2\]"),
        ({"nested_offset": torch.zeros(1)}, ValueError, r"nested_offset: got shape \[1\]"),
        ({"codebook": CODEBOOK}, ValueError, 'codebook: got a tensor with format="nf4"'),
        ({"format": "custom"}, ValueError, 'codebook: got None with format="custom"'),
        ({"format": "nf5"}, ValueError, "format: got 'nf5'; takes one of nf4, fp4, custom"),
        ({"block_size": 48}, ValueError, "block_size: got 48; takes a power of two from 32 to"),
        ({"block_size": 64.0}, TypeError, "block_size: got float; takes an int"),
        ({"shape": (33, 99)}, ValueError, r"packed: got shape \[1106\]; takes \[1634\]"),
        ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
        (
            {"packed": torch.zeros(1106, dtype=torch.uint8, device="meta")},
            ValueError,
            "absmax: got a tensor on cpu; takes meta",
        ),
        (
            {"packed": torch.zeros(2212, dtype=torch.uint8)[::2]},
            ValueError,
            r"packed: got strides \[2\]; takes a contiguous tensor",
        ),
    ],
)
def test_parts_that_do_not_fit(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(make(), **changes)


def test_repr_does_not_print_values() -> None:
    assert repr(make()) == (
        "QuantizedTensor(shape=[33, 67], format='nf4', block_size=64, double_quant=True, "
        f"dtype=torch.bfloat16, device='cpu', nbytes={make().nbytes})"
    )


def test_codebook_is_kept_and_sorted_only_for_encoding() -> None:
    codebook = CODEBOOK.flip(0).contiguous()
    w = torch.randn(8, 64)
    qw = qkern.quantize_4bit(w, "custom", codebook=codebook, double_quant=False)
    straight = qkern.quantize_4bit(w, "custom", codebook=CODEBOOK, double_quant=False)
    assert qw.codebook.data_ptr() == codebook.data_ptr()
    assert torch.equal(qw.dequantize(), straight.dequantize())
    assert torch.equal(qw.packed, straight.packed ^ 0xFF)


def quantized_twice(
    format: str, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A matrix; bitsandbytes' codes and what they stand for; the reference's codes and scales.

    The scales are the same.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type=format)
    packed, absmax = reference.quantize_4bit(w, format, 64, None)
    assert torch.equal(absmax, state.absmax)
    return w, (theirs, functional.dequantize_4bit(theirs, state)), (packed, absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_equals_bitsandbytes(dtype: torch.dtype) -> None:
    w, (theirs, their_dense), (packed, absmax) = quantized_twice("nf4", dtype)
    assert torch.equal(packed, theirs.view(-1))
    weight = Weight(packed, absmax, None, None, None, "nf4", 64)
    dense = reference.dequantize_4bit(weight, w.shape, dtype)
    assert torch.equal(dense, their_dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp4_equals_bitsandbytes_but_for_ties_and_the_sign_of_zero(dtype: torch.dtype) -> None:
    w, (theirs, _), (packed, absmax) = quantized_twice("fp4", dtype)

    def values(codes: Tensor) -> Tensor:
        weight = Weight(codes, absmax, None, None, None, "fp4", 64)
        return reference.dequantize_4bit(weight, w.shape, torch.float32).view(-1, 64)

    # bitsandbytes decides at midpoints rounded to nearest, and on the signed value.
    t = (w.float().view(-1, 64) * (1.0 / absmax)[:, None]).abs()
    ties = torch.tensor(
        (*formats.midpoints(formats.FP4_MAGNITUDES), *formats.FP4_MAGNITUDE_THRESHOLDS)
    )
    differs = values(packed) != values(theirs.view(-1))
    assert torch.isin(t[differs], ties).all()
    assert differs.sum() < 0.001 * w.numel()


def test_restored_scales_equal_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    theirs, state = functional.quantize_4bit(
        w, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    qw = QuantizedTensor(
        theirs.view(-1),
        state.absmax,
        state.state2.absmax,
        state.offset,
        None,
        "nf4",
        64,
        w.shape,
        w.dtype,
    )
    assert torch.equal(qw.dequantize(), functional.dequantize_4bit(theirs, state))
    ours = qkern.quantize_4bit(w)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert ours.nested_offset.item() == pytest.approx(state.offset.item(), rel=1e-6)
    # bitsandbytes rounds 8-bit codes by a coarse table; the exact nearest is at most one code away.
    difference = ours.absmax.int() - state.absmax.int()
    assert difference.abs().max() <= 1
    assert difference.count_nonzero() < 0.01 * difference.numel()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("defaults", ["device", "dtype"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torchs_default_device_and_dtype_change_nothing(
    backend: str, defaults: str, format: str
) -> None:
    """Loaders of large models set both while qkern quantises."""
    if reason := backends.available("cpu")[backend]:
        pytest.skip(reason)
    codebook = CODEBOOK if format == "custom" else None
    w, x = torch.randn(33, 67), torch.randn(3, 67, requires_grad=True)
    code = formats.map_tensor("signed")

    def everything() -> list[Tensor]:
        qw = qkern.quantize_4bit(w, format, codebook=codebook)
        y = qkern.linear_4bit(x, qw)
        (dx,) = torch.autograd.grad(y, x, y)
        codes, absmax = qkern.quantize_8bit(w, code)
        dense = qkern.dequantize_8bit(codes, absmax, "signed")
        return [*qw.tensors().values(), qw.dequantize(), y, dx, codes, absmax, dense]

    with backends.use(backend):
        expected = everything()
        with torch.device("meta") if defaults == "device" else default_dtype(torch.bfloat16):
            found = everything()
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


def test_torch_functions_are_refused_by_name() -> None:
    weight = qkern.quantize_4bit(torch.randn(8, 64))
    with pytest.raises(
        TypeError, match=r"linear: got a QuantizedTensor; takes a Tensor.*linear_4bit"
    ):
        torch.nn.functional.linear(torch.randn(2, 64), weight)
    with pytest.raises(TypeError, match="add: got a QuantizedTensor"):
        torch.add(weight, 1)


def test_its_fields_make_another_one() -> None:
    """`dataclasses.asdict` and `astuple` have the arguments of the constructor, and no more."""
    qw = qkern.quantize_4bit(torch.randn(5, 70))
    for other in (
        QuantizedTensor(**dataclasses.asdict(qw)),
        QuantizedTensor(*dataclasses.astuple(qw)),
    ):
        assert torch.equal(other.dequantize(), qw.dequantize())
        assert other.weight.packed is other.packed
    assert pickle.loads(pickle.dumps(qw)).weight[5:] == qw.weight[5:]
