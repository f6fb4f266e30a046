"""linear_4bit_dx_add: gradients times a 4-bit weight, and a term of low rank."""

from qkern.testing.specs._matmul import added_spec

SPEC = added_spec("linear_4bit_dx_add", "dy", "in_features")
