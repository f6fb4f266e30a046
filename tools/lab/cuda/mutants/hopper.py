"""Bugs in the kernels of Hopper's products."""

from __future__ import annotations

from lab.mutants import Mutant

_FORWARD = "linear_4bit_wgmma.cu"
_DX = "linear_4bit_dx_wgmma.cu"


_SWIZZLE = "(chunk ^ (line % 8));", "chunk;"


def _forward(name: str, old: str, new: str, caught_by: str, file: str = _FORWARD) -> Mutant:
    scope = "linear_4bit_wgmma"
    return Mutant(f"hopper_{name}", file, old, new, scope, caught_by, (_FORWARD,))


def _dx(name: str, old: str, new: str, caught_by: str, file: str = _DX) -> Mutant:
    scope = "linear_4bit_dx_wgmma"
    return Mutant(f"hopper_dx_{name}", file, old, new, scope, caught_by, (_DX,))


HOPPER = (
    # Fences, waits and barriers.
    _forward("operands_without_fence", "    wgmma_fence(now);\n", "", "launch"),
    _forward(
        "copies_without_fence",
        "    fence_async_proxy();\n    // The next tile",
        "    // The next tile",
        "launch",
    ),
    _forward("operands_replaced_in_flight", "wgmma_wait<1>();", "wgmma_wait<2>();", "schedule"),
    _forward("results_read_in_flight", "  wgmma_wait<0>();\n", "", "schedule"),
    _forward("refills_what_is_read", "kAhead = kStages - 2;", "kAhead = kStages - 1;", "schedule"),
    _forward(
        "waits_for_too_few_copies",
        "    cp_async_wait<Shared::kAhead - 1>();\n    fence",
        "    cp_async_wait<Shared::kAhead>();\n    fence",
        "schedule",
    ),
    _forward(
        "without_barrier",
        "are done for all.\n    __syncthreads();",
        "are done for all.",
        "poison",
    ),
    _forward(
        "sums_where_x_is_read",
        "<= sizeof(shared.x));\n  __syncthreads();",
        "<= sizeof(shared.x));",
        "schedule",
    ),
    _forward(
        "one_warp_closes_a_group",
        "    wgmma_commit();",
        "    if (thread < 32) wgmma_commit();",
        "launch",
    ),
    # Descriptors and layouts.
    _forward(
        "shared_memory_unaligned", "QKERN_DYNAMIC_SHARED_1024(", "QKERN_DYNAMIC_SHARED(", "launch"
    ),
    _forward("x_not_swizzled", *_SWIZZLE, "numbers", "ptx_hopper.h"),
    _forward(
        "pieces_apart",
        "shared.x[stage], 0, kMatrixPiece}",
        "shared.x[stage], 0, 2 * kMatrixPiece}",
        "poison",
    ),
    _forward("sums_conflict", "(column ^ (row / 2 % 4 * 8))", "column", "layout"),
    # Codes and scales.
    _forward("bytes_of_another_lane", "0x40u + 0x11u * t;", "0x40u + 0x11u * (3 - t);", "numbers"),
    _forward(
        "rows_of_another_order",
        "a[2 * half + step][2 + row] = pairs[1];",
        "a[2 * half + step][3 - row] = pairs[1];",
        "numbers",
    ),
    _forward("one_scale_for_both_halves", "if (half < kScales)", "if (half == 0)", "numbers"),
    _forward(
        "scales_of_halves_as_one",
        "const bool halves = args.weight.block_size < kTileK ||",
        "const bool halves = false &&",
        "numbers",
    ),
    _forward(
        "half_a_tile_forgotten", "(tile < tiles && thread % kRowCodes == 0)", "false", "numbers"
    ),
    _forward(
        "half_a_tile_of_x_cut_short",
        "copy_chunk < kLine / 2;",
        "copy_chunk < kLine / 4;",
        "numbers",
    ),
    _forward(
        "parts_in_one_place",
        "output.parts + blockIdx.z * output.m * output.columns + at;",
        "output.parts + at;",
        "poison",
        "linear.cuh",
    ),
    # The input gradient.
    _dx("operands_without_fence", "    wgmma_fence(now);\n", "", "launch"),
    _dx("weights_without_fence", "    fence_async_proxy();\n", "", "launch"),
    _dx("operands_replaced_in_flight", "wgmma_wait<1>();", "wgmma_wait<2>();", "schedule"),
    _dx("results_read_in_flight", "  wgmma_wait<0>();\n", "", "schedule"),
    _dx("two_buffers", "kBuffers = 3; ", "kBuffers = 2; ", "schedule"),
    _dx(
        "without_barrier", "are done for all.\n    __syncthreads();", "are done for all.", "poison"
    ),
    _dx("codes_read_early", "  __syncthreads();  // the table is there\n", "", "thread"),
    _dx(
        "lines_in_the_order_of_rows",
        "const int w_row = row_of_line(line);",
        "const int w_row = line;",
        "numbers",
    ),
    _dx(
        "panels_apart",
        "kPanel * sizeof(uint4), kMatrixPiece}",
        "2 * kPanel * sizeof(uint4), kMatrixPiece}",
        "launch",
    ),
    _dx("lines_not_swizzled", *_SWIZZLE, "numbers", "ptx_hopper.h"),
    _dx("lines_conflict", "const int half = lane % 2;", "const int half = lane / 4 % 2;", "poison"),
    _dx("dy_past_the_split", "tile < full_tiles || n < end - begin;", "true;", "address"),
    _dx(
        "rows_past_the_split",
        "tile < full_tiles || tile * kDepth + i * kPieceRows + w_row < end - begin) {",
        "true) {",
        "address",
    ),
    _dx(
        "columns_in_another_order",
        "4 * (j / 2) + 2 * row + j % 2",
        "4 * (j % 4) + 2 * row + j / 4",
        "numbers",
    ),
)
