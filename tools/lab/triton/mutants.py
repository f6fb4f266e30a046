"""The planted bugs: each one small replacement in a copy of triton_kernels.

What can notice one:

    numbers   a wrong result
    bounds    an access outside the tensors of a launch
    race      two programs that touch one element, of which one writes
    undefined two values that one store writes to one element
    rounding  an approximate, contracted or flushed rounding in the compilers' text
    offsets   an offset into a tensor that has 32 bits
    figures   the machine code: spills, widths of accesses, no matrix instructions
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
    scope: str
    """Cases of `judge.CASES`, or calls of `static.compile` (with an architecture)."""
    caught_by: str
    quick: bool = False


MUTANTS = (
    # What the encoders compute.
    Mutant(
        "approximate_reciprocal",
        "codec.py",
        "tl.math.div_rn(one, absmax)",
        "one / absmax",
        "quantize_4bit-fp32-nf4 80",
        "rounding",
        quick=True,
    ),
    Mutant(
        "a_block_of_zeros_is_divided",
        "codec.py",
        "tl.where(absmax == 0.0, 0.0, tl.math.div_rn(one, absmax))",
        "tl.math.div_rn(one, absmax)",
        "quantize_4bit",
        "numbers",
    ),
    Mutant(
        "a_nan_is_ignored",
        "codec.py",
        "bits = tl.where(bits >= _INF_BITS, _QUIET_NAN_BITS, bits)",
        "bits = tl.where(bits >= _INF_BITS, _INF_BITS, bits)",
        "quantize_4bit",
        "numbers",
    ),
    Mutant(
        "a_tie_takes_the_upper_code",
        "codec.py",
        "tl.where(t > threshold, step, 0)",
        "tl.where(t >= threshold, step, 0)",
        "quantize_4bit",
        "numbers",
        quick=True,
    ),
    Mutant(
        "the_sign_of_scaled_values",
        "quantize_4bit.py",
        "tl.abs(t) if SIGNED else t",
        "t",
        "quantize_4bit",
        "numbers",
    ),
    Mutant(
        "a_byte_beyond_the_last",
        "quantize_4bit.py",
        "byte < (n + 1) // 2",
        "byte <= (n + 1) // 2",
        "quantize_4bit",
        "bounds",
        quick=True,
    ),
    Mutant(
        "odd_sizes_lose_their_last_byte",
        "quantize_4bit.py",
        "byte < (n + 1) // 2",
        "byte < n // 2",
        "quantize_4bit",
        "numbers",
    ),
    Mutant(
        "a_short_block_is_read_whole",
        "quantize_8bit.py",
        "mask = inside[:, None] if WHOLE else element < n",
        "mask = inside[:, None]",
        "quantize_8bit",
        "bounds",
    ),
    Mutant(
        "the_sums_last_bits_are_cut_off",
        "quantize_absmax.py",
        "kept | 1, kept)",
        "kept, kept)",
        "quantize_absmax",
        "numbers",
    ),
    Mutant(
        "programs_write_one_part",
        "quantize_absmax.py",
        "limbs_ptr + program * _LIMBS + limb",
        "limbs_ptr + limb",
        "quantize_absmax",
        "race",
    ),
    # Decoding.
    Mutant(
        "nibbles_exchanged",
        "codec.py",
        "tl.interleave(packed >> 4, packed & 15)",
        "tl.interleave(packed & 15, packed >> 4)",
        "dequantize_4bit",
        "numbers",
    ),
    Mutant(
        "nibbles_exchanged_where_rows_are_odd",
        "codec.py",
        "((element & 1) ^ 1) * 4",
        "(element & 1) * 4",
        "linear_4bit",
        "numbers",
    ),
    Mutant(
        "scales_of_other_groups",
        "codec.py",
        "(block >> _NESTED_SHIFT)",
        "(block >> (_NESTED_SHIFT - 1))",
        "dequantize_4bit",
        "bounds",
    ),
    Mutant(
        "scales_restored_by_a_fused_multiply_add",
        "launch.py",
        'return {"num_warps": self.num_warps, "enable_fp_fusion": False}',
        'return {"num_warps": self.num_warps, "enable_fp_fusion": True}',
        "dequantize_4bit-fp32-double_quant 80",
        "rounding",
    ),
    Mutant(
        "offsets_of_32_bits",
        "dequantize_4bit.py",
        "tl.program_id(0).to(tl.int64) * UNITS",
        "tl.program_id(0) * UNITS",
        "dequantize_4bit-fp32-double_quant 80",
        "offsets",
        quick=True,
    ),
    Mutant(
        "narrow_accesses",
        "dequantize_4bit.py",
        "WHOLE=n % UNIT.value == 0",
        "WHOLE=False",
        "dequantize_4bit-fp32-double_quant 80",
        "figures",
    ),
    # AdamW.
    Mutant(
        "an_approximate_root",
        "adamw_step.py",
        "tl.math.sqrt_rn(v)",
        "tl.sqrt(v)",
        "adamw_step-fp32-32bit 80",
        "rounding",
    ),
    Mutant(
        "an_approximate_quotient",
        "adamw_step.py",
        "tl.math.div_rn(m * step_size, denominator)",
        "m * step_size / denominator",
        "adamw_step-fp32-32bit 80",
        "rounding",
    ),
    Mutant(
        "the_program_is_of_the_parameter_before",
        "adamw_step.py",
        "_FIRST_PROGRAM) <= program",
        "_FIRST_PROGRAM) < program",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "programs_of_a_parameter_overlap",
        "adamw_step.py",
        "_FIRST_PROGRAM)) * BLOCKS",
        "_FIRST_PROGRAM)) * (BLOCKS // 2)",
        "adamw_step",
        "race",
        quick=True,
    ),
    Mutant(
        "a_skipped_parameter_is_changed",
        "adamw_step.py",
        "if skip == 0.0:",
        "if skip == skip:",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "a_short_block_of_a_parameter_is_read_whole",
        "adamw_step.py",
        "mask = inside[:, None] if WHOLE else element < n",
        "mask = inside[:, None]",
        "adamw_step",
        "bounds",
    ),
    Mutant(
        "moments_that_do_not_exist_count",
        "adamw_step.py",
        "values = values if WHOLE else tl.where(mask, values, 0.0)",
        "values = values",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "neighbours_draw_one_number",
        "adamw_step.py",
        "block_seed[:, None] + place[None, :].to(tl.uint32)",
        "block_seed[:, None] + (place[None, :] * 0).to(tl.uint32)",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "every_step_draws_the_same_numbers",
        "adamw_step.py",
        "_STEP = tl.constexpr(9)",
        "_STEP = tl.constexpr(8)",
        "adamw_step",
        "numbers",
    ),
    Mutant(
        "addresses_of_unknown_alignment",
        "adamw_step.py",
        "tl.multiple_of(address, _WIDEST) if ALIGNED else address",
        "address",
        "adamw_step-fp32-32bit 80",
        "figures",
    ),
    # Matmuls.
    Mutant(
        "x_read_beyond_its_columns",
        "linear_4bit.py",
        "mask=(rows[:, None] < M) & (k[None, :] < K)",
        "mask=rows[:, None] < M",
        "linear_4bit",
        "bounds",
    ),
    Mutant(
        "columns_that_do_not_exist_are_stored",
        "linear_4bit.py",
        "mask=(rows[:, None] < M) & (columns[None, :] < N))",
        "mask=rows[:, None] < M)",
        "linear_4bit",
        "undefined",
    ),
    Mutant(
        "parts_written_over_each_other",
        "linear_4bit.py",
        "y = y_ptr + (split * M + rows[:, None]) * N",
        "y = y_ptr + rows[:, None] * N",
        "linear_4bit",
        "race",
        quick=True,
    ),
    Mutant(
        "the_last_part_is_forgotten",
        "linear_4bit.py",
        "for _ in range(1, PARTS):",
        "for _ in range(2, PARTS):",
        "linear_4bit",
        "numbers",
    ),
    Mutant(
        "parts_overlap",
        "linear_4bit_dx.py",
        "tl.minimum((split + 1) * n_split, N)",
        "tl.minimum((split + 2) * n_split, N)",
        "linear_4bit_dx",
        "numbers",
    ),
    Mutant(
        "bias_added_to_every_part",
        "linear_4bit.py",
        "bias if config.parts == 1 else None",
        "bias",
        "linear_4bit",
        "numbers",
    ),
    Mutant(
        "a_tile_that_depends_on_the_batch",
        "launch.py",
        "        rows = _INVARIANT_ROWS\n",
        "        rows = max(rows, _INVARIANT_ROWS)\n",
        "batch_invariant",
        "numbers",
    ),
    Mutant(
        "float32_rounded_to_19_bits",
        "linear_4bit.py",
        'input_precision="ieee"',
        'input_precision="tf32"',
        "linear_4bit-fp32-512 80",
        "figures",
    ),
    Mutant(
        "16_bit_products_where_there_are_none",
        "launch.py",
        'return self.kind == "hip" or int(self.arch) >= 80',
        "return True",
        "linear_4bit-bf16-512 75",
        "figures",
    ),
    Mutant(
        "a_tile_too_large_for_the_registers",
        "launch.py",
        "(64, 64, 32, 8))\n_RDNA",
        "(64, 64, 32, 4))\n_RDNA",
        "linear_4bit-fp32-512 80",
        "figures",
    ),
)
