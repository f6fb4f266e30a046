"""Bugs in the dense products by experts."""

from __future__ import annotations

from lab.mutants import Mutant

_SOURCE = "grouped_matmul_into.cu"
_SCOPE = "grouped_matmul_into"


def _planted(
    name: str, old: str, new: str, caught_by: str = "numbers", quick: bool = False
) -> Mutant:
    return Mutant(name, _SOURCE, old, new, _SCOPE, caught_by, quick=quick)


def _in_groups(name: str, old: str, new: str, caught_by: str = "numbers") -> Mutant:
    return Mutant(name, "groups.cuh", old, new, _SCOPE, caught_by, compiled=(_SOURCE,))


INTO = (
    # What is brought to shared memory.
    _planted(
        "terms_replaced_while_they_are_multiplied",
        "    __syncthreads();\n    of_a.place(",
        "    of_a.place(",
    ),
    _planted(
        "terms_multiplied_before_they_are_there",
        "    of_b.place(args.b.dtype, b_bits, shared.terms.b);\n    __syncthreads();\n",
        "    of_b.place(args.b.dtype, b_bits, shared.terms.b);\n",
        "thread",
    ),
    _planted(
        "runs_of_16_rows_over_each_other",
        "thread / 16 % 2 * 16 + thread / kWarp;",
        "thread / 16 % 2 * 8 + thread / kWarp;",
        "poison",
    ),
    _planted(
        "terms_of_a_run_left_out", "return i % 2 * 8 + i / 2 * 32;", "return i * 16;", "poison"
    ),
    _planted("rows_beyond_the_last", "row + rows < count && term", "term", "address"),
    _planted("terms_of_the_next_expert", " && term + on < terms ?", " ?"),
    _planted(
        "bfloat16_read_as_float16",
        "if (dtype == DType::kBFloat16) value = to_float(BFloat16{half});",
        "if (dtype == DType::kBFloat16) value = to_float(Float16{half});",
    ),
    # Sums.
    _planted(
        "a_sum_does_not_restart",
        "total[i][j] = __fadd_rn(total[i][j], sum[i][j]);\n        sum[i][j] = 0.0f;",
        "total[i][j] = __fadd_rn(total[i][j], sum[i][j]);",
    ),
    _planted(
        "sums_over_terms_that_are_read",
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kThreadRows; ++i) {",
        "#pragma unroll\n  for (int i = 0; i < kThreadRows; ++i) {",
        "thread",
    ),
    _planted(
        "sums_of_others_read_early",
        "  __syncthreads();\n  in_dtype(args.out_dtype",
        "  in_dtype(args.out_dtype",
        "poison",
        quick=True,
    ),
    _planted(
        "a_share_left_out",
        "for (int other = 1; other < Shape::kShares;",
        "for (int other = 1; other < Shape::kShares - 1;",
    ),
    _planted("alpha_left_out", "__fmul_rn(value, args.alpha)", "value"),
    _planted("what_was_there_is_replaced", "if (args.accumulate) value =", "if (false) value ="),
    _planted(
        "columns_beyond_the_last", "if (row >= rows || column >= columns)", "if (row >= rows)"
    ),
    # Whose.
    _planted("rows_of_no_expert_have_terms", "owned ? args.terms : 0,", "args.terms,"),
    _planted("b_of_the_first_expert", "owned ? found.expert * args.b_stride : 0", "0"),
    _planted(
        "results_of_the_first_expert",
        "(expert * args.rows + row0) * args.columns",
        "row0 * args.columns",
    ),
    _planted("terms_of_the_first_expert", "found.first * args.b.term_stride + column0", "column0"),
    _in_groups(
        "terms_to_the_last_row",
        "larger(begin, end_of(groups, expert, m)) - begin, 0};",
        "m - begin, 0};",
    ),
    _in_groups(
        "experts_of_half_a_warp",
        "for (int step = kWarp / 2; step > 0; step /= 2) {",
        "for (int step = kWarp / 4; step > 0; step /= 2) {",
        "launch",
    ),
    Mutant(
        "rows_of_experts_that_end_before_they_begin",
        "groups.cuh",
        "larger(begin, end_of(groups, expert, m)) - begin, 0};",
        "end_of(groups, expert, m) - begin & m, 0};",
        "grouped_into_offsets",
        "numbers",
        compiled=(_SOURCE,),
    ),
    _in_groups(
        "experts_of_a_warp_alone",
        "for (int before = lane; before < expert; before += kWarp) {",
        "for (int before = lane; before < expert && before < kWarp; before += kWarp) {",
    ),
)
