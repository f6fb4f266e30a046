"""Few rows at the ends of float32's range, where scales and factors must not leave it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkern
from qkern import reference, testing
from qkern.testing import Target, assert_matmul

LOW = (torch.bfloat16, torch.float16)
low_dtypes = pytest.mark.parametrize("dtype", LOW, ids=testing.DTYPE_NAMES.get)
formats = pytest.mark.parametrize("format", ["nf4", "fp4"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)


def exact(qw: qkern.QuantizedTensor) -> Tensor:
    return reference.dequantize_4bit(qw.weight, qw.shape, torch.float32)


@formats
@pytest.mark.parametrize(("of_w", "of_x"), [(70, 48), (60, 55), (108, 8), (-90, -20), (-50, -55)])
def test_large_scales_and_small_ones(target: Target, format: str, of_w: int, of_x: int) -> None:
    """The product of both is in range, whatever a kernel multiplies them by on the way."""
    qw = qkern.quantize_4bit(drawn(16, 128) / 2 * 2.0**of_w, format, 64, double_quant=False)
    for rows in (1, 3, 8):
        x = (drawn(rows, 128, seed=rows) * 2.0**of_x).bfloat16()
        with target.activate():
            y = qkern.linear_4bit(x, qw)
        assert_matmul(y, x, exact(qw))


def test_float16_overflows_to_infinity(target: Target) -> None:
    qw = qkern.quantize_4bit(drawn(16, 128) * 2.0**108, "nf4", 64, double_quant=False)
    x = (drawn(3, 128, seed=1) * 2.0**8).half()
    with target.activate():
        y = qkern.linear_4bit(x, qw)
    assert_matmul(y, x, exact(qw))


@low_dtypes
def test_small_elements_beside_weights_of_zero(target: Target, dtype: torch.dtype) -> None:
    """They are all of the result, however large the others are."""
    w = drawn(16, 256)
    w[:, :128] = 0
    x = torch.ones(3, 256)
    x[:, 128:] = 2.0**-110 if dtype == torch.bfloat16 else 2.0**-24
    qw = qkern.quantize_4bit(w, "nf4", 64, double_quant=False)
    with target.activate():
        y = qkern.linear_4bit(x.to(dtype), qw)
    assert_matmul(y, x.to(dtype), exact(qw))


@low_dtypes
@pytest.mark.parametrize("exponent", [-4, -8, -10, -12, -14])
def test_large_elements_that_all_meet_weights_of_zero(
    target: Target, dtype: torch.dtype, exponent: int
) -> None:
    w = drawn(64, 512)
    w[:, 0::2] = 0
    x = drawn(4, 512, seed=1) * 2.0**exponent
    x[:, 0::2] = drawn(4, 256, seed=2).sign()
    qw = qkern.quantize_4bit(w, "nf4", 64, double_quant=False)
    with target.activate():
        y = qkern.linear_4bit(x.to(dtype), qw)
    assert_matmul(y, x.to(dtype), exact(qw))


CODEBOOKS = {"tiny": 2.0**-29, "small": 2.0**-9, "large": 2.0**9, "huge": 2.0**29}


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("of_w", "of_x"), [(45, 60), (-60, -50), (0, 0)])
def test_8_bits_with_codebooks_of_any_size(
    target: Target, codebook: str, of_w: int, of_x: int
) -> None:
    values = torch.linspace(-1, 1, 16) * CODEBOOKS[codebook]
    qw = qkern.quantize_4bit(
        drawn(16, 128) * 2.0**of_w,
        "custom",
        64,
        double_quant=False,
        codebook=values,
        check_finite=False,
    )
    qw.packed.random_(0, 256, generator=torch.Generator().manual_seed(2))
    x = drawn(3, 128, seed=1) * 2.0**of_x
    with target.activate(), qkern.precision("int8"):
        y = qkern.linear_4bit(x, qw)
    expected = x.double() @ exact(qw).double().mT
    scale = x.double().abs() @ exact(qw).double().abs().mT
    finite = expected.abs() < torch.finfo(torch.float32).max / 2
    assert y[finite].isfinite().all()
    error = ((y.double() - expected).abs() / scale)[finite]
    assert (error < 0.02).all()


def test_8_bits_leave_rows_alone_that_they_would_lose(target: Target) -> None:
    w = drawn(16, 128)
    w[:, :64] = 0
    x = torch.ones(2, 128)
    x[0, 64:] = 2.0**-110
    qw = qkern.quantize_4bit(w, "nf4", 64, double_quant=False)
    with target.activate(), qkern.precision("int8"):
        y = qkern.linear_4bit(x, qw)
    assert_matmul(y[:1], x[:1], exact(qw))


def test_8_bits_round_the_other_rows_once() -> None:
    x = (drawn(2, 64) * 2.0**82).bfloat16()
    bias = (drawn(32, seed=1) * 2.0**83).bfloat16()
    weight = qkern.quantize_4bit(drawn(32, 64, seed=2)).weight
    testing.assert_bitwise(
        reference.linear_4bit_int8(x, weight, 32, bias), reference.linear_4bit(x, weight, 32, bias)
    )


def test_8_bits_of_no_features(target: Target) -> None:
    qw = qkern.quantize_4bit(torch.zeros(5, 0))
    with target.activate(), qkern.precision("int8"):
        testing.assert_bitwise(qkern.linear_4bit(torch.zeros(3, 0), qw), torch.zeros(3, 5))
