"""grouped_linear_4bit: activations sorted by expert, each times its expert's 4-bit weight."""

from qkern.testing.specs._grouped import grouped_spec

SPEC = grouped_spec("grouped_linear_4bit", "x", "out_features")
