"""The number formats: code tables, thresholds and block layout; and names by C++'s numbers.

This file is the single source. The C++ header ``csrc/include/qkern/codes.h`` is generated from it:

    python qkern/formats.py            # write the header
    python qkern/formats.py --check    # exit 1, showing the difference, when the header is stale

``python -m qkern.formats`` does the same where torch is installed.

Only the standard library is imported at module level, so the header can be made without torch.
Every table entry is a Python float that is exactly a float32.
"""

from __future__ import annotations

import argparse
import difflib
import struct
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FORMATS = ("nf4", "fp4", "custom")
FORMAT_IDS = {name: index for index, name in enumerate(FORMATS)}

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that kernels compute with; the position is C++'s number, ``DType``."""

CUDA_PATHS = {
    "vector": "float32 dot products; forward only",
    "mma": "tensor cores; 16-bit x in 16-byte pieces, K % 32 == 0",
    "tiled": "float32 tiles; takes anything",
    "wgmma": "Hopper's tensor cores (9.0 only), as mma otherwise; only if it is forced",
}
"""How a CUDA matmul is computed; the position is C++'s number, ``CudaPath``."""

ADAMW_FACTORS = {
    "grad_scale": "of gradients: clipping, inverse loss scale, the sign to maximise",
    "decay": "1 - lr * weight_decay",
    "beta1_complement": "1 - beta1",
    "beta2": "",
    "beta2_complement": "1 - beta2",
    "step_size": "lr / (1 - beta1^t)",
    "root_bias2_inverse": "1 / sqrt(1 - beta2^t)",
    "eps": "",
    "skip": "unless 0, the parameter and its moments stay as they are",
    "step": "t",
}
"""The float32 numbers that a parameter's step ``t`` of AdamW takes, in their order in memory."""

MIN_BLOCK_SIZE = 32
MAX_BLOCK_SIZE = 16384
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of elements that may share a scale: the powers of two between both ends."""
BNB_BLOCK_SIZES = tuple(size for size in BLOCK_SIZES if size <= 4096)
"""Those of them that bitsandbytes takes for 4 bits: it decodes no file with others."""
NESTED_BLOCK_SIZE = 256
"""Number of absmax values that share one second-level scale in double quantisation."""
STATE_BLOCK_SIZE = 256
"""Number of an 8-bit optimizer state's elements that share one scale."""
MAX_GRADIENT = 2.0**63
"""The largest magnitude of a finite gradient in 8-bit moments: its square is a float32."""
INT8_ROWS = 8
"""Rows of activations that `qkern.precision` takes to 8 bits; more are computed as usual."""
INT8_FACTORS = {"nf4": 112.0, "fp4": 120.0}
"""What codes' values are multiplied by and then rounded to 8 bits: of the factors up to 127, those
with the least root mean square error, 0.0017 for NF4 and 0.0011 for FP4. A codebook's largest
magnitude becomes 127."""
INT8_GROUP_SIZE = 32
"""Elements of a row of activations that share a scale there."""

MAPS = ("signed", "unsigned")

NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4 (QLoRA, arXiv 2305.14314), ascending, as bitsandbytes stores it.

Hard-coded: recomputing it from normal quantiles in float32 gives only 13 of the 16 bit patterns.
"""

_FP4_MAGNITUDES_BY_CODE = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
FP4_CODES = _FP4_MAGNITUDES_BY_CODE + tuple(-value for value in _FP4_MAGNITUDES_BY_CODE)
"""bitsandbytes' FP4: bit 3 is the sign, so code 8 is -0.0; the magnitudes are not in order."""

FP4_MAGNITUDE_CODES = tuple(sorted(range(8), key=_FP4_MAGNITUDES_BY_CODE.__getitem__))
"""The 3-bit code of each FP4 magnitude, magnitudes ascending."""
FP4_MAGNITUDES = tuple(_FP4_MAGNITUDES_BY_CODE[code] for code in FP4_MAGNITUDE_CODES)
"""The eight FP4 magnitudes, ascending."""


def _float32(value: float) -> float:
    """``value`` rounded to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _float32_down(value: float) -> float:
    """The largest float32 that is not above ``value``."""
    rounded = _float32(value)
    if rounded <= value:
        return rounded
    (bits,) = struct.unpack("<i", struct.pack("<f", rounded))
    # One step toward -inf. A positive result of rounding up is at least the least subnormal.
    bits += -1 if rounded > 0.0 else 1
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


def midpoints(codes: Sequence[float]) -> tuple[float, ...]:
    """Float32 midpoints ``(a + b) * 0.5`` of neighbours in an ascending table.

    The code of a scaled value ``t`` is the number of midpoints it exceeds.
    """
    return tuple(_float32(_float32(low + high) * 0.5) for low, high in pairwise(codes))


def nearest_thresholds(codes: Sequence[float]) -> tuple[float, ...]:
    """Exact midpoints of neighbours in an ascending table, rounded down to float32.

    A float32 ``t`` exceeds the rounded-down midpoint exactly when it exceeds the true one, so
    counting ``t > threshold`` finds the nearest entry, a tie going to the lower one.
    """
    return tuple(_float32_down((low + high) / 2.0) for low, high in pairwise(codes))


def _dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 8-bit dynamic map (7 exponent bits): 256 float32 values, ascending.

    For each decade the means of neighbours in an even grid over [0.1, 1], then 0 and 1. It equals
    bitsandbytes' ``create_dynamic_map`` bit for bit where that runs with AVX2; each step is rounded
    to float32 as there, the grid points with one rounding for multiply and add. Elsewhere 42 of its
    values are one or two floats away.
    """
    low, high = _float32(0.1), 1.0
    values = [0.0, 1.0]
    for exponent in range(7):
        intervals = 2**exponent if signed else 2 ** (exponent + 1)
        step = _float32(_float32(high - low) / intervals)
        # From both ends toward the middle, as torch.linspace does.
        grid = [
            _float32(low + step * i)
            if i < (intervals + 1) // 2
            else _float32(high - step * (intervals - i))
            for i in range(intervals + 1)
        ]
        scale = _float32(10.0 ** (exponent - 6))
        for mean in midpoints(grid):
            values.append(_float32(scale * mean))
            if signed:
                values.append(-_float32(scale * mean))
    return tuple(sorted(values))


DYNAMIC_MAP_SIGNED = _dynamic_map(signed=True)
"""8-bit map for values of either sign: double quantisation's, and an optimizer's first moment."""
DYNAMIC_MAP_UNSIGNED = _dynamic_map(signed=False)
"""8-bit map for non-negative values, such as an optimizer's second moment."""

NF4_MIDPOINTS = midpoints(NF4_CODES)
FP4_MAGNITUDE_THRESHOLDS = nearest_thresholds(FP4_MAGNITUDES)
DYNAMIC_THRESHOLDS_SIGNED = nearest_thresholds(DYNAMIC_MAP_SIGNED)
DYNAMIC_THRESHOLDS_UNSIGNED = nearest_thresholds(DYNAMIC_MAP_UNSIGNED)


def packed_size(n: int) -> int:
    """Number of bytes that hold ``n`` 4-bit codes, two to a byte."""
    return (n + 1) // 2


def num_blocks(n: int, block_size: int) -> int:
    """Number of blocks, the last one perhaps short, that hold ``n`` elements."""
    return (n + block_size - 1) // block_size


def code_tensor(
    format: str,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The code table of ``"nf4"`` or ``"fp4"``: a new float32 tensor ``[16]``.

    Raises ``ValueError`` for any other name; a custom codebook lives in its ``QuantizedTensor``.
    """
    import torch

    tables = {"nf4": NF4_CODES, "fp4": FP4_CODES}
    if format not in tables:
        raise ValueError(f'format: got {format!r}; takes "nf4" or "fp4"')
    return torch.tensor(tables[format], dtype=torch.float32, device=device)


def map_tensor(name: str, device: torch.device | str | None = None) -> torch.Tensor:
    """The 8-bit dynamic map ``"signed"`` or ``"unsigned"``: a new float32 tensor ``[256]``.

    Raises ``ValueError`` for any other name.
    """
    import torch

    maps = {"signed": DYNAMIC_MAP_SIGNED, "unsigned": DYNAMIC_MAP_UNSIGNED}
    if name not in maps:
        raise ValueError(f'map: got {name!r}; takes "signed" or "unsigned"')
    return torch.tensor(maps[name], dtype=torch.float32, device=device)


def is_table(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a file's table is ``expected``, float32, but for the last two bits of its values.

    bitsandbytes computes its maps where it quantises, and not every processor rounds them alike.
    """
    if found.shape != expected.shape:
        return False
    exact = expected.double()
    differences = (found.to(exact.device, exact.dtype) - exact).abs()
    return bool((differences <= exact.abs() * 2.0**-22).all())


HEADER_PATH = Path(__file__).resolve().parent.parent / "csrc" / "include" / "qkern" / "codes.h"


def _float_literal(value: float) -> str:
    mantissa, exponent = value.hex().split("p")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}p{exponent}f"


def _array(ctype: str, name: str, items: Sequence[str], per_line: int) -> str:
    lines = [", ".join(items[i : i + per_line]) for i in range(0, len(items), per_line)]
    return (
        f"inline constexpr {ctype} {name}[{len(items)}] = {{\n    " + ",\n    ".join(lines) + "};"
    )


def _float_array(name: str, values: Sequence[float], comment: str) -> str:
    return f"// {comment}\n" + _array("float", name, [_float_literal(v) for v in values], 4)


def _numbers(name: str, values: Sequence[str]) -> str:
    """How many there are of ``values``, and what an error says of their numbers."""
    *most, last = (f"{i} ({value})" for i, value in enumerate(values))
    return (
        f"inline constexpr int k{name}s = {len(values)};\n"
        f'inline constexpr const char* k{name}Numbers = "{", ".join(most)} or {last}";'
    )


def _commented(code: str, comment: str) -> str:
    return f"  {code}  // {comment}" if comment else f"  {code}"


def _names() -> list[str]:
    """The numbers that stand for names in C++."""
    dtypes = [f"k{name.capitalize().replace('Bf', 'BF')}" for name in DTYPES]
    return [
        *(
            f"inline constexpr int kFormat{name.capitalize()} = {i};"
            for i, name in enumerate(FORMATS)
        ),
        _numbers("Format", FORMATS),
        "",
        "enum class DType : int {",
        *(f"  {name} = {i}," for i, name in enumerate(dtypes)),
        "};",
        _numbers("DType", DTYPES),
        "",
        "// How a CUDA matmul is computed; qkern/backends/_cuda_paths.py chooses.",
        "enum class CudaPath : int {",
        *(
            _commented(f"k{name.capitalize()} = {i},", comment)
            for i, (name, comment) in enumerate(CUDA_PATHS.items())
        ),
        "};",
        _numbers("CudaPath", tuple(CUDA_PATHS)),
        "",
        "// AdamW's factors for a parameter at its step t; qkern/reference.py derives them.",
        "struct AdamWFactors {",
        *(_commented(f"float {name};", comment) for name, comment in ADAMW_FACTORS.items()),
        "};",
        f"inline constexpr int kAdamWFactors = {len(ADAMW_FACTORS)};",
        'static_assert(sizeof(AdamWFactors) == kAdamWFactors * sizeof(float), "no padding");',
    ]


def header() -> str:
    """The text of ``codes.h``."""
    parts = [
        "// Generated by qkern/formats.py; edit that file and run `python qkern/formats.py`.",
        "// clang-format off",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace qkern {",
        "",
        *_names(),
        "",
        f"inline constexpr int kMinBlockSize = {MIN_BLOCK_SIZE};",
        f"inline constexpr int kMaxBlockSize = {MAX_BLOCK_SIZE};",
        "inline constexpr const char* kBlockSizes = "
        f'"a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}";',
        f"inline constexpr int kNestedBlockSize = {NESTED_BLOCK_SIZE};",
        f"inline constexpr int kStateBlockSize = {STATE_BLOCK_SIZE};",
        f"inline constexpr float kMaxGradient = {_float_literal(MAX_GRADIENT)};",
        f"inline constexpr int kInt8Rows = {INT8_ROWS};",
        f"inline constexpr float kInt8FactorNf4 = {_float_literal(INT8_FACTORS['nf4'])};",
        f"inline constexpr float kInt8FactorFp4 = {_float_literal(INT8_FACTORS['fp4'])};",
        "",
        _float_array("kNf4Codes", NF4_CODES, "Value of each NF4 code, ascending."),
        "",
        _float_array("kNf4Midpoints", NF4_MIDPOINTS, "NF4 code = number of midpoints below t."),
        "",
        _float_array("kFp4Codes", FP4_CODES, "Value of each FP4 code; bit 3 is the sign."),
        "",
        _float_array("kFp4Magnitudes", FP4_MAGNITUDES, "FP4 magnitudes, ascending."),
        "",
        _float_array(
            "kFp4MagnitudeMidpoints",
            FP4_MAGNITUDE_THRESHOLDS,
            "Midpoints of the magnitudes, rounded down: |t| > m finds the exact nearest.",
        ),
        "",
        "// 3-bit code of each ascending magnitude.",
        _array("std::uint8_t", "kFp4MagnitudeCodes", [str(c) for c in FP4_MAGNITUDE_CODES], 8),
        "",
        _float_array("kDynamicMapSigned", DYNAMIC_MAP_SIGNED, "Value of each signed 8-bit code."),
        "",
        _float_array(
            "kDynamicThresholdsSigned",
            DYNAMIC_THRESHOLDS_SIGNED,
            "Signed 8-bit code = number of thresholds below t.",
        ),
        "",
        _float_array(
            "kDynamicMapUnsigned", DYNAMIC_MAP_UNSIGNED, "Value of each unsigned 8-bit code."
        ),
        "",
        _float_array(
            "kDynamicThresholdsUnsigned",
            DYNAMIC_THRESHOLDS_UNSIGNED,
            "Unsigned 8-bit code = number of thresholds below t.",
        ),
        "",
        "}  // namespace qkern",
        "",
    ]
    return "\n".join(parts)


def keep_current(path: Path, wanted: str, command: str, check: bool) -> int:
    """Write a generated file, or with ``check`` say how it differs; returns the exit status."""
    if not check:
        path.write_text(wanted, encoding="utf-8")
        return 0
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found == wanted:
        return 0
    print(f"{path} is stale; run `{command}`", file=sys.stderr)
    difference = difflib.unified_diff(
        found.splitlines(), wanted.splitlines(), "on disk", "generated", n=0, lineterm=""
    )
    print("\n".join(list(difference)[:40]), file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Write the header, or with ``--check`` compare it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write csrc/include/qkern/codes.h.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    args = parser.parse_args(argv)
    if not HEADER_PATH.parent.is_dir():
        print(f"{HEADER_PATH.parent} is missing: run this in a source tree", file=sys.stderr)
        return 2
    return keep_current(HEADER_PATH, header(), "python qkern/formats.py", args.check)


if __name__ == "__main__":
    sys.exit(main())
