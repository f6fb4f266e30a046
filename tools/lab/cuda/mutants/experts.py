"""Bugs in the products by experts: which block does what, and by whose weight."""

from __future__ import annotations

from lab.mutants import Mutant

_GROUPS = "groups.cuh"
_MMA = "linear_4bit_mma.cu"
_DX = "linear_4bit_dx_mma.cu"
_VECTOR = "linear_4bit_vector.cu"
_TILED = "linear_4bit_tiled.cu"


def _planted(
    name: str, old: str, new: str, kernel: str, source: str, caught_by: str, quick: bool = False
) -> Mutant:
    """In the file that all kernels by experts share, compiled for one of them."""
    scope = f"grouped_{kernel}"
    return Mutant(name, _GROUPS, old, new, scope, caught_by, compiled=(source,), quick=quick)


EXPERTS = (
    # Which tile.
    _planted(
        "tile_of_the_next_expert",
        "return {expert, at, end - at, left * kTileRows};",
        "return {expert + 1 < groups.experts ? expert + 1 : 0, at, end - at, left * kTileRows};",
        *("linear_4bit_mma", _MMA, "numbers"),
    ),
    _planted(
        "group_ends_a_row_late",
        "return {expert, at, end - at, left * kTileRows};",
        "return {expert, at, end - at + 1, left * kTileRows};",
        *("linear_4bit_vector", _VECTOR, "thread"),
    ),
    _planted(
        "group_begins_a_row_late",
        "return {expert, at, end - at, left * kTileRows};",
        "return {expert, at + 1, end - at - 1, left * kTileRows};",
        *("linear_4bit_dx_mma", _DX, "poison"),
    ),
    _planted(
        "last_tile_of_a_run_left_out",
        "up_to <= index ? 1 : 0",
        "up_to <= index + 1 ? 1 : 0",
        *("linear_4bit_tiled", _TILED, "poison"),
    ),
    _planted(
        "scan_leaves_a_run_out",
        "if (lane >= step) up_to += other;",
        "if (lane > step) up_to += other;",
        *("linear_4bit_tiled", _TILED, "poison"),
    ),
    _planted(
        "tiles_rounded_down",
        "static_cast<unsigned>(end - begin) + kTileRows - 1) / kTileRows",
        "static_cast<unsigned>(end - begin)) / kTileRows",
        *("linear_4bit_mma", _MMA, "poison"),
    ),
    _planted(
        "grid_without_rows_of_no_expert",
        "experts + 1 < m ? experts + 1 : m;",
        "experts < m ? experts : m;",
        *("linear_4bit_vector", _VECTOR, "poison"),
    ),
    _planted(
        "rows_of_no_expert_left_as_they_are",
        "if (row0 >= found.rows) return;",
        "return;",
        *("linear_4bit_tiled", _TILED, "poison"),
    ),
    _planted(
        "one_row_of_no_expert_too_few",
        "found.rows - row0 < tile_rows ? found.rows - row0 : tile_rows;",
        "found.rows - row0 < tile_rows ? found.rows - row0 - 1 : tile_rows;",
        *("linear_4bit_mma", _MMA, "poison"),
    ),
    # What of the offsets.
    _planted(
        "int64_read_as_int32",
        "  if (groups.wide) {",
        "  if (false) {",
        *("linear_4bit_tiled", _TILED, "numbers"),
        quick=True,
    ),
    _planted(
        "ends_beyond_x",
        "  return end < m ? end : m;",
        "  return end;",
        *("offsets", _MMA, "address"),
    ),
    _planted(
        "low_half_of_a_negative_end",
        "return end < 0 ? 0 : end < m",
        "return end < m",
        *("offsets", _VECTOR, "numbers"),
    ),
    _planted(
        "ends_that_descend",
        "    end = larger(at, end_of(groups, ++expert, m));",
        "    end = end_of(groups, ++expert, m);",
        *("offsets", _TILED, "poison"),
    ),
    # Whose weight, bias and rows.
    _planted(
        "codes_of_the_first_expert",
        "  own.packed += expert * groups.stride.packed;",
        "",
        *("linear_4bit_vector", _VECTOR, "numbers"),
    ),
    _planted(
        "scales_of_the_first_expert",
        "own.scales.absmax) + expert * groups.stride.absmax;",
        "own.scales.absmax);",
        *("linear_4bit_dx_mma", _DX, "numbers"),
    ),
    _planted(
        "nested_scales_of_the_first_expert",
        "    own.scales.nested_absmax += expert * groups.stride.nested_absmax;\n",
        "",
        *("linear_4bit_vector", _VECTOR, "numbers"),
    ),
    _planted(
        "nested_offset_of_the_first_expert",
        "    own.scales.nested_offset += expert;\n",
        "",
        *("linear_4bit_mma", _MMA, "numbers"),
    ),
    _planted(
        "bias_of_the_first_expert",
        "epilogue.bias += expert * own.rows;",
        "epilogue.bias += 0;",
        *("linear_4bit_mma", _MMA, "numbers"),
    ),
    _planted(
        "rows_of_the_expert_before",
        "  own.x += found.first * own.x_row_stride;\n",
        "",
        *("linear_4bit_tiled", _TILED, "numbers"),
    ),
    _planted(
        "tile_writes_past_its_group",
        "  output.m = own.m;\n",
        "",
        *("linear_4bit_mma", _MMA, "address"),
    ),
)
