"""grouped_linear_4bit_dx: the gradient of that input."""

from qkern.testing.specs._grouped import grouped_spec

SPEC = grouped_spec("grouped_linear_4bit_dx", "dy", "in_features")
