"""linear_4bit: activations times a 4-bit weight."""

from qkern.testing.specs._matmul import matmul_spec

SPEC = matmul_spec("linear_4bit", "x", "out_features")
