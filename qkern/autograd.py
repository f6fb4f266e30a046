"""Gradients of the 4-bit matmul with respect to its input and bias.

The weight is frozen: it gets no gradient, and only its existing packed tensors are saved. Neither
the dense weight nor the input is kept. The map is linear in ``x``, so the backward of the backward
is the forward op again, and gradients of any order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, pad

from qkern._errors import FLOAT_DTYPES
from qkern.backends import forced, holding
from qkern.ops import call, forward_derivatives, is_traced
from qkern.weight import Weight

_linear_4bit = torch.ops.qkern.linear_4bit.default


class Linear4bit(Function):
    """``x @ W.T + bias`` by the op ``linear_4bit``.

    The fields of the weight come last, one by one: torch.compile wants tensors as arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        out_features: int,
        batch_invariant: bool | None,
        *weight: Any,
    ) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        _save(ctx, x, weight, batch_invariant)
        return _linear_4bit(x, *weight, out_features, bias, batch_invariant)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``bias``, where needed."""
        return *_gradients(ctx, dy), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * (2 + len(Weight._fields))
"""Of the weight's fields and the two arguments before them."""


class KnownLinear4bit(Function):
    """`Linear4bit` whose result is already computed; few arguments, because each one slows apply.

    ``weight`` and ``product``, the result, are in tuples, where autograd does not look for tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Weight,
        batch_invariant: bool | None,
        product: tuple[Tensor],
    ) -> Tensor:
        """Return the result; save the packed weight when a gradient will need it."""
        _save(ctx, x, weight, batch_invariant)
        return product[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``bias``, where needed."""
        return *_gradients(ctx, dy), None, None, None


# Function.apply first looks for functorch's wrappers among the arguments, which takes longer than
# a small matmul. Where a kernel has read the arguments there is none.
record_known_linear_4bit = super(Function, KnownLinear4bit).apply


def _save(ctx: Any, x: Tensor, weight: Sequence[Any], batch_invariant: bool | None) -> None:
    """What the gradient of ``x`` needs, if it is needed; ``x`` itself is not."""
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*weight[:5])
        ctx.layout = weight[5:]
        ctx.static = (x.shape[-1], batch_invariant)
        ctx.forced = forced()  # backward may run elsewhere: in autograd's threads, out of the block


def _saved_weight(ctx: Any, tensors: Sequence[Any]) -> Weight:
    return Weight(*tensors, *ctx.layout)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of the first two inputs, ``x`` and ``bias``."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(ctx, dy, ctx.saved_tensors)
    if ctx.needs_input_grad[1]:
        # Of no dimensions at all, sum() would take every one.
        dbias = dy.sum(tuple(range(dy.dim() - 1))) if dy.dim() > 1 else dy
    return dx, dbias


def _input_gradient(ctx: Any, dy: Tensor, tensors: Sequence[Any]) -> Tensor:
    weight = _saved_weight(ctx, tensors)
    in_features, batch_invariant = ctx.static
    if ctx.forced is None:  # a block costs as much as the kernel
        return _linear_4bit_dx(dy, weight, in_features, batch_invariant)
    with holding(ctx.forced):
        return _linear_4bit_dx(dy, weight, in_features, batch_invariant)


def _linear_4bit_dx(
    dy: Tensor, weight: Weight, in_features: int, batch_invariant: bool | None
) -> Tensor:
    if is_differentiated():
        return recorded_linear_4bit_dx(dy, in_features, batch_invariant, *weight)
    return call("linear_4bit_dx", dy, weight, in_features, batch_invariant)


def is_differentiated() -> bool:
    """Whether gradients are differentiated in turn: grad mode is on under create_graph=True."""
    return torch.is_grad_enabled() or forward_derivatives()


class Linear4bitDx(Function):
    """``dy @ W`` by the op ``linear_4bit_dx``, with the weight's fields last."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, in_features: int, batch_invariant: bool | None, *weight: Any
    ) -> Tensor:
        """Run the op; save the packed weight when a gradient will need it."""
        _save(ctx, dy, weight, batch_invariant)
        return call("linear_4bit_dx", dy, Weight(*weight), in_features, batch_invariant)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``dy``, where needed."""
        ddy = None
        if ctx.needs_input_grad[0]:
            weight = _saved_weight(ctx, ctx.saved_tensors)
            out_features, batch_invariant = ctx.static
            with holding(ctx.forced):
                if is_differentiated():
                    ddy = recorded_linear_4bit(ddx, None, out_features, batch_invariant, *weight)
                else:
                    ddy = call("linear_4bit", ddx, weight, out_features, None, batch_invariant)
        return ddy, *_NO_GRADIENTS


# With tangents, in classes of their own: torch.compile takes no Function that has a jvp.


def _save_for_tangents(ctx: Any, others: Sequence[Any]) -> None:
    """The two arguments before the weight, and its fields."""
    ctx.save_for_forward(*others[2:7])
    ctx.of_tangents = others[:2], others[7:]


class Linear4bitOfDuals(Linear4bit):
    """`Linear4bit` with forward-mode derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        """Run the op; save the packed weight."""
        _save_for_tangents(ctx, others)
        return Linear4bit.forward(ctx, x, bias, *others)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        """The same map of the tangents of ``x`` and ``bias``."""
        static, layout = ctx.of_tangents
        return Linear4bitOfDuals.apply(x, bias, *static, *ctx.saved_tensors, *layout)


class Linear4bitDxOfDuals(Linear4bitDx):
    """`Linear4bitDx` with forward-mode derivatives."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *others: Any) -> Tensor:
        """Run the op; save the packed weight."""
        _save_for_tangents(ctx, others)
        return Linear4bitDx.forward(ctx, dy, *others)

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, *others: Any) -> Tensor:
        """The same map of the tangent of ``dy``."""
        static, layout = ctx.of_tangents
        return Linear4bitDxOfDuals.apply(dy, *static, *ctx.saved_tensors, *layout)


def recorded_linear_4bit(*args: Any) -> Tensor:
    """The op ``linear_4bit`` with derivatives; arguments as of `Linear4bit`."""
    return (Linear4bitOfDuals if forward_derivatives() else Linear4bit).apply(*args)


def recorded_linear_4bit_dx(*args: Any) -> Tensor:
    """The op ``linear_4bit_dx`` with derivatives; arguments as of `Linear4bitDx`."""
    return (Linear4bitDxOfDuals if forward_derivatives() else Linear4bitDx).apply(*args)


class LoRALinear4bit(Function):
    """``x @ W.T + bias + scaling * h @ lora_b.T`` with ``h = adapter_input @ lora_a.T``.

    One Function for base and adapter, so that both add to one result and, in backward, to one
    gradient of ``x``. Matrices ``x`` and ``adapter_input`` of ``[rows, in_features]``, of one
    dtype; ``adapter_input`` None stands for ``x`` (no dropout). The adapter is computed in the
    dtype of ``lora_a`` and ``lora_b``, which is ``x``'s or a wider one. ``product`` is the base's
    result in a tuple where it is already computed, then of any shape, or None. The other arguments
    are those of `Linear4bit`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        adapter_input: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        product: tuple[Tensor] | None,
        bias: Tensor | None,
        out_features: int,
        batch_invariant: bool | None,
        *weight: Any,
    ) -> Tensor:
        """Run the op and add the adapter; save the adapter's input, ``h``, A, B and the weight."""
        kept = x if adapter_input is None else adapter_input
        adapter = kept, lora_a, lora_b, scaling
        y, hidden = lora_product(x, *adapter, product, bias, out_features, batch_invariant, weight)
        trained = any(ctx.needs_input_grad[2:4])  # a frozen adapter keeps no activation
        ctx.save_for_backward(
            *((kept, hidden) if trained else (None, None)), lora_a, lora_b, *weight[:5]
        )
        ctx.layout = weight[5:]
        ctx.static = (x.shape[-1], batch_invariant)
        ctx.forced = forced()
        ctx.scaling, ctx.shared_input = scaling, adapter_input is None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``adapter_input``, ``lora_a``, ``lora_b`` and ``bias``."""
        # Autocast may be on here alone, and would mix dtypes.
        with no_autocast(dy.device.type), held(ctx.forced):
            return LoRALinear4bit._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = as_matrix(dy)
        kept, hidden, lora_a, lora_b, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        dbias = dy.sum(0) if ctx.needs_input_grad[6] else None
        if not any(needs):
            return (None,) * 6 + (dbias, *_NO_GRADIENTS)
        weight, (in_features, batch_invariant) = _saved_weight(ctx, tensors), ctx.static
        factors = (kept, hidden, lora_a, lora_b, ctx.scaling, batch_invariant)

        def added_to_dx(dhidden: Tensor, own: bool) -> Tensor:
            if own:
                term = dhidden, lora_a, 1.0
                return call("linear_4bit_dx_add", dy, weight, in_features, *term, batch_invariant)
            dx = _linear_4bit_dx(dy, weight, in_features, batch_invariant)
            if is_differentiated():
                return dx + matmul(dhidden, lora_a, batch_invariant).to(dy.dtype)
            return _add_product(dx, dhidden, lora_a, 1.0, batch_invariant, own)

        if needs[0] and ctx.shared_input:
            dx, da, db = _adapter_gradients(dy, *factors, needs[1:], added_to_dx)
            return dx, None, da, db, None, None, dbias, *_NO_GRADIENTS
        dx = _linear_4bit_dx(dy, weight, in_features, batch_invariant) if needs[0] else None
        dinput, da, db = _adapter_gradients(dy, *factors, needs[1:])
        return dx, dinput, da, db, None, None, dbias, *_NO_GRADIENTS


class AddAdapter(Function):
    """``y + scaling * x @ lora_a.T @ lora_b.T`` of matrices, as `LoRALinear4bit` adds it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        batch_invariant: bool | None,
    ) -> Tensor:
        """Add to a copy; save ``x``, ``x @ lora_a.T``, A and B."""
        total = y.clone(memory_format=torch.contiguous_format)
        with no_autocast(y.device.type):  # as the backward, which needs the dtype of the factors
            hidden = add_adapter(total, x, lora_a, lora_b, scaling, batch_invariant)
        trained = any(ctx.needs_input_grad[2:4])  # a frozen adapter keeps no activation
        ctx.save_for_backward(*((x, hidden) if trained else (None, None)), lora_a, lora_b)
        ctx.forced = forced()
        ctx.scaling, ctx.batch_invariant = scaling, batch_invariant
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``y``, ``x``, ``lora_a`` and ``lora_b``."""
        kept, hidden, lora_a, lora_b = ctx.saved_tensors
        factors = kept, hidden, lora_a, lora_b, ctx.scaling, ctx.batch_invariant
        with no_autocast(dy.device.type), held(ctx.forced):
            gradients = _adapter_gradients(dy, *factors, ctx.needs_input_grad[1:4])
        return dy, *gradients, None, None


def _adapter_gradients(
    dy: Tensor,
    kept: Tensor,
    hidden: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    batch_invariant: bool | None,
    needs: Sequence[bool],
    add: Callable[[Tensor, bool], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the adapter's input ``kept``, of A and of B, those that ``needs`` names.

    ``hidden`` is ``kept @ lora_a.T``. Where ``add`` is given, it makes the first, from the gradient
    of ``hidden`` and what `has_own_product` says.
    """
    needs_input, needs_a, needs_b = needs
    graph = is_differentiated()
    dtype = lora_a.dtype
    dinput = da = db = None
    own = not graph and has_own_product(dy, lora_a, batch_invariant)
    wide_dy = dy
    if not own:  # torch multiplies in one dtype
        wide_dy = dy.to(dtype)
        kept = kept.to(dtype) if needs_a or (needs_b and graph) else kept
    if needs_b:
        if graph:
            hidden = kept @ lora_a.t()  # the saved one is no function of its factors
        # The transpose of dy.T @ hidden: a product with few rows is faster than a narrow one.
        db = _product(hidden.t(), wide_dy, own, scaling).t().contiguous()
    if needs_input or needs_a or add is not None:
        dhidden = _product(wide_dy, lora_b, own, scaling, batch_invariant)
        if needs_a:
            da = _product(dhidden.t(), kept, own)
        if add is not None:
            dinput = add(dhidden, own)
        elif needs_input:
            dinput = _product(dhidden, lora_a, own, by_rows=batch_invariant).to(dy.dtype)
    return dinput, da, db


def held(choice: Any) -> AbstractContextManager[Any]:
    """The backend of a forward, ``choice``, in force again; None is no choice."""
    return nullcontext() if choice is None else holding(choice)


def lora_product(
    x: Tensor,
    adapter_input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    product: tuple[Tensor] | None,
    bias: Tensor | None,
    out_features: int,
    batch_invariant: bool | None,
    weight: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """What `LoRALinear4bit` computes, and ``adapter_input @ lora_a.T``."""
    if product is None and has_own_product(x, lora_a, batch_invariant):
        hidden = _product(adapter_input, lora_a.mT, True)
        base = x, Weight(*weight), out_features, bias
        term = hidden, lora_b.mT, scaling
        return call("linear_4bit_add", *base, *term, batch_invariant), hidden
    if product is None:
        y = _linear_4bit(x, *weight, out_features, bias, batch_invariant)
    else:
        y = product[0]
    return y, add_adapter(y, adapter_input, lora_a, lora_b, scaling, batch_invariant)


def add_adapter(
    y: Tensor,
    adapter_input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    batch_invariant: bool | None,
) -> Tensor:
    """Add the adapter's part to ``y``, in place; return ``adapter_input @ lora_a.T``."""
    y = as_matrix(y)
    own = has_own_product(y, lora_a, batch_invariant)
    if own:
        hidden = _product(adapter_input, lora_a.mT, own)
    else:
        wide = as_dtype(adapter_input, lora_a.dtype)
        # For a plain product, linear() takes fewer steps.
        hidden = matmul(wide, lora_a.mT, True) if batch_invariant else linear(wide, lora_a)
    _add_product(y, hidden, lora_b.mT, scaling, batch_invariant, own)
    return hidden


_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
_OWN_PRODUCT_ROWS = 16  # with fewer, a call takes as long as the product


def may_have_own_product(x: Any, batch_invariant: bool | None) -> bool:
    """Whether `has_own_product` may be true of ``x``, before anything is checked."""
    return (
        not is_traced()  # before the rows, on which a compiled graph would depend
        and isinstance(x, Tensor)
        and x.is_cpu
        and x.dim() > 0
        and (batch_invariant or x.shape[:-1].numel() >= _OWN_PRODUCT_ROWS)
    )


def has_own_product(y: Tensor, lora_a: Tensor, batch_invariant: bool | None) -> bool:
    """Whether products of a matrix like ``y`` with an adapter's factors go by ``matmul_into``.

    A library's products on a CPU are slow where a matrix is narrow, and need one dtype.
    """
    return (
        lora_a.dtype is torch.float32
        and may_have_own_product(y, batch_invariant)
        and y.dtype in FLOAT_DTYPES
        and not _is_batched(y)  # by the vmap of torch.autograd.grad, which nothing else tells of
    )


def _product(
    a: Tensor, b: Tensor, own: bool, alpha: float = 1.0, by_rows: bool | None = None
) -> Tensor:
    """``alpha * a @ b``; ``own`` as `has_own_product` says, then in float32."""
    if not own:
        product = matmul(a, b, by_rows)
        return product if alpha == 1.0 else product * alpha
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    call("matmul_into", out, a, b, alpha, False)
    return out


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off for a device type; some, meta among them, have none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def as_matrix(y: Tensor) -> Tensor:
    """``y`` of one dimension or more as a matrix; as it is where it is one."""
    return y if y.dim() == 2 else y.flatten(0, -2) if y.dim() > 2 else y[None]


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, faster where it has the dtype."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


_SLICE_BYTES = 4 << 20  # of a dense weight in float32; a smaller slice's matmul is slower


class FrozenLinear(Function):
    """``x @ weight.T + bias`` in float32, rounded once to the 16-bit dtype of all three.

    The weight ``[out_features, in_features]`` is frozen and widened a slice of rows at a time;
    ``x`` is ``[rows, in_features]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply slice by slice; save the weight."""
        ctx.save_for_backward(weight)
        y = x.new_empty(x.shape[0], weight.shape[0])
        wide = x.float()
        for rows, part in float32_slices(weight):
            product = wide @ part.t()
            if bias is not None:
                product += bias[rows]
            y[:, rows] = product
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``bias``, where needed."""
        (weight,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = FrozenLinearDx.apply(dy, weight)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, None, dbias


class FrozenLinearDx(Function):
    """``dy @ weight``, as `FrozenLinear`."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: Tensor) -> Tensor:
        """Multiply slice by slice; save the weight."""
        ctx.save_for_backward(weight)
        return widened_linear_dx(dy, weight).to(dy.dtype)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``dy``: the map is linear, so it is the forward again."""
        (weight,) = ctx.saved_tensors
        return FrozenLinear.apply(ddx, weight, None) if ctx.needs_input_grad[0] else None, None


def widened_linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """``dy @ weight`` of a 16-bit weight, in float32."""
    dx = torch.zeros(dy.shape[0], weight.shape[1], dtype=torch.float32, device=dy.device)
    for rows, part in float32_slices(weight):
        dx.addmm_(dy[:, rows].float(), part)
    return dx


def float32_slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and those rows in float32.

    Of a 16-bit weight they are in one buffer that the next slice overwrites.
    """
    out_features, in_features = weight.shape
    step = max(_SLICE_BYTES // (4 * max(in_features, 1)), 1)
    shape = (min(step, out_features), in_features)
    buffer = None
    if weight.dtype is not torch.float32:
        buffer = weight.new_empty(shape, dtype=torch.float32)
    for begin in range(0, out_features, step):
        rows = slice(begin, min(begin + step, out_features))
        part = weight[rows]
        yield rows, part if buffer is None else buffer[: len(part)].copy_(part)


_ROWS = 32  # of a batch-invariant product's parts: enough to be worth a call of the library


def matmul(a: Tensor, b: Tensor, batch_invariant: bool | None) -> Tensor:
    """``a @ b``; batch-invariant, a row's bits do not depend on the rows that come with it.

    A library may choose its code by the number of rows and by the alignment of each row's address.
    So each part that it is given has the same number of rows, of whole cache lines each, in memory
    of its own: zeros are appended.
    """
    if not batch_invariant or torch.compiler.is_compiling() or not len(a):
        return a @ b
    columns, b = b.shape[1], _whole_lines(b, b.shape[0])
    return torch.cat([(part @ b)[:rows, :columns] for part, rows in _parts(a)])


_LINE = 32
"""Columns, of 16 bits, that are a cache line."""


def _whole_lines(tensor: Tensor, rows: int) -> Tensor:
    """A copy with zeros appended: columns to whole cache lines, rows likewise from ``rows`` on."""
    return pad(tensor, (0, -tensor.shape[1] % _LINE, 0, rows - len(tensor) + -rows % _LINE))


def _parts(a: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Copies of ``_ROWS`` rows each, and how many of them are ``a``'s."""
    for part in a.split(_ROWS):
        yield _whole_lines(part, _ROWS), len(part)


def _add_product(
    total: Tensor, a: Tensor, b: Tensor, alpha: float, batch_invariant: bool | None, own: bool
) -> Tensor:
    """``total += alpha * a @ b``, in place, rounded once; in one dtype, without a temporary.

    Batch-invariant as `matmul` is; ``own`` as `has_own_product` says.
    """
    if own:
        call("matmul_into", total, a, b, alpha, True)
        return total
    if a.dtype is not total.dtype:
        return total.add_(matmul(a, b, batch_invariant), alpha=alpha)
    if not batch_invariant or torch.compiler.is_compiling():
        return total.addmm_(a, b, alpha=alpha)
    columns, b = total.shape[1], _whole_lines(b, b.shape[0])
    for target, (sums, rows), (part, _) in zip(
        total.split(_ROWS), _parts(total), _parts(a), strict=True
    ):
        target.copy_(sums.addmm_(part, b, alpha=alpha)[:rows, :columns])
    return total
