"""The instruction sets with products of bfloat16, whatever the processor.

Their kernels with intrinsics in plain C++, those twins beside the intrinsics themselves, planted
bugs, and the probe that selects ``avx512bf16``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lab import ROOT
from lab.emulated_cpu import backend, bfloat16, build
from lab.emulated_cpu.build import BFLOAT16
from lab.mutants import Mutant, plant, run_judge
from lab.processes import fresh_python
from qkern import env, testing
from qkern.backends import cpu
from qkern.testing import OPS, Case
from tests.ops import test_conformance

KERNELS = ROOT / "csrc" / "cpu"
TWINS = build.HERE / "avx512"
emulated = pytest.mark.skipif(BFLOAT16.missing() is not None, reason=str(BFLOAT16.missing()))
native = pytest.mark.skipif(cpu.missing_reason() is not None, reason="no native kernels")


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    yield
    backend.close()


levels = pytest.mark.parametrize("level", bfloat16.ISAS)
names = pytest.mark.parametrize("name", bfloat16.PRODUCTS)


def target_of(level: str) -> backend.EmulatedTarget:
    return backend.EmulatedTarget(bfloat16.FLAVOURS[level], level)


@emulated
@levels
def test_products_of_every_shape(level: str) -> None:
    assert bfloat16.check(level) is None


@emulated
@levels
@names
def test_a_part_of_the_table(name: str, level: str) -> None:
    spec, target = OPS[name], target_of(level)
    for dtype in bfloat16.ISAS[level]:
        for case in [case for case in spec.cases if case.dtype == dtype][::12]:
            testing.check(spec, case, target)


@emulated
@levels
@names
def test_bits_depend_on_neither_threads_nor_rows(name: str, level: str) -> None:
    spec, target, device = OPS[name], target_of(level), torch.device("cpu")
    for dtype in bfloat16.ISAS[level]:
        test_conformance.test_any_thread_count_gives_the_same_bits(spec, target, dtype, device)
        test_conformance.test_batch_invariant(spec, target, dtype, (37, 130), device)


@emulated
@levels
@names
def test_infinities(name: str, level: str) -> None:
    spec, target, device = OPS[name], target_of(level), torch.device("cpu")
    for dtype in bfloat16.ISAS[level]:
        test_conformance.test_nonfinite_activations_stay_in_their_row(spec, target, dtype, device)
        test_conformance.test_a_nonfinite_scale_stays_in_its_block(
            spec, target, 416, 40, dtype, device
        )


@emulated
@pytest.mark.parametrize("name", ["linear_4bit", "linear_4bit_dx"])
@pytest.mark.parametrize("scale", [0.8, 0.9, 1.0, 1.1])
def test_float16_products_whose_small_terms_add_up(name: str, scale: float) -> None:
    """All of a sum's terms have the same small errors, and the sum itself all but cancels.

    Rounding weights to float16 has 2^-12 of a term; here a term has 2^-17.
    """
    spec, case, size = OPS[name], Case((40, 1024, 1024), torch.float16), 1024
    inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(1))
    codes = torch.full((size, size // 2), 0x99, dtype=torch.uint8)
    negative = round(size / (1 + 0.28444138169288635 / 0.16093020141124725))
    (codes if spec.input_gradient else codes.T)[: negative // (2 - spec.input_gradient)] = 0x44
    weight = inputs["weight"]
    absmax = torch.full_like(weight.absmax, scale)
    inputs["weight"] = weight._replace(packed=codes.view_as(weight.packed), absmax=absmax)
    inputs[spec.main] = torch.full_like(inputs[spec.main], 1 + 7 / 1024)
    with target_of("amx").activate():
        (y,) = spec.run(inputs)
    x, weight = inputs[spec.main].double(), spec.exact_weight(inputs, case).mT.double()
    assert y.abs().max() < 0.5
    limit = 2.0**-17 * (x.abs() @ weight.abs()) + 2.0**-12 * y.abs()
    assert ((y - x @ weight).abs() <= limit).all()


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("mutant", bfloat16.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    kernels = plant(mutant, KERNELS, tmp_path)
    changed = [f"isa_{mutant.scope}.cpp"]
    program = build.build(
        bfloat16.FLAVOURS[mutant.scope], kernels, tmp_path / "build", only=changed
    )
    judge = "-m", "lab.emulated_cpu.bfloat16", str(program), mutant.scope
    found, done = run_judge([sys.executable, *judge])
    assert found == mutant.caught_by, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", bfloat16.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, KERNELS, tmp_path)


@emulated
def test_the_probe_decides_where_nothing_is_chosen() -> None:
    """Twins of dot products are slow, so their rate is known to be low, not what it is."""
    free, forced = (backend.server(BFLOAT16, isa) for isa in ("", "avx512bf16"))
    assert free.bfloat16_rate > 0
    assert (free.active == "avx512bf16") == (free.bfloat16_rate >= 1.25)
    assert (forced.active, forced.bfloat16_rate) == ("avx512bf16", 0)


@native
def test_a_rate_must_be_clearly_higher() -> None:
    pays = cpu.library().bfloat16_pays
    assert [pays(rate) for rate in (0.0, 0.5, 1.0, 1.2, 1.25, 1.9, 2.0)] == [False] * 4 + [True] * 3


@native
def test_only_a_choice_that_depends_on_the_rate_measures_it() -> None:
    program = """
import qkern
from qkern.backends import cpu
rates, widest = [cpu.library().bfloat16_rate()], cpu.available_isas()[-1]
for name in (widest, ""):
    cpu.set_isa(name)
    cpu.isa()
    rates.append(cpu.library().bfloat16_rate())
print(widest, *rates)
"""
    done = fresh_python("-c", program)
    widest, *rates = done.stdout.split()
    imported, forced, free = map(float, rates)
    assert (imported, forced) == (0, 0), done.stderr
    assert (free > 0) == (widest == "avx512bf16")


@pytest.mark.parametrize(
    ("rate", "active", "line"),
    [
        (1.94, "avx512bf16", "1.9x float32's rate: used"),
        (0.5, "avx512vnni", "0.5x float32's rate: not used"),
        (0.0, "amx", None),
    ],
)
def test_env_tells_what_the_probe_found(rate: float, active: str, line: str | None) -> None:
    found = env.report()
    found["native"] = {
        "built": True,
        "build": {},
        "instruction_sets": [active],
        "instruction_set": active,
        "bfloat16_rate": rate,
    }
    lines = [text for text in env._lines(found) if text.startswith("bfloat16 dot products")]
    assert [text.split("  ")[-1] for text in lines] == ([] if line is None else [line])


WORDS = re.compile(r"_mm(?:512_|256_mask)\w+|_tile_\w+")


def test_the_comparison_has_every_intrinsic_that_has_a_twin() -> None:
    named = set(WORDS.findall((TWINS / "intrinsics.cpp").read_text()))
    twins = "".join((TWINS / name).read_text() for name in ("immintrin.h", "amx_twins.h"))
    used = {word for path in KERNELS.glob("*.h") for word in WORDS.findall(path.read_text())}
    assert used <= set(re.findall(r"inline \S+ (_\w+)\(", twins)) <= named


def compared(folder: Path, name: str, *flags: str) -> Path:
    """The comparison, built against twins or intrinsics."""
    program = folder / name
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi"]
    command += ["-mavx2", "-mfma", "-mf16c", *flags, str(TWINS / "intrinsics.cpp")]
    done = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


AVX512 = ["f", "bw", "dq", "vl", "vnni", "vbmi", "bf16"]
AMX = ["amx-tile", "amx-bf16"]


@emulated
def test_twins_compute_what_the_intrinsics_do(tmp_path: Path) -> None:
    """Without the instructions, that both are called alike is all there is to see."""
    twins = compared(tmp_path, "twins", "-DQKERN_TWINS=1", f"-I{TWINS}")
    real = compared(
        tmp_path, "real", *(f"-mavx512{name}" for name in AVX512), *(f"-m{n}" for n in AMX)
    )
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").replace("avx512_", "avx512").split())
    if missing := {f"avx512{name}" for name in AVX512} - flags:
        pytest.skip(f"the processor lacks {', '.join(sorted(missing))}")
    arguments: list[list[str]] = [[]] + ([["tiles"]] if {"amx_tile", "amx_bf16"} <= flags else [])
    for more in arguments:
        outputs = [
            subprocess.run([str(p), *more], capture_output=True, text=True, check=True).stdout
            for p in (twins, real)
        ]
        for twin, truth in zip(*(output.splitlines() for output in outputs), strict=True):
            assert twin == truth
