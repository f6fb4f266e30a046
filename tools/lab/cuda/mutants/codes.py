"""Bugs in the kernels that quantise and dequantise."""

from __future__ import annotations

from lab.mutants import Mutant

_DEQUANTIZE = "dequantize_4bit.cu"
_QUANTIZE = "quantize_4bit.cu"
_ABSMAX = "quantize_absmax.cu"

CODES = (
    # Barriers.
    Mutant(
        "table_read_before_it_is_there",
        _DEQUANTIZE,
        "stage_codes(source, shared.table);\n  __syncthreads();",
        "stage_codes(source, shared.table);",
        "dequantize_4bit",
        # Rounding by integers turns the poison into zeros.
        "numbers",
    ),
    Mutant(
        "results_of_other_lanes_read_early",
        _DEQUANTIZE,
        "own[c] = values[c];\n    __syncwarp();",
        "own[c] = values[c];",
        "dequantize_4bit",
        "poison",
    ),
    Mutant(
        "results_of_other_lanes_overwritten",
        _DEQUANTIZE,
        "    }\n    __syncwarp();\n  }\n}",
        "    }\n  }\n}",
        "dequantize_4bit",
        "thread",
    ),
    Mutant(
        "results_of_the_wrong_lane",
        _DEQUANTIZE,
        "from[chunk_position(i * kQuads, 0)]",
        "from[chunk_position(i * kQuads ^ 1, 0)]",
        "dequantize_4bit",
        "numbers",
    ),
    Mutant(
        "codes_sorted_before_ranks_are_there",
        _QUANTIZE,
        "    ranks.of[i] = rank;\n  }\n  __syncthreads();",
        "    ranks.of[i] = rank;\n  }",
        "quantize_4bit",
        "numbers",
    ),
    Mutant(
        "sum_of_scales_read_too_early",
        _ABSMAX,
        "  sum.flush(state);\n  __syncthreads();",
        "  sum.flush(state);",
        "quantize_absmax",
        "numbers",
    ),
    Mutant(
        "sum_of_scales_without_atomics",
        _ABSMAX,
        "atomicAdd(&state.bins[first_], low);",
        "state.bins[first_] += low;",
        "quantize_absmax",
        "thread",
    ),
    Mutant(
        "sum_of_scales_rounded_by_its_next_bit_alone",
        _ABSMAX,
        "bool up = (mantissa & 1u) != 0;",
        "bool up = true;",
        "quantize_absmax",
        "numbers",
    ),
    Mutant(
        "tail_of_the_sum_of_scales_ignored",
        _ABSMAX,
        "i < lowest - 1 && !up; ++i) up =",
        "i < 0 && !up; ++i) up =",
        "quantize_absmax",
        "numbers",
    ),
    Mutant(
        "sign_of_the_sum_of_scales_lost",
        _ABSMAX,
        "return negative ? -magnitude : magnitude;",
        "return magnitude;",
        "quantize_absmax",
        "numbers",
    ),
    Mutant(
        "scales_restored_below_zero",
        _ABSMAX,
        "bytes.store_from(least_code(absmax, offset), start",
        "bytes.store_from(0, start",
        "quantize_absmax",
        "numbers",
        quick=True,
    ),
    Mutant(
        "zero_taken_for_a_negative_scale",
        _ABSMAX,
        "nested_absmax), offset) < 0.0f;",
        "nested_absmax), offset) <= 0.0f;",
        "quantize_absmax",
        "numbers",
    ),
    # Fragments, codes, scales.
    Mutant(
        "nibbles_swapped",
        "codec.cuh",
        "((element & 1) != 0 ? 0 : 4)",
        "((element & 1) != 0 ? 4 : 0)",
        "dequantize_4bit",
        "numbers",
        compiled=(_DEQUANTIZE,),
        quick=True,
    ),
    Mutant(
        "nested_scale_of_128_blocks",
        "codec.cuh",
        "__ldg(scales.nested_absmax + (block >> 8))",
        "__ldg(scales.nested_absmax + (block >> 7))",
        "dequantize_4bit",
        "numbers",
        compiled=(_DEQUANTIZE,),
    ),
    Mutant(
        "scale_by_fused_multiply_add",
        "codec.cuh",
        "return __fadd_rn(__fmul_rn(value, fetched.nested_absmax), nested_offset);",
        "return __fmaf_rn(value, fetched.nested_absmax, nested_offset);",
        "dequantize_4bit",
        "numbers",
        compiled=(_DEQUANTIZE,),
    ),
    # The quantisation rule.
    Mutant(
        "ties_go_up",
        "blockwise.cuh",
        "count += t > thresholds[count + step - 1] ? step : 0;",
        "count += t >= thresholds[count + step - 1] ? step : 0;",
        "quantize_4bit",
        "numbers",
        compiled=(_QUANTIZE,),
        quick=True,
    ),
    Mutant(
        "absmax_of_two_blocks",
        "blockwise.cuh",
        "step < plan.block_lanes; step *= 2",
        "step <= plan.block_lanes && step < kWarp; step *= 2",
        "quantize_4bit",
        "numbers",
        compiled=(_QUANTIZE,),
    ),
    Mutant(
        "infinity_passes_for_a_scale",
        "blockwise.cuh",
        "largest >= kInfBits",
        "largest > kInfBits",
        "quantize_4bit",
        "numbers",
        compiled=(_QUANTIZE,),
    ),
    Mutant(
        "zeros_times_infinity",
        "blockwise.cuh",
        "return absmax == 0.0f ? 0.0f : __frcp_rn(absmax);",
        "return __frcp_rn(absmax);",
        "quantize_4bit",
        "numbers",
        compiled=(_QUANTIZE,),
    ),
    # Tails and bounds.
    Mutant(
        "reads_one_past_the_end",
        "blockwise.cuh",
        "out[i] = start + i < numel ? to_float<T>(x[start + i]) : 0.0f;",
        "out[i] = start + i <= numel ? to_float<T>(x[start + i]) : 0.0f;",
        "quantize_4bit",
        "address",
        compiled=(_QUANTIZE,),
    ),
    Mutant(
        "writes_one_past_the_end",
        _QUANTIZE,
        "if (i < count) packed[",
        "if (i <= count) packed[",
        "quantize_4bit",
        "address",
    ),
    # The machine code.
    Mutant(
        "codes_loaded_by_words",
        "ptx.h",
        "return __ldg(static_cast<const uint4*>(p));",
        "const auto* w = static_cast<const unsigned*>(p);\n"
        "  return {__ldg(w), __ldg(w + 1), __ldg(w + 2), __ldg(w + 3)};",
        "dequantize_4bit",
        "code",
        compiled=(_DEQUANTIZE,),
    ),
)
