"""Experts4bit: the weights of experts, frozen in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern import _errors
from qkern.autograd import as_dtype
from qkern.experts import QuantizedExperts, grouped_linear_by_weight, quantize_experts
from qkern.functional import as_input
from qkern.nn._layouts import PARAMETERS, as_bits
from qkern.nn._module import QuantizedModule, encoded, is_sharded, parameter
from qkern.weight import as_float32

LAYOUT = 1
"""Of the parameters, in ``quant_meta`` as ``"experts"``: another is refused."""


class Experts4bit(QuantizedModule):
    """``y = x Wᵀ + b`` with the W and b of each row's expert, W frozen in 4 bits.

    It stands where a model keeps the weights of E experts in one tensor of three dimensions. The
    forward takes rows that are sorted by expert and where those of each end, as
    :func:`qkern.grouped_linear_4bit` does. Gradients flow to ``x`` and to the bias, never to W.
    Made from dense weights by :meth:`from_dense`, from quantised ones by :meth:`from_quantized`;
    the constructor itself makes weights of zeros, to be filled by a state dict.

    The parameters are those of :class:`Linear4bit` with a first dimension of experts: ``weight``
    uint8 ``[E, ceil(n / 2)]`` with ``n = out_features * in_features``, ``absmax`` int32 or uint8
    ``[E, blocks]``, ``nested_absmax`` int32 ``[E, ceil(blocks / 256)]``, ``nested_offset`` int32
    ``[E]``, ``codebook`` int32 ``[16]``, ``quant_meta``; and ``bias`` ``[E, out_features]`` or
    None. So a state dict has one set of keys for each tensor of experts.

    ``transposed``
        whether the dense weights were ``[E, in_features, out_features]``; it is what
        :meth:`to_dense` gives, and is in ``quant_meta``.
    ``compute_dtype``
        as in :class:`Linear4bit`.
    """

    bias: nn.Parameter | None
    transposed: bool
    compute_dtype: torch.dtype | None = None

    implementation_before: str | None = None
    """What transformers computed the dense experts by, which are to be so again."""

    _maker = "from_dense"

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        codebook = torch.empty(16, device="meta") if format == "custom" else None
        with torch.inference_mode(False):  # its tensors could not be trained with
            shape = num_experts, out_features, in_features
            sizes = quantize_experts(
                *(torch.empty(shape, dtype=dtype, device="meta"), format, block_size, double_quant),
                codebook=codebook,
            )
            fields: list[Any] = [
                None
                if tensor is None
                else torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                for tensor in sizes.weight.tensors
            ]
            fields += format, block_size, shape, dtype
            zeros = QuantizedExperts(*fields)
            own = torch.zeros(shape[:2], device=device, dtype=dtype) if bias else None
            parameter = None if own is None else nn.Parameter(own)
            self._init_from(zeros, parameter, transposed, compute_dtype)

    def _init_from(
        self,
        qw: QuantizedExperts,
        bias: Tensor | None,
        transposed: bool,
        compute_dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        self.transposed, self.compute_dtype = bool(transposed), compute_dtype
        self.num_experts, self.out_features, self.in_features = qw.shape
        self._set_quantized(qw)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedExperts,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Experts4bit:
        """A module around ``qw`` (shared, not copied) and ``bias`` ``[E, out_features]``.

        A bias that is a Parameter is taken as it is; a tensor becomes a frozen one. Raises
        TypeError or ValueError for other arguments than these.
        """
        if not isinstance(qw, QuantizedExperts):
            raise TypeError(f"qw: got {_errors.type_name(qw)}; takes a QuantizedExperts")
        if bias is not None and bias.shape != torch.Size(qw.shape[:2]):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}; takes {list(qw.shape[:2])}")
        module = cls.__new__(cls)
        module._init_from(qw, bias, transposed, compute_dtype)
        return module

    @classmethod
    def from_dense(
        cls,
        w: Tensor | Sequence[Tensor],
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        *,
        codebook: Tensor | None = None,
        check_finite: bool = True,
        transposed: bool = False,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Experts4bit:
        """4-bit copies of the experts' weights ``w``, each quantised by itself.

        ``w`` is ``[E, out_features, in_features]``, or with ``transposed``
        ``[E, in_features, out_features]``; or a sequence of E such matrices. Only one expert is
        worked on at a time. Raises the errors of :func:`qkern.quantize_experts`.
        """
        with torch.inference_mode(False):  # its tensors could not be trained with
            qw = quantize_experts(
                w,
                *(format, block_size, double_quant),
                # A copy, since tensors that share memory cannot be saved as safetensors.
                codebook=None if codebook is None else codebook.clone(),
                check_finite=check_finite,
                transposed=transposed,
            )
            return cls.from_quantized(qw, bias, transposed=transposed, compute_dtype=compute_dtype)

    @property
    def quantized(self) -> QuantizedExperts:  # type: ignore[override]
        """The frozen weights: views of the parameters as what they hold, made at every call.

        Raises RuntimeError while the parameters are sharded (FSDP2), TypeError or ValueError where
        they do not fit one another.
        """
        weight = self.as_operand()
        if is_sharded(weight.packed):
            raise RuntimeError("weight: is sharded; takes a module after its unshard()")
        packed, *others, codebook, format, block_size = weight
        fields: list[Any] = [packed, *map(as_float32, others), as_float32(codebook)]
        fields += format, block_size, self._weight_shape, self._weight_dtype
        return QuantizedExperts(*fields)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weights in the layout that they had, by default in ``quantized.dtype``.

        That is ``[E, out_features, in_features]``, or ``[E, in_features, out_features]`` where they
        are ``transposed``. Raises TypeError for another dtype than float32, bfloat16 and float16,
        RuntimeError where the weight is sharded or offloaded.
        """
        if not self.transposed:
            return self._dequantized(dtype)
        self._check_not_offloaded()
        qw = self.quantized
        dtype = qw.dtype if dtype is None else dtype
        with torch.inference_mode(False):
            experts, out_features, in_features = qw.shape
            dense = qw.packed.new_empty(experts, in_features, out_features, dtype=dtype)
            for expert, part in zip(qw, dense, strict=True):
                part.copy_(expert.dequantize(dtype).mT)
        return dense

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a ``compute_dtype`` that nothing can be computed in."""
        if name == "compute_dtype" and value is not None:
            _errors.check_float_dtype(name, value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in every module; in another process transformers has to be told of the forward."""
        super().__setstate__(state)
        from qkern.nn import _experts  # which imports this module

        _experts.register()

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The dequantised weight of one expert, in the layout that it had.

        For code that multiplies expert by expert, such as transformers' eager one: slow, and its
        backward keeps the dense weight.
        """
        one = self.quantized[int(expert)].dequantize()
        return one.mT if self.transposed else one

    def __len__(self) -> int:
        return self.num_experts

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        *,
        bias: Tensor | None = None,
        check_offsets: bool = False,
    ) -> Tensor:
        """``[rows, in_features]``, sorted by expert, to ``[rows, out_features]`` in x's dtype.

        ``bias`` is taken in place of the module's own, cast to x's dtype as that is. The arguments
        and the errors are those of :func:`qkern.grouped_linear_4bit`.
        """
        dtype = self.compute_dtype
        cast = x if dtype is None else as_input(x, dtype)
        bias = self.bias_for(cast, bias)
        operand, shape = self.as_operand(), self._weight_shape
        y = grouped_linear_by_weight(cast, operand, shape, offsets, bias, check_offsets)
        return y if dtype is None else as_dtype(y, x.dtype)

    def bias_for(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The bias, or another in its place, in x's dtype."""
        if bias is None:
            bias = parameter(self, "bias")
        if isinstance(bias, Tensor) and isinstance(x, Tensor) and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return bias

    def extra_repr(self) -> str:
        """The sizes, whether there is a bias, the format, and what else is set."""
        computed = f", compute_dtype={self.compute_dtype}" if self.compute_dtype else ""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._format_repr()}{', transposed' if self.transposed else ''}{computed}"
        )

    def _own_layout(self, qw: Any) -> dict[str, Tensor | None]:
        parts = {name: as_bits(tensor) for name, tensor in qw.tensors().items()}
        parts["weight"] = parts.pop("packed")
        meta = self._described(qw.format, qw.block_size, qw.double_quant, qw.shape)
        names = dict.fromkeys(PARAMETERS)
        return {**names, **parts, "quant_meta": encoded(meta, qw.packed.device)}

    def _described(self, *fields: Any) -> dict[str, Any]:
        return super()._described(*fields) | {"experts": LAYOUT, "transposed": self.transposed}
