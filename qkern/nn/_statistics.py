"""Running statistics of batch norms, which training moves though they do not require grad."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BEFORE = "_batches_before_adapters"


def remember(model: nn.Module) -> None:
    """Keep in each batch norm how many batches it has seen, when adapters are added."""
    for module in model.modules():
        if (count := _batches(module)) is not None:
            vars(module)[_BEFORE] = count


def moved(module: nn.Module) -> bool:
    """Whether it is a batch norm that has seen batches since `remember`, or was given others'.

    One that is younger, as when it was made a SyncBatchNorm, counts as moved once it saw any.
    """
    count = _batches(module)
    return count is not None and count != vars(module).get(_BEFORE, 0)


def _batches(module: nn.Module) -> int | None:
    count = module.num_batches_tracked if isinstance(module, _BatchNorm) else None
    return None if count is None or count.is_meta else int(count)
