"""How a 4-bit matmul is started on a GPU, on the way that `_cuda_paths` chooses.

``library`` is the compiled module everywhere; all is done on ``stream``, the address of the current
stream of the current device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qkern import formats
from qkern.backends import _args, _cuda_paths
from qkern.backends._backend import Product
from qkern.backends._compiled import product_numbers, weight_numbers
from qkern.backends._cuda_paths import PATHS, Limits, Matmul, Way
from qkern.backends._exact_gemm import exact_products


def start(library: Any, stream: int, product: Product) -> None:
    """Start the product into its ``out``."""
    x = product.x
    whole_rows = product.in_features % 32 == 0 and x.shape[1] * x.element_size() % 16 == 0
    if whole_rows and not _in_pieces(x, product.row_stride):
        # x is small beside W, and in pieces every path can read it.
        x = x.clone(memory_format=torch.contiguous_format)
        product = product._replace(x=x, row_stride=x.stride(0))
    whole_weight = product.weight.packed.data_ptr() % 16 == 0
    call = Matmul(
        *(product.dx, x.dtype, product.rows, product.out_features, product.in_features),
        batch_invariant=product.batch_invariant,
        aligned=whole_weight and _in_pieces(x, product.row_stride),
        experts=None if product.offsets is None else len(product.offsets),
    )
    limits = device_limits(library)
    way = choose(library, call, limits)
    if way.path == "gemm":
        _slices_by_gemm(library, stream, call, limits, product)
    else:
        _fused(library, stream, way, product)


def _in_pieces(x: Tensor, row_stride: int) -> bool:
    return x.data_ptr() % 16 == 0 and row_stride * x.element_size() % 16 == 0


def device_limits(library: Any) -> Limits:
    """The limits of the current device."""
    return Limits(*library.cuda_device_limits())


def choose(library: Any, call: Matmul, limits: Limits) -> Way:
    """The way for a call; ``ValueError`` where ``QKERN_CUDA_PATH`` forces one that cannot."""
    ways, best = _ranked(library, call, limits)
    return _cuda_paths.forced(call, ways) or best


def way_of_its_own(
    library: Any,
    device: int,
    dx: bool,
    dtype_id: int,
    rows: int,
    out_features: int,
    in_features: int,
    experts: int,
    batch_invariant: bool,
    aligned: bool,
) -> tuple[int, int] | None:
    """The best way of a call if it is one of the library's, as its path and bytes of workspace.

    None is ``gemm``. ``experts`` is 0 of a product that is not by experts. ``device`` is the
    current one, for who keeps the answers by all arguments.
    """
    dtype = formats.DTYPES[dtype_id]
    shape = rows, out_features, in_features
    options = batch_invariant, aligned, experts or None
    call = Matmul(bool(dx), getattr(torch, dtype), *shape, *options)
    _, best = _ranked(library, call, device_limits(library))
    return None if best.path == "gemm" else (PATHS.index(best.path), best.workspace_bytes)


@functools.lru_cache(maxsize=4096)
def _ranked(library: Any, call: Matmul, limits: Limits) -> tuple[tuple[Way, ...], Way]:
    """What can compute a call on the current device, and the best of it.

    Kept, so that a matmul of a shape that came before asks C++ for no more than its kernel.
    """
    by_experts = call.experts is not None
    found = library.cuda_linear_paths(
        *(call.dx, _args.dtype_id("x", call.dtype), call.rows, call.out_features),
        *(call.in_features, call.batch_invariant or by_experts, call.aligned),
    )
    ways = tuple(Way(PATHS[path], parts, nbytes) for path, parts, nbytes in found)
    if by_experts:
        # A batch-invariant call splits a contraction only where it is too long for one sum.
        of_one = [way for way in ways if way.path in _cuda_paths.BY_EXPERTS and way.parts == 1]
        return tuple(of_one), _cuda_paths.best(call, limits, of_one)
    # A vendor's GEMM may sum in another order for another number of rows.
    if not call.batch_invariant:
        ways += (Way("gemm"),)
    return ways, _cuda_paths.best(call, limits, ways)


def _fused(library: Any, stream: int, way: Way, product: Product) -> None:
    """One of qkern's own kernels, with a workspace of the size that it asks for."""
    address = None
    if way.workspace_bytes:
        # The allocator hands it out again only to work that this stream does later.
        workspace = torch.empty(way.workspace_bytes, dtype=torch.uint8, device=product.x.device)
        address = workspace.data_ptr()
    op = "linear_4bit_dx" if product.dx else "linear_4bit"
    name = f"cuda_{op}" if product.offsets is None else f"cuda_grouped_{op}"
    kernel = getattr(library, name)
    kernel(*product_numbers(product), PATHS.index(way.path), address, stream)


def _slices_by_gemm(
    library: Any, stream: int, call: Matmul, limits: Limits, product: Product
) -> None:
    """Decode W a slice at a time into one workspace; torch multiplies into ``out``'s columns.

    A slice has every term of its results, so each is rounded once, by the GEMM itself.
    """
    x, bias = product.x.detach(), product.bias
    out = product.out.detach().view(call.rows, -1)
    dtype_id = _args.DTYPE_IDS[x.dtype]
    weight = weight_numbers(product.weight)
    slices = _cuda_paths.slices_of(call, limits)
    begin, end = slices[0]
    other = call.out_features if call.dx else call.in_features
    workspace = torch.empty((end - begin) * other, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.detach()
    with exact_products():
        for begin, end in slices:
            width = end - begin
            region = (0, begin, other, width) if call.dx else (begin, 0, width, other)
            library.cuda_dequantize_4bit_region(
                *weight, call.in_features, *region, workspace.data_ptr(), dtype_id, stream
            )
            part = workspace[: width * other].view(region[2], region[3])
            part = part if call.dx else part.t()
            multiply(x, part, None if bias is None else bias[begin:end], out[:, begin:end])


def multiply(x: Tensor, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The vendor's GEMM: ``out = x part (+ bias)``."""
    if bias is None:
        torch.mm(x, part, out=out)
    else:
        torch.addmm(bias, x, part, out=out)
