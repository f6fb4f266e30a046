"""bitsandbytes' 4-bit ops, computed by qkern's. Their schemas are bitsandbytes' own.

Torch calls these functions below autograd, with plain tensors. Beside them an op that bitsandbytes
lacks: the gradient of a matmul's input, on 4 bits too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qkern import _bnb, _errors, formats
from qkern._settings import batch_invariance, none_set
from qkern.ops import call
from qkern.weight import Weight

T = TypeVar("T")

QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = formats.NESTED_BLOCK_SIZE


class _Remembered(Generic[T]):
    """An answer about a small tensor's values, asked again only where they may have changed.

    On a GPU, each question would wait for it.
    """

    def __init__(self, ask: Callable[[Tensor], T]) -> None:
        self._ask = ask
        self._known: dict[int, tuple[weakref.ref[Tensor], int, T]] = {}

    def __call__(self, tensor: Tensor) -> T:
        if tensor.is_inference():  # counts no changes
            return self._ask(tensor)
        key, changes = id(tensor), tensor._version
        found = self._known.get(key)
        if found is not None and found[0]() is tensor and found[1] == changes:
            return found[2]
        answer = self._ask(tensor)
        self._known[key] = (
            weakref.ref(tensor, lambda gone: self._forget(key, gone)),
            changes,
            answer,
        )
        return answer

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        found = self._known.get(key)
        if found is not None and found[0] is gone:
            del self._known[key]


is_own_map = _Remembered(_bnb.is_own_map)
"""Whether a map of 256 values is the one that qkern's kernels decode scales by."""


def _named_table(code: Tensor) -> str:
    for name in QUANT_TYPES:
        own = formats.code_tensor(name, code.device)
        if code.dtype == own.dtype and torch.equal(code, own):
            return name
    return "custom"


_table_of = _Remembered(_named_table)


def _check(quant_type: Any, blocksize: Any) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f'quant_type: got {quant_type!r}; takes "nf4" or "fp4"')
    if blocksize not in formats.BNB_BLOCK_SIZES:
        sizes = ", ".join(map(str, formats.BNB_BLOCK_SIZES))
        raise ValueError(f"blocksize: got {blocksize!r}; takes {sizes}")


def _check_matrix(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(f"{name}: got {list(shape)}; takes two sizes, [out_features, in_features]")


def _check_input(name: str, x: Tensor, features: int) -> None:
    if not x.dim() or x.shape[-1] != features:
        raise ValueError(f"{name}: got shape {list(x.shape)}; takes [..., {features}]")


def codes(stored: Tensor) -> Tensor:
    """The bytes of a packed weight, whatever dtype they are stored as, in the same memory."""
    if stored.dtype is torch.uint8:
        return stored
    return stored.contiguous().view(torch.uint8)


def flat_scales(absmax: Tensor, shape: Sequence[int], blocksize: int) -> Tensor:
    """The scales ``[blocks]`` of a weight in float32, in whatever shape they are given.

    Where bitsandbytes undid its packing for CPU inference, scales without double quantisation stay
    as they were packed: ``[in_features / blocksize, out_features]`` in bfloat16.
    """
    if is_packed(absmax) and len(shape) == 2:
        packed = [shape[1] // blocksize, shape[0]]
        if list(absmax.shape) != packed:
            raise ValueError(
                f"absmax: got {absmax.dtype} {list(absmax.shape)}; takes one dimension, or "
                f"{packed} as packed for CPU inference"
            )
        absmax = absmax.t()
    return absmax.float().contiguous().view(-1)


def is_packed(absmax: Tensor) -> bool:
    """Whether the scales are those of a weight that is, or was, packed for CPU inference."""
    return absmax.dim() == 2 and absmax.dtype == torch.bfloat16


def plain_weight(
    stored: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int]
) -> Weight:
    """A weight whose scales are not quantised themselves."""
    _check(quant_type, blocksize)
    scales = flat_scales(absmax, shape, blocksize)
    return Weight(codes(stored), scales, None, None, None, quant_type, blocksize)


def weight(
    stored: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
) -> Weight:
    """A weight as `gemm_4bit` takes it: with ``absmax_8bit``, ``absmax`` has the scales' scales."""
    if absmax_8bit is None:
        return plain_weight(stored, absmax, blocksize, quant_type, shape)
    _check(quant_type, blocksize)
    if absmax_code is None or absmax_offset is None:
        missing = "absmax_code" if absmax_code is None else "absmax_offset"
        raise ValueError(f"{missing}: got None; takes a tensor with absmax_8bit")
    absmax, offset = absmax.float(), absmax_offset.float()
    if is_own_map(absmax_code):
        return Weight(codes(stored), absmax_8bit, absmax, offset, None, quant_type, blocksize)
    # Another processor may have rounded the map otherwise. The one in the state decodes.
    scales = call(
        "dequantize_8bit",
        absmax_8bit,
        absmax,
        absmax_code.float(),
        NESTED_BLOCK_SIZE,
        torch.float32,
    )
    return Weight(codes(stored), scales + offset, None, None, None, quant_type, blocksize)


def _is_batch_invariant() -> bool:
    return not none_set() and bool(batch_invariance.get())


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes ``[n, 1]`` in ``quant_storage`` and float32 scales ``[blocks]``."""
    _errors.check_float_tensor("A", A)
    _check(quant_type, blocksize)
    packed, absmax = call("quantize_4bit", A, quant_type, blocksize, None)
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quant_storage: got {quant_storage} for {packed.numel()} bytes of codes; takes a "
            "dtype whose size divides them"
        )
    return packed.view(quant_storage).unsqueeze(1), absmax


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The dense tensor of ``shape``."""
    _errors.check_float_dtype("dtype", dtype)
    found = plain_weight(A, absmax, blocksize, quant_type, shape)
    return call("dequantize_4bit", found, tuple(shape), dtype)


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """`dequantize_4bit` into ``out``, of any strides."""
    _check_out(out, A, shape, dtype)
    if not out.is_contiguous():
        out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))
        return
    found = plain_weight(A, absmax, blocksize, quant_type, shape)
    call("dequantize_4bit_out", found, out)


def _check_out(out: Tensor, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if out.dtype != dtype:
        raise TypeError(f"out: got {out.dtype}; takes {dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out: got shape {list(out.shape)}; takes {list(shape)}")
    _errors.check_device("out", out, like.device, "A")


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    """``A @ W.T`` for ``A`` of ``[..., in_features]``: of any number of rows, despite its name.

    ``B`` may be packed for CPU inference, as its scales of two dimensions in bfloat16 say.
    """
    _check_matrix("shapeB", shapeB)
    _check_input("A", A, shapeB[1])
    _check("nf4", blocksize)
    if is_packed(absmax):
        B = unpacked_codes(B, shapeB)
    scales = flat_scales(absmax, shapeB, blocksize)
    table = _table_of(code)
    codebook = code.float() if table == "custom" else None
    found = Weight(codes(B), scales, None, None, codebook, table, blocksize)
    return call("linear_4bit", A, found, shapeB[0], None, _is_batch_invariant())


def gemv_4bit_out(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    """`gemv_4bit` into ``out``."""
    _check_matrix("shapeB", shapeB)
    _check_out(out, A, (*A.shape[:-1], shapeB[0]), A.dtype)
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``A @ W.T + bias`` for ``A`` of ``[..., in_features]``, in ``A``'s dtype."""
    _check_matrix("shapeB", shapeB)
    _check_input("A", A, shapeB[1])
    nested = absmax_8bit, absmax_code, absmax_offset
    found = weight(B, absmax, blocksize, quant_type, *nested, shapeB)
    return call("linear_4bit", A, found, shapeB[0], bias, _is_batch_invariant())


def gemm_4bit_dx(
    dy: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``dy @ W`` for ``dy`` of ``[..., out_features]``: the gradient of `gemm_4bit`'s ``A``."""
    _check_matrix("shapeB", shapeB)
    _check_input("dy", dy, shapeB[0])
    nested = absmax_8bit, absmax_code, absmax_offset
    found = weight(B, absmax, blocksize, quant_type, *nested, shapeB)
    return call("linear_4bit_dx", dy, found, shapeB[1], _is_batch_invariant())


OPS: dict[str, tuple[Callable[..., Any], str]] = {
    "quantize_4bit": (quantize_4bit, "A blocksize quant_type quant_storage"),
    "dequantize_4bit": (dequantize_4bit, "A absmax blocksize quant_type shape dtype"),
    "dequantize_4bit.out": (dequantize_4bit_out, "A absmax blocksize quant_type shape dtype out"),
    "gemv_4bit": (gemv_4bit, "A B shapeB absmax code blocksize"),
    "gemv_4bit.out": (gemv_4bit_out, "A B shapeB absmax code blocksize out"),
    "gemm_4bit": (
        gemm_4bit,
        "A B shapeB absmax blocksize quant_type bias absmax_8bit absmax_code absmax_offset",
    ),
}
"""By bitsandbytes' name: what computes the op, and the names of the arguments it must have."""


def _gemm_4bit_dx_fake(dy: Tensor, B: Tensor, shapeB: Sequence[int], *others: object) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], shapeB[1]))


_library = torch.library.Library("qkern_bitsandbytes", "DEF")
_library.define(
    "gemm_4bit_dx(Tensor dy, Tensor B, SymInt[] shapeB, Tensor absmax, int blocksize,"
    " str quant_type, Tensor? absmax_8bit=None, Tensor? absmax_code=None,"
    " Tensor? absmax_offset=None) -> Tensor"
)
_library.impl("gemm_4bit_dx", gemm_4bit_dx, "CompositeExplicitAutograd")
torch.library.register_fake("qkern_bitsandbytes::gemm_4bit_dx", _gemm_4bit_dx_fake, lib=_library)


def unpacked_codes(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The usual codes ``[n / 2, 1]`` of a weight that was packed for CPU inference."""
    rows, columns = shape
    wanted = [rows, columns // 2]
    if packed.dtype != torch.uint8 or list(packed.shape) != wanted or rows % _bnb.ROWS:
        raise ValueError(
            f"B: got {packed.dtype} {list(packed.shape)}; takes torch.uint8 {wanted}, as "
            "bitsandbytes packs it for CPU inference"
        )
    return _bnb.unpacked(packed).unsqueeze(1)
