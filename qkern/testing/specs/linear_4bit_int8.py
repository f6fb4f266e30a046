"""linear_4bit_int8: activations times a 4-bit weight, both in 8 bits."""

from functools import partial

import torch
from torch import Tensor

from qkern import formats, reference
from qkern.testing._judge import assert_bitwise, assert_matmul
from qkern.testing._spec import Inputs, OpSpec
from qkern.testing.specs._matmul import int8_cases, matmul_bytes, matmul_flops, matmul_inputs


def _judge(y: Tensor, inputs: Inputs, weight: Tensor) -> None:
    """Raise AssertionError unless rows taken to 8 bits are right, and the others as always.

    Of the rounded factors the product must be as exact as any. From the product of the factors
    themselves it may be as far as their roundings allow, each at most half a step.
    """
    x, bias, factor = inputs["x"], inputs["bias"], reference.int8_factor(inputs["weight"])
    if (
        factor is None
        or x.shape[-1] % inputs["weight"].block_size
        or (x.shape[0] > formats.INT8_ROWS and not inputs["batch_invariant"])
    ):
        return assert_matmul(y, x, weight, bias)
    x, y, weight = x.detach().cpu(), y.detach().cpu(), weight.detach().cpu()
    taken = reference.rows_in_8_bits(x.float())
    assert_matmul(y[~taken], x[~taken], weight, bias)
    x, y = x[taken].float(), y[taken]
    if not y.numel():
        return None
    integers = reference.int8_weight(inputs["weight"], factor)
    rounded_weight = reference.dequantize_4bit(integers, weight.shape, torch.float32).cpu()
    rounded = reference.rounded_to_8_bits(x), rounded_weight / factor
    # The result is rounded once to its dtype; what it was before is at most that far away.
    wide_bias = None if bias is None else bias.float()
    exact = rounded[0].double() @ rounded[1].double().mT + (0 if bias is None else bias.double())
    scale = rounded[0].abs().double() @ rounded[1].abs().double().mT
    scale += 0 if bias is None else bias.double().abs()
    if y.dtype == torch.float32:
        assert_matmul(y, rounded[0], rounded[1], wide_bias)
    else:
        unit = torch.finfo(y.dtype).eps
        infinite = ~exact.to(y.dtype).isfinite()
        assert_bitwise(y[infinite], exact.to(y.dtype)[infinite], "results that are not finite")
        smallest = torch.finfo(y.dtype).smallest_normal * unit
        near = (y.double() - exact).abs() <= exact.abs() * unit / 2 + scale * 2.0**-16 + smallest
        assert (near | infinite).all(), "a result is not that of the rounded factors"
    _assert_bound(exact, x, weight, bias, inputs, factor)
    return None


def _assert_bound(
    exact: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, factor: float
) -> None:
    """Raise AssertionError where rounding moved a product further than two half steps allow."""
    unrounded = x.double() @ weight.double().mT + (0 if bias is None else bias.double())
    groups = x.double().unflatten(-1, (-1, formats.INT8_GROUP_SIZE))
    x_step = (groups.abs().amax(-1, keepdim=True) / 254).expand_as(groups).flatten(-2)
    blocks = inputs["weight"].absmax.numel()
    scales = reference.restored_absmax(inputs["weight"], 0, blocks).double().abs().cpu()
    weight_step = scales.repeat_interleave(inputs["weight"].block_size).view_as(weight) / factor / 2
    bound = x.double().abs() @ weight_step.mT + x_step @ (weight.double().abs() + weight_step).mT
    room = 1 + 2.0**-20  # the scales themselves are float32
    assert ((exact - unrounded).abs() <= bound * room).all(), "rounding moved a result too far"


SPEC = OpSpec(
    "linear_4bit_int8",
    int8_cases(),
    partial(matmul_inputs, main="x", size="out_features"),
    "matmul",
    matmul_bytes,
    matmul_flops,
    main="x",
    judge=_judge,
)
