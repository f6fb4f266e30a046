"""Properties over generated shapes, formats and values.

Each example runs on every backend and instruction set that is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import qkern
from qkern import formats, testing
from qkern.testing import CODEBOOKS, DTYPES, OPS, Target
from qkern.weight import Weight

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(formats.BLOCK_SIZES)
# Mostly near the sizes where vectors and blocks end.
sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([511, 512, 513, 1023, 1025, 4095, 4097, 16383, 16385])
)
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
any32 = st.floats(width=32)


@st.composite
def codebooks(draw: st.DrawFn) -> list[float]:
    """16 values, any order and repeats; two of them never add to an infinity."""
    bounded = st.floats(-(2.0**126), 2.0**126, width=32)
    near = st.floats(-1, 1, width=32)
    return draw(st.lists(st.one_of(near, near, bounded), min_size=16, max_size=16))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """The format arguments of an op."""
    name = draw(st.sampled_from(["nf4", "fp4", "custom", *CODEBOOKS]))
    if name in ("nf4", "fp4"):
        return {"format": name, "codebook": None}
    values = CODEBOOKS[name] if name in CODEBOOKS else draw(codebooks())
    return {"format": "custom", "codebook": torch.tensor(values, dtype=torch.float32)}


@st.composite
def values(draw: st.DrawFn, elements: st.SearchStrategy[float] = any32) -> Tensor:
    """A flat float32 tensor: some elements drawn one by one, the others filled."""
    shape = draw(sizes)
    fill = st.sampled_from([0.0, 1.0, -0.25, 1e-30])
    array = draw(hnp.arrays(np.float32, shape, elements=elements, fill=fill))
    return torch.from_numpy(array)


def available(device: torch.device) -> list[Target]:
    return [target for target in testing.targets(device.type) if not target.reason]


def check(op: str, inputs: testing.Inputs, device: torch.device) -> None:
    inputs = {k: testing.map_tensors(v, lambda t: t.to(device)) for k, v in inputs.items()}
    expected = OPS[op].reference(inputs)
    for target in available(device):
        with target.activate():
            actual = OPS[op].run(inputs)
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            testing.assert_bitwise(a, e, f"{op} result {index} on {target}")


@given(x=values(), table=tables(), block_size=block_sizes, dtype=dtypes)
def test_quantize_4bit(
    device: torch.device,
    x: Tensor,
    table: dict[str, Any],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    inputs = {"x": x.to(dtype), "block_size": block_size, **table}
    check("quantize_4bit", inputs, device)


@given(x=values(), name=st.sampled_from(formats.MAPS), block_size=block_sizes, dtype=dtypes)
def test_quantize_8bit(
    device: torch.device, x: Tensor, name: str, block_size: int, dtype: torch.dtype
) -> None:
    inputs = {"x": x.to(dtype), "map": formats.map_tensor(name), "block_size": block_size}
    check("quantize_8bit", inputs, device)


@given(absmax=values(st.floats(0, width=32)))
def test_quantize_absmax(device: torch.device, absmax: Tensor) -> None:
    check("quantize_absmax", {"absmax": absmax}, device)


@given(
    absmax=hnp.arrays(np.float32, st.integers(0, 70), elements=any32),
    table=tables(),
    block_size=st.sampled_from([32, 64, 128]),
    cut=st.integers(0, 31),
    dtype=dtypes,
    double_quant=st.booleans(),
    seed=seeds,
)
def test_dequantize_4bit(
    device: torch.device,
    absmax: np.ndarray,
    table: dict[str, Any],
    block_size: int,
    cut: int,
    dtype: torch.dtype,
    double_quant: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = max(0, len(absmax) * block_size - cut)
    packed = torch.randint(256, (formats.packed_size(n),), dtype=torch.uint8, generator=generator)
    layout = table | {"block_size": block_size}
    weight = Weight(packed, torch.from_numpy(absmax), None, None, **layout)
    if double_quant:
        assume(len(absmax) > 0)
        size = (len(absmax),)
        weight = weight._replace(
            absmax=torch.randint(256, size, dtype=torch.uint8, generator=generator),
            nested_absmax=torch.from_numpy(absmax[:1].copy()),
            nested_offset=torch.tensor(absmax[-1]),
        )
    check("dequantize_4bit", {"weight": weight, "shape": [n], "dtype": dtype}, device)


@given(
    x=values(finite32),
    table=st.sampled_from(["nf4", "fp4"]),
    block_size=block_sizes,
    dtype=dtypes,
)
def test_the_round_trip_stays_near(
    x: Tensor, table: str, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Each value comes back within half the widest gap of the table times its block's absmax."""
    x = x.to(device, dtype)
    assume(x.isfinite().all())
    codes = formats.code_tensor(table, device).sort().values
    half_gap = (codes.diff().max() / 2).item()
    for target in available(device):
        with target.activate():
            qw = qkern.quantize_4bit(x, format=table, block_size=block_size, double_quant=False)
            back = qw.dequantize(torch.float32)
        absmax = qw.absmax.repeat_interleave(block_size)[: x.numel()]
        # Below, 1 / absmax overflows, and the rule gives no nearest value.
        ordinary = absmax > 1.0 / torch.finfo(torch.float32).max
        error = (back - x.float()).abs()[ordinary]
        assert (error <= absmax[ordinary] * half_gap * (1 + 1e-5)).all(), str(target)
        assert (back[absmax == 0] == 0).all(), str(target)


@given(x=values(finite32), block_size=block_sizes)
def test_quantising_what_was_dequantised_changes_nothing(
    x: Tensor, block_size: int, device: torch.device
) -> None:
    """NF4 decodes a block's absmax exactly, and its other values keep their codes."""
    x = x.to(device).clamp(-1e30, 1e30)
    x = x.where(x.abs() > 1e-30, 0.0)
    for target in available(device):
        with target.activate():
            first = qkern.quantize_4bit(x, block_size=block_size, double_quant=False)
            decoded = first.dequantize(torch.float32)
            second = qkern.quantize_4bit(decoded, block_size=block_size, double_quant=False)
        testing.assert_bitwise(second.absmax, first.absmax, f"absmax on {target}")
        testing.assert_bitwise(second.packed, first.packed, f"packed on {target}")


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.one_of(st.integers(1, 200), st.integers(1, 20).map(lambda i: 32 * i)),
    table=tables(),
    block_size=block_sizes,
    dtype=dtypes,
    double_quant=st.booleans(),
    use_bias=st.booleans(),
    batch_invariant=st.booleans(),
    seed=seeds,
)
def test_linear_4bit(
    m: int,
    n: int,
    k: int,
    table: dict[str, Any],
    block_size: int,
    dtype: torch.dtype,
    double_quant: bool,
    use_bias: bool,
    batch_invariant: bool,
    seed: int,
    device: torch.device,
) -> None:
    codebook = table["codebook"]
    if codebook is not None:
        # Larger ones overflow float16, where the error has no meaning.
        assume(codebook.abs().max() < 1e3)
        table = table | {"codebook": codebook.to(device)}
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, k, generator=generator) * 0.05).to(device)
    x = torch.randn(m, k, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(n, generator=generator).to(device, dtype) if use_bias else None
    dy = torch.randn(m, n, generator=generator).to(device, dtype)
    qw = qkern.quantize_4bit(w, block_size=block_size, double_quant=double_quant, **table)
    dense = qw.dequantize(torch.float32)
    for target in available(device):
        with target.activate(), qkern.batch_invariant(batch_invariant):
            y = qkern.linear_4bit(x, qw, bias)
            (dx,) = torch.autograd.grad(y, x, dy)
        testing.assert_matmul(y, x, dense, bias)
        testing.assert_matmul(dx, dy, dense.mT)


@given(
    m=st.integers(0, 9),
    rows=st.integers(1, 5),
    n=st.integers(0, 40),
    k=st.integers(0, 70),
    seed=seeds,
)
def test_shapes_of_any_batch(
    m: int, rows: int, n: int, k: int, seed: int, device: torch.device
) -> None:
    """Leading dimensions, empty ones too, are only a matter of shape."""
    generator = torch.Generator().manual_seed(seed)
    qw = qkern.quantize_4bit(torch.randn(n, k, generator=generator).to(device))
    x = torch.randn(rows, m, k, generator=generator).to(device).requires_grad_()
    for target in available(device):
        with target.activate():
            y = qkern.linear_4bit(x, qw)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == (rows, m, n)
        assert dx.shape == x.shape
        assert y.isfinite().all()
        assert dx.isfinite().all()
