"""What must hold once the files are read: every tensor of every 4-bit weight came, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING

from qkern.integrations._hf_loading import Loading
from qkern.io._common import some
from qkern.nn._names import is_inside

_IF_NEW = "name the modules in QKernConfig(skip=...) if they are new; then they stay dense"
_HOOK = "_adjust_missing_and_unexpected_keys"


def watch(model: Any, loading: Loading, new: Iterable[str] | None) -> None:
    """Have the keys checked as soon as transformers has sorted them, before it reports them.

    ``new`` is None for dense files. In files in 4 bits what is dense of the base model must fit
    too, but for the modules of these names, which the files need not have.
    """
    original = getattr(model, _HOOK)

    def adjust(*args: Any) -> Any:
        result = original(*args)
        # Newer versions of transformers pass all that they noted, older ones the names.
        info = args[0] if len(args) == 1 else None
        missing, unexpected = (
            (info.missing_keys, info.unexpected_keys) if info is not None else (result or args)
        )
        try:
            if info is not None:
                _check(loading, info)
            _check_names(loading, missing, unexpected)
            if new is not None:
                _check_new(loading, new)
                _check_base(model, missing, unexpected, _absent(model, missing, new))
        except Exception:
            if info is not None:
                # transformers would raise an error that only says that there was one.
                info.conversion_errors, info.mismatched_keys = {}, set()
            raise
        return result

    # On this one object, until it is loaded.
    vars(model)[_HOOK] = adjust


def unwatch(model: Any) -> None:
    """Leave the model as transformers made it."""
    vars(model).pop(_HOOK, None)


def _check(loading: Loading, info: Any) -> None:
    if loading.error is not None:
        raise loading.error
    if info.conversion_errors:
        return  # of a converter of the model's, which transformers raises for
    for name, got, takes in sorted(info.mismatched_keys):
        if loading.plan.owner(name) is not None:
            raise ValueError(f"{name}: got shape {list(got)}; takes {list(takes)}")


def _check_names(loading: Loading, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    if loading.error is not None:
        raise loading.error
    paths = loading.plan.paths
    lost = [name for name in missing if name.rpartition(".")[0] in paths]
    if lost:
        raise ValueError(f"the checkpoint has no {some(lost)}, of 4-bit layers; {_IF_NEW}")
    unexpected = list(unexpected)
    extra = [name for name in unexpected if name in loading.packed or _is_part(name)]
    if extra:
        raise ValueError(f"the model has no 4-bit layer for {some(extra)} of the checkpoint")
    extra = [name for name in unexpected if name.rpartition(".")[0] in paths]
    if extra:
        raise ValueError(f"4-bit layers of the model have no {some(extra)} of the checkpoint")


def _check_new(loading: Loading, new: Iterable[str]) -> None:
    for name in new:
        held = [path for path in loading.plan.paths if is_inside(path, (name,))]
        if held:
            raise ValueError(f"skip: got {name!r}; the checkpoint has {some(held)} in 4 bits")


def _absent(model: nn.Module, missing: Iterable[str], new: Iterable[str]) -> list[str]:
    """Those of ``new`` of which no tensor came: of the others one was lost."""
    tensors, gone = list(model.state_dict()), set(missing)
    return [name for name in new if gone.issuperset(t for t in tensors if is_inside(t, (name,)))]


def _check_base(
    model: Any, missing: Iterable[str], unexpected: Iterable[str], new: list[str]
) -> None:
    """Nothing of the base model is drawn at random, or left out; heads come and go with tasks."""
    prefix = _base(model)
    if prefix is None:
        return
    lost = [name for name in missing if name.startswith(prefix) and not is_inside(name, new)]
    if lost:
        raise ValueError(f"the checkpoint has no {some(lost)}; {_IF_NEW}")
    modules = dict(model.get_submodule(prefix.removesuffix(".")).named_modules())
    extra = [
        name
        for name in unexpected
        if name.startswith(prefix) and _is_weight(modules, name.removeprefix(prefix))
    ]
    if extra:
        raise ValueError(f"the model has no {some(extra)} of the checkpoint")


def _base(model: Any) -> str | None:
    """The prefix of names in the model without its head; None where that is not known."""
    name = model.base_model_prefix
    if name and isinstance(getattr(model, name, None), nn.Module):
        return f"{name}."
    kinds = MODEL_MAPPING.get(type(model.config), ())
    return "" if type(model) in (kinds if isinstance(kinds, tuple) else (kinds,)) else None


def _is_weight(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether ``name`` is of a layer of a part that there is; masks and the like are not."""
    path, _, tensor = name.rpartition(".")
    if path.partition(".")[0] not in modules:
        return False
    layer = modules.get(path)
    return tensor == "weight" if layer is None else bool(layer._parameters)


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
