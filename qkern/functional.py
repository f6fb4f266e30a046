"""The public functions: they check arguments, explain errors and call the ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout

from qkern import _errors, formats, reference
from qkern._settings import batch_invariance, int8_activations, none_set
from qkern._tables import map_on
from qkern.autograd import (
    LoRALinear4bit,
    as_dtype,
    as_matrix,
    lora_product,
    matmul,
    may_have_own_product,
    record_known_linear_4bit,
    recorded_linear_4bit,
)
from qkern.backends import check_memory, has_cpu_matmul, num_threads
from qkern.ops import assume, call, forward_derivatives, is_watched, undispatched
from qkern.tensor import QuantizedTensor
from qkern.weight import Weight

any_autocast = getattr(torch._C, "_is_any_autocast_enabled", assume)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_traced_batch_invariant: bool | None = None
"""In code that a compiler traces, what a block there sets. None: the op asks when it runs."""


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Make each row's result independent of how many rows come with it, for 4-bit matmuls.

    So it is for what ``lora_linear`` adds, and for the gradient of ``x``. Off by default, because
    it costs speed: the adapter's products are then computed 32 rows at a time.

    Holds for the code in the ``with`` block, in the thread or task that entered it and in tasks
    made inside; and for the backward of a forward done inside. It does not hold in other threads,
    such as those of ``DataParallel``. A checkpointed forward runs again in ``backward``: put the
    block into the checkpointed function, or ``backward`` into the block too, which reentrant
    checkpoints on a GPU do not see. Graphs of ``torch.compile`` take
    what is in force when they run, forward and backward each, unless the block is in the compiled
    function itself; in them, products with adapters are the compiler's and may depend on the rows.
    """
    global _traced_batch_invariant
    if torch.compiler.is_dynamo_compiling():
        previous = _traced_batch_invariant
        _traced_batch_invariant = bool(enabled)
        try:
            yield
        finally:
            _traced_batch_invariant = previous
    else:
        with batch_invariance.held(bool(enabled)):
            yield


_traced_int8: bool = False
"""In code that a compiler traces, what a block of `precision` there sets."""


@contextmanager
def precision(value: str | None) -> Iterator[None]:
    """With ``"int8"``, compute 4-bit matmuls of up to 8 rows with both factors in 8 bits.

    For inference on CPUs: products of bytes take fewer instructions than float32's, and with VNNI
    fewer than those of 16-bit activations; without VNNI bfloat16 and float16 gain nothing by it.
    ``None`` ends it for the block. Off by default, for it is less exact:

    - A group of 32 elements of a row of ``x`` shares a scale, its largest magnitude ``a`` over 127.
      So an element is off by at most ``a / 254``.
    - The format's values are rounded to multiples of 1/112 (NF4), 1/120 (FP4), or 1/127 of a
      codebook's largest magnitude ``c``. So a weight of a block with the scale ``absmax`` is off by
      at most ``absmax / 224``, ``absmax / 240`` or ``absmax * c / 254``.

    Sums are still in float32. On data like a normal distribution a result is off by about 1 % of
    its own standard deviation.

    More than 8 rows are computed as usual, unless `batch_invariant` is on; so are weights
    whose rows are no whole blocks, and rows with a NaN, an infinity or extreme values. A row's bits
    do not depend on the others where all of them are taken. Backends other than ``cpu`` compute it
    by the reference, which is slow.

    The block holds where that of `batch_invariant` does: for this thread or task, for every library
    whose layers compute by qkern, and for graphs of ``torch.compile`` that run in it. It has no
    gradient: a matmul in the block raises ``RuntimeError`` where ``x``, the bias or an adapter
    requires one and gradients are on, or tangents are recorded; in a compiled graph its backward
    does, if it runs in the block too. Blocks inside a compiled function and blocks around its call
    do not combine: of a matmul in a `batch_invariant` block inside, nobody asks for the precision
    around it, and ``precision(None)`` inside does not end it. Raises ``ValueError`` for another
    value.
    """
    global _traced_int8
    if value not in ("int8", None):
        raise ValueError(f'value: got {value!r}; takes "int8" or None')
    enabled = value is not None
    if torch.compiler.is_dynamo_compiling():
        previous = _traced_int8
        _traced_int8 = enabled
        try:
            yield
        finally:
            _traced_int8 = previous
    else:
        with int8_activations.held(enabled):
            yield


def _int8_now() -> bool:
    """Whether activations are taken to 8 bits here."""
    if _is_dynamo_compiling():
        return _traced_int8
    return bool(int8_activations.get())


def batch_invariant_now() -> bool | None:
    """Whether rows must not depend on one another here."""
    if _is_dynamo_compiling():
        return _traced_batch_invariant
    return not none_set() and (batch_invariance.get() or False)


def quantize_4bit(
    w: Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Tensor | None = None,
    check_finite: bool = True,
) -> QuantizedTensor:
    """Quantise a tensor to 4 bits with one scale per ``block_size`` elements in row-major order.

    ``w``
        float32, bfloat16 or float16, of any shape and size, memory-mapped too.
    ``format``
        ``"nf4"``, ``"fp4"``, or ``"custom"`` with a ``codebook``.
    ``block_size``
        a power of two from 32 to 16384. It need not divide a row: blocks run across rows.
    ``double_quant``
        quantise the scales to 8 bits: 4.127 bits a weight rather than 4.5 at block size 64.
    ``codebook``
        16 finite float32 values in any order; a scaled weight lies in [-1, 1]. The tensor itself is
        kept when it is on ``w``'s device.
    ``check_finite``
        raise on a NaN or an infinity, in ``w`` or in what it dequantises to: near the end of
        ``w``'s dtype, a scale rounded up to 8 bits or a codebook beyond [-1, 1] can overflow it.
        Unchecked, a block that holds one dequantises to NaN (with ``double_quant`` every block
        does), and values that overflow to infinities.

    Raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a wrong value, naming the
    first bad block of a ``w`` that is not finite.

    One scale far above the others costs these their precision with ``double_quant``: 256 share a
    range. None becomes negative, but small ones may become 0.
    """
    _errors.check_float_tensor("w", w)
    check_memory_now("w", w)
    _errors.check_format(format, codebook)
    _errors.check_block_size(block_size)
    if codebook is not None:
        codebook = _checked_codebook(codebook)
        if codebook.is_meta:  # it cannot be brought from there
            _errors.check_device("codebook", codebook, w.device, "w")
        codebook = codebook.to(w.device)
    w = w.detach()
    packed, absmax = call("quantize_4bit", w, format, block_size, codebook)
    scales, nested_absmax, nested_offset = absmax, None, None
    if double_quant:
        scales, nested_absmax, nested_offset = call("quantize_absmax", absmax)
    quantized = QuantizedTensor(
        packed,
        scales,
        nested_absmax,
        nested_offset,
        codebook,
        format,
        block_size,
        tuple(w.shape),
        w.dtype,
    )
    if check_finite and not w.is_meta and not _is_surely_finite(quantized):
        if absmax.isnan().any():
            _raise_not_finite(absmax, block_size, w.numel())
        _check_overflow(quantized, absmax)
    return quantized


_LARGEST = {dtype: torch.finfo(dtype).max for dtype in _errors.FLOAT_DTYPES}


def _is_surely_finite(qw: QuantizedTensor) -> bool:
    """Whether no value can dequantise to a NaN or an infinity, by the largest scales alone."""
    if qw.numel() == 0:
        return True
    if qw.nested_absmax is None or qw.nested_offset is None:
        largest = qw.absmax.max()
    else:
        # The last entry of the map is 1, and rounding keeps an order. NaN where any scale is.
        groups = qw.nested_absmax
        largest = (groups if groups.numel() == 1 else groups.max()) + qw.nested_offset
    if qw.codebook is not None:
        largest = largest * qw.codebook.abs().max()
    return largest.item() <= _LARGEST[qw.dtype]


def _raise_not_finite(absmax: Tensor, block_size: int, n: int) -> None:
    block = int(absmax.isnan().nonzero()[0])
    raise ValueError(
        f"w: got a NaN or an infinity in {_block_name(block, block_size, n)}; takes finite values, "
        "or check_finite=False"
    )


def _block_name(block: int, block_size: int, n: int) -> str:
    first, last = block * block_size, min((block + 1) * block_size, n) - 1
    return f"block {block} (elements {first} to {last} of the flattened tensor)"


def _check_overflow(qw: QuantizedTensor, absmax: Tensor) -> None:
    """``ValueError`` for the first value that dequantises to an infinity in the weight's dtype.

    ``absmax`` has the scales before they were quantised.
    """
    for start, values in reference.decoded_pieces(qw.weight, qw.numel()):
        infinite = values.to(qw.dtype).isinf()
        if not infinite.any():
            continue
        block = (start + int(infinite.nonzero()[0])) // qw.block_size
        scale = absmax[block]
        factor = 1.0 if qw.codebook is None else qw.codebook.abs().max()
        remedies = ["smaller values", "a w of a wider dtype", "check_finite=False"]
        if qw.double_quant and (scale * factor).to(qw.dtype).isfinite():
            restored = reference.restored_absmax(qw.weight, block, block + 1)[0]
            reason = f"its scale {scale:.8g} becomes {restored:.8g} in 8 bits"
            remedies.insert(0, "double_quant=False")
        else:
            reason = f"the codebook multiplies its scale {scale:.8g} by up to {factor:.8g}"
        name = _block_name(block, qw.block_size, qw.numel())
        raise ValueError(
            f"w: got {name}, which dequantises to an infinity in {qw.dtype}: {reason}; takes "
            f"{', '.join(remedies[:-1])} or {remedies[-1]}"
        )


def _checked_codebook(codebook: Any) -> Tensor:
    _errors.check_buffer("codebook", codebook, torch.float32, (16,))
    check_memory_now("codebook", codebook)
    values = codebook.detach()
    if values.is_meta:
        return values
    ordered = values.sort().values
    if not (ordered[:-1] + ordered[1:]).isfinite().all():
        raise ValueError(
            f"codebook: got {values.tolist()}; takes finite values, also where two are added"
        )
    return values


def dequantize_4bit(
    qw: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense tensor of a quantised one; see ``QuantizedTensor.dequantize``."""
    _check_quantized("qw", qw)
    return qw.dequantize(dtype, out=out)


def check_memory_now(name: str, value: Tensor) -> None:
    """`check_memory` of what torch will read; of what is traced nothing is asked."""
    if not is_watched():
        check_memory(name, value)


def _check_quantized(name: str, value: Any) -> None:
    if not isinstance(value, QuantizedTensor):
        raise TypeError(f"{name}: got {_errors.type_name(value)}; takes a QuantizedTensor")


def _map(map: str | Tensor, device: torch.device) -> Tensor:
    if isinstance(map, str):
        return map_on(map, device)
    _errors.check_buffer("map", map, torch.float32, (256,))
    check_memory_now("map", map)
    _errors.check_device("map", map, device, "the data")
    # Also false where a value is NaN.
    if not map.is_meta and not ((map[1:] >= map[:-1]).all() and map[[0, -1]].isfinite().all()):
        raise ValueError("map: got values out of order or not finite; takes 256 ascending values")
    return map


def quantize_8bit(
    x: Tensor, map: str | Tensor = "signed", block_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Quantise blockwise to 8 bits: ``(codes uint8 of x's shape, absmax float32 [blocks])``.

    ``x`` is float32, bfloat16 or float16; ``map`` is ``"signed"``, ``"unsigned"`` (the dynamic
    maps) or an ascending float32 tensor ``[256]``; ``block_size`` is a power of two from 32 to
    16384. The code is the nearest entry to ``x / absmax``, a tie going to the lower one. A block
    that holds a NaN or an infinity gets the absmax NaN. Raises ``TypeError`` or ``ValueError``.
    """
    _errors.check_float_tensor("x", x)
    _errors.check_block_size(block_size)
    codes, absmax = call("quantize_8bit", x.detach(), _map(map, x.device), block_size)
    return codes, absmax


def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    map: str | Tensor = "signed",
    block_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``map[codes] * absmax``, rounded once to ``dtype``; the inverse of ``quantize_8bit``.

    Raises ``TypeError`` or ``ValueError`` when the arguments do not fit one another.
    """
    _errors.check_tensor("codes", codes)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}; takes torch.uint8")
    _errors.check_block_size(block_size)
    blocks = formats.num_blocks(codes.numel(), block_size)
    _errors.check_buffer("absmax", absmax, torch.float32, (blocks,))
    _errors.check_device("absmax", absmax, codes.device, "codes")
    _errors.check_float_dtype("dtype", dtype)
    return torch.ops.qkern.dequantize_8bit(
        codes, absmax, _map(map, codes.device), block_size, dtype
    )


def linear_4bit(x: Tensor, qw: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with the 4-bit weight used as it is, in forward and backward.

    ``x``
        float32, bfloat16 or float16 ``[..., in_features]``.
    ``qw``
        a quantised ``[out_features, in_features]``, in any format, on ``x``'s device. It gets no
        gradient.
    ``bias``
        ``[out_features]`` of ``x``'s dtype, or None.

    Returns ``[..., out_features]`` of ``x``'s dtype; sums are in float32 and rounded once. Under
    autocast ``x`` and ``bias`` are cast to its dtype, as ``torch.nn.functional.linear`` does.
    Raises ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape or device.
    """
    _check_quantized("qw", qw)
    return linear_by_weight(x, qw.weight, qw.shape, bias)


def linears_4bit(
    x: Tensor,
    qws: Sequence[QuantizedTensor],
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """``linear_4bit`` of one ``x`` with several weights, as queries, keys and values have one.

    ``x``
        float32, bfloat16 or float16 ``[..., in_features]``.
    ``qws``
        quantised ``[out_features, in_features]``, in any format each; one or more.
    ``biases``
        as many, each ``[out_features]`` of ``x``'s dtype or None; None for none at all.

    Returns a tuple of as many results, with the bits that single calls give. On a CPU, ``x`` is
    read and checked once and all products are one call; other backends and tracers take one after
    the other. The gradient of ``x`` is the sum over all of them. Raises as ``linear_4bit`` does.
    """
    if not isinstance(qws, list | tuple):
        raise TypeError(f"qws: got {_errors.type_name(qws)}; takes a list of QuantizedTensor")
    for index, qw in enumerate(qws):
        _check_quantized(f"qws[{index}]", qw)
    if not qws:
        raise ValueError("qws: got none; takes one QuantizedTensor or more")
    if not isinstance(biases, list | tuple | None):
        raise TypeError(
            f"biases: got {_errors.type_name(biases)}; takes a list of tensors and None, or None"
        )
    biases = (None,) * len(qws) if biases is None else tuple(biases)
    if len(biases) != len(qws):
        raise ValueError(f"biases: got {len(biases)} for {len(qws)} weights; takes as many")
    weights = tuple(qw.weight for qw in qws)
    shapes = [qw.shape for qw in qws]
    ys = _several_by_kernel(x, weights, shapes, biases)
    if ys is None:
        products = zip(weights, shapes, biases, strict=True)
        return tuple(linear_by_weight(x, *product) for product in products)
    if not any(_has_gradient(x, bias) for bias in biases):
        return ys
    known = zip(ys, weights, biases, strict=True)
    return tuple(
        record_known_linear_4bit(x, bias, weight, False, (y,)) if _has_gradient(x, bias) else y
        for y, weight, bias in known
    )


def _several_by_kernel(
    x: Tensor,
    weights: tuple[Weight, ...],
    shapes: Sequence[Sequence[int]],
    biases: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...] | None:
    """The products by the kernel alone, without a graph; outside of blocks that set anything.

    None if a tracer must see the ops or an argument is unusual.
    """
    backend = undispatched(x)  # first, for a compiler cannot trace the rest
    if backend is None or not none_set() or any_autocast():
        return None
    if any(len(shape) != 2 for shape in shapes):
        return None
    kernel = backend.fast.get("linears_4bit")
    features, width = tuple(shape[0] for shape in shapes), shapes[0][1]
    if kernel is None or any(shape[1] != width for shape in shapes):
        return None
    found: tuple[Tensor, ...] | None
    found = kernel(x, weights, features, biases, False, num_threads(), width)
    return found


_linear_4bit = torch.ops.qkern.linear_4bit.default
_linear_4bit_int8 = torch.ops.qkern.linear_4bit_int8.default


def linear_by_weight(
    x: Tensor, weight: Weight, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """`linear_4bit` by a weight of ``shape`` as the ops take it; errors call it ``qw``."""
    invariant: bool | None = False
    if _is_dynamo_compiling() or not none_set():
        invariant = batch_invariant_now()
        if _int8_now():
            return _linear_in_8_bits(x, weight, shape, bias, invariant)
    y = _by_kernel_alone(x, weight, shape, bias, invariant)
    if y is None:
        x, bias = _checked_input(x, weight, shape, bias)
        if is_recorded(x, bias):
            return recorded_linear_4bit(x, bias, shape[0], invariant, *weight)
        return _linear_4bit(x, *weight, shape[0], bias, invariant)
    if _has_gradient(x, bias):  # tangents are never without the op
        return record_known_linear_4bit(x, bias, weight, invariant, (y,))
    return y


def _linear_in_8_bits(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    bias: Tensor | None,
    invariant: bool | None,
) -> Tensor:
    """`linear_by_weight` in a block of `precision`."""
    y = _by_kernel_alone(x, weight, shape, bias, invariant, "linear_4bit_int8")
    if y is None:
        x, bias = _checked_input(x, weight, shape, bias)
        _refuse_gradients(x, bias)
        return _linear_4bit_int8(x, *weight, shape[0], bias, invariant)
    _refuse_gradients(x, bias)
    return y


def _refuse_gradients(*tensors: Tensor | None) -> None:
    """``RuntimeError`` where a product in 8 bits would be differentiated."""
    if any(tensor is not None and is_recorded(tensor, None) for tensor in tensors):
        raise RuntimeError(
            'precision: got "int8" where a gradient is recorded; takes it under torch.no_grad() or '
            "torch.inference_mode(), or where no tensor requires a gradient"
        )


def _by_kernel_alone(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    bias: Tensor | None,
    batch_invariant: bool | None,
    op: str = "linear_4bit",
) -> Tensor | None:
    """The product by the kernel alone, without a graph.

    None if a tracer must see the op or an argument is unusual.
    """
    backend = undispatched(x)
    if backend is None or any_autocast() or len(shape) != 2:
        return None
    kernel = backend.fast.get(op)
    if kernel is None:
        return None
    return kernel(x, weight, shape[0], bias, batch_invariant, num_threads(), shape[1])


def is_recorded(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the product of ``x`` must have derivatives."""
    return forward_derivatives() or _has_gradient(x, bias)


def _has_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def _checked_input(
    x: Tensor, weight: Weight, shape: Sequence[int], bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``bias``, checked against the weight, in the autocast dtype if there is one."""
    _errors.check_tensor("x", x)
    if autocast_enabled(x):
        x, bias = autocast(x, bias)
    if (
        x.dtype not in _errors.FLOAT_DTYPES
        or len(shape) != 2
        or x.device != weight.device
        or x.dim() == 0
        or x.shape[-1] != shape[1]
    ):
        _raise_for_input(x, weight, shape)
    if bias is not None:
        check_bias(bias, x, shape[0], "x")
    return x, bias


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    if x.is_cpu:
        # Asking a device for its type would cost more than all other checks together.
        return torch.is_autocast_enabled("cpu")
    device_type = x.device.type
    # Some device types, meta among them, have no autocast to ask about.
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the autocast dtype where they are floating point, else as they are."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype in _errors.FLOAT_DTYPES:
        check_memory_now("x", x)
        x = x.to(dtype)
    if isinstance(bias, Tensor) and bias.dtype in _errors.FLOAT_DTYPES:
        check_memory_now("bias", bias)
        bias = bias.to(dtype)
    return x, bias


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; what `linear_by_weight` refuses as it is, so that it does."""
    if not isinstance(x, Tensor) or x.dtype not in _errors.FLOAT_DTYPES:
        return x
    check_memory_now("x", x)
    return as_dtype(x, dtype)


def _raise_for_input(x: Tensor, weight: Weight, shape: Sequence[int]) -> None:
    _errors.check_float_tensor("x", x)
    if len(shape) != 2:
        raise ValueError(
            f"qw: got shape {list(shape)}; takes two dimensions, [out_features, in_features]"
        )
    _errors.check_device("x", x, weight.device, "qw")
    raise ValueError(
        f"x: got shape {list(x.shape)}; takes [..., {shape[1]}] for qw of shape {list(shape)}"
    )


def check_bias(bias: Any, x: Tensor, out_features: int, owner: str) -> None:
    """TypeError or ValueError unless ``bias`` goes with ``x``, which errors call ``owner``."""
    _errors.check_tensor("bias", bias)
    if bias.dtype != x.dtype:
        raise TypeError(f"bias: got {bias.dtype}; takes {x.dtype}, {owner}'s dtype")
    if bias.shape != (out_features,):
        raise ValueError(f"bias: got shape {list(bias.shape)}; takes [{out_features}]")
    _errors.check_device("bias", bias, x.device, owner)


def nf4_linear(x: Tensor, qw: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``linear_4bit`` for an NF4 weight; ``ValueError`` when ``qw`` is in another format."""
    _check_quantized("qw", qw)
    if qw.format != "nf4":
        raise ValueError(f'qw: got format {qw.format!r}; takes "nf4"')
    return linear_by_weight(x, qw.weight, qw.shape, bias)


def fp4_linear(x: Tensor, qw: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``linear_4bit`` for an FP4 weight; ``ValueError`` when ``qw`` is in another format."""
    _check_quantized("qw", qw)
    if qw.format != "fp4":
        raise ValueError(f'qw: got format {qw.format!r}; takes "fp4"')
    return linear_by_weight(x, qw.weight, qw.shape, bias)


def lora_linear(
    x: Tensor,
    qw: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``linear_4bit(x, qw, bias) + scaling * dropout(x) @ lora_a.T @ lora_b.T``.

    ``x``, ``qw``, ``bias``
        as for ``linear_4bit``.
    ``lora_a``, ``lora_b``
        the adapter, ``[r, in_features]`` and ``[out_features, r]``, as in PEFT; float32, bfloat16
        or float16. It is computed in ``x``'s dtype; on a CPU that only emulates matmuls in that
        dtype, in float32. Gradients come back in the adapter's own dtype.
    ``dropout_p``
        probability to drop an element of the adapter's input: pass 0.0 when not training.

    Gradients reach ``x``, ``lora_a``, ``lora_b`` and ``bias``. Beyond tensors that exist anyway,
    backward keeps only ``x @ lora_a.T`` (and the dropped-out ``x`` with dropout). Raises as
    ``linear_4bit`` does.
    """
    _check_quantized("qw", qw)
    return lora_by_weight(x, qw.weight, qw.shape, lora_a, lora_b, scaling, bias, dropout_p)


def lora_by_weight(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`lora_linear` by a weight of ``shape`` as the ops take it; errors call it ``qw``."""
    invariant: bool | None = False
    in_8_bits = False
    if _is_dynamo_compiling() or not none_set():
        invariant, in_8_bits = batch_invariant_now(), _int8_now()
    op = "linear_4bit_int8" if in_8_bits else "linear_4bit"
    y = None
    if in_8_bits or not may_have_own_product(x, invariant):
        y = _by_kernel_alone(x, weight, shape, bias, invariant, op)
    if y is None:
        x, bias = _checked_input(x, weight, shape, bias)
    out_features, in_features = shape
    read = y is not None  # and so nobody watches
    _check_adapter("lora_a", lora_a, x, None, in_features, read)
    _check_adapter("lora_b", lora_b, x, out_features, lora_a.shape[0], read)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; takes a probability from 0 to below 1")
    matrix = as_matrix(x)
    adapter_input = _dropout(matrix, dropout_p) if dropout_p else None
    adapter_dtype = x.dtype
    if adapter_dtype is not torch.float32 and x.is_cpu and not autocast_enabled(x):
        adapter_dtype = _cpu_matmul_dtype(adapter_dtype)
    if in_8_bits:
        _refuse_gradients(x, bias, lora_a, lora_b)
    lora_a, lora_b = as_dtype(lora_a, adapter_dtype), as_dtype(lora_b, adapter_dtype)
    if forward_derivatives():
        # Separately: the function of both has no tangents.
        y = recorded_linear_4bit(matrix, bias, out_features, invariant, *weight)
        kept = matrix if adapter_input is None else adapter_input
        hidden = matmul(as_dtype(kept, adapter_dtype), lora_a.mT, invariant)
        y = y + as_dtype(matmul(hidden, lora_b.mT, invariant) * scaling, y.dtype)
    elif torch.is_grad_enabled() and not in_8_bits:
        known = None if y is None else (y,)
        adapter = (adapter_input, lora_a, lora_b, scaling)
        base = (bias, out_features, invariant, *weight)
        y = LoRALinear4bit.apply(matrix, *adapter, known, *base)
    else:
        if y is None and in_8_bits:
            y = _linear_4bit_int8(matrix, *weight, out_features, bias, invariant)
        known = None if y is None else (y,)
        kept = matrix if adapter_input is None else adapter_input
        rest = known, bias, out_features, invariant, weight
        y, _ = lora_product(matrix, kept, lora_a, lora_b, scaling, *rest)
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], out_features)


def _cpu_matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where a CPU's matmuls in ``dtype`` are emulated."""
    return dtype if has_cpu_matmul(dtype) else torch.float32


# What torch.compiler.assume_constant_result sets. It would import the compiler, which takes longer
# than all else that qkern imports.
_cpu_matmul_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_adapter(
    name: str, value: Any, x: Tensor, rows: int | None, columns: int, read: bool
) -> None:
    _errors.check_float_tensor(name, value)
    shape = value.shape
    if len(shape) != 2 or shape[1] != columns or rows not in (None, shape[0]):
        takes = f"[{'r' if rows is None else rows}, {columns}]"
        raise ValueError(f"{name}: got shape {list(shape)}; takes {takes}")
    if not (value.is_cpu and x.is_cpu):  # two devices take longer to compare
        _errors.check_device(name, value, x.device, "x")
    if read or not is_watched():
        check_memory(name, value)
