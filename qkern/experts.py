"""Experts in 4 bits: several weights of one shape, and the matmul of rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout

from qkern import _bnb_experts, _errors
from qkern.backends import num_threads
from qkern.functional import (
    any_autocast,
    autocast,
    autocast_enabled,
    batch_invariant_now,
    check_memory_now,
    is_recorded,
    quantize_4bit,
)
from qkern.grouped import (
    LoRAGroupedLinear4bit,
    differentiable_product,
    lora_product,
    recorded_grouped_linear_4bit,
)
from qkern.ops import call, forward_derivatives, undispatched
from qkern.reference import groups
from qkern.tensor import QuantizedTensor, Stored
from qkern.weight import Weight


class QuantizedExperts(Stored):
    """The weights of E experts in 4 bits, each quantised alone; `quantize_experts` makes them.

    Immutable. The fields are those of :class:`QuantizedTensor` with a dimension more, the first:

    ``packed``
        uint8 ``[E, ceil(n / 2)]``, with ``n`` elements an expert.
    ``absmax``
        float32 ``[E, blocks]``, or uint8 codes when double-quantised. No block has elements of two
        experts.
    ``nested_absmax``, ``nested_offset``
        float32 ``[E, ceil(blocks / 256)]`` and float32 ``[E]``; None unless double-quantised.
    ``codebook``
        float32 ``[16]`` of all for the format ``"custom"``, otherwise None.
    ``format``, ``block_size``, ``dtype``
        as in :class:`QuantizedTensor`.
    ``shape``
        ``[E, out_features, in_features]``.

    ``len(qw)`` is E, ``qw[e]`` the :class:`QuantizedTensor` of one expert in the same memory.
    Raises ``TypeError`` or ``ValueError`` when the parts do not fit one another.
    """

    _product: ClassVar[str] = "grouped_linear_4bit"
    _others: ClassVar[str] = ", offsets"

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(
                f"shape: got {list(self.shape)}; takes [experts, out_features, in_features]"
            )
        super().__post_init__()

    def _lead(self) -> tuple[int, ...]:
        return (self.shape[0],)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> QuantizedTensor:
        """One expert's weight ``[out_features, in_features]``, in the same memory."""
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert: got {expert}; takes one of {len(self)}")
        fields: list[Any] = [None if field is None else field[expert] for field in self.weight[:4]]
        fields += [self.codebook, self.format, self.block_size, self.shape[1:], self.dtype]
        return QuantizedTensor(*fields)

    def __iter__(self) -> Iterator[QuantizedTensor]:
        return (self[expert] for expert in range(len(self)))

    @classmethod
    def stack(cls, experts: Sequence[QuantizedTensor]) -> QuantizedExperts:
        """Copies of one or more weights of one shape, format, block size, dtype and device.

        Raises ``ValueError`` where they differ, or are of other dimensions than two.
        """
        if not experts:
            raise ValueError("experts: got none; takes one or more")
        first = experts[0]
        for index, other in enumerate(experts):
            for name in ("shape", "format", "block_size", "double_quant", "dtype", "device"):
                got, takes = getattr(other, name), getattr(first, name)
                if got != takes:
                    raise ValueError(
                        f"experts: got {name} {got} of expert {index}; takes {takes}, expert 0's"
                    )
            if other.codebook is not first.codebook and not _same(other.codebook, first.codebook):
                raise ValueError(f"experts: got another codebook of expert {index} than expert 0's")
        fields: list[Any] = [
            None if parts[0] is None else torch.stack(parts)
            for parts in zip(*(expert.weight[:4] for expert in experts), strict=True)
        ]
        fields += first.codebook, first.format, first.block_size
        fields += (len(experts), *first.shape), first.dtype
        return cls(*fields)

    def to_bnb(self, names: Sequence[str | Sequence[str]]) -> dict[str, Tensor]:
        """The tensors that bitsandbytes keeps of experts that are layers of their own, by name.

        ``names`` has for each expert the name of its weight, as ``"experts.0.w2.weight"``, or the
        names of several that are as many of its rows each, as those of gate and up. Of each weight
        the tensors are those of :meth:`QuantizedTensor.to_bnb`; several of one expert have their
        scales in float32, with the values that they have here.

        Raises ``ValueError`` for another number of experts, where rows cannot be cut into so many
        weights of whole blocks, and what :meth:`QuantizedTensor.to_bnb` raises.
        """
        return _bnb_experts.to_bnb(list(self), names)

    @classmethod
    def from_bnb(
        cls, tensors: Mapping[str, Tensor], names: Sequence[str | Sequence[str]]
    ) -> QuantizedExperts:
        """The experts of a state dict that bitsandbytes wrote, or :meth:`to_bnb`; copies.

        ``names`` as there. Raises ``ValueError`` where weights do not fit one another, and what
        :meth:`QuantizedTensor.from_bnb` raises.
        """
        return cls.stack(_bnb_experts.from_bnb(tensors, names))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a dense ``[E, out_features, in_features]``, by default in ``self.dtype``.

        Raises ``TypeError`` for a dtype that is not float32, bfloat16 or float16.
        """
        if dtype is None:
            dtype = self.dtype
        _errors.check_float_dtype("dtype", dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for expert, part in zip(self, out, strict=True):
            expert.dequantize(out=part)
        return out


# torch.load by default refuses classes it does not know; this one only holds tensors.
torch.serialization.add_safe_globals([QuantizedExperts])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def quantize_experts(
    w: Tensor | Sequence[Tensor], *args: Any, transposed: bool = False, **options: Any
) -> QuantizedExperts:
    """Quantise the weights of experts to 4 bits, each by itself.

    ``w``
        float32, bfloat16 or float16 ``[E, out_features, in_features]``, or a sequence of E matrices
        of one shape, dtype and device. One expert is worked on at a time.
    ``transposed``
        the matrices are ``[in_features, out_features]``, as Llama 4 and gpt-oss keep them.

    The other arguments are those of :func:`quantize_4bit`. Raises what it raises, of a matrix
    naming the expert, ``ValueError`` for no experts or other dimensions, and ``TypeError`` for
    another ``w``.
    """
    if isinstance(w, Tensor):
        _errors.check_float_tensor("w", w)
        if w.dim() != 3:
            raise ValueError(f"w: got shape {list(w.shape)}; takes three dimensions, experts first")
        check_memory_now("w", w)
    if not hasattr(w, "__len__"):
        raise TypeError(f"w: got {_errors.type_name(w)}; takes a tensor or a sequence of them")
    if len(w) == 0:
        raise ValueError("w: got no experts; takes one or more")
    return quantize_each(w, len(w), *args, transposed=transposed, **options)


def quantize_each(
    matrices: Iterable[Tensor], count: int, *args: Any, transposed: bool = False, **options: Any
) -> QuantizedExperts:
    """`quantize_experts` of so many matrices, each asked for when the one before is done."""
    fields: list[Any] = []
    for index, matrix in enumerate(matrices):
        try:
            _errors.check_float_tensor("w", matrix)
            if matrix.dim() != 2:
                raise ValueError(f"w: got shape {list(matrix.shape)}; takes two dimensions")
            one = quantize_4bit(matrix.mT if transposed else matrix, *args, **options)
            if not fields:
                first = one
                fields = [
                    None if field is None else field.new_empty(count, *field.shape)
                    for field in one.weight[:4]
                ]
            if (one.shape, one.dtype, one.device) != (first.shape, first.dtype, first.device):
                got, takes = (f"{list(q.shape)} {q.dtype} on {q.device}" for q in (one, first))
                raise ValueError(f"w: got {got}; takes {takes}, expert 0's")
        except (TypeError, ValueError) as error:
            if not str(error).startswith("w: "):  # of an argument for all
                raise
            raise type(error)(f"expert {index}: {error}") from error
        for whole, field in zip(fields, one.weight[:4], strict=True):
            if field is not None:
                whole[index] = field
    fields += first.codebook, first.format, first.block_size
    fields += (count, *first.shape), first.dtype
    return QuantizedExperts(*fields)


def grouped_linear_4bit(
    x: Tensor,
    qw: QuantizedExperts,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    check_offsets: bool = False,
) -> Tensor:
    """``x @ W.T + bias`` with the weight and bias of each row's expert, used in 4 bits.

    ``x``
        float32, bfloat16 or float16 ``[rows, in_features]``, sorted by expert.
    ``qw``
        quantised ``[E, out_features, in_features]``, on ``x``'s device. It gets no gradient.
    ``offsets``
        int32 or int64 ``[E]`` on that device: expert ``e`` has the rows up to ``offsets[e]`` from
        where those of the expert before end, as torch's ``grouped_mm`` takes them. An expert may
        have none. Rows after the last expert's are of none: they give zeros and get no gradient.
    ``bias``
        ``[E, out_features]`` of ``x``'s dtype, or None.
    ``check_offsets``
        read the offsets, which waits for a GPU, and raise where they do not ascend from 0 to
        ``rows``. On a CPU they are always checked. Elsewhere, unchecked, such rows are of another
        expert or of none.

    Returns ``[rows, out_features]`` of ``x``'s dtype; sums are in float32 and rounded once. Only
    experts with rows are read. Under autocast ``x`` and ``bias`` are cast to its dtype. In a block
    of :func:`batch_invariant` an expert's rows have the bits of :func:`linear_4bit`. Raises
    ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape, device or offsets.
    """
    if not isinstance(qw, QuantizedExperts):
        raise TypeError(f"qw: got {_errors.type_name(qw)}; takes a QuantizedExperts")
    return grouped_linear_by_weight(x, qw.weight, qw.shape, offsets, bias, check_offsets)


def grouped_linear_by_weight(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None = None,
    check_offsets: bool = False,
) -> Tensor:
    """`grouped_linear_4bit` by a weight of ``shape`` as the ops take it."""
    invariant = batch_invariant_now()
    if not check_offsets:
        y = _by_kernel_alone(x, weight, shape, offsets, bias, invariant)
        if y is not None:
            return y
    x, bias = checked_input(x, weight, shape, bias)
    check_grouping(x, shape[0], offsets, check_offsets)
    if is_recorded(x, bias):
        return recorded_grouped_linear_4bit(x, bias, offsets, shape[1], invariant, *weight)
    return call("grouped_linear_4bit", x, weight, shape[1], offsets, bias, invariant)


def _by_kernel_alone(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
    batch_invariant: bool | None,
) -> Tensor | None:
    """The product by the kernel alone, which checks all arguments, where nothing is recorded.

    None if a tracer must see the op or an argument is unusual.
    """
    backend = undispatched(x)
    if backend is None or any_autocast():
        return None
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (x, bias)):
        return None
    kernel = backend.fast.get("grouped_linear_4bit")
    if kernel is None or len(shape) != 3:
        return None
    rest = batch_invariant, num_threads(), shape[2]
    found: Tensor | None = kernel(x, weight, shape[1], offsets, bias, *rest)
    return found


def grouped_lora_linear(
    x: Tensor,
    qw: QuantizedExperts,
    offsets: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    check_offsets: bool = False,
) -> Tensor:
    """`grouped_linear_4bit` plus ``scaling * dropout(x) @ A.T @ B.T`` of each row's expert.

    ``x``, ``qw``, ``offsets``, ``bias``, ``check_offsets``
        as for ``grouped_linear_4bit``.
    ``lora_a``, ``lora_b``
        adapters ``[E, r, in_features]`` and ``[E, out_features, r]``, or one for all experts,
        ``[r, in_features]`` and ``[out_features, r]``; float32, bfloat16 or float16. They are
        computed in float32 on a CPU, and gradients come back in their own dtype.
    ``dropout_p``
        probability to drop an element of the adapter's input: pass 0.0 when not training.

    Gradients reach ``x``, ``lora_a``, ``lora_b`` and ``bias``. Beyond tensors that exist anyway,
    backward keeps only ``x @ A.T`` (and the dropped-out ``x`` with dropout). Rows of no expert give
    zeros. Raises as ``grouped_linear_4bit`` does.
    """
    if not isinstance(qw, QuantizedExperts):
        raise TypeError(f"qw: got {_errors.type_name(qw)}; takes a QuantizedExperts")
    adapter = lora_a, lora_b, scaling
    rest = bias, dropout_p, check_offsets
    return grouped_lora_by_weight(x, qw.weight, qw.shape, offsets, *adapter, *rest)


def grouped_lora_by_weight(
    x: Tensor,
    weight: Weight,
    shape: Sequence[int],
    offsets: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    check_offsets: bool = False,
) -> Tensor:
    """`grouped_lora_linear` by a weight of ``shape`` as the ops take it."""
    x, bias = checked_input(x, weight, shape, bias)
    experts, out_features, in_features = shape
    check_memory_now("x", x)
    check_grouping(x, experts, offsets, check_offsets)
    _check_adapter("lora_a", lora_a, x, experts, (None, in_features))
    _check_adapter("lora_b", lora_b, x, experts, (out_features, lora_a.shape[-2]))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; takes a probability from 0 to below 1")
    lora_a, lora_b = (
        t.float() if t.dim() == 3 else t.float()[None].expand(experts, -1, -1)
        for t in (lora_a, lora_b)
    )
    invariant = batch_invariant_now()
    adapter_input = dropout(x, dropout_p) if dropout_p else None
    if forward_derivatives():
        # Separately: the function of both has no tangents.
        y = recorded_grouped_linear_4bit(x, bias, offsets, out_features, invariant, *weight)
        kept = x if adapter_input is None else adapter_input
        hidden = differentiable_product(kept, lora_a.mT, offsets)
        return y + differentiable_product(hidden, lora_b.mT, offsets, scaling).to(y.dtype)
    rest = bias, offsets, out_features, scaling, invariant
    if torch.is_grad_enabled():
        factors = adapter_input, lora_a, lora_b
        return LoRAGroupedLinear4bit.apply(x, *factors, *rest, *weight)
    kept = x if adapter_input is None else adapter_input
    return lora_product(x, kept, lora_a, lora_b, *rest, weight)[0]


def _check_adapter(
    name: str, value: Any, x: Tensor, experts: int, takes: tuple[int | None, int]
) -> None:
    """Raise unless ``value`` has the two sizes (None is any), for each expert or for all."""
    _errors.check_float_tensor(name, value)
    rows, columns = takes
    shape = list(value.shape)
    if (
        shape[:-2] not in ([], [experts])
        or shape[-1:] != [columns]
        or (rows is not None and shape[-2:-1] != [rows])
        or len(shape) < 2
    ):
        one = f"{'r' if rows is None else rows}, {columns}"
        raise ValueError(f"{name}: got shape {shape}; takes [{experts}, {one}], or [{one}] for all")
    _errors.check_device(name, value, x.device, "x")
    check_memory_now(name, value)


def checked_input(
    x: Tensor, weight: Weight, shape: Sequence[int], bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``bias``, checked against the weight, in the autocast dtype if there is one."""
    _errors.check_tensor("x", x)
    if autocast_enabled(x):
        x, bias = autocast(x, bias)
    _errors.check_float_tensor("x", x)
    _errors.check_device("x", x, weight.device, "qw")
    if x.dim() != 2 or x.shape[1] != shape[2]:
        raise ValueError(
            f"x: got shape {list(x.shape)}; takes [rows, {shape[2]}] for qw of shape {list(shape)}"
        )
    if bias is not None:
        _errors.check_tensor("bias", bias)
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: got {bias.dtype}; takes {x.dtype}, x's dtype")
        if bias.shape != torch.Size(shape[:2]):
            raise ValueError(f"bias: got shape {list(bias.shape)}; takes {list(shape[:2])}")
        _errors.check_device("bias", bias, x.device, "x")
    return x, bias


def check_grouping(x: Tensor, experts: int, offsets: Any, read: bool) -> None:
    """Raise unless ``offsets`` is of so many experts and beside ``x``; ``read`` looks into it."""
    _errors.check_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: got {offsets.dtype}; takes torch.int32 or torch.int64")
    if offsets.shape != (experts,):
        raise ValueError(
            f"offsets: got shape {list(offsets.shape)}; takes [{experts}], an end for each expert"
        )
    _errors.check_device("offsets", offsets, x.device, "x")
    if read and not offsets.is_meta:
        groups(offsets, len(x))
