"""Values at the ends of what floats and codes hold: nothing turns its sign or overflows unseen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qkern
from qkern import formats, reference, testing
from qkern.testing import DTYPES, OPS, Case

CPU = torch.device("cpu")
MAP = formats.map_tensor("signed")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)


def nearest_codes(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation by the nearest codes, whatever the signs of what they restore to."""
    offset = reference.quantize_absmax(absmax)[2]
    codes, nested = reference.quantize_8bit(absmax - offset, MAP, formats.NESTED_BLOCK_SIZE)
    return codes, nested, offset


def restored(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    group = torch.arange(len(codes)) // formats.NESTED_BLOCK_SIZE
    return MAP[codes.long()] * nested[group] + offset


@pytest.mark.parametrize("case", [c for c in OPS["quantize_absmax"].cases if c.values == "uneven"])
def test_scales_are_restored_to_none_below_zero(case: Case) -> None:
    inputs = OPS["quantize_absmax"].make_inputs(case, CPU, torch.Generator().manual_seed(0))
    nearest = nearest_codes(inputs["absmax"])
    was = restored(*nearest)
    codes, *rest = reference.quantize_absmax(inputs["absmax"])
    now = restored(codes, *rest)
    assert (was < 0).sum() > 1000
    assert (now >= 0).all()
    # Only those, and to the least that there is.
    assert torch.equal(codes[was >= 0], nearest[0][was >= 0])
    assert (restored(codes - 1, *rest)[was < 0] < 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_huge_block_turns_no_signs(backend: str) -> None:
    if qkern.backends.available("cpu")[backend] is not None:
        pytest.skip("qkern._C is not built")
    w = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    w[7] *= 3000
    with qkern.backends.use(backend):
        values = qkern.quantize_4bit(w).dequantize()
    assert (values * w >= 0).all()


@dtypes
def test_weights_that_would_dequantise_to_infinities_are_refused(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    found = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(16, 1, generator=generator) * largest
        w = (torch.rand(16, 64, generator=generator) * rows).to(dtype)
        w[seed % 16, 0] = largest
        overflows = qkern.quantize_4bit(w, check_finite=False).dequantize().isinf()
        if overflows.any():
            found += 1
            block = int(overflows.flatten().nonzero()[0]) // 64
            message = (
                rf"w: got block {block} \(elements {64 * block} to {64 * block + 63} of .*"
                rf"infinity in {dtype}: its scale .* in 8 bits; takes double_quant=False,"
            )
            with pytest.raises(ValueError, match=message):
                qkern.quantize_4bit(w)
        else:
            qkern.quantize_4bit(w)
        assert qkern.quantize_4bit(w, double_quant=False).dequantize().isfinite().all()
    assert found > 0


def test_a_codebook_may_overflow_too() -> None:
    """Only where it does: 1.5 is in the codebook, and 0.9 nearer to 1."""
    beyond = torch.linspace(-1.5, 1.5, 16)
    w = torch.full((2, 64), 60000.0, dtype=torch.float16)
    qw = qkern.quantize_4bit(w, format="custom", codebook=beyond, double_quant=False)
    assert qw.dequantize().isfinite().all()
    beyond[10:] = 1.5
    message = r"w: got block 0 .*: the codebook multiplies its scale 60000 by up to 1\.5; takes sm"
    with pytest.raises(ValueError, match=message):
        qkern.quantize_4bit(w, format="custom", codebook=beyond)


@dtypes
def test_the_largest_weights_dequantise_to_themselves(dtype: torch.dtype) -> None:
    w = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
    for signed in (w, -w):
        assert torch.equal(qkern.quantize_4bit(signed).dequantize(), signed)


def step(grad: Tensor, bits: int, backend: str, steps: int = 3) -> dict[str, Tensor]:
    """A parameter of 600 ones after some steps with one gradient.

    With the scales of its moments in 8 bits, or its second moment.
    """
    param = torch.ones(600).to(grad.dtype)
    moments = [torch.zeros(600) for _ in range(2)]
    scales: list[list[Tensor]] = [[], []]
    if bits == 8:
        maps = [formats.map_tensor(name) for name in formats.MAPS]
        quantized = [reference.quantize_8bit(m, c, 256) for m, c in zip(moments, maps, strict=True)]
        moments = [codes for codes, _ in quantized]
        scales = [[absmax] for _, absmax in quantized]
    with qkern.backends.use(backend):
        for count in range(1, steps + 1):
            factors = reference.adamw_factors(
                torch.tensor([float(count)]), 1e-2, 0.9, 0.999, 1e-8, 0.0
            )
            lists = [[param], [grad], [moments[0]], [moments[1]], *scales]
            torch.ops.qkern.adamw_step(*lists, factors)
    second = torch.cat([absmax for (absmax,) in scales]) if bits == 8 else moments[1]
    return {"param": param, "scales" if bits == 8 else "second": second}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.DTYPE_NAMES.get)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("huge", [3e19, -4e20, 1e38])
def test_a_huge_gradient_stays_in_its_place(backend: str, dtype: torch.dtype, huge: float) -> None:
    """Its square is infinite, which would make the 256 moments of its block NaN."""
    if qkern.backends.available("cpu")[backend] is not None:
        pytest.skip("qkern._C is not built")
    grad = torch.full((600,), 0.5, dtype=dtype)
    grad[300] = huge
    found = step(grad, 8, backend)
    assert found["param"].isfinite().all()
    assert found["scales"].isfinite().all()
    # It moves as any gradient that is the largest of its block does.
    grad[300] = math.copysign(1e6, huge)
    testing.assert_bitwise(found["param"][300], step(grad, 8, backend)["param"][300])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("huge", [1e19, 3e19, -4e20, 1e38])
def test_a_huge_gradient_with_moments_of_32_bits_is_as_torch_has_it(
    backend: str, huge: float
) -> None:
    if qkern.backends.available("cpu")[backend] is not None:
        pytest.skip("qkern._C is not built")
    grad = torch.full((600,), 0.5)
    grad[300] = huge
    ours = step(grad, 32, backend)
    theirs = torch.nn.Parameter(torch.ones(600))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0, foreach=False)
    theirs.grad = grad
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(ours["param"], theirs.detach())
    torch.testing.assert_close(ours["second"], optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_that_are_not_finite_show(backend: str, bad: float) -> None:
    if qkern.backends.available("cpu")[backend] is not None:
        pytest.skip("qkern._C is not built")
    grad = torch.full((600,), 0.5)
    grad[300] = bad
    found = step(grad, 8, backend)
    assert found["param"].isnan().nonzero().flatten().tolist() == list(range(256, 512))
    assert found["scales"].isnan().tolist() == [False, True, False] * 2
