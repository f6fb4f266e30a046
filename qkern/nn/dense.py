"""Frozen linear layers that stay dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkern import autograd
from qkern.backends import has_cpu_matmul
from qkern.nn import _sources

_MIN_ROWS = 16
"""Of fewer rows the emulated product is limited by reading the weight, which is half as long."""


class FrozenLinear(nn.Linear):
    """A frozen ``nn.Linear`` for training, fast on CPUs that only emulate 16-bit matmuls.

    Same parameters, state dict and results as ``nn.Linear``. Where torch would emulate a matmul in
    the dtype of ``x`` and the weight, forward and gradient of ``x`` are computed in float32 from
    slices of the weight, widened a few MiB at a time, and rounded once. Everything else (another
    device, float32, a weight that requires grad, autocast, ``torch.compile``, few rows) is
    ``nn.Linear``'s own forward.

    :func:`prepare_for_training` puts it in place of the layers that quantisation left alone: an
    output head in bfloat16 can otherwise take longer than all 4-bit layers together.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FrozenLinear:
        """A layer that shares ``linear``'s parameters, hooks and attributes.

        Raises ValueError if its weight requires grad, or something would be lost; TypeError for a
        subclass that is not known to compute the same.
        """
        _sources.check_layer("linear", linear, _sources.LINEAR)
        if linear.weight.requires_grad:
            raise ValueError("linear: its weight requires grad; takes a frozen layer")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = linear.weight.shape
        layer.weight, layer.bias = linear.weight, linear.bias
        _sources.carry_over(linear, layer)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the input's dtype."""
        if not self._is_emulated(input):
            return F.linear(input, self.weight, self.bias)
        y: Tensor = autograd.FrozenLinear.apply(input.flatten(0, -2), self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)

    def _is_emulated(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and x.is_cpu
            and self.weight.is_cpu
            and x.dtype == self.weight.dtype
            and not has_cpu_matmul(x.dtype)
            and x.dim() > 1
            and x.shape[-1] == self.in_features
            and x.numel() >= _MIN_ROWS * self.in_features > 0
            and not self.weight.requires_grad
            and not torch.is_autocast_enabled("cpu")
        )
