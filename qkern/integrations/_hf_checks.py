"""What must hold once the files are read: every tensor of every 4-bit weight came, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qkern.integrations._hf_loading import Loading
from qkern.io._common import some

_HOOK = "_adjust_missing_and_unexpected_keys"


def watch(model: Any, loading: Loading) -> None:
    """Have the keys checked as soon as transformers has sorted them, before it reports them."""
    original = getattr(model, _HOOK)

    def adjust(*args: Any) -> Any:
        result = original(*args)
        info = args[0] if len(args) == 1 else None
        if info is not None:
            _check(loading, info)
        else:
            _check_names(loading, *(result or args))
        return result

    # On this one object, until it is loaded.
    vars(model)[_HOOK] = adjust


def unwatch(model: Any) -> None:
    """Leave the model as transformers made it."""
    vars(model).pop(_HOOK, None)


def _check(loading: Loading, info: Any) -> None:
    if loading.error is not None:
        # transformers would raise an error that only says that there was one.
        info.conversion_errors = {}
        raise loading.error
    if info.conversion_errors:
        return  # of a converter of the model's, which transformers raises for
    for name, got, takes in sorted(info.mismatched_keys):
        if loading.plan.owner(name) is not None:
            info.mismatched_keys = set()
            raise ValueError(f"{name}: got shape {list(got)}; takes {list(takes)}")
    _check_names(loading, info.missing_keys, info.unexpected_keys)


def _check_names(loading: Loading, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    if loading.error is not None:
        raise loading.error
    paths = loading.plan.paths
    lost = [name for name in missing if name.rpartition(".")[0] in paths]
    if lost:
        raise ValueError(f"the checkpoint has no {some(lost)}, of 4-bit layers")
    extra = [name for name in unexpected if name in loading.packed or _is_part(name)]
    if extra:
        raise ValueError(f"the model has no 4-bit layer for {some(extra)} of the checkpoint")


def _is_part(name: str) -> bool:
    """Whether only a 4-bit weight has a tensor of this name."""
    return name.endswith(".quant_meta") or ".weight.quant_" in name or ".weight.absmax" in name


def check_described(loading: Loading) -> None:
    """ValueError where a weight of qkern's layout says to be in another format than its module."""
    for path, layer in loading.plan.paths.items():
        if layer.quant_meta.is_meta:
            continue
        try:
            found = json.loads(bytes(layer.quant_meta.tolist()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}.quant_meta: is not the JSON that qkern writes") from error
        if found != layer._meta():
            raise ValueError(f"{path}: the checkpoint holds {found}; takes {layer._meta()}")
