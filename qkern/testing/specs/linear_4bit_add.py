"""linear_4bit_add: activations times a 4-bit weight, and a term of low rank."""

from qkern.testing.specs._matmul import added_spec

SPEC = added_spec("linear_4bit_add", "x", "out_features")
