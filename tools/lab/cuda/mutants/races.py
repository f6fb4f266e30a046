"""Bugs that a proof of race-freedom must not get past; ``scope`` is the kernel that it is about."""

from __future__ import annotations

from lab.mutants import Mutant

_BARRIER = "__syncthreads();\n"
_MMA = "linear_4bit_mma_kernel<BFloat16, 16, 4>"
_WIDE_MMA = "linear_4bit_mma_kernel<Float16, 64, 2>"
_DX = "linear_4bit_dx_mma_kernel<BFloat16, 64, 3>"
_VECTOR = "linear_4bit_vector_kernel<BFloat16, 1, 4, true>"
_TILED = "linear_4bit_tiled_kernel<float, false>"
_FEW = "cp_async_wait<kStages - 2>();"
_ONE_FEWER = "cp_async_wait<kStages - 1>();"

RACES = (
    Mutant(
        "tables_read_early",
        "adamw_step.cu",
        "stage_tables<kThreads>(shared);\n    __syncthreads();",
        "stage_tables<kThreads>(shared);",
        "adamw_step_kernel<float, unsigned char>",
        "race",
    ),
    Mutant(
        "scales_stored_by_all",
        "adamw_step.cu",
        "    if (lane == 0) {\n",
        "    {\n",
        "adamw_step_kernel<BFloat16, unsigned char>",
        "race",
    ),
    Mutant(
        "scales_replaced_while_they_are_read",
        "adamw_step.cu",
        "if constexpr (kCodes) __syncwarp();",
        "",
        "adamw_step_kernel<BFloat16, unsigned char>",
        "race",
    ),
    Mutant(
        "warps_overlap",
        "adamw_step.cu",
        "kChunk + warp * kStateBlockSize;",
        "kChunk + warp * (kStateBlockSize / 2);",
        "adamw_step_kernel<float, float>",
        "race",
    ),
    Mutant(
        "table_read_early",
        "dequantize_4bit.cu",
        "stage_codes(source, shared.table);\n  __syncthreads();",
        "stage_codes(source, shared.table);",
        "dequantize_4bit_kernel<BFloat16>",
        "race",
    ),
    Mutant(
        "results_read_early",
        "dequantize_4bit.cu",
        "own[c] = values[c];\n    __syncwarp();",
        "own[c] = values[c];",
        "dequantize_4bit_kernel<BFloat16>",
        "race",
    ),
    Mutant(
        "results_overwritten",
        "dequantize_4bit.cu",
        "    }\n    __syncwarp();\n  }\n}",
        "    }\n  }\n}",
        "dequantize_4bit_kernel<float>",
        "race",
    ),
    Mutant(
        "table_read_early",
        "quantize_4bit.cu",
        "  __syncthreads();\n  const TensorValues<T> input",
        "  const TensorValues<T> input",
        "quantize_4bit_kernel<float, true>",
        "race",
    ),
    Mutant(
        "ranks_read_early",
        "quantize_4bit.cu",
        "    ranks.of[i] = rank;\n  }\n  __syncthreads();",
        "    ranks.of[i] = rank;\n  }",
        "quantize_4bit_kernel<float, false>",
        "race",
    ),
    Mutant(
        "thresholds_read_early",
        "quantize_8bit.cu",
        "stage_thresholds(map, thresholds);\n  __syncthreads();",
        "stage_thresholds(map, thresholds);",
        "quantize_8bit_kernel<float>",
        "race",
    ),
    Mutant(
        "map_read_early",
        "quantize_8bit.cu",
        "table.values[i] = map[i];\n  __syncthreads();",
        "table.values[i] = map[i];",
        "dequantize_8bit_kernel<BFloat16>",
        "race",
    ),
    Mutant(
        "sum_read_early",
        "quantize_absmax.cu",
        "  sum.flush_warp(state);\n  __syncthreads();",
        "  sum.flush_warp(state);",
        "absmax_mean_kernel",
        "race",
    ),
    Mutant(
        "bins_cleared_late",
        "quantize_absmax.cu",
        "state.not_finite = 0;\n  __syncthreads();",
        "state.not_finite = 0;",
        "absmax_mean_kernel",
        "race",
    ),
    Mutant(
        "thresholds_read_early",
        "quantize_absmax.cu",
        "stage_thresholds(kDeviceMapSigned.values, thresholds);\n  __syncthreads();",
        "stage_thresholds(kDeviceMapSigned.values, thresholds);",
        "quantize_absmax_kernel",
        "race",
    ),
    Mutant(
        "codes_of_two_lanes_overlap",
        "blockwise.cuh",
        "codes[start + i] =",
        "codes[start / 2 + i] =",
        "quantize_absmax_kernel",
        "race",
    ),
    Mutant(
        "x_overwritten",
        "linear_4bit_vector.cu",
        f"    {_BARRIER}    stage_x",
        "    stage_x",
        _VECTOR,
        "race",
    ),
    Mutant(
        "x_read_early",
        "linear_4bit_vector.cu",
        "begin + stage, shared);\n    __syncthreads();",
        "begin + stage, shared);",
        _VECTOR,
        "race",
    ),
    Mutant(
        "tile_overwritten",
        "linear_4bit_tiled.cu",
        "d0 += kDepth) {\n    __syncthreads();",
        "d0 += kDepth) {",
        _TILED,
        "race",
    ),
    Mutant(
        "tile_read_early",
        "linear_4bit_tiled.cu",
        "    __syncthreads();\n#pragma unroll 8",
        "#pragma unroll 8",
        _TILED,
        "race",
    ),
    Mutant(
        "no_barrier",
        "linear_4bit_mma.cu",
        f"    {_BARRIER}    start_loads(",
        "    start_loads(",
        _MMA,
        "race",
    ),
    Mutant("waits_too_little", "linear_4bit_mma.cu", _FEW, _ONE_FEWER, _MMA, "race", quick=True),
    Mutant("waits_too_little", "linear_4bit_mma.cu", _FEW, _ONE_FEWER, _WIDE_MMA, "race"),
    Mutant(
        "no_barrier",
        "linear_4bit_dx_mma.cu",
        f"    {_BARRIER}    start_loads(",
        "    start_loads(",
        _DX,
        "race",
    ),
    Mutant("waits_too_little", "linear_4bit_dx_mma.cu", _FEW, _ONE_FEWER, _DX, "race"),
    Mutant(
        "scales_in_one_buffer",
        "linear_4bit_dx_mma.cu",
        "shared.scales[tile % 2][warp][i * ",
        "shared.scales[0][warp][i * ",
        _DX,
        "race",
    ),
    Mutant(
        "two_threads_one_result",
        "linear_4bit.cu",
        "    y[i] = ",
        "    y[i / 2] = ",
        "sum_splits_kernel<BFloat16>",
        "race",
    ),
)
