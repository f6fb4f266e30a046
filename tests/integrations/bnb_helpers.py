"""What tests of bitsandbytes on qkern's kernels share: weights of its own making, and judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor

from qkern import formats

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def dense(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, some blocks much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(math.prod(shape), generator=generator)
    values *= 1 + torch.arange(values.numel()) // 100 % 7
    return values.view(*shape).to(dtype)


def quantized(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Any]:
    """Codes and state as bitsandbytes makes them."""
    options = {"quant_type": "nf4", "blocksize": 64, **options}
    return functional.quantize_4bit(dense(shape, dtype), **options)


def layer(
    in_features: int = 96,
    out_features: int = 64,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    **options: Any,
) -> Any:
    """A layer of bitsandbytes with quantised weights, in training mode."""
    options = {"quant_type": "nf4", **options}
    made = bnb.nn.Linear4bit(in_features, out_features, bias=bias, **options).to(dtype)
    with torch.no_grad():
        made.weight.copy_(dense((out_features, in_features), dtype, seed=1))
        if bias:
            made.bias.copy_(dense((out_features,), dtype, seed=2))
    return made.to("cpu")


def scales(state: Any) -> Tensor:
    """The float32 scale of each block, from the state's own tables."""
    if not state.nested:
        return state.absmax
    inner = state.state2
    groups = torch.arange(state.absmax.numel()) // inner.blocksize
    return inner.code[state.absmax.long()] * inner.absmax[groups] + state.offset


def oracle(packed: Tensor, state: Any) -> Tensor:
    """The weight in float64, from the definition: table value times scale of its block."""
    stored = packed.detach().contiguous().view(torch.uint8).view(-1)
    codes = torch.stack([stored >> 4, stored & 0xF], dim=1).view(-1)
    n = math.prod(state.shape)
    table = formats.code_tensor(state.quant_type)
    blocks = torch.arange(n) // state.blocksize
    return (table[codes[:n].long()].double() * scales(state).double()[blocks]).view(*state.shape)


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """``y`` is ``x @ w.T + bias`` within the rounding of its dtype, for ``w`` in float64."""
    x = x.detach().double()
    expected, size = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        expected, size = expected + bias.detach().double(), size + bias.detach().double().abs()
    assert y.shape == expected.shape
    error = (y.detach().double() - expected).abs()
    assert (error <= 4 * torch.finfo(y.dtype).eps * size).all(), error.max()


def packed_for_inference(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """What an evaluation forward makes of a weight where processors multiply in bfloat16."""
    return functional._convert_weight_packed_for_cpu(packed, state)
