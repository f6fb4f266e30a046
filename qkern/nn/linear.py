"""Linear layers on a frozen 4-bit weight."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from qkern import _errors
from qkern.autograd import as_dtype
from qkern.functional import as_input, linear_by_weight
from qkern.nn import _sources
from qkern.nn._module import (
    TENSORS,
    QuantizedModule,
    frozen,
    parameter,
    quantized_weight,
    zeros_quantized,
)
from qkern.tensor import QuantizedTensor


class _NamedHooks(OrderedDict[int, Any]):
    """No hooks, and not of length zero: false, and longer by one than what it holds.

    In eval mode ``nn.TransformerEncoderLayer`` hands the weights of its linear layers to a fused
    kernel, unless one of its modules has hooks, by ``len``. To call the layer, ``nn.Module`` asks
    whether its hooks are true. A hook that does nothing would cost a microsecond a call.
    """

    def __len__(self) -> int:
        return super().__len__() + 1

    def __bool__(self) -> bool:
        for _ in self:  # faster than super(), and the caller is in a hurry
            return True
        return False


def _no_change(module: nn.Module, args: object) -> None:
    """A hook that stays when the others are removed: see ``_NamedHooks``."""


def without_named_hooks(layer: nn.Module) -> None:
    """Take ``_no_change`` from the hooks of a layer that is dense again."""
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _no_change]:
        del hooks[key]


class Linear4bit(QuantizedModule, nn.Linear):
    """``y = x Wᵀ + b`` with W frozen in 4 bits; the matmul works on the codes in both passes.

    ``x`` is ``[..., in_features]`` in float32, bfloat16 or float16 and decides the dtype of the
    result; a bias in another dtype is cast. Gradients flow to ``x`` and to the bias, never to W.
    Made from a dense layer by :meth:`from_linear`, from a weight quantised before by
    :meth:`from_quantized`; the constructor itself makes a weight of zeros, to be
    filled by a state dict.

    It is an ``nn.Linear`` so that libraries that look for linear layers find it. ``weight`` is the
    parameter with the packed codes, uint8 ``[ceil(out * in / 2), 1]``, as in bitsandbytes' layer of
    the same name; :attr:`quantized` has the shape, and dequantises. Packed codes on another device
    may be assigned to ``weight``; a dense weight is refused.

    ``compute_dtype``
        float32, bfloat16 or float16: ``x`` and the bias are cast to it, the product is computed in
        it, with an adapter (:class:`LoRALinear`) the whole sum, and the result is cast back to
        ``x``'s dtype, as bitsandbytes does. None, the default, computes in ``x``'s. It may be
        assigned at any time, is copied and pickled with the layer, and is not in state dicts.
        Under autocast the product is in autocast's dtype, and the result still in ``x``'s.
    ``source_class``
        the class that :meth:`to_linear` makes: ``nn.Linear``, or the one the layer was made of, as
        ``Conv1D`` of transformers.
    """

    compute_dtype: torch.dtype | None = None
    source_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        with torch.inference_mode(False):  # its tensors could not be trained with
            zeros = zeros_quantized(
                (out_features, in_features),
                format=format,
                block_size=block_size,
                double_quant=double_quant,
                dtype=dtype,
                device=device,
            )
            own = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
            self._init_from(zeros, None if own is None else nn.Parameter(own), compute_dtype)

    def _init_from(
        self, qw: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype | None
    ) -> None:
        # nn.Linear's own constructor would allocate the dense weight.
        nn.Module.__init__(self)
        self._forward_pre_hooks = _NamedHooks()
        self.out_features, self.in_features = qw.shape
        self._set_quantized(qw)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self.compute_dtype = compute_dtype

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a ``compute_dtype`` that nothing can be computed in."""
        if name == "compute_dtype" and value is not None:
            _errors.check_float_dtype(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """A layer around ``qw`` ``[out, in]`` (shared, not copied) and ``bias`` ``[out]``.

        A bias that is a Parameter is taken as it is; a tensor becomes a frozen one.
        Raises ValueError where ``qw`` is not two-dimensional or the bias does not fit, TypeError
        for a ``compute_dtype`` that is not float32, bfloat16 or float16.
        """
        if len(qw.shape) != 2:
            raise ValueError(f"qw: got shape {tuple(qw.shape)}; takes [out_features, in_features]")
        if bias is not None and tuple(bias.shape) != (qw.shape[0],):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}; takes [{qw.shape[0]}]")
        layer = cls.__new__(cls)
        layer._init_from(qw, bias, compute_dtype)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        *,
        codebook: Tensor | None = None,
        check_finite: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """A 4-bit copy of ``linear``, with its bias (the same Parameter) and train/eval mode.

        ``linear`` is an ``nn.Linear``, or transformers' ``Conv1D``, whose weight ``[in, out]`` is
        transposed first: the 4-bit weight is ``[out, in]`` always, as bitsandbytes has it.
        Hooks (in the very same dictionaries) and attributes are the new layer's too. On the meta
        device nothing is computed: the result has meta tensors of the right sizes, for
        ``load_state_dict(..., assign=True)``.

        Raises TypeError for a subclass that is not known to compute the same, ValueError where
        something would be lost (see :func:`quantize_model`); and the errors of
        :func:`qkern.quantize_4bit`.
        """
        _sources.check_layer("linear", linear, _sources.LINEAR_OR_CONV1D)
        options = format, block_size, double_quant, codebook, check_finite
        bias: Any = linear.bias
        with torch.inference_mode(False):  # its tensors could not be trained with
            qw = quantized_weight(_sources.matrix(linear), *options)
            layer = cls.from_quantized(qw, bias, compute_dtype=compute_dtype)
        layer.take_over(linear)
        return layer

    def take_over(self, linear: nn.Module) -> None:
        """Have the hooks, attributes and mode of the layer that this one stands in for.

        Also its class, as ``source_class``, and of a ``Linear4bit`` both that and the
        ``compute_dtype``.
        """
        if isinstance(linear, Linear4bit):
            self._take_settings(linear)
        elif (kind := _sources.source_class(linear)) is not nn.Linear:
            self.source_class = kind
        _sources.carry_over(linear, self)
        if linear._forward_pre_hooks and _no_change not in linear._forward_pre_hooks.values():
            # The dictionary took the place of the layer's own, which tells of hooks when it is
            # empty.
            self.register_forward_pre_hook(_no_change)

    def _take_settings(self, other: Linear4bit) -> None:
        """Compute in the dtype that ``other`` does, and be of its ``source_class``."""
        self.compute_dtype, self.source_class = other.compute_dtype, other.source_class

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense layer of class ``source_class`` that computes with the dequantised weight.

        Weight and bias are in ``dtype`` (float32, bfloat16 or float16), by default that of
        ``quantized``. The weight is frozen; a bias that has the dtype is the same Parameter.
        Hooks, attributes and train/eval mode are the new layer's too. A ``compute_dtype`` has no
        place there: a dense layer computes in its own.

        Raises TypeError for another dtype, RuntimeError where the weight is sharded or offloaded.
        """
        return self._dense_around(self._dense_weight(dtype))

    def _dense_weight(self, dtype: torch.dtype | None) -> nn.Parameter:
        weight = self._dequantized(dtype)
        return frozen(weight.T.contiguous() if self._is_transposed() else weight)

    def _is_transposed(self) -> bool:
        return _sources.is_conv1d(self.source_class)

    def _dense_around(self, weight: nn.Parameter) -> nn.Module:
        bias: Tensor | None = parameter(self, "bias")
        if bias is not None and bias.dtype != weight.dtype:
            with torch.inference_mode(False):
                bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        if not self._is_transposed():
            sizes = {"in_features": self.in_features, "out_features": self.out_features}
            return _sources.dense_layer(self, weight, bias=bias, **sizes)
        if bias is None:  # its forward needs one
            bias = frozen(torch.zeros_like(weight[0]))
        return _sources.dense_layer(
            self, weight, bias=bias, nf=self.out_features, nx=self.in_features
        )

    def with_same_weight(self, bias: Tensor | None) -> Linear4bit:
        """Another layer on the very same parameters, tied to this one, with a ``bias`` of its own.

        Raises ValueError where the bias does not fit.
        """
        layer = type(self).from_quantized(self.quantized, bias).train(self.training)
        layer._take_settings(self)
        layer._parameters.update((name, self._parameters[name]) for name in TENSORS)
        return layer

    def reset_parameters(self) -> None:
        """Refuse: a 4-bit weight is frozen and has no random initialisation."""
        raise TypeError("Linear4bit has no parameters to reset; make it from an initialised layer")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in x's dtype."""
        dtype = self.compute_dtype
        if dtype is None:
            return linear_by_weight(x, self.as_operand(), self._weight_shape, self.bias_for(x))
        cast = as_input(x, dtype)
        weight, bias = self.as_operand(), self.bias_for(cast)
        return as_dtype(linear_by_weight(cast, weight, self._weight_shape, bias), x.dtype)

    def bias_for(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype."""
        bias: Tensor | None = parameter(self, "bias")
        return bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype)

    def extra_repr(self) -> str:
        """The sizes, whether there is a bias, the format, and a ``compute_dtype`` that is set."""
        computed = f", compute_dtype={self.compute_dtype}" if self.compute_dtype else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._format_repr()}{computed}"
        )
