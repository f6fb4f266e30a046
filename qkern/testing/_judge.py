"""How a result is judged: bit for bit, or by its error against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkern.testing._values import INT_OF

MATMUL_MARGIN = {torch.float32: 1.25, torch.bfloat16: 1.1, torch.float16: 1.1}
"""How much larger than the baseline's a matmul's root mean square error may be: room for another
order of summation. In 16 bits the rounding of results dominates, and less room is needed."""

MATMUL_MAX_MARGIN = 2.0
"""The same for the largest error, a less steady figure."""

_RMS_MIN_NUMEL = 256
_FLOAT32_ROUNDOFF = 2.0**-24


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raise AssertionError unless shapes, dtypes and bits are equal; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if actual.is_floating_point():
        integer = INT_OF[actual.dtype]
        different = actual.view(integer) != expected.view(integer)
        different &= ~(actual.isnan() & expected.isnan())
    else:
        different = actual != expected
    count = int(different.sum())
    if count:
        place = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {count} of {different.numel()} differ, first at {place}: "
            f"{actual[place].item()!r}, not {expected[place].item()!r}"
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """Results that are sums, and what they are judged by."""

    y: Tensor
    exact: Tensor
    """In float64, as the scale is: the unit of errors."""
    scale: Tensor
    baseline: Tensor
    """The same sums in float32, rounded once."""
    plain: Callable[[], Tensor]
    """Gives them summed from left to right."""


@dataclass(frozen=True, slots=True)
class MatmulError:
    """Errors of a product, each divided by ``|x| · |Wᵀ| + |bias|`` of its element."""

    rms: float
    max: float


def matmul_error(y: Tensor, exact: Tensor, scale: Tensor) -> MatmulError:
    """The error of `y` against `exact`, in units of `scale`; all ``[M, N]``, the last two float64.

    Elements whose exact value is not finite are left out.
    """
    error = ((y.double() - exact).abs() / scale)[exact.isfinite() & (scale > 0)]
    if not error.numel():
        return MatmulError(0.0, 0.0)
    return MatmulError(error.square().mean().sqrt().item(), error.max().item())


def assert_matmul(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Raise AssertionError unless ``y = x · weightᵀ + bias`` is as exact as qkern promises.

    x is ``[M, K]`` in float32, bfloat16 or float16, `weight` the float32 ``[N, K]`` exact
    dequantised weight, bias ``[N]`` in x's dtype. `added` is another term, ``alpha · left · right``
    of float32 ``[M, r]`` and ``[r, N]``: ``(left, right, alpha)``. The baseline rounds the weight
    to x's dtype, multiplies and adds in float32 and rounds once. Errors are taken against float64
    and in units of ``|x| · |weightᵀ| + |bias|``, with `added` likewise:

    - the root mean square is at most `MATMUL_MARGIN` times the baseline's plus half a float32 unit,
      where at least 256 elements make it a steady figure;
    - the largest is at most `MATMUL_MAX_MARGIN` times the baseline's plus one rounding.

    In float32 the order of summation is all that differs, and torch's changes with the shape; there
    the baseline is torch's product or a plain sum from left to right, whichever is worse.

    Where the exact result is not finite, or overflows x's dtype, y must be that same value.
    """
    assert_sums([matmul_sums(y, x, weight, bias, added)])


def matmul_sums(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: tuple[Tensor, Tensor, float] | None = None,
) -> Sums:
    """What `assert_matmul` judges, its shapes and dtypes looked at."""
    dtype = x.dtype
    assert y.dtype == dtype, f"dtype {y.dtype}, not {dtype}"
    shape = (*x.shape[:-1], weight.shape[0])
    assert y.shape == shape, f"shape {tuple(y.shape)}, not {shape}"
    x, y, weight = x.detach().cpu(), y.detach().cpu(), weight.detach().cpu()
    bias = torch.zeros(shape[-1], dtype=dtype) if bias is None else bias.detach().cpu()

    exact = x.double() @ weight.double().mT + bias.double()
    scale = x.double().abs() @ weight.double().abs().mT + bias.double().abs()
    baseline = x.float() @ weight.to(dtype).float().mT + bias.float()
    left, right, alpha = (torch.zeros(len(x), 0), torch.zeros(0, shape[-1]), 0.0)
    if added is not None:
        left, right, alpha = added[0].detach().cpu(), added[1].detach().cpu(), added[2]
    exact += alpha * (left.double() @ right.double())
    scale += abs(alpha) * (left.double().abs() @ right.double().abs())
    baseline = (baseline + alpha * (left @ right)).to(dtype)

    def plain() -> Tensor:
        return _left_to_right(x, weight) + alpha * _left_to_right(left, right.mT) + bias

    return Sums(y, exact, scale, baseline, plain)


def assert_product(
    out: Tensor, a: Tensor, b: Tensor, alpha: float, before: Tensor | None = None
) -> None:
    """Raise AssertionError unless ``out = alpha · a · b + before`` is as exact as qkern promises.

    As `assert_matmul`, of dense ``a [m, k]`` and ``b [k, n]`` of any of three dtypes. The baseline
    multiplies and adds in float32 and rounds once, to the dtype of ``out``.
    """
    assert_sums([product_sums(out, a, b, alpha, before)])


def product_sums(
    out: Tensor, a: Tensor, b: Tensor, alpha: float, before: Tensor | None = None
) -> Sums:
    """What `assert_product` judges, its shape looked at."""
    out, a, b = (tensor.detach().cpu() for tensor in (out, a, b))
    added = torch.zeros(out.shape) if before is None else before.detach().cpu().float()
    assert out.shape == (len(a), b.shape[1]), f"shape {tuple(out.shape)}"
    exact = alpha * (a.double() @ b.double()) + added.double()
    scale = abs(alpha) * (a.double().abs() @ b.double().abs()) + added.double().abs()
    baseline = (alpha * (a.float() @ b.float()) + added).to(out.dtype)
    return Sums(
        *(out, exact, scale, baseline),
        lambda: alpha * _left_to_right(a.float(), b.float().mT) + added,
    )


def assert_sums(several: Sequence[Sums]) -> None:
    """Judge results of one dtype as `assert_matmul` says, all errors together."""
    several = [sums for sums in several if sums.y.numel()]
    if not several:
        return

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(sums, name).flatten() for sums in several])

    y, exact, scale, baseline = map(joined, ("y", "exact", "scale", "baseline"))
    dtype = y.dtype
    overflow = ~exact.to(dtype).isfinite()
    if overflow.any():
        assert_bitwise(y[overflow], exact.to(dtype)[overflow], "results that are not finite")
        exact = exact.masked_fill(overflow, math.nan)
    assert y[~overflow].isfinite().all(), "a result is not finite where the exact one is"

    ours, theirs = matmul_error(y, exact, scale), matmul_error(baseline, exact, scale)
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() / scale).nan_to_num(0).max().item()
    fault = _too_large(ours, theirs, dtype, rounding, y.numel())
    if fault and dtype == torch.float32:
        plain = torch.cat([sums.plain().flatten() for sums in several])
        other = matmul_error(plain, exact, scale)
        theirs = MatmulError(max(theirs.rms, other.rms), max(theirs.max, other.max))
        fault = _too_large(ours, theirs, dtype, rounding, y.numel())
    assert not fault, fault


def _too_large(
    ours: MatmulError, theirs: MatmulError, dtype: torch.dtype, rounding: float, numel: int
) -> str | None:
    """What is wrong with `ours`, or None; `rounding` is one rounding of the largest result."""
    floor = max(rounding, _FLOAT32_ROUNDOFF)
    if ours.max > MATMUL_MAX_MARGIN * theirs.max + floor:
        allowed = f"{MATMUL_MAX_MARGIN} times {theirs.max:.3g} plus {floor:.3g}"
        return f"largest error {ours.max:.3g}; the baseline's allows {allowed}"
    margin = MATMUL_MARGIN[dtype]
    if numel >= _RMS_MIN_NUMEL and ours.rms > margin * theirs.rms + _FLOAT32_ROUNDOFF / 2:
        return f"rms error {ours.rms:.3g}; the baseline's allows {margin} times {theirs.rms:.3g}"
    return None


def _left_to_right(x: Tensor, weight: Tensor) -> Tensor:
    """``x · weightᵀ`` in float32, summed from left to right in runs of 512 terms."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[1], 512):
        run = torch.zeros_like(total)
        for k in range(start, min(start + 512, x.shape[1])):
            run.addcmul_(x[:, k, None], weight[:, k])
        total += run
    return total
