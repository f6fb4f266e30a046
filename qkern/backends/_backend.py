"""What a backend is, and what all those with kernels do before a kernel starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkern import _errors, formats, reference
from qkern.backends import _args
from qkern.weight import Weight, tensors_of


class _Functions(dict[str, Callable[..., Any]]):
    """By op, the function that computes it."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, op: str) -> Callable[..., Any]:
        backend, base = self._backend, without_term(op)
        found = getattr(backend, op, None)
        if base != op and hasattr(backend, base) and not has_newest(type(backend), op, base):
            product = getattr(backend, base)
            if op.startswith("grouped_"):
                found = _composed_of_groups(product, self["grouped_matmul_into"])
            else:
                found = _composed(product)
        self[op] = found = found or _referred(op)
        return found


def without_term(op: str) -> str:
    """The matmul that an op adds a term to, or the op itself."""
    return op.removesuffix("_add")


def has_newest(kind: type[Backend], op: str, base: str) -> bool:
    """Whether no subclass on the way to ``kind``'s ``op`` has replaced its ``base``."""
    for each in kind.__mro__:
        if op in vars(each):
            return True
        if base in vars(each):
            return False
    return False


def _composed(product: Callable[..., Any]) -> Callable[..., Any]:
    """A matmul with a term by the matmul alone, whose result is rounded before."""

    def run(*args: Any) -> Tensor:
        *first, left, right, alpha, batch_invariant = args
        x, _, features, *_ = first
        _args.check_added(x, features, left, right, x.device)
        y: Tensor = product(*first, batch_invariant)
        return reference.plus_product(y.float(), left, right, alpha, batch_invariant).to(y.dtype)

    return run


def _composed_of_groups(
    product: Callable[..., Any], add: Callable[..., None]
) -> Callable[..., Any]:
    """The same of a matmul by experts; ``add`` is the backend's ``grouped_matmul_into``."""

    def run(*args: Any) -> Tensor:
        *first, left, right, alpha, batch_invariant = args
        x, _, features, offsets, *_ = first
        _args.check_grouped_added(x, features, offsets, left, right, x.device)
        y: Tensor = product(*first, batch_invariant)
        if y.numel() and left.shape[1]:
            add(y, left, right, offsets, alpha, True)
        return y

    return run


def _referred(op: str) -> Callable[..., Any]:
    """The reference's function for an op, with arguments that kernels would take, too."""
    check, function = getattr(_Checker("reference"), op), getattr(reference, op)
    names = tuple(inspect.signature(function).parameters)

    def run(*args: Any) -> Any:
        for name, value in zip(names, args, strict=False):
            for place, tensor in tensors_of(name, value):
                _args.check_memory(place, tensor)
        check(*args)
        return function(*args)

    return run


class Backend:
    """One implementation of the ops.

    Each method with an op's name computes that op, with the parameters of its schema in
    ``qkern.ops``; ``qkern.reference`` says what. What a backend lacks, the reference computes; a
    matmul with a term, ``linear_4bit_add`` for one, comes of the backend's own matmul, and is then
    rounded before the term is added, too.
    """

    fast: Mapping[str, Callable[..., Any]] = {}
    """By op, functions that read plain tensors themselves: see `qkern.ops.undispatched`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.table: Mapping[str, Callable[..., Any]] = _Functions(self)

    def has(self, op: str) -> bool:
        """Whether it computes the op itself."""
        return hasattr(self, op)

    def missing_reason(self) -> str | None:
        """Why it cannot run, or None."""
        return None

    def unfit_reason(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, although it can on others; or None."""
        return None

    def __repr__(self) -> str:
        return f"<backend {self.name}>"


class Reference(Backend):
    """Plain PyTorch on any device."""

    def has(self, op: str) -> bool:
        """Whether there is such an op."""
        return hasattr(reference, op)


class Elements:
    """A contiguous tensor as a kernel takes it where it asks for dtype and size, too."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Product(NamedTuple):
    """A checked 4-bit matmul: ``out = x W^T + bias``, or ``out = x W`` for the input gradient.

    With ``offsets`` it is one for each expert, by its rows of ``x`` and its part of ``weight`` and
    ``bias``; what the offsets are is not checked.
    """

    dx: bool
    """Whether it is the input gradient."""
    x: Tensor
    """A matrix of unit inner stride; keep it alive while its address is in use."""
    rows: int
    row_stride: int
    weight: Weight
    out_features: int
    in_features: int
    bias: Tensor | None
    out: Tensor
    batch_invariant: bool
    int8: bool = False
    """Whether both factors are taken to 8 bits."""
    added: tuple[Tensor, Tensor, float] | None = None
    """Float32 matrices ``[rows, r]``, of unit inner stride, and ``[r, features]`` whose product
    times a number is added."""
    offsets: Tensor | None = None
    """Of a product by experts, where the rows of each end: int32 or int64 ``[experts]``."""


class KernelBackend(Backend):
    """A backend with kernels, on tensors of one device.

    Its ops check their arguments, make the results and start a kernel, by `_launch` or `_multiply`.
    A kernel is given contiguous tensors, and never one without elements.
    """

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        """Start the kernel of an op with tensors of ``device``.

        Arguments are tensors, or None; `Elements`; a `Weight`; a format's name; numbers.
        """
        raise NotImplementedError

    def _multiply(self, product: Product) -> None:
        """Start a matmul."""
        raise NotImplementedError

    def _multiply_into(
        self, out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, alpha: float, accumulate: bool
    ) -> None:
        """Start dense products by experts, which have rows and terms."""
        raise NotImplementedError

    def _device_of(self, tensor: Tensor) -> torch.device:
        """Where the other tensors must be and the results will be."""
        return tensor.device

    def _check_offsets(self, offsets: Tensor, x: Tensor) -> None:
        """Raise for numbers that the kernels must not be given, if there are any; ``x`` has rows.

        To read them a GPU would wait, so its kernels take any.
        """

    def quantize_4bit(
        self, x: Tensor, format: str, block_size: int, codebook: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``qkern.reference.quantize_4bit``."""
        n = x.numel()
        device = self._device_of(x)
        blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
        _args.check_format(format, codebook, device)
        x = _args.float_input("x", x, device)
        packed = torch.empty(formats.packed_size(n), dtype=torch.uint8, device=device)
        absmax = torch.empty(blocks, dtype=torch.float32, device=device)
        if n:
            arguments = Elements(x), codebook, format, block_size, packed, absmax
            self._launch("quantize_4bit", device, *arguments)
        return packed, absmax

    def dequantize_4bit(self, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``qkern.reference.dequantize_4bit``."""
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device_of(weight.packed))
        self._dequantize_4bit(weight, out, given=False)
        return out

    def dequantize_4bit_out(self, weight: Weight, out: Tensor) -> None:
        """See ``qkern.reference.dequantize_4bit_out``."""
        self._dequantize_4bit(weight, out, given=True)

    def _dequantize_4bit(self, weight: Weight, out: Tensor, given: bool) -> None:
        n = out.numel()
        device = self._device_of(weight.packed)
        _args.check_weight(weight, n, device)
        _args.dtype_id("out", out.dtype)
        _args.check("out", out, out.dtype, n, device)
        if given:
            _errors.check_apart("out", out, weight.named_tensors())
        if n:
            self._launch("dequantize_4bit", device, weight, Elements(out))

    def quantize_8bit(self, x: Tensor, map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """See ``qkern.reference.quantize_8bit``."""
        n = x.numel()
        device = self._device_of(x)
        blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
        _args.check("map", map, torch.float32, 256, device)
        x = _args.float_input("x", x, device)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
        absmax = torch.empty(blocks, dtype=torch.float32, device=device)
        if n:
            self._launch("quantize_8bit", device, Elements(x), map, block_size, codes, absmax)
        return codes, absmax

    def dequantize_8bit(
        self, codes: Tensor, absmax: Tensor, map: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor:
        """See ``qkern.reference.dequantize_8bit``."""
        n = codes.numel()
        device = self._device_of(codes)
        blocks = formats.num_blocks(n, _args.block_size_arg(block_size))
        _args.check_memory("codes", codes)
        codes = codes.contiguous()
        _args.check("codes", codes, torch.uint8, n, device)
        _args.check("absmax", absmax, torch.float32, blocks, device)
        _args.check("map", map, torch.float32, 256, device)
        _args.dtype_id("dtype", dtype)
        out = torch.empty(codes.shape, dtype=dtype, device=device)
        if n:
            arguments = codes, absmax, map, block_size, Elements(out)
            self._launch("dequantize_8bit", device, *arguments)
        return out

    def quantize_absmax(self, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``qkern.reference.quantize_absmax``."""
        n = absmax.numel()
        device = self._device_of(absmax)
        _args.check_memory("absmax", absmax)
        absmax = absmax.contiguous()
        _args.check("absmax", absmax, torch.float32, n, device)
        if n == 0:
            return reference.quantize_absmax(absmax)
        groups = formats.num_blocks(n, formats.NESTED_BLOCK_SIZE)
        codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(groups, dtype=torch.float32, device=device)
        nested_offset = torch.empty((), dtype=torch.float32, device=device)
        results = codes, nested_absmax, nested_offset
        self._launch("quantize_absmax", device, Elements(absmax), *results)
        return codes, nested_absmax, nested_offset

    def adamw_step(self, params: Sequence[Tensor], *args: Any) -> None:
        """See ``qkern.reference.adamw_step``; all tensors are where the first parameter is."""
        device = self._device_of(params[0])
        args = _args.with_adamw_defaults(args)
        pieces = _args.adamw_pieces(device, params, *args)
        seed: int | None = args[6]
        if pieces:
            self._launch("adamw_step", device, pieces, seed)

    def linear_4bit(
        self,
        x: Tensor,
        weight: Weight,
        out_features: int,
        bias: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.linear_4bit``."""
        product = self._product("x", x, weight, out_features, bias, batch_invariant)
        if product is None:
            return reference.linear_4bit(x, weight, out_features, bias, batch_invariant)
        self._multiply(product)
        return product.out

    def linear_4bit_dx(
        self, dy: Tensor, weight: Weight, in_features: int, batch_invariant: bool = False
    ) -> Tensor:
        """See ``qkern.reference.linear_4bit_dx``."""
        product = self._product("dy", dy, weight, in_features, None, batch_invariant)
        if product is None:
            return reference.linear_4bit_dx(dy, weight, in_features, batch_invariant)
        self._multiply(product)
        return product.out

    def grouped_linear_4bit(
        self,
        x: Tensor,
        weight: Weight,
        out_features: int,
        offsets: Tensor,
        bias: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit``."""
        product = self._product("x", x, weight, out_features, bias, batch_invariant, offsets)
        if product is None:
            if not len(x):  # nothing to look at the offsets for, which a GPU would wait for
                return x.new_empty(0, out_features)
            others = offsets, bias, batch_invariant
            return reference.grouped_linear_4bit(x, weight, out_features, *others)
        self._multiply(product)
        return product.out

    def grouped_linear_4bit_dx(
        self,
        dy: Tensor,
        weight: Weight,
        in_features: int,
        offsets: Tensor,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See ``qkern.reference.grouped_linear_4bit_dx``."""
        product = self._product("dy", dy, weight, in_features, None, batch_invariant, offsets)
        if product is None:
            if not len(dy):
                return dy.new_empty(0, in_features)
            others = offsets, batch_invariant
            return reference.grouped_linear_4bit_dx(dy, weight, in_features, *others)
        self._multiply(product)
        return product.out

    def grouped_matmul_into(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        alpha: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        """See ``qkern.reference.grouped_matmul_into``; nothing else shares memory with ``out``."""
        _args.check_grouped_matmul_into(out, a, b, offsets, self._device_of(out))
        self._check_offsets(offsets, a)
        if a.numel() and out.numel() and len(offsets):
            self._multiply_into(out, a, b, offsets, alpha, accumulate)
        elif not accumulate:
            out.zero_()

    def _product(
        self,
        name: str,
        x: Tensor,
        weight: Weight,
        features: int,
        bias: Tensor | None,
        batch_invariant: bool,
        offsets: Tensor | None = None,
    ) -> Product | None:
        """The checked call for ``x``, or ``dy`` by its ``name``; None where there are no terms.

        Of one matmul, or with ``offsets`` of one for each expert.
        """
        dx = name == "dy"
        device = self._device_of(x)
        experts = 1
        if offsets is not None:
            if x.dim() != 2:
                raise ValueError(f"{name}: got shape {list(x.shape)}; takes a matrix")
            experts = _args.check_offsets(offsets, device)
        width = x.shape[-1]
        out_features, in_features = (width, features) if dx else (features, width)
        numel = out_features * in_features
        _args.check_weight(weight, numel, device, experts)
        _args.dtype_id(name, x.dtype)
        if bias is not None:
            _args.check("bias", bias, x.dtype, experts * out_features, device)
        if numel == 0 or x.numel() == 0 or experts == 0:
            return None
        matrix, rows, row_stride = _args.rows(name, x, width, device)
        out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=device)
        return Product(
            *(dx, matrix, rows, row_stride, weight),
            *(out_features, in_features, bias, out, batch_invariant),
            offsets=offsets,
        )


class _Checker(KernelBackend):
    """Asks of arguments what every backend with kernels does, and starts none."""

    def linear_4bit_int8(
        self, x: Tensor, weight: Weight, out_features: int, *others: Any
    ) -> Tensor:
        """Of a product that few backends have; its arguments are `linear_4bit`'s."""
        return self.linear_4bit(x, weight, out_features, *others)

    def linear_4bit_add(
        self,
        x: Tensor,
        weight: Weight,
        features: int,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        *others: Any,
    ) -> Tensor:
        """Of a product with a term of low rank."""
        _args.check_added(x, features, left, right, self._device_of(x))
        return self.linear_4bit(x, weight, features, bias)

    def linear_4bit_dx_add(
        self, dy: Tensor, weight: Weight, features: int, left: Tensor, right: Tensor, *others: Any
    ) -> Tensor:
        """Of an input gradient with such a term."""
        _args.check_added(dy, features, left, right, self._device_of(dy))
        return self.linear_4bit_dx(dy, weight, features)

    def grouped_linear_4bit_add(
        self,
        x: Tensor,
        weight: Weight,
        features: int,
        offsets: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        *others: Any,
    ) -> Tensor:
        """Of a product by experts with such a term."""
        _args.check_grouped_added(x, features, offsets, left, right, self._device_of(x))
        return self.grouped_linear_4bit(x, weight, features, offsets, bias)

    def grouped_linear_4bit_dx_add(
        self,
        dy: Tensor,
        weight: Weight,
        features: int,
        offsets: Tensor,
        left: Tensor,
        right: Tensor,
        *others: Any,
    ) -> Tensor:
        """Of its input gradient with such a term."""
        _args.check_grouped_added(dy, features, offsets, left, right, self._device_of(dy))
        return self.grouped_linear_4bit_dx(dy, weight, features, offsets)

    def grouped_matmul_into(
        self, out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *others: Any
    ) -> None:
        """Of dense products by experts."""
        _args.check_grouped_matmul_into(out, a, b, offsets, self._device_of(out))

    def matmul_into(self, out: Tensor, a: Tensor, b: Tensor, *others: Any) -> None:
        """Of a dense product, which torch computes where a backend does not."""
        _args.check_matmul_into(out, a, b, self._device_of(out))

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        pass

    def _multiply(self, product: Product) -> None:
        pass
