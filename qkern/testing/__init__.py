"""The op table: inputs, comparison, bytes and flops of every qkern op.

Tests and benchmarks read this one table, and so may anyone who writes a backend of their own::

    from qkern import testing

    target = testing.Target(my_backend)   # a qkern.backends.Backend, or the name of one
    for spec in testing.OPS.values():
        for case in spec.cases:
            testing.check(spec, case, target)

`check` makes the case's inputs, runs ``torch.ops.qkern.<op>`` on the target and compares with
`qkern.reference`. Two comparisons exist:

- ``"bitwise"`` for everything that encodes or decodes: codes, scales and dequantised values are
  equal bit for bit (a NaN equals any NaN).
- ``"matmul"`` for the fused products: their error against float64 on the exact dequantised
  weights is at most that of dequantising to the activation's dtype and multiplying there, with a
  small margin; `assert_matmul` says it exactly.
"""

from __future__ import annotations

from qkern.testing._check import check, poisoned_outputs
from qkern.testing._judge import (
    MATMUL_MARGIN,
    MATMUL_MAX_MARGIN,
    MatmulError,
    assert_bitwise,
    assert_matmul,
    assert_product,
    matmul_error,
)
from qkern.testing._spec import (
    CODEBOOKS,
    DTYPE_NAMES,
    DTYPES,
    LAYOUTS,
    Case,
    Inputs,
    OpSpec,
    map_tensors,
)
from qkern.testing._targets import ISAS, Target, register_target, targets
from qkern.testing._values import (
    HALFWAY_TAILS,
    codebook_tensor,
    neighbours,
    tie_values,
    with_layout,
)
from qkern.testing.specs import OPS

__all__ = [
    "CODEBOOKS",
    "DTYPES",
    "DTYPE_NAMES",
    "HALFWAY_TAILS",
    "ISAS",
    "LAYOUTS",
    "MATMUL_MARGIN",
    "MATMUL_MAX_MARGIN",
    "OPS",
    "Case",
    "Inputs",
    "MatmulError",
    "OpSpec",
    "Target",
    "assert_bitwise",
    "assert_matmul",
    "assert_product",
    "check",
    "codebook_tensor",
    "map_tensors",
    "matmul_error",
    "neighbours",
    "poisoned_outputs",
    "register_target",
    "targets",
    "tie_values",
    "with_layout",
]
