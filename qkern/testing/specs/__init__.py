"""The op table: a file an op, each with its ``SPEC``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from qkern import ops
from qkern.testing._spec import OpSpec


def _spec(name: str) -> OpSpec:
    spec: OpSpec = importlib.import_module(f"{__name__}.{name}").SPEC
    return spec


OPS: Mapping[str, OpSpec] = MappingProxyType(
    # What writes into a tensor of the caller's is tested with the op of the same name.
    {name: _spec(name) for name in ops.OPS if not name.endswith("_out")}
)
"""Every op by name: the one list that tests and benchmarks read."""
