"""qkern: 4-bit weights, and matmuls that work on them directly in forward and backward.

>>> qw = qkern.quantize_4bit(w, format="nf4", block_size=64, double_quant=True)
>>> y = qkern.nf4_linear(x, qw, bias)

``python -m qkern.env`` tells which kernels are built and which run.
"""

from importlib.metadata import PackageNotFoundError, version

from qkern import io, nn, optim
from qkern.experts import (
    QuantizedExperts,
    grouped_linear_4bit,
    grouped_lora_linear,
    quantize_experts,
)
from qkern.functional import (
    batch_invariant,
    dequantize_4bit,
    dequantize_8bit,
    fp4_linear,
    linear_4bit,
    linears_4bit,
    lora_linear,
    nf4_linear,
    precision,
    quantize_4bit,
    quantize_8bit,
)
from qkern.loss import linear_cross_entropy
from qkern.tensor import QuantizedTensor

__all__ = [
    "QuantizedExperts",
    "QuantizedTensor",
    "__version__",
    "batch_invariant",
    "dequantize_4bit",
    "dequantize_8bit",
    "fp4_linear",
    "grouped_linear_4bit",
    "grouped_lora_linear",
    "io",
    "linear_4bit",
    "linear_cross_entropy",
    "linears_4bit",
    "lora_linear",
    "nf4_linear",
    "nn",
    "optim",
    "precision",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_experts",
]

try:
    __version__ = version("qkern")
except PackageNotFoundError:
    # A source tree that is on the path but not installed.
    __version__ = "0+unknown"
