"""The launches by experts that are proved free of races, made of those of one weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from .structures import (
    GroupedMmaArgs,
    GroupedTiledArgs,
    GroupedVectorArgs,
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
