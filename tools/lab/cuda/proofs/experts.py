"""The launches by experts that are proved free of races, made of those of one weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .structures import (
    GroupedMmaArgs,
    GroupedTiledArgs,
    GroupedVectorArgs,
    IntoArgs,
    MmaArgs,
    TiledArgs,
    VectorArgs,
)

if TYPE_CHECKING:
    from .launches import Proof

_OF_TWO = ("linear_4bit_tiled_kernel<float, false>", "linear_4bit_dx_mma_kernel<BFloat16, 64, 3>")
"""Kernels with large tiles that are asked about with two experts all the same."""
_GROUPED = {MmaArgs: GroupedMmaArgs, TiledArgs: GroupedTiledArgs, VectorArgs: GroupedVectorArgs}


def by_experts(proofs: Iterable[Proof]) -> Iterator[Proof]:
    """The same of experts and of rows of none, a block each.

    There are two experts where tiles are small, else one: a proof takes longer for each block.
    The kernels are asked about in a form in which all have as many rows (``QKERN_EVEN_GROUPS``):
    what lies in memory, and so where rows end, is unknown to the prover. The search that this
    form leaves out touches no shared memory.
    """
    for proof in proofs:
        parameters = proof.parameters[0]
        # There is no sum of parts by experts, and no kernel for single rows of float32.
        if parameters not in _GROUPED or "vector_kernel<float, 1" in proof.kernel:
            continue
        fields = {path.removeprefix("0."): value for path, value in proof.arguments.items()}
        rows = fields["m"]
        assert isinstance(rows, int)
        # One sum of the whole contraction.
        if "split_length" in fields:
            fields["split_length"] = fields["rows" if "dx" in proof.kernel else "cols"]
        experts = 2 if rows in (1, 13) or proof.kernel in _OF_TWO else 1
        output = "output." if "output.y" in fields else ""
        fields[f"{output}y"] = "y"
        fields |= {name: None for name in fields if name.endswith("parts")}
        fields |= {name: (experts + 1) * rows for name in fields if name in ("m", "output.m")}
        yield replace(
            proof,
            kernel=f"grouped_{proof.kernel}",
            parameters=(_GROUPED[parameters],),
            arguments={
                **{f"0.all.{name}": value for name, value in fields.items()},
                "0.groups.offsets": "offsets",
                "0.groups.experts": experts,
                # Of whole weights, whatever these are: nothing is written there.
                "0.groups.stride.packed": 1 << 20,
                "0.groups.stride.absmax": 1 << 20,
                "0.groups.stride.nested_absmax": 1 << 12,
            },
            grid=(experts + 1, 1, 1),
        )


_FLOAT, _BFLOAT, _HALF = range(3)
"""Numbers of dtypes."""


def into() -> Iterator[dict[str, Any]]:
    """What is proved of the dense products by experts: for each kernel, fields of two proofs.

    In one matrices are row-major, in the other column-major: each factor is brought both ways, and
    in three dtypes. The tiles are not whole, and there are more terms than a tile has.
    """
    for rows, columns, depth, own in (
        *((16, 16, 128, False), (64, 64, 32, False)),
        *((16, 64, 32, True), (64, 64, 32, True)),
    ):
        m, n, terms = rows - 3, columns - 3, 2 * depth + 5
        # Rows of an expert and of none, or the terms of two experts; those of none are not read.
        all_rows, experts = (3 * terms, 2) if own else (2 * m, 1)
        for crossed in (False, True):
            of_a = (all_rows, 1) if own else (1, all_rows)  # across rows of the result, and terms
            of_b = (all_rows if own else terms, 1)
            if not crossed:
                of_a, of_b = (1, m) if own else (terms, 1), (1, n)
            dtypes = (_HALF, _FLOAT, _BFLOAT) if crossed else (_FLOAT, _BFLOAT, _FLOAT)
            arguments: dict[str, str | int | None] = {"0.a.data": "a", "0.b.data": "b"}
            for name, strides, dtype in zip("ab", (of_a, of_b), dtypes[:2], strict=True):
                arguments[f"0.{name}.dtype"] = dtype
                arguments[f"0.{name}.stride"], arguments[f"0.{name}.term_stride"] = strides
            arguments |= {"0.out": "out", "0.out_dtype": dtypes[2], "0.rows": m, "0.columns": n}
            arguments |= {"0.terms": terms, "0.b_stride": terms * n, "0.m": all_rows}
            arguments["0.accumulate"] = int(crossed)
            arguments |= {"0.groups.offsets": "offsets", "0.groups.experts": experts}
            yield {
                "kernel": f"grouped_matmul_into_kernel<{rows}, {columns}, {depth}, "
                + f"{str(own).lower()}>",
                "source": "grouped_matmul_into.cu",
                "parameters": (IntoArgs,),
                "arguments": arguments,
                "grid": (2, 1, 1),
                "select": True,
                "case": "crossed" if crossed else "",
            }
