"""Cross entropy of a head's logits, a few rows of which exist at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from qkern import _errors
from qkern.autograd import as_dtype, float32_slices, no_autocast, widened_linear_dx
from qkern.backends import forced, has_cpu_matmul, holding
from qkern.functional import (
    autocast,
    autocast_enabled,
    batch_invariant_now,
    check_bias,
    check_memory_now,
)
from qkern.ops import call, is_watched
from qkern.tensor import QuantizedTensor
from qkern.weight import Weight

_CHUNK_BYTES = 56 << 20
"""Of logits at a time. Smaller chunks read the weight more often than a matmul hides."""

_REDUCTIONS = ("mean", "sum", "none")


class _Options(NamedTuple):
    """What is no tensor."""

    vocabulary: int
    per_row: bool
    scale: float
    softcap: float | None
    ignore_index: int
    batch_invariant: bool | None
    grad: bool
    """Whether gradients are wanted: inside of a Function grad mode is off."""
    logit_bytes: int
    """Of one logit, with its copy in 16 bits."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels)`` that never holds all the logits.

    Logits are made some rows at a time, and with them, where gradients are wanted, their part of
    the gradients; the backward pass scales those. Beyond gradients that takes less than 64 MiB,
    unless one row has more. Gradients are there twice in the backward pass, and that of a weight
    that is trained is summed up in float32. Of ``hidden`` on a CPU rows that are ignored are not
    multiplied at all.

    ``hidden``
        float32, bfloat16 or float16 ``[..., in_features]``, a decoder's output.
    ``weight``
        the head, ``[vocabulary, in_features]``: of ``hidden``'s dtype, or in 4 bits, which gets no
        gradient.
    ``labels``
        int64 ``[...]``: classes from 0 to vocabulary - 1, or ``ignore_index``. Nothing is shifted.
    ``bias``
        ``[vocabulary]`` of ``hidden``'s dtype, or None.
    ``reduction``
        ``"mean"`` over the labels that are not ignored (NaN if there is none), ``"sum"``, or
        ``"none"`` for a loss each, which multiplies by the weight once more in the backward pass.
    ``scale``, ``softcap``
        for models that change their logits: ``softcap * tanh(scale * logits / softcap)``; without a
        cap ``scale * logits``.

    Returns float32: a number, or with ``"none"`` the shape of ``labels``. Logits are computed in
    ``hidden``'s dtype or more exactly; softmax, losses and sums over the rows are in float32.
    Under autocast all three tensors are cast to its dtype. Gradients cannot be differentiated
    again. A dense weight's product may depend on the number of rows, under ``batch_invariant()``
    too. ``torch.compile`` makes a graph for each number of rows.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or option,
    IndexError for a label that is no class (on a CPU).

    Source: the recipe of Liger Kernel (arXiv 2410.10989, section 3.2), which chunks by rows.
    """
    _check_options(reduction, scale, softcap, ignore_index)
    hidden, weight, bias = _checked(hidden, weight, labels, bias)
    rows = labels.reshape(-1)
    matrix = hidden.reshape(labels.numel(), hidden.shape[-1])
    vocabulary = weight.shape[0]
    counted = rows != ignore_index
    kept = None
    if hidden.is_cpu and not is_watched():
        # Elsewhere the number of labels that count is not known without waiting for the device.
        _check_classes(rows, counted, vocabulary, ignore_index)
        if not bool(counted.all()):
            kept = counted.nonzero().squeeze(1)
            matrix, rows = matrix[kept], rows[kept]
    in_float32 = hidden.dtype == torch.float32 or _by_columns(matrix, weight)
    options = _Options(
        vocabulary,
        reduction == "none",
        scale,
        softcap,
        ignore_index,
        batch_invariant_now(),
        torch.is_grad_enabled(),
        4 if in_float32 else 6,
    )
    packed = weight.weight if isinstance(weight, QuantizedTensor) else ()
    dense = None if isinstance(weight, QuantizedTensor) else weight
    loss: Tensor = _LinearCrossEntropy.apply(matrix, dense, bias, rows, options, *packed)
    if reduction == "mean":
        count = counted.sum()
        loss = (loss / count.clamp(min=1)).where(count > 0, torch.nan)
    elif reduction == "none":
        if kept is not None:
            loss = loss.new_zeros(labels.numel()).index_copy(0, kept, loss)
        loss = loss.view(labels.shape)
    return loss


def _check_options(reduction: Any, scale: Any, softcap: Any, ignore_index: Any) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; takes one of {', '.join(_REDUCTIONS)}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            if name == "softcap" and value is None:
                continue
            raise TypeError(f"{name}: got {_errors.type_name(value)}; takes a number")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}: got {value}; takes a finite number")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}; takes a number above 0")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {_errors.type_name(ignore_index)}; takes an int")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index: got {ignore_index}; takes an int64")


def _checked(
    hidden: Any, weight: Any, labels: Any, bias: Any
) -> tuple[Tensor, Tensor | QuantizedTensor, Tensor | None]:
    """The floating tensors, cast as autocast asks, once types, shapes and devices are right."""
    _errors.check_float_tensor("hidden", hidden)
    in_4_bits = isinstance(weight, QuantizedTensor)
    if not in_4_bits:
        _errors.check_float_tensor("weight", weight)
    if hidden.dim() == 0:
        raise ValueError("hidden: got shape []; takes [..., in_features]")
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}; takes [vocabulary, {hidden.shape[-1]}] for "
            f"hidden of shape {list(hidden.shape)}"
        )
    _errors.check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}; takes int64")
    if labels.layout is not torch.strided:
        raise TypeError(f"labels: got layout {labels.layout}; takes a dense tensor")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: got shape {list(labels.shape)}; takes {list(hidden.shape[:-1])} for hidden "
            f"of shape {list(hidden.shape)}"
        )
    _errors.check_device("weight", weight.packed if in_4_bits else weight, hidden.device, "hidden")
    _errors.check_device("labels", labels, hidden.device, "hidden")
    memory = {"hidden": hidden, "labels": labels}
    memory |= weight.tensors() if in_4_bits else {"weight": weight}
    for name, tensor in memory.items():
        check_memory_now(name, tensor)
    if autocast_enabled(hidden):
        hidden, bias = autocast(hidden, bias)
        weight = weight if in_4_bits else as_dtype(weight, hidden.dtype)
    if not in_4_bits and weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got {weight.dtype}; takes {hidden.dtype}, hidden's dtype")
    if bias is not None:
        check_bias(bias, hidden, weight.shape[0], "hidden")
        check_memory_now("bias", bias)
    return hidden, weight, bias


def _check_classes(labels: Tensor, counted: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        found = int(labels[wrong][0])
        raise IndexError(
            f"labels: got {found}; takes 0 to {vocabulary - 1}, or ignore_index={ignore_index}"
        )


class _LinearCrossEntropy(Function):
    """Losses of ``[rows, in_features]``: their sum, or each with ``options.per_row``.

    Gradients of the sum are made along with it, while a chunk's logits are at hand. Those of single
    losses need what comes from above, so logits are made again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *others: Any) -> Tensor:
        """Chunk by chunk; save the gradients, or what they are made of."""
        with no_autocast(hidden.device.type):  # it would narrow what is float32
            return _LinearCrossEntropy._losses(ctx, hidden, *others)

    @staticmethod
    def _losses(
        ctx: Any,
        hidden: Tensor,
        dense: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        options: _Options,
        *packed: Any,
    ) -> Tensor:
        weight = dense if dense is not None else Weight(*packed)
        needed = tuple(options.grad and n for n in ctx.needs_input_grad[:3])
        now = any(needed) and not options.per_row
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        gradients = _Gradients(hidden, weight, bias, needed if now else (False,) * 3)
        for rows in _chunks(labels, options):
            chunk = _Chunk(hidden[rows], weight, bias, labels[rows], options)
            losses[rows] = chunk.losses
            if now:
                gradients.add(rows, chunk, None)
            del chunk  # before the next one is made
        ctx.options, ctx.dtype = options, hidden.dtype
        if now:
            # A sum over rows may be too large for float16, before it is divided by their number.
            ctx.save_for_backward(*gradients.finished(wide=hidden.dtype == torch.float16))
        elif any(needed):
            ctx.save_for_backward(hidden, dense, bias, labels, *packed[:5])
            ctx.layout = packed[5:]
            ctx.forced = forced()
        return losses if options.per_row else losses.sum()

    @staticmethod
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        """Of ``hidden``, ``dense`` and ``bias``."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Without a graph they would count as constants in what is made of them.
            raise RuntimeError(
                "linear_cross_entropy: got a backward pass with create_graph=True; its gradients "
                "cannot be differentiated again, those of torch.nn.functional.cross_entropy can"
            )
        if ctx.options.per_row:
            with no_autocast(from_above.device.type), holding(ctx.forced):
                found = _LinearCrossEntropy._of_each(ctx, from_above)
        else:
            found = tuple(
                None if g is None else as_dtype(g * from_above, ctx.dtype)
                for g in ctx.saved_tensors
            )
        return (*found, *(None,) * (len(ctx.needs_input_grad) - 3))

    @staticmethod
    def _of_each(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        hidden, dense, bias, labels, *tensors = ctx.saved_tensors
        weight = dense if dense is not None else Weight(*tensors, *ctx.layout)
        gradients = _Gradients(hidden, weight, bias, tuple(ctx.needs_input_grad[:3]))
        for rows in _chunks(labels, ctx.options):
            chunk = _Chunk(hidden[rows], weight, bias, labels[rows], ctx.options)
            gradients.add(rows, chunk, from_above[rows, None])
            del chunk
        return gradients.finished()


def _chunks(labels: Tensor, options: _Options) -> Iterator[slice]:
    """Slices of rows whose logits fill the memory allowed."""
    copies = 1 if options.softcap is None else 2
    step = _CHUNK_BYTES // (options.logit_bytes * copies * options.vocabulary)
    step = max(step // 16 * 16, min(step, 16), 1)  # whole tiles of a matmul
    return (slice(begin, begin + step) for begin in range(0, len(labels), step))


class _Chunk:
    """Some rows' losses, and what is left of their logits for a gradient."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | Weight,
        bias: Tensor | None,
        labels: Tensor,
        options: _Options,
    ) -> None:
        self.hidden, self.options = hidden, options
        z = _logits(hidden, weight, bias, options)
        if options.scale != 1:
            z.mul_(options.scale)
        self.slope = None
        if options.softcap is not None:
            z.div_(options.softcap).tanh_()
            self.slope = z.square().neg_().add_(1)
            z.mul_(options.softcap)
        self.counted = (labels != options.ignore_index)[:, None]
        self.target = labels[:, None].where(self.counted, 0)
        of_target = z.gather(1, self.target)
        top = _largest(z)
        self.exponentials = z.sub_(top).exp_()
        self.total = z.sum(1, keepdim=True)
        losses = self.total.log() + (top - of_target)
        self.losses = losses.where(self.counted, 0).squeeze(1)

    def logit_gradient(self, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the head's logits; what each row is to be multiplied by, and the one from above.

        Uses up the exponentials: softmax minus one at the target. What comes from above to a row
        that is ignored, be it NaN, does not count.
        """
        z = self.exponentials.scatter_add_(1, self.target, -self.total)
        if self.slope is not None:
            z.mul_(self.slope)
        of_row = self.options.scale * self.counted / self.total
        return z, of_row, None if factor is None else factor.where(self.counted, 0)


class _Gradients:
    """Gradients that are filled chunk by chunk; those that are not needed are None."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | Weight,
        bias: Tensor | None,
        needed: tuple[bool, ...],
    ) -> None:
        self.weight = weight
        self.dtype = hidden.dtype
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # Sums over many rows: rounded once, at the end.
        self.dense = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None  # type: ignore[arg-type]
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None  # type: ignore[arg-type]

    def add(self, rows: slice, chunk: _Chunk, factor: Tensor | None) -> None:
        """The chunk's part; ``factor`` ``[rows, 1]`` comes from above."""
        z, of_row, factor = chunk.logit_gradient(factor)
        # After the product there are fewer columns, but 16 bits may be too narrow for it before.
        # What comes from above is often small, and would leave nothing of small numbers in 16 bits.
        late = self.dtype == torch.float32 and self.dense is None and self.bias is None
        if late:
            of_row = of_row if factor is None else of_row * factor
        else:
            z.mul_(of_row)
        if self.hidden is not None:
            part = _input_gradient(z, self.weight, chunk.hidden, chunk.options)
            by = of_row if late else factor
            self.hidden[rows] = part if by is None else part * by
        if factor is not None and not late:
            z.mul_(factor)
        if self.dense is not None:
            self.dense.addmm_(z.t(), chunk.hidden.float())
        if self.bias is not None:
            self.bias += z.sum(0)

    def finished(self, wide: bool = False) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, in their dtype; ``wide`` leaves the sums in float32."""
        if wide:
            return self.hidden, self.dense, self.bias
        dense, bias = (
            None if g is None else as_dtype(g, self.dtype) for g in (self.dense, self.bias)
        )
        return self.hidden, dense, bias


def _by_columns(hidden: Tensor, weight: Any) -> bool:
    """Whether a dense product is computed in float32, some columns of logits at a time.

    On a CPU that is faster for few rows than ``hidden @ weight.T``, whose large factor a library
    packs first, and than a product in 16 bits that is emulated.
    """
    if not hidden.is_cpu or not isinstance(weight, Tensor) or torch.compiler.is_compiling():
        return False
    return hidden.dtype == torch.float32 or not has_cpu_matmul(hidden.dtype)


def _logits(
    hidden: Tensor, weight: Tensor | Weight, bias: Tensor | None, options: _Options
) -> Tensor:
    """Of the head, in float32, in memory of their own."""
    if isinstance(weight, Weight):
        arguments = options.vocabulary, bias, options.batch_invariant
        y: Tensor = call("linear_4bit", hidden, weight, *arguments)
    elif _by_columns(hidden, weight):
        by_columns = hidden.new_empty(weight.shape[0], len(hidden), dtype=torch.float32)
        of_rows = hidden.float().t()
        for columns, part in float32_slices(weight):
            torch.mm(part, of_rows, out=by_columns[columns])
            if bias is not None:
                by_columns[columns] += bias[columns, None]
        y = by_columns.t()
    else:
        y = F.linear(hidden, weight, bias)
    return y.float()


def _largest(z: Tensor) -> Tensor:
    """Of each row, ``[rows, 1]``; NaN where one is."""
    if z.stride(0) == 1 < z.stride(1) and z.shape[1] > _COLUMNS:
        # Column by column torch takes a maximum without vectors, but between tensors with.
        first, *others = z.split(_COLUMNS, 1)
        found = first.clone()
        for part in others:
            into = found[:, : part.shape[1]]
            torch.maximum(into, part, out=into)
        z = found
    return z.amax(1, keepdim=True)


_COLUMNS = 1024
"""Few enough for a cache to hold, many enough to be worth a call."""


def _input_gradient(
    z: Tensor, weight: Tensor | Weight, hidden: Tensor, options: _Options
) -> Tensor:
    """``z @ W``, of ``z`` in float32."""
    if isinstance(weight, Weight):
        dy, arguments = as_dtype(z, hidden.dtype), (hidden.shape[1], options.batch_invariant)
        found: Tensor = call("linear_4bit_dx", dy, weight, *arguments)
        return found
    if hidden.dtype != torch.float32 and _by_columns(hidden, weight):
        return widened_linear_dx(z, weight)
    return as_dtype(z, hidden.dtype) @ weight
