"""The emulator that runs the CUDA kernels on a CPU finds what it is there to find.

`lab/cuda/emulator/selftest` has small kernels: right ones, and ones with a single mistake.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from lab.cuda.emulator import build

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

SCHEDULES = tuple(
    (order, seed, copies)
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
    for copies in ("late", "early")
)

RIGHT = (
    *("reverse", "reverse_warp", "uninitialised", "blocks_write_their_own", "counted_by_atomics"),
    *("sum_rows", "copy_zero_fill", "shuffles", "votes", "ldmatrix_feeds_mma", "words", "warp_max"),
    "warp_sum",
    *("mma_f16_k8", "mma_f16_k16", "mma_bf16_k8", "mma_bf16_k16"),
    *("conversions", "byte_perm", "never_contracted", "grids", "launch_limits"),
    *("product_128_f16", "product_128_bf16", "product_256_f16", "product_256_bf16"),
    *("product_128_f16_transposed", "product_128_bf16_transposed"),
    *("product_256_f16_transposed", "product_256_bf16_transposed", "products_in_flight"),
)

REFUSED = {
    "divergent_sites": "divergent barrier: other threads wait in __syncthreads at barriers.cpp",
    "divergent_return": "divergent barrier: thread 7 has left the kernel",
    "deadlock": "32 wait in __syncwarp",
    "static_shared_too_large": "49153 bytes of static shared memory",
    "failure_while_ignored": "given up (self test at barriers.cpp",
    "misaligned_load": "misaligned address (load_global16",
    "misaligned_store": "misaligned address (store_global16",
    "misaligned_words": "misaligned address (load_words",
    "misaligned_copy": "misaligned address (cp_async16",
    "copy_beyond_shared": "outside shared memory",
    "lane_not_in_mask": "lacks the calling lane 0",
    "mask_beyond_block": "names lanes that the block does not have",
    "mask_of_left_lane": "has left the kernel while lanes wait for it",
    "shuffle_outside_mask": "reads a lane outside the mask",
    "different_operations": "waits with the same mask",
    "mma_of_half_a_warp": "left the kernel",
    "product_without_fence": "without wgmma_fence of a",
    "product_written_after_fence": "a was written after wgmma_fence",
    "product_without_proxy_fence": "written without fence_async_proxy",
    "product_of_one_warp": "warp 1 left the kernel without a call",
    "product_descriptors_of_warps": "in another warp of the warpgroup 0x",
    "product_descriptors_of_lanes": "lanes have different descriptors",
    "product_stride": "has a stride that is no multiple of 1024 bytes",
    "product_layout": "has another layout than the 128-byte swizzle",
    "product_unaligned": "starts at no multiple of 1024 bytes",
    "product_undeclared_alignment": "starts at no multiple of 1024 bytes",
    "product_beyond_shared": "b is outside dynamic shared memory",
    "product_part_of_a_warpgroup": "the block has 96 threads",
    "address_outside_shared": "outside shared memory (shared_address",
}
"""Mistakes that end a launch under every schedule, and what is said of them."""

WRONG = (
    *("reverse_without_barrier", "reverse_without_trailing_barrier"),
    *("reverse_warp_without_barrier", "copy_over_what_is_read"),
)
"""Mistakes that give a wrong result under every schedule."""

RACES_WHEN_LATE = ("products_without_trailing_barrier",)
WRONG_WHEN_LATE = (
    *("sum_rows_without_wait", "sum_rows_waiting_too_little", "product_read_before_wait"),
    *("products_one_stage", "products_one_operand", *RACES_WHEN_LATE),
)
REFUSED_WHEN_LATE = {"products_fence_before_wait": "written without fence_async_proxy"}
"""Mistakes that go unnoticed where cp.async and products are done at once."""

OUT_OF_BOUNDS = (
    *("global_out_of_bounds", "static_shared_out_of_bounds", "dynamic_shared_out_of_bounds"),
)
RACES = (*WRONG, "blocks_write_the_same", "product_without_barrier")
LATE = tuple(s for s in SCHEDULES if s[2] == "late")
EARLY = tuple(s for s in SCHEDULES if s[2] == "early")


def selftest(
    name: str, schedule: tuple[str, int, str], variant: str = "plain", capability: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one of them; on a device that has products of warpgroups where it is about these."""
    if capability is None:
        capability = 90 if name.startswith("product") else 80
    program = build.build(variant) / "emulator_selftest"
    command = [str(program), name, schedule[0], str(schedule[1]), schedule[2], str(capability)]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )


def outcomes(name: str, schedules: tuple[tuple[str, int, str], ...] = SCHEDULES) -> set[str]:
    return {selftest(name, schedule).stdout.strip() for schedule in schedules}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(name: str) -> None:
    assert outcomes(name) == {"ok"}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_that_end_a_launch(name: str) -> None:
    for outcome in outcomes(name):
        assert outcome.startswith("failed: ")
        assert REFUSED[name] in outcome


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_that_change_the_result(name: str) -> None:
    assert outcomes(name) == {"wrong: result"}


@pytest.mark.parametrize("name", WRONG_WHEN_LATE)
def test_a_missing_wait_shows_when_copies_are_late(name: str) -> None:
    assert outcomes(name, LATE) == {"wrong: result"}
    assert outcomes(name, EARLY) == {"ok"}


@pytest.mark.parametrize("name", REFUSED_WHEN_LATE)
def test_mistakes_that_end_a_launch_when_copies_are_late(name: str) -> None:
    for outcome in outcomes(name, LATE):
        assert outcome.startswith("failed: ")
        assert REFUSED_WHEN_LATE[name] in outcome
    assert outcomes(name, EARLY) == {"ok"}


@pytest.mark.parametrize("capability", [80, 100])
def test_only_sm_90_has_products_of_warpgroups(capability: int) -> None:
    for name in ("product_128_f16", "products_in_flight"):
        done = selftest(name, SCHEDULES[0], capability=capability)
        assert done.stdout.startswith("failed: needs sm_90a (")


def test_before_sm_80_there_is_no_bfloat16_mma() -> None:
    assert selftest("mma_bf16_k8", SCHEDULES[0], capability=75).stdout.startswith("failed: bfloat")
    for name in ("mma_f16_k16", "mma_f16_k8"):
        assert selftest(name, SCHEDULES[0], capability=75).stdout == "ok\n"


def test_every_kernel_of_the_program_is_tested() -> None:
    names = set()
    for file in (build.HERE / "selftest").glob("*.cpp"):
        table = file.read_text().partition("\nTests ")[2]
        names |= set(re.findall(r'\{"(\w+)",', table))
    known = {*RIGHT, *REFUSED, *WRONG, *WRONG_WHEN_LATE, *OUT_OF_BOUNDS, *RACES}
    known |= {*REFUSED_WHEN_LATE}
    assert names == known


@pytest.mark.slow
@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_address_sanitizer_finds(name: str) -> None:
    for schedule in SCHEDULES[::2]:
        assert "heap-buffer-overflow" in selftest(name, schedule, "address").stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds(name: str) -> None:
    for schedule in SCHEDULES:
        assert "data race" in selftest(name, schedule, "thread").stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES_WHEN_LATE)
def test_thread_sanitizer_finds_what_products_read_late(name: str) -> None:
    for schedule in LATE:
        assert "data race" in selftest(name, schedule, "thread").stderr
    for schedule in EARLY:
        assert selftest(name, schedule, "thread").stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_instrumented_builds_accept_right_kernels(variant: str) -> None:
    for name in (*RIGHT, *REFUSED):
        done = selftest(name, SCHEDULES[4], variant)
        assert done.stderr == "", name
        assert done.stdout.startswith("ok" if name in RIGHT else "failed: "), name
