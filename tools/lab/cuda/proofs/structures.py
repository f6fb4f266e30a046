"""The structures that kernels of csrc/cuda take as parameters."""

from __future__ import annotations

import ctypes

POINTER = ctypes.c_uint64

INT = ctypes.c_int32

LONG = ctypes.c_int64

FLAG = ctypes.c_bool


class Scales(ctypes.Structure):
    _fields_ = (
        *(("absmax", POINTER), ("nested_absmax", POINTER), ("nested_offset", POINTER)),
        ("block_shift", INT),
    )


class CodeSource(ctypes.Structure):
    _fields_ = (("values", ctypes.c_float * 16), ("custom", POINTER))


class Region(ctypes.Structure):
    _fields_ = (("first", LONG), ("row_length", LONG), ("row_skip", LONG))


class BlockPlan(ctypes.Structure):
    _fields_ = (
        *(("numel", LONG), ("units", LONG)),
        *(("block_shift", INT), ("passes", INT), ("block_lanes", INT)),
    )


class Epilogue(ctypes.Structure):
    _fields_ = (("bias", POINTER),)


class MmaOutput(ctypes.Structure):
    _fields_ = (
        *(("bias", POINTER), ("y", POINTER), ("parts", POINTER)),
        *(("m", LONG), ("columns", LONG)),
    )


_MATMUL = (
    *(("x", POINTER), ("m", LONG), ("x_row_stride", LONG), ("packed", POINTER)),
    *(("scales", Scales), ("source", CodeSource), ("rows", LONG), ("cols", LONG)),
)


class MmaArgs(ctypes.Structure):
    """Of linear_4bit_mma_kernel and linear_4bit_dx_mma_kernel."""

    _fields_ = (
        *_MATMUL,
        *(("split_length", LONG), ("share_length", LONG), ("output", MmaOutput)),
    )


class VectorArgs(ctypes.Structure):
    _fields_ = (
        *_MATMUL,
        *(("split_length", LONG), ("share_length", LONG), ("shares", INT)),
        *(("bias", POINTER), ("y", POINTER), ("parts", POINTER)),
    )


class TiledArgs(ctypes.Structure):
    _fields_ = (
        *_MATMUL,
        *(("bias", POINTER), ("y", POINTER)),
    )


class ExpertStride(ctypes.Structure):
    _fields_ = (("packed", LONG), ("absmax", LONG), ("nested_absmax", LONG))


class Groups(ctypes.Structure):
    _fields_ = (
        *(("offsets", POINTER), ("wide", FLAG), ("experts", INT)),
        ("stride", ExpertStride),
    )


class GroupedMmaArgs(ctypes.Structure):
    _fields_ = (("all", MmaArgs), ("groups", Groups))


class GroupedVectorArgs(ctypes.Structure):
    _fields_ = (("all", VectorArgs), ("groups", Groups))


class GroupedTiledArgs(ctypes.Structure):
    _fields_ = (("all", TiledArgs), ("groups", Groups))


class Factor(ctypes.Structure):
    _fields_ = (("data", POINTER), ("dtype", INT), ("stride", LONG), ("term_stride", LONG))


class IntoArgs(ctypes.Structure):
    """Of grouped_matmul_into_kernel."""

    _fields_ = (
        *(("a", Factor), ("b", Factor), ("out", POINTER), ("out_dtype", INT)),
        *(("rows", LONG), ("columns", LONG), ("terms", LONG), ("b_stride", LONG)),
        *(("m", INT), ("alpha", ctypes.c_float), ("accumulate", FLAG)),
        ("groups", Groups),
    )


class Piece(ctypes.Structure):
    _fields_ = (
        *(("param", POINTER), ("grad", POINTER), ("exp_avg", POINTER), ("exp_avg_sq", POINTER)),
        *(("exp_avg_absmax", POINTER), ("exp_avg_sq_absmax", POINTER), ("factors", POINTER)),
        *(("numel", LONG), ("first_chunk", LONG), ("first_block", LONG), ("index", INT)),
    )


class Pieces(ctypes.Structure):
    """With ``QKERN_CODEC_SELECT``."""

    _fields_ = (
        *(("chunks", LONG), ("seed", LONG), ("count", INT), ("stochastic_rounding", INT)),
        ("piece", Piece * 2),
    )
