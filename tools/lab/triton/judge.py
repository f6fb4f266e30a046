"""Judges a copy of the kernels, in a process of its own.

``python -m lab.triton.judge FOLDER SCOPE [ARCHITECTURE]``: SCOPE is an entry of `CASES`, whose
cases run under ttsem, or with an ARCHITECTURE a call of `static.compile`. Prints ``caught by WHAT:
...`` and exits with 3 at the first mistake.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import qkern
from lab.mutants import report
from lab.triton import semantics
from qkern import testing
from qkern.testing import Case

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SM_90, SM_75 = semantics.DEVICES[:2]
FAULTS = {"oob_read": "bounds", "oob_write": "bounds", "race": "race", "poison": "undefined"}

CASES: dict[str, tuple[str, tuple[Case, ...]]] = {
    "quantize_4bit": (
        "quantize_4bit",
        (
            Case((65,)),
            Case((600,), values="ties"),
            Case((700,), values="nonfinite"),
            Case((512,), values="zeros"),
            Case((700,), HALF, format="fp4", values="special"),
        ),
    ),
    "quantize_4bit_long": ("quantize_4bit", (Case((18_001,), BFLOAT, 16384),)),
    "quantize_8bit_long": ("quantize_8bit", (Case((18_001,), BFLOAT, 16384),)),
    "dequantize_4bit": (
        "dequantize_4bit",
        (Case((65,), BFLOAT), Case((5, 4111), FLOAT, 32, double_quant=True)),
    ),
    "quantize_8bit": ("quantize_8bit", (Case((257,), FLOAT, 256),)),
    "quantize_absmax": (
        "quantize_absmax",
        (
            *(Case((n,), values="halfway") for n in testing.HALFWAY_TAILS),
            Case((300,)),
            Case((5000,), values="uneven"),
        ),
    ),
    "adamw_step": (
        "adamw_step",
        (
            Case((5, 515), FLOAT, 256, bits=32),
            Case((700,), BFLOAT, 256, bits=8, stochastic_rounding=True),
            Case((700,), FLOAT, 256, bits=8, values="huge"),
        ),
    ),
    "linear_4bit": (
        "linear_4bit",
        (
            Case((3, 37, 1056), HALF, double_quant=True, bias=True),
            Case((5, 70, 130), FLOAT, bias=True),
            Case((17, 37, 99), BFLOAT, 32),
        ),
    ),
    "linear_4bit_dx": ("linear_4bit_dx", (Case((5, 1100, 64), HALF), Case((3, 37, 99), FLOAT))),
    "grouped_linear_4bit": (
        "grouped_linear_4bit",
        (
            Case((50, 37, 96), HALF, double_quant=True, bias=True, groups=(2, 0, 19, 1, 20)),
            Case((9, 5, 32), groups=tuple(int(e in (1, 128, 140, 256, 280)) for e in range(300))),
        ),
    ),
    "grouped_linear_4bit_dx": ("grouped_linear_4bit_dx", (Case((9, 37, 99), groups=(3, 2)),)),
    "grouped_batch_invariant": (
        "grouped_linear_4bit",
        (Case((20, 20, 512), FLOAT, batch_invariant=True, groups=(17, 0, 3)),),
    ),
    "grouped_matmul_into": (
        "grouped_matmul_into",
        (
            Case((23, 20, 70), BFLOAT, mixed=True, groups=(3, 0, 18)),
            Case((70, 70, 40), HALF, mixed=True, accumulate=True, groups=(66, 0, 3)),
            Case((23, 70, 20), FLOAT, own_results=True, groups=(3, 0, 18)),
            Case((9, 5, 32), own_results=True, groups=tuple(int(e % 37 == 1) for e in range(300))),
        ),
    ),
    "batch_invariant": ("linear_4bit", (Case((70, 300, 512), FLOAT, batch_invariant=True),)),
}


def take_kernels_from(folder: Path) -> None:
    """Make ``qkern.triton_kernels`` the package in ``folder``."""
    name = "qkern.triton_kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    qkern.triton_kernels = package  # type: ignore[attr-defined]


def judge_numbers(scope: str) -> str | None:
    """What the cases of a scope notice."""
    name, cases = CASES[scope]
    spec = testing.OPS[name]
    if scope == "quantize_absmax":
        target = semantics.SemanticsTarget(SM_90)
        if found := noticed(lambda: semantics.check_exact_means(target)):
            return found
    for case in cases:
        if found := noticed(functools.partial(check_case, spec, case)):
            return f"{found.partition(':')[0]}: {case}:{found.partition(':')[2]}"
    return None


def noticed(check: Callable[[], None]) -> str | None:
    """What is wrong by a check, starting with its kind."""
    from ttsem.sanitize import KernelFault

    try:
        check()
    except KernelFault as fault:
        return f"{FAULTS[fault.fault.kind]}: {fault}"
    except AssertionError as wrong:
        return f"numbers: {wrong}"
    return None


def check_case(spec: testing.OpSpec, case: Case) -> None:
    """Raise an error for what is wrong in one case."""
    # Few processors split what is one tile of rows, and not what is several.
    target = semantics.SemanticsTarget(SM_75 if case.batch_invariant else SM_90)
    testing.check(spec, case, target, "cpu")
    if case.batch_invariant:
        inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator())
        with target.activate():
            (whole,) = spec.run(inputs)
            (row,) = spec.run(inputs | {"x": inputs["x"][:1]})
        testing.assert_bitwise(row, whole[:1])


def judge_code(scope: str, architecture: str) -> str | None:
    """What the compiled launches of a call show."""
    from lab.triton.static import budget, figures, rules
    from lab.triton.static import compile as compiler

    arch = budget.architecture(architecture)
    call = compiler.calls()[scope]
    committed = budget.read_table()
    with compiler.compiling(arch) as launched:
        call()
        for compiled in launched:
            if faults := rules.offset_faults(compiled):
                return f"offsets: {compiled.name}: {faults}"
            if (
                "linear" not in scope
                and "matmul" not in scope
                and (faults := rules.rounding_faults(compiled))
            ):
                return f"rounding: {compiled.name}: {faults}"
            found = figures.of(scope, compiled, arch)
            row = committed[budget.key_of(found)]
            if faults := [*budget.faults(found), *budget.regressions(found, row)]:
                return f"figures: {compiled.name}: {faults}"
    return None


def main(folder: str, scope: str, architecture: str = "") -> None:
    """Command line."""
    take_kernels_from(Path(folder))
    found = judge_code(scope, architecture) if architecture else judge_numbers(scope)
    report(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
