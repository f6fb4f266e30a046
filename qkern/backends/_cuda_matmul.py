"""How a CUDA matmul starts: on the path that `_cuda_paths` chooses, with what memory it needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qkern.backends import _args
from qkern.backends._backend import Product
from qkern.backends._compiled import numbers, product_numbers
from qkern.backends._cuda_paths import PATHS, Limits, Matmul, choose, slices_of


def start(library: Any, product: Product, stream: AbstractContextManager[int]) -> None:
    """Start the product on ``stream``, entered when the arguments are ready."""
    x, row_stride = product.x, product.row_stride
    if product.in_features % 32 == 0 and not _in_pieces(x, row_stride):
        # x is small beside W, and in pieces every path can read it.
        x = x.clone(memory_format=torch.contiguous_format)
        row_stride = x.stride(0)
    with stream as address:
        aligned = _in_pieces(x, row_stride) and product.weight.packed.data_ptr() % 16 == 0
        limits = Limits(*library.cuda_device_limits())
        sizes = product.rows, product.out_features, product.in_features
        call = Matmul(product.dx, x.dtype, *sizes, product.batch_invariant, aligned)
        path = choose(call, limits)
        if path == "gemm":
            _slices_by_gemm(library, call, limits, x, product, address)
        else:
            _fused(library, path, call, x, row_stride, product, address)


def _in_pieces(x: Tensor, row_stride: int) -> bool:
    return x.data_ptr() % 16 == 0 and row_stride * x.element_size() % 16 == 0


def _fused(
    library: Any,
    path: str,
    call: Matmul,
    x: Tensor,
    row_stride: int,
    product: Product,
    stream: int,
) -> None:
    """One of qkern's own kernels, with a workspace of the size that it asks for."""
    dtype_id = _args.dtype_id("x", x.dtype)
    path_id = PATHS.index(path)
    sizes = call.out_features, call.in_features
    workspace_bytes = library.cuda_linear_workspace(
        call.dx, dtype_id, call.rows, *sizes, call.batch_invariant, path_id
    )
    # The allocator hands it out again only to work that this stream does later.
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)
    kernel = library.cuda_linear_4bit_dx if call.dx else library.cuda_linear_4bit
    product = product._replace(x=x, row_stride=row_stride)
    kernel(*product_numbers(product, path_id, workspace, stream))


def _slices_by_gemm(
    library: Any, call: Matmul, limits: Limits, x: Tensor, product: Product, stream: int
) -> None:
    """Decode W a slice at a time into one workspace; torch multiplies into ``out``'s columns.

    A slice has every term of its results, so each is rounded once, by the GEMM itself.
    """
    dtype_id = _args.dtype_id("x", x.dtype)
    weight = tuple(numbers(product.weight))
    slices = slices_of(call, limits)
    begin, end = slices[0]
    other = call.out_features if call.dx else call.in_features
    workspace = torch.empty((end - begin) * other, dtype=x.dtype, device=x.device)
    x, out, bias = x.detach(), product.out.detach().view(call.rows, -1), product.bias
    for begin, end in slices:
        width = end - begin
        region = (0, begin, other, width) if call.dx else (begin, 0, width, other)
        library.cuda_dequantize_4bit_region(
            *weight, call.in_features, *region, workspace.data_ptr(), dtype_id, stream
        )
        part = workspace[: width * other].view(region[2], region[3])
        part = part if call.dx else part.t()
        if bias is None:
            torch.mm(x, part, out=out[:, begin:end])
        else:
            torch.addmm(bias.detach()[begin:end], x, part, out=out[:, begin:end])
