"""What a model is about to be given to, as far as `accelerate launch` and accelerate say."""

from __future__ import annotations

import os
import sys


def refuse_fsdp1() -> None:
    """Raise ValueError where accelerate is about to shard with FSDP1, before anything is loaded.

    FSDP1 flattens the parameters of a layer into one, of one dtype, and 4-bit weights are integers
    of two. accelerate itself is not imported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return
    module = sys.modules.get("accelerate.state")
    state = {} if module is None else module.AcceleratorState._shared_state
    plugin = state.get("fsdp_plugin")
    if plugin is not None:
        version = plugin.fsdp_version
    elif "FSDP_VERSION" in os.environ:
        version = int(os.environ["FSDP_VERSION"])
    else:
        return  # a plugin made in the program, which this one does not know yet
    if version == 1:
        raise ValueError(
            "fsdp_version: got 1; 4-bit weights take 2, for FSDP1 flattens a layer's parameters "
            "into one dtype"
        )
