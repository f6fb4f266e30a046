"""The planted bugs: each one small replacement in a copy of csrc/cuda.

What can notice one:

    numbers    a wrong result with threads in order and cp.async done at once
    poison     the same, and the result is a NaN: memory was read that nobody had written
    schedule   a result wrong only under another order of threads or with late cp.async
    launch     the emulator ends a launch: misalignment, divergent barrier, out of shared memory
    address    AddressSanitizer or UndefinedBehaviorSanitizer
    thread     ThreadSanitizer
    layout     the banks that an access to shared memory meets
    code       the machine code: spills, widths of accesses
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: ``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    op: str
    """Cases of `judge.CASES` that are run."""
    caught_by: str
    compiled: tuple[str, ...] = ()
    """Kernel files to compile anew, if they are not ``file``."""
    quick: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Kernel files that the bug is in."""
        return self.compiled or (self.file,)


_MMA = "linear_4bit_mma.cu"
_DX = "linear_4bit_dx_mma.cu"
_VECTOR = "linear_4bit_vector.cu"
_TILED = "linear_4bit_tiled.cu"
_DEQUANTIZE = "dequantize_4bit.cu"
_QUANTIZE = "quantize_4bit.cu"
_ABSMAX = "quantize_absmax.cu"
_ADAMW = "adamw_step.cu"
_MOMENTS = "moments.cuh"

MUTANTS = (
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
        "mma_without_barrier",
        _MMA,
        "    __syncthreads();\n    start_loads(tile + kStages - 1);",
        "    start_loads(tile + kStages - 1);",
        "linear_4bit_mma",
        "poison",
    ),
    Mutant(
        "dx_without_barrier",
        _DX,
        "    __syncthreads();\n    start_loads(tile + kStages - 1);",
        "    start_loads(tile + kStages - 1);",
        "linear_4bit_dx_mma",
        "poison",
    ),
    Mutant(
        "dx_scales_in_one_buffer",
        _DX,
        "shared.scales[tile % 2][warp][i * kWarp + lane] = finished[i];",
        "shared.scales[0][warp][i * kWarp + lane] = finished[i];",
        "linear_4bit_dx_mma",
        "poison",
    ),
    Mutant(
        "vector_overwrites_x_that_is_read",
        _VECTOR,
        "    __syncthreads();\n    stage_x<kWhole>(",
        "    stage_x<kWhole>(",
        "linear_4bit_vector",
        "numbers",
    ),
    Mutant(
        "vector_reads_x_before_it_is_there",
        _VECTOR,
        "begin + stage, shared);\n    __syncthreads();",
        "begin + stage, shared);",
        "linear_4bit_vector",
        "poison",
    ),
    Mutant(
        "vector_barrier_of_half_a_warp",
        _VECTOR,
        "    __syncthreads();\n    stage_x<kWhole>(",
        "    if (lane < 16) __syncthreads();\n    stage_x<kWhole>(",
        "linear_4bit_vector",
        "launch",
    ),
    Mutant(
        "tiled_without_trailing_barrier",
        _TILED,
        "d0 += kDepth) {\n    __syncthreads();",
        "d0 += kDepth) {",
        "linear_4bit_tiled",
        "poison",
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
    # Asynchronous copies.
    Mutant(
        "mma_waits_for_one_group_too_few",
        _MMA,
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
        "linear_4bit_mma",
        "schedule",
    ),
    Mutant(
        "dx_waits_for_one_group_too_few",
        _DX,
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
        "linear_4bit_dx_mma",
        "schedule",
    ),
    Mutant(
        "dx_commits_only_where_it_copied",
        _DX,
        "    cp_async_commit();\n  };",
        "    if (tile < tiles) cp_async_commit();\n  };",
        "linear_4bit_dx_mma",
        "schedule",
    ),
    Mutant(
        "mma_reads_the_next_stage",
        _MMA,
        "const uint4* const x_tile = shared.x[stage];",
        "const uint4* const x_tile = shared.x[(stage + 1) % kStages];",
        "linear_4bit_mma",
        "poison",
    ),
    # Fragments, codes, scales.
    Mutant(
        "mma_fragment_rows_swapped",
        _MMA,
        "{w[2 * f][2 * step], w[2 * f + 1][2 * step],",
        "{w[2 * f + 1][2 * step], w[2 * f][2 * step],",
        "linear_4bit_mma",
        "numbers",
        quick=True,
    ),
    Mutant(
        "dx_rows_of_a_pair_swapped",
        _DX,
        "code_position(row0 + 2 * pair + i, warp)",
        "code_position(row0 + 2 * pair + 1 - i, warp)",
        "linear_4bit_dx_mma",
        "numbers",
    ),
    Mutant(
        "results_from_the_wrong_lane",
        "linear.cuh",
        "odd ? pairs[0][i] : pairs[1][i], 4);",
        "odd ? pairs[0][i] : pairs[1][i], 8);",
        "linear_4bit_mma",
        "numbers",
        compiled=(_MMA,),
    ),
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
        "nibbles_of_a_word_swapped",
        "codec.cuh",
        "i % 2 == 0 ? first : second",
        "i % 2 == 0 ? second : first",
        "linear_4bit_vector",
        "numbers",
        compiled=(_VECTOR,),
    ),
    Mutant(
        "scale_of_the_next_block",
        _MMA,
        "positions[j] = row_position[j] + k0;",
        "positions[j] = row_position[j] + k0 + kLaneCodes;",
        "linear_4bit_mma",
        "numbers",
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
    Mutant(
        "mma_reads_rows_that_x_has_not",
        _MMA,
        "x_in_range && (kRepeatsRows || i < copies));",
        "x_in_range);",
        "linear_4bit_mma",
        "address",
    ),
    Mutant(
        "mma_reads_rows_that_w_has_not",
        _MMA,
        "in_range && j < lane_rows);",
        "in_range);",
        "linear_4bit_mma",
        "address",
    ),
    Mutant(
        "writes_one_row_too_many",
        "linear.cuh",
        "if (row >= output.m) return;",
        "if (row > output.m) return;",
        "linear_4bit_mma",
        "address",
        compiled=(_MMA,),
    ),
    Mutant(
        "mma_stages_misaligned",
        _MMA,
        "Shared& shared = *reinterpret_cast<Shared*>(memory);",
        "Shared& shared = *reinterpret_cast<Shared*>(memory + 8);",
        "linear_4bit_mma",
        "launch",
        quick=True,
    ),
    Mutant(
        "dx_asks_for_too_little_shared_memory",
        _DX,
        "kThreads, sizeof(DxShared<kTileM, kStages>), stream}",
        "kThreads, sizeof(DxShared<kTileM, kStages>) - 512, stream}",
        "linear_4bit_dx_mma",
        "address",
    ),
    Mutant(
        "splits_summed_twice",
        "linear_4bit.cu",
        "for (int part = 1; part < count",
        "for (int part = 0; part < count",
        "linear_4bit_vector",
        "numbers",
    ),
    Mutant(
        "row_offset_in_32_bits",
        _VECTOR,
        "args.x + (row0 + row) * args.x_row_stride + k;",
        "args.x + static_cast<int>((row0 + row) * args.x_row_stride) + k;",
        "huge_stride",
        "numbers",
    ),
    # The optimizer.
    Mutant(
        "moments_tables_read_early",
        _ADAMW,
        "stage_tables<kThreads>(shared);\n    __syncthreads();",
        "stage_tables<kThreads>(shared);",
        "adamw_step",
        "poison",
    ),
    Mutant(
        "moments_scale_replaced_while_it_is_read",
        _ADAMW,
        "if constexpr (kCodes) __syncwarp();",
        "",
        "adamw_step",
        "thread",
    ),
    Mutant(
        "moments_scale_stored_by_all",
        _ADAMW,
        "    if (lane == 0) {\n",
        "    {\n",
        "adamw_step",
        "thread",
    ),
    Mutant(
        "moments_scale_of_a_lane",
        _MOMENTS,
        "absmax_from_bits(warp_max(largest))",
        "absmax_from_bits(largest)",
        "adamw_step",
        "numbers",
        compiled=(_ADAMW,),
        quick=True,
    ),
    Mutant(
        "moments_without_a_number_encoded",
        _MOMENTS,
        "if (magnitude_bits(reciprocal) < kInfBits) {",
        "if (true) {",
        "adamw_step",
        "numbers",
        compiled=(_ADAMW,),
    ),
    Mutant(
        "moments_buckets_of_the_next_code",
        _MOMENTS,
        "t > thresholds[code + 1] ? 1 : 0",
        "t >= thresholds[code + 1] ? 1 : 0",
        "every_threshold",
        "numbers",
        compiled=(_ADAMW,),
    ),
    Mutant(
        "moments_buckets_too_wide",
        _MOMENTS,
        "using Signed = MapTables<6, 22, 127>;",
        "using Signed = MapTables<5, 22, 127>;",
        "every_threshold",
        "numbers",
        compiled=(_ADAMW,),
    ),
    Mutant(
        "moments_that_do_not_exist_in_the_scale",
        _ADAMW,
        "unsigned{MomentTables::Signed::kZero}",
        "0u",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "optimizer_reads_past_the_end",
        _ADAMW,
        "lane + i * kWarp < count ? held(",
        "lane + i * kWarp <= count ? held(",
        "adamw_step",
        "address",
    ),
    Mutant(
        "optimizer_writes_past_the_end",
        _ADAMW,
        "if (lane + i * kWarp < count) mine",
        "if (lane + i * kWarp <= count) mine",
        "adamw_step",
        "address",
    ),
    Mutant(
        "optimizer_takes_all_for_aligned",
        _ADAMW,
        "if (aligned && left >= kStateBlockSize) {",
        "if (left >= kStateBlockSize) {",
        "misaligned",
        "launch",
    ),
    Mutant(
        "optimizer_ignores_skip",
        _ADAMW,
        "if (factors.skip == 0.0f) {",
        "if (true) {",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "factors_of_the_first_parameter",
        _ADAMW,
        "load_factors(piece_at(pieces, found).factors)",
        "load_factors(piece_at(pieces, 0).factors)",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "factors_of_the_round_before",
        _ADAMW,
        "    if (chunk >= end) {",
        "    if (end == 0) {",
        "several_rounds",
        "numbers",
    ),
    Mutant(
        "parameter_before_the_chunks",
        _ADAMW,
        "piece_at(pieces, next).first_chunk <= chunk",
        "piece_at(pieces, next).first_chunk < chunk",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "more_parameters_than_a_launch_takes",
        _ADAMW,
        "pieces.count < Pieces::kMost;",
        "pieces.count <= Pieces::kMost;",
        "many_parameters",
        "address",
    ),
    Mutant(
        "division_by_a_reciprocal",
        _ADAMW,
        "return __fdiv_rn(a, b);",
        "return __fmul_rn(a, __frcp_rn(b));",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "random_numbers_of_the_first_block",
        _ADAMW,
        "piece.first_block + block);",
        "piece.first_block);",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "first_element_in_32_bits",
        _ADAMW,
        "piece.first_block = from.first / kStateBlockSize;",
        "piece.first_block = static_cast<std::int32_t>(from.first) / kStateBlockSize;",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "chunks_overlap",
        _ADAMW,
        "kChunk + warp * kStateBlockSize;",
        "kChunk + warp * (kStateBlockSize / 2);",
        "adamw_step",
        "numbers",
    ),
    # The machine code.
    Mutant(
        "optimizer_with_too_many_blocks_for_the_registers",
        _ADAMW,
        "constexpr int kResidentBlocks = 5;",
        "constexpr int kResidentBlocks = 9;",
        "adamw_step",
        "code",
    ),
    Mutant(
        "mma_swizzle_forgotten",
        _MMA,
        "return (row * kRowChunks + ((t >> 1) << 3 | low)) ^ (s << 1);",
        "return row * kRowChunks + (4 * t + s) + 0 * low;",
        "linear_4bit_mma",
        "layout",
    ),
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
    Mutant(
        "too_many_blocks_for_the_registers",
        _DX,
        "QKERN_KERNEL(kThreads, 2)",
        "QKERN_KERNEL(kThreads, 8)",
        "linear_4bit_dx_mma",
        "code",
    ),
)
