"""Asks sentryward whether a kernel's PTX is free of races for one launch.

A branch that depends on where a tensor lies (its alignment), which sentryward does not know, is
decided both ways: each way must be proved.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.cuda.static import figures, toolchain
from lab.ptx_prover import verify

from . import analysis, skeleton
from .launches import PROOFS, Proof
from .ptx import SkeletonError
from .structures import FLAG, INT, LONG, POINTER


@dataclass(frozen=True)
class Verdict:
    """What sentryward answered: ``race_free``, or the first other result."""

    result: str
    asked: int
    """How many times it was asked."""
    message: str = ""
    misaligned: tuple[str, ...] = ()
    """Tensors that were not 16-aligned then."""


def _parts(type_: type) -> Iterator[tuple[str, int, type]]:
    """Name, offset and type of a structure's fields, or of an array's elements."""
    if issubclass(type_, ctypes.Structure):
        for name, field in type_._fields_:  # type: ignore[misc]
            yield name, getattr(type_, name).offset, field
    elif issubclass(type_, ctypes.Array):
        for i in range(type_._length_):
            yield str(i), i * ctypes.sizeof(type_._type_), type_._type_


def _offset(type_: type, path: list[str]) -> tuple[int, type]:
    offset = 0
    for name in path:
        ((at, type_),) = ((at, part) for found, at, part in _parts(type_) if found == name)
        offset += at
    return offset, type_


_SCALARS = {LONG: "u64", INT: "u32", FLAG: "u8", POINTER: "u64"}


def _input(proof: Proof, entry: str, shared_bytes: int) -> dict[str, object]:
    declarations, arguments = [], []
    for path, value in proof.arguments.items():
        index, *fields = path.split(".")
        offset, type_ = _offset(proof.parameters[int(index)], fields)
        place: dict[str, object] = {"parameter": int(index)}
        if fields:
            place["offset"] = offset
        if isinstance(value, str):
            kind = {"type": "pointer", "space": "global", "object": value}
            declarations.append(place | kind)
        else:
            arguments.append(place | {"type": _SCALARS[type_], "value": value or 0})
    # The map of double quantisation, which the PTX text takes as one more parameter.
    map_ = {"type": "pointer", "space": "global", "object": "dynamic_map"}
    declarations.append({"parameter": len(proof.parameters)} | map_)
    launch: dict[str, object] = {"grid_dim": list(proof.grid), "block_dim": [proof.threads, 1, 1]}
    if shared_bytes:
        launch["dynamic_shared_bytes"] = shared_bytes
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": launch,
        "declarations": declarations,
        "arguments": arguments,
    }


def pointers(proof: Proof) -> dict[tuple[int, int], str]:
    """All pointers among the parameters, and the map that is the last one, for the skeleton."""
    found = {(len(proof.parameters), 0): "dynamic_map"}

    def walk(type_: type, index: int, offset: int, name: str) -> None:
        if type_ is POINTER:
            value = proof.arguments.get(name)
            found[index, offset] = value if isinstance(value, str) else analysis.NULL
        for part, at, part_type in _parts(type_):
            walk(part_type, index, offset + at, f"{name}.{part}")

    for index, type_ in enumerate(proof.parameters):
        walk(type_, index, 0, str(index))
    return found


def kernel_text(
    proof: Proof, architecture: int, kernels: Path = toolchain.KERNELS
) -> tuple[str, str]:
    """The PTX of the one kernel, and its entry's name.

    sentryward does not know arrays in device memory that are not parameters: the tables of 8-bit
    codes become the last parameter, which the kernel reads where it read the array.
    """
    source = kernels / proof.source
    defines = ("QKERN_CODEC_SELECT", "QKERN_EVEN_GROUPS") if proof.select else ()
    path = toolchain.compile_kernels(source, architecture, "ptx", defines=defines)
    text = path.read_text()
    parts = re.split(r"(?m)^(?=(?:\.visible )?(?:\.weak )?\.entry )", text)
    entries = [re.search(r"\.entry\s+(\w+)", part) for part in parts[1:]]
    names = [found[1] for found in entries if found]
    short = figures.demangle(names)
    index = short.index(proof.kernel)
    entry, body = names[index], parts[1 + index]
    # What follows the kernel's closing brace belongs to the file.
    body = body[: body.index("\n}") + 3]
    head, _, rest = body.partition(")")
    sizes = [int(size) for size in re.findall(r"\.b8 \w+\[(\d+)\]", head)]
    structures = [p for p in proof.parameters if issubclass(p, ctypes.Structure)]
    assert sizes == [ctypes.sizeof(p) for p in structures], f"{proof.kernel}: {sizes}"
    body = f"{head.rstrip()},\n\t.param .u64 {entry}_param_{len(proof.parameters)}\n){rest}"
    body = re.sub(
        r"mov\.u64\s+(%rd\d+), \w*kDevice(?:MapSigned|MomentTables)\w*;",
        rf"ld.param.u64 \1, [{entry}_param_{len(proof.parameters)}];\n\tcvta.to.global.u64 \1, \1;",
        body,
    )
    assert "kDevice" not in body
    return parts[0] + body, entry


def ask(proof: Proof, text: str, entry: str, shared_bytes: int) -> tuple[str, str]:
    """Sentryward's result for PTX, and what it says of it."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, question = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        ptx.write_text(text)
        question.write_text(json.dumps(_input(proof, entry, shared_bytes)))
        answer = verify(ptx, question, proof.timeout_s, memory_limit_mib=6000)
    first = (answer.get("diagnostics") or [{}])[0]
    where = first.get("details", {}).get("location", {}).get("line")
    line = "" if where is None else f" ({text.splitlines()[where - 1].strip()})"
    return answer["result"], f"{first.get('code')}: {first.get('message')}{line}"


def prove(proof: Proof, architecture: int, kernels: Path = toolchain.KERNELS) -> Verdict:
    """Sentryward's answer about the skeleton of a kernel in ``kernels``.

    ``race_free`` only if it is whichever of the tensors are not 16-aligned, as far as the kernel
    looks at that.
    """
    text, entry = kernel_text(proof, architecture, kernels)
    shared = 0
    if proof.shared is not None:
        size = f"sizeof({proof.shared})"
        shared = figures.constants(kernels / proof.source, [size])[size]
    objects = pointers(proof)
    try:
        tests = skeleton.tested_for_alignment(text, objects)
        names = sorted(set().union(*tests))
        tried: set[tuple[bool, ...]] = set()
        for count in range(len(names) + 1):
            for misaligned in itertools.combinations(names, count):
                answers = tuple(not test.isdisjoint(misaligned) for test in tests)
                if answers in tried:
                    continue
                tried.add(answers)
                reduced = skeleton.skeleton(text, objects, misaligned)
                result, message = ask(proof, reduced, entry, shared)
                if result != "race_free":
                    return Verdict(result, len(tried), message, misaligned)
    except SkeletonError as error:
        return Verdict("no skeleton", 0, str(error))
    return Verdict("race_free", len(tried))


def compiled_kernels(architecture: int) -> set[str]:
    """Names of the kernels in csrc/cuda, each with its template arguments."""
    names = set()
    for source in toolchain.sources(architecture):
        text = toolchain.compile_kernels(source, architecture, "ptx").read_text()
        found = re.findall(r"(?m)^(?:\.visible )?(?:\.weak )?\.entry\s+(\w+)", text)
        names.update(figures.demangle(found) if found else ())
    return names


def main() -> None:
    """``ARCHITECTURE [PART OF A NAME ...]``: prints what sentryward answers."""
    architecture, *parts = sys.argv[1:]
    for proof in PROOFS:
        named = not parts or any(part in str(proof) for part in parts)
        if named and int(architecture) in proof.architectures:
            start = time.monotonic()
            verdict = prove(proof, int(architecture))
            seconds = time.monotonic() - start
            print(f"sm_{architecture} {proof}: {verdict} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
