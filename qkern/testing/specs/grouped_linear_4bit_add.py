"""grouped_linear_4bit_add: activations by experts' 4-bit weights, and a term of low rank."""

from qkern.testing.specs._grouped import grouped_added_spec

SPEC = grouped_added_spec("grouped_linear_4bit_add", "x", "out_features")
