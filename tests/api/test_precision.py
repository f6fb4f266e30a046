"""`qkern.precision`: blocks in which activations are taken to 8 bits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import qkern
from qkern import nn as qnn
from qkern import reference, testing
from qkern.testing import Target


def weight(format: str = "nf4", out: int = 48, block_size: int = 64) -> qkern.QuantizedTensor:
    torch.manual_seed(1)
    return qkern.quantize_4bit(torch.randn(out, 256), format, block_size)


def in_8_bits(x: Tensor, qw: qkern.QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.qkern.linear_4bit_int8(x, *qw.weight, qw.shape[0], bias, False)


def test_every_product_of_a_block_is_in_8_bits(target: Target) -> None:
    x, qw, bias = torch.randn(3, 256), weight(), torch.randn(48)
    layer = qnn.Linear4bit.from_quantized(qw, bias)
    lora = qnn.LoRALinear(layer, 4, 8.0).eval()
    torch.nn.init.normal_(next(p for n, p in lora.named_parameters() if "lora_b" in n))
    with target.activate(), torch.no_grad():
        expected, usual = in_8_bits(x, qw, bias), qkern.linear_4bit(x, qw, bias)
        adapter = lora(x) - usual
        with qkern.precision("int8"):
            found = [qkern.linear_4bit(x, qw, bias), qkern.nf4_linear(x, qw, bias), layer(x)]
            with_adapter = lora(x)
    for y in found:
        testing.assert_bitwise(y, expected)
    assert not torch.equal(expected, usual)
    torch.testing.assert_close(with_adapter - expected, adapter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.DTYPE_NAMES.get)
def test_the_error_is_about_one_per_cent(format: str, dtype: torch.dtype) -> None:
    x, qw = torch.randn(8, 256).to(dtype), weight(format, 512)
    with qkern.precision("int8"):
        y = qkern.linear_4bit(x, qw)
    exact = x.double() @ qw.dequantize(torch.float32).double().T
    assert 1e-3 < (y - exact).std() / exact.std() < 0.012


def test_blocks_nest_and_end() -> None:
    x, qw = torch.randn(2, 256), weight()
    usual, rounded = qkern.linear_4bit(x, qw), in_8_bits(x, qw)
    with qkern.precision("int8"):
        with qkern.precision(None):
            testing.assert_bitwise(qkern.linear_4bit(x, qw), usual)
        testing.assert_bitwise(qkern.linear_4bit(x, qw), rounded)
        other: list[Tensor] = []
        thread = threading.Thread(target=lambda: other.append(qkern.linear_4bit(x, qw)))
        thread.start()
        thread.join()
        testing.assert_bitwise(other[0], usual)
    testing.assert_bitwise(qkern.linear_4bit(x, qw), usual)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_more_rows_are_computed_as_usual_unless_batch_invariant(rows: int, target: Target) -> None:
    x, qw = torch.randn(rows, 256), weight()
    with target.activate():
        each = torch.cat([in_8_bits(x[i : i + 1], qw) for i in range(rows)])
        with qkern.precision("int8"):
            y = qkern.linear_4bit(x, qw)
            with qkern.batch_invariant():
                invariant = qkern.linear_4bit(x, qw)
        if target.backend != "reference":
            testing.assert_bitwise(invariant, each)
            testing.assert_bitwise(y, each if rows <= 8 else qkern.linear_4bit(x, qw))


def test_rows_out_of_range_are_computed_as_usual(target: Target) -> None:
    """Each alone: what is beside it stays in 8 bits."""
    x, qw = torch.randn(7, 256), weight()
    with target.activate():
        clean = in_8_bits(x, qw)
        x[1, 3], x[2, 200], x[4], x[5, 9] = torch.nan, -torch.inf, 1e30, 0.0
        x[6] = 0.0
        y = in_8_bits(x, qw)
        usual = torch.cat([qkern.linear_4bit(row[None], qw) for row in x])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert (y[6] == 0).all()
    if target.backend != "reference":
        testing.assert_bitwise(y[[0, 3]], clean[[0, 3]])
        testing.assert_bitwise(y[[1, 2, 4]], usual[[1, 2, 4]])


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_factors_have_the_least_error(format: str) -> None:
    """Of the multiples of 1/8 up to 127."""
    values = torch.tensor(qkern.formats.NF4_CODES if format == "nf4" else qkern.formats.FP4_CODES)
    factors = torch.arange(60 * 8, 127 * 8 + 1, dtype=torch.float64) / 8
    scaled = values.double() * factors[:, None]
    error = (scaled.round() / factors[:, None] - values).square().mean(1)
    assert factors[error.argmin()] == qkern.formats.INT8_FACTORS[format]


def test_a_codebook_of_extreme_values_is_computed_as_usual(target: Target) -> None:
    x = torch.randn(2, 256)
    codebook = torch.linspace(-1, 1, 16)
    for size, rounds in ((1.0, True), (2.0**31, False), (2.0**-31, False)):
        w = torch.randn(48, 256)
        qw = qkern.quantize_4bit(w, "custom", codebook=codebook * size, check_finite=False)
        assert (reference.int8_factor(qw.weight) is not None) == rounds
        with target.activate():
            assert torch.equal(in_8_bits(x, qw), qkern.linear_4bit(x, qw)) != rounds


def of_duals(x: Tensor, qw: qkern.QuantizedTensor) -> Tensor:
    with forward_ad.dual_level():
        return qkern.linear_4bit(forward_ad.make_dual(x, torch.ones_like(x)), qw)


REFUSED: dict[str, Callable[[qkern.QuantizedTensor], object]] = {
    "x": lambda qw: qkern.linear_4bit(torch.randn(2, 256).requires_grad_(), qw),
    "bias": lambda qw: qkern.linear_4bit(torch.randn(2, 256), qw, torch.zeros(48).requires_grad_()),
    "adapter": lambda qw: qkern.lora_linear(
        torch.randn(2, 256), qw, torch.randn(4, 256), torch.randn(48, 4).requires_grad_(), 1.0
    ),
    "x of a lora": lambda qw: qkern.lora_linear(
        torch.randn(2, 256).requires_grad_(), qw, torch.randn(4, 256), torch.randn(48, 4), 1.0
    ),
    "tangents": lambda qw: of_duals(torch.randn(2, 256), qw),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gradients_are_refused(name: str) -> None:
    qw = weight()
    REFUSED[name](qw)
    with qkern.precision("int8"), pytest.raises(RuntimeError, match=r'^precision: got "int8"'):
        REFUSED[name](qw)


def test_gradients_that_are_off_are_not_in_the_way() -> None:
    x, qw = torch.randn(2, 256).requires_grad_(), weight()
    with qkern.precision("int8"), torch.no_grad():
        testing.assert_bitwise(qkern.linear_4bit(x, qw), in_8_bits(x, qw))


@pytest.mark.parametrize("value", ["int4", 8, True])
def test_other_precisions_are_refused(value: object) -> None:
    with (
        pytest.raises(ValueError, match=r'^value: got .*; takes "int8" or None'),
        qkern.precision(value),  # type: ignore[arg-type]
    ):
        pass


def test_a_compiled_graph_computes_as_the_block_that_it_runs_in() -> None:
    x, qw = torch.randn(2, 256), weight()
    compiled = torch.compile(lambda x: qkern.linear_4bit(x, qw), fullgraph=True, backend="eager")
    usual, rounded = qkern.linear_4bit(x, qw), in_8_bits(x, qw)
    testing.assert_bitwise(compiled(x), usual)
    with qkern.precision("int8"):
        testing.assert_bitwise(compiled(x), rounded)
    testing.assert_bitwise(compiled(x), usual)


def test_a_block_in_a_compiled_function() -> None:
    x, qw = torch.randn(2, 256), weight()

    @torch.compile(fullgraph=True, backend="eager")
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with qkern.precision("int8"):
            rounded = qkern.linear_4bit(x, qw)
        return rounded, qkern.linear_4bit(x, qw)

    rounded, usual = both(x)
    testing.assert_bitwise(rounded, in_8_bits(x, qw))
    testing.assert_bitwise(usual, qkern.linear_4bit(x, qw))


def test_a_product_with_a_term_has_no_8_bits() -> None:
    x, qw, left, right = torch.randn(2, 256), weight(), torch.ones(2, 3), torch.ones(3, 1)
    features = qw.shape[0]
    arguments = x, *qw.weight, features, None, left, right.expand(3, features), 1.0, None
    torch.ops.qkern.linear_4bit_add(*arguments)
    with (
        qkern.precision("int8"),
        pytest.raises(RuntimeError, match=r'^precision: got "int8" in linear_4bit_add; takes'),
    ):
        torch.ops.qkern.linear_4bit_add(*arguments)


def test_a_compiled_backward_is_refused() -> None:
    x, qw = torch.randn(2, 256).requires_grad_(), weight()
    compiled = torch.compile(
        lambda x: qkern.linear_4bit(x, qw).sum(), fullgraph=True, backend="aot_eager"
    )
    with qkern.precision("int8"):
        loss = compiled(x)
        with pytest.raises(RuntimeError, match="compiled backward"):
            loss.backward()
