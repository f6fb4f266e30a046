"""linear_4bit_dx: gradients times a 4-bit weight."""

from __future__ import annotations

import torch

from qkern.testing._spec import Case, Inputs, OpSpec
from qkern.testing.specs._matmul import matmul_bytes, matmul_cases, matmul_flops, matmul_inputs


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    return matmul_inputs(case, device, generator, "dy", "in_features")


SPEC = OpSpec(
    "linear_4bit_dx",
    matmul_cases(with_bias=False),
    _inputs,
    "matmul",
    matmul_bytes,
    matmul_flops,
    main="dy",
    input_gradient=True,
)
