"""What a peer does wrong on some processors, mended, so that it can tell right from wrong."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_DECODERS = tuple(
    f"cdequantize_blockwise_cpu_{format}_{dtype}"
    for format in ("nf4", "fp4")
    for dtype in ("fp32", "bf16", "fp16")
)


class RowsAsOne:
    """bitsandbytes' library, decoding rows that are no whole blocks as what they are in memory.

    Its code for AVX-512 (0.50.2) takes each row for the start of a block. Where the rows are given
    as one, the same bytes are decoded as on other processors.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name not in _DECODERS:
            return function

        def decode(codes: Any, absmax: Any, out: Any, block: Any, rows: Any, columns: Any) -> None:
            if columns.value % block.value:
                rows, columns = ctypes.c_longlong(1), ctypes.c_longlong(rows.value * columns.value)
            function(codes, absmax, out, block, rows, columns)

        return decode


def mend_bitsandbytes() -> None:
    """Put that in place in this process, if bitsandbytes is imported."""
    ops: Any = sys.modules.get("bitsandbytes.backends.cpu.ops")
    if ops is not None and not isinstance(ops.lib, RowsAsOne):
        ops.lib = RowsAsOne(ops.lib)
