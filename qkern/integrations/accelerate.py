"""accelerate: FSDP2 in processes on CPUs.

A 4-bit weight is a few frozen parameters, so DDP, FSDP2, ZeRO-3, offloading and checkpoints of
accelerate take it without a word from here. What accelerate has not got, for any model, is FSDP on
CPUs: it trains with DDP there, whatever the configuration says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from qkern.integrations._wrapping import is_wrapped, wrap


def enable_fsdp_on_cpu() -> None:
    """Have accelerate obey ``distributed_type: FSDP`` in processes on CPUs too.

    Call it before the first ``Accelerator``, ``TrainingArguments`` or ``Trainer``; again, it does
    nothing. From then on a plugin of FSDP, from the configuration of ``accelerate launch`` or given
    to the ``Accelerator``, is used where the processes run on CPUs, as it is on GPUs. Without a
    plugin, and on other devices, nothing changes. Communication is over gloo.

    An ``Accelerator`` made afterwards raises ValueError for ``fsdp_version: 1``, which flattens
    the parameters of a layer into one of one dtype; RuntimeError where one was made before, on
    CPUs with a plugin, and trains with DDP.
    """
    if is_wrapped(AcceleratorState.__init__):
        return
    state = AcceleratorState._shared_state
    if state.get("distributed_type") == DistributedType.MULTI_CPU and parse_flag_from_env(
        "ACCELERATE_USE_FSDP"
    ):
        raise RuntimeError(
            "an Accelerator trains with DDP already; call enable_fsdp_on_cpu before the first "
            "Accelerator, TrainingArguments or Trainer"
        )

    wrap(AcceleratorState, "__init__", _init)


def _init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    if plugin.fsdp_version != 2:
        AcceleratorState._reset_state()
        raise ValueError(
            f"fsdp_version: got {plugin.fsdp_version}; takes 2, for FSDP1 flattens a layer's "
            "parameters into one dtype"
        )
    if self._mixed_precision != "no":
        plugin.set_mixed_precision(self._mixed_precision)
    self.fsdp_plugin = plugin
    self.distributed_type = DistributedType.FSDP
    # Whoever asks for the state again takes this over from there.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
