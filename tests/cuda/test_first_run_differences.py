"""What the page of a first run says of measured times: which choices of the model are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from lab.cuda.first_run import differences, summary

SHAPE = (4096, 4096)


def rows(
    m: int,
    chosen: str,
    measured: dict[str, float],
    modelled: dict[str, float],
    op: str = "forward",
    shape: tuple[int, int] = SHAPE,
    **peers: float,
) -> list[dict[str, Any]]:
    """The records of a product; times in microseconds."""
    about = {"op": op, "shape": list(shape), "m": m}
    found = [about | {"name": name, "ms": us / 1e3} for name, us in peers.items()]
    for path, us in measured.items():
        extra = {"path": path, "chosen": chosen, "modelled_ms": modelled[path] / 1e3}
        found.append(about | {"name": f"qkern {path}", "ms": us / 1e3} | extra)
    if chosen in measured:
        extra = {"path": chosen, "chosen": chosen, "modelled_ms": modelled[chosen] / 1e3}
        ours = {"name": "qkern", "ms": measured[chosen] / 1e3, "host_us": 22.0}
        found.insert(0, about | ours | extra)
    return found


def content(*groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "results": [row for group in groups for row in group],
        "limits": {"copy_gb_s": 4300.0, "matmul_gflops": {"bfloat16": 788_000.0}},
        "machine": {"megahertz": 1980.0},
        "notes": ["one", "one"],
    }


FEW = {"vector": 10.0, "mma": 12.0, "gemm": 90.0}
MANY = {"vector": 900.0, "mma": 300.0, "gemm": 100.0}
PEERS = {"dense": 24.0, "bitsandbytes": 18.0}
WRONG = content(
    rows(1, "vector", {"vector": 11.0, "mma": 15.0, "gemm": 99.0}, FEW, dense=22.0),
    rows(
        16, "mma", {"vector": 40.0, "mma": 12.0, "gemm": 99.0}, FEW, dense=24.0, bitsandbytes=18.0
    ),
    rows(256, "mma", {"vector": 999.0, "mma": 240.0, "gemm": 80.0}, MANY, dense=60.0),
)


def page_of(times: dict[str, Any]) -> str:
    return summary.page({}, [], times, [], 1)


def test_wrong_choices_are_named_with_what_they_cost() -> None:
    page = page_of(WRONG)
    assert "fastest, or within 3% of it, in 2 of 3 products" in page
    assert "the choices cost 1.44 times the fastest on average" in page  # the cube root of 3
    line = "- forward 4096x4096 M=256: `mma` is chosen and takes 240.0 us, `gemm` 80.0: 3.00 times."
    assert line in page
    assert "M=16: `" not in page
    # The crossover is told beside the model's.
    measured = "vector from 1, mma from 16, gemm from 256"
    assert f"| forward | 4096x4096 | {measured} | vector from 1, gemm from 256 | " in page
    assert "| vector from 1, mma from 16 | **differs** |" in page
    assert "| forward | 256 | mma 240.0, **gemm 80.0** (0.80) |" in page


def test_ratios_tell_which_constant_is_wrong() -> None:
    page = page_of(WRONG)
    assert "| forward | mma | 1.12 (1.00 to 1.25) | 0.80 (0.80 to 0.80) |  | " in page
    assert "| forward | vector | 2.55 (1.10 to 4.00) | 1.11 (1.11 to 1.11) |  | " in page


def test_a_line_tells_launches_from_rates() -> None:
    slow = [rows(m, "mma", {"mma": 5.0 + 2.0 * m}, {"mma": 1.0 * m}) for m in (1, 16, 256, 4096)]
    assert "| 5.0 us + 2.00 x |" in page_of(content(*slow))
    assert differences.line([(4.0, 6.0), (4.0, 6.0)]) == (0.0, 1.5)
    # Errors count by their share: the longest time does not bend the line of the others.
    us, factor = differences.line([(1.0, 3.0), (2.0, 4.0), (4.0, 6.0), (1000.0, 1102.0)])
    assert us == pytest.approx(2.0, abs=0.3)
    assert factor == pytest.approx(1.1, abs=0.03)


def test_peers_and_limits() -> None:
    page = page_of(WRONG)
    assert "copies 4300 GB/s, bfloat16 products of torch 788.0 TFLOP/s" in page
    assert "processors ran at 1980 MHz" in page
    assert "| op | M | 1 | 16 | 256 |" in page
    assert "| forward | x dense | 2.00 | 2.00 | 0.25 |" in page
    assert "| forward | x bitsandbytes |  | 1.50 |  |" in page
    assert "| forward | host us | 22 | 22 | 22 |" in page
    assert page.count("- one") == 1


def test_a_right_model_has_nothing_to_say() -> None:
    page = page_of(content(rows(1, "vector", FEW, FEW), rows(256, "gemm", MANY, MANY)))
    assert "in 2 of 2 products; the choices cost 1.00 times" in page
    assert "differs" not in page
    assert "**" not in page.split("## Times")[1]
    # A path that is never chosen and never the fastest.
    assert "`mma` is chosen nowhere, and was the fastest nowhere: leave it so." in page


@pytest.mark.parametrize(
    ("at_64", "at_512", "advice"),
    [
        (
            40.0,
            55.0,
            "in 2 of 3 products, from M=64 on, 1.58 times as fast as what is chosen: make",
        ),
        (
            99.0,
            55.0,
            "in 1 of 3 products, from M=512 on, 2.00 times as fast as what is chosen: make",
        ),
        (99.0, 500.0, "was the fastest nowhere: leave it so."),
    ],
)
def test_a_path_that_is_only_forced_becomes_a_default_where_it_pays(
    at_64: float, at_512: float, advice: str
) -> None:
    """The page decides over `wgmma`, or whatever comes next, by what was measured."""
    modelled = {"mma": 100.0, "wgmma": 60.0}
    page = page_of(
        content(
            rows(1, "mma", {"mma": 10.0, "wgmma": 30.0}, modelled),
            rows(64, "mma", {"mma": 50.0, "wgmma": at_64}, modelled),
            rows(512, "mma", {"mma": 110.0, "wgmma": at_512}, modelled),
        )
    )
    assert "`wgmma` is chosen nowhere" in page
    assert advice in page
    assert ("make it a default there" in page) == ("leave" not in advice)


def test_rarely_better_is_hardly_worth_it() -> None:
    usual = [
        rows(m, "mma", {"mma": 10.0, "wgmma": 30.0}, FEW | {"wgmma": 9.0}) for m in range(1, 9)
    ]
    one = rows(512, "mma", {"mma": 10.0, "wgmma": 5.0}, FEW | {"wgmma": 9.0})
    assert "in 1 of 9 products, from M=512 on, 2.00 times" in page_of(content(*usual, one))
    assert "hardly worth being a default" in page_of(content(*usual, one))


def test_a_chosen_path_that_failed_is_left_out_of_what_it_costs() -> None:
    """It is said among the failures; the page has the others' times."""
    (problem,) = differences.problems(rows(1, "vector", {"mma": 15.0}, FEW, dense=30.0))
    assert problem.chosen == "vector"
    assert problem.loss == 1.0
    page = page_of(content(rows(1, "vector", {"mma": 15.0}, FEW, dense=30.0)))
    assert "| forward | 1 | vector failed, **mma 15.0** |" in page


def test_times_that_never_came() -> None:
    assert "Choices" not in page_of(content())
    assert "Choices" not in page_of({})
    only_dense = content([{"op": "forward", "shape": [1, 1], "m": 1, "name": "dense", "ms": 1.0}])
    assert "Choices" not in page_of(only_dense)
