"""linear_4bit_dx: gradients times a 4-bit weight."""

from qkern.testing.specs._matmul import matmul_spec

SPEC = matmul_spec("linear_4bit_dx", "dy", "in_features")
