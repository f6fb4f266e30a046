"""grouped_linear_4bit_dx_add: the gradient of such an input, and a term of low rank."""

from qkern.testing.specs._grouped import grouped_added_spec

SPEC = grouped_added_spec("grouped_linear_4bit_dx_add", "dy", "in_features")
