"""Which layers of a model targets and ``skip`` mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from qkern.nn import _sources
from qkern.nn._experts import Stack
from qkern.nn._heads import find_heads
from qkern.nn._module import QuantizedModule
from qkern.nn._names import is_inside, plain_paths
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit

Targets = str | Sequence[str]

_READ = {
    "MambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "FalconMambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
}
"""Layers of transformers with whose weight their module computes itself, some with a GPU's kernels
only: 4-bit codes would fail there, and an adapter would be passed by."""


def is_own(module: nn.Module) -> bool:
    """Whether it has a weight in 4 bits that a matmul works on."""
    return type(module) in (Linear4bit, Experts4bit)


def _read_by_parent(model: nn.Module) -> dict[int, str]:
    """Ids and paths of layers that are not always called."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name in _READ.get(type(module).__name__, ()):
            if isinstance(child := getattr(module, name, None), nn.Module):
                found[id(child)] = f"{path}.{name}" if path else name
    return found


def select(
    model: nn.Module,
    targets: Targets,
    skip: tuple[str, ...],
    argument: str,
    *,
    quantized: bool,
    soon: Collection[int] = (),
    stacks: Sequence[Stack] = (),
) -> tuple[list[list[str]], list[str]]:
    """Paths of the chosen linear layers, all paths of one layer together.

    Targets may also mean ``stacks`` of experts, for which there is `select_stacks`.

    Of those in 4 bits too if ``quantized``; else these, and experts in 4 bits, are the second
    result, a path for each.
    With ``quantized`` a ``Conv1D`` is chosen only where it is one of ``soon``, the ids of layers
    that will be in 4 bits when their adapters come.
    """
    layers: dict[int, list[str]] = {}
    done: dict[int, list[str]] = {}
    others: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not path:
            continue
        if (
            _sources.is_linear(module)
            or (quantized and is_own(module))
            or (_sources.is_transposed(module) and (not quantized or id(module) in soon))
        ):
            layers.setdefault(id(module), []).append(path)
        elif is_own(module):
            done.setdefault(id(module), []).append(path)
        else:
            others[path] = module
    names = _Names(model)
    # One skipped place is enough: the layer is the same everywhere.
    kept = {
        key: paths
        for key, paths in layers.items()
        if not any(names.inside(path, skip) for path in paths)
    }
    heads = find_heads(model).spared
    read = _read_by_parent(model)
    if targets == "all-linear":
        chosen = [paths for key, paths in kept.items() if key not in heads and key not in read]
        already = [paths[0] for key, paths in done.items() if key not in heads]
        outside = {p: m for p, m in others.items() if not names.inside(p, skip)}
        unknown = {p: m for p, m in outside.items() if id(m) not in heads}
        _check_passed_over(unknown, argument)
        if not chosen and not already and not select_stacks(model, stacks, targets, skip):
            raise ValueError(f"model: has no linear layer outside skip={list(skip)} and its heads")
        return chosen, already
    patterns = [targets] if isinstance(targets, str) else list(targets)
    by_name = not isinstance(targets, str)
    matches = names.is_or_ends_in if by_name else names.is_whole
    found: dict[int, list[str]] = {}
    found_done: dict[int, str] = {}
    for pattern in patterns:
        matched = {k: v for k, v in kept.items() if any(matches(pattern, path) for path in v)}
        matched_done = {
            k: v[0] for k, v in done.items() if any(matches(pattern, path) for path in v)
        }
        if not matched and not matched_done:
            if select_stacks(model, stacks, pattern if not by_name else [pattern], skip):
                continue
            wrong = {path: m for path, m in others.items() if matches(pattern, path)}
            skipped = [p for paths in layers.values() for p in paths if matches(pattern, p)]
            raise _no_match(argument, pattern, wrong, skipped, list(kept.values()))
        if by_name:
            # A head that happens to be called like layers of the body is not meant.
            body = {k: v for k, v in matched.items() if k not in heads}
            matched = matched if not body and not matched_done.keys() - heads else body
        if wrong_keys := matched.keys() & read.keys():
            path = read[next(iter(wrong_keys))]
            raise ValueError(
                f"{argument}: {path} is read by its module, which computes with the weight itself; "
                "skip it"
            )
        found.update(matched)
        found_done.update(matched_done)
    return list(found.values()), list(found_done.values())


def select_stacks(
    model: nn.Module, stacks: Sequence[Stack], targets: Targets, skip: tuple[str, ...]
) -> list[Stack]:
    """Those that are chosen; a name means a tensor, or all of a module around it."""
    names = _Names(model)
    found: list[Stack] = []
    for stack in stacks:
        path, name = stack.path, stack.name
        if names.inside(path, skip) or is_inside(f"{names.plain(path)}.{name}", skip):
            continue
        if targets == "all-linear":
            chosen = True
        elif isinstance(targets, str):
            chosen = any(re.fullmatch(targets, f"{p}.{name}") for p in (path, names.plain(path)))
        else:
            whole = f".{names.plain(path)}.{name}"
            chosen = any(whole.endswith(f".{target}") for target in targets)
        if chosen:
            found.append(stack)
    return found


def _check_passed_over(others: dict[str, nn.Module], argument: str) -> None:
    """TypeError for a layer that "all-linear" means and that is not of a class that is taken."""
    refused: list[str] = []
    for path, module in others.items():
        kind = type(module).__name__
        if (kind == "Conv1D" and not isinstance(module, nn.Conv1d)) or (
            isinstance(module, nn.Linear)
            and not (isinstance(module, QuantizedModule) and argument == "targets")
            and _sources.class_name(module) not in _sources.LEFT_DENSE
        ):
            refused.append(path)
    if refused:
        names = sorted({path.rpartition(".")[2] for path in refused})
        them = "it as it is" if len(refused) == 1 else "all such layers as they are"
        raise TypeError(
            f"{argument}: {refused[0]} is a {_wrong_class(others[refused[0]])}; "
            f"skip={names} leaves {them}"
        )


def _no_match(
    argument: str,
    pattern: str,
    wrong: dict[str, nn.Module],
    skipped: list[str],
    kept: list[list[str]],
) -> Exception:
    if skipped:
        return ValueError(f"{argument}: {pattern!r} matches {skipped[0]}, which is in skip")
    if wrong:
        path, module = next(iter(wrong.items()))
        return TypeError(f"{argument}: {path} is a {_wrong_class(module)}")
    names = sorted({paths[0].rpartition(".")[2] for paths in kept})
    return ValueError(
        f"{argument}: {pattern!r} matches no linear layer; the model has {', '.join(names[:20])}"
    )


def _wrong_class(module: nn.Module) -> str:
    """Its class and what is taken, for a message."""
    kind = type(module).__name__
    if _sources.is_transposed(module):
        return f"dense {kind}, whose weight is transposed; takes it in 4 bits (quantize_model)"
    return f"{kind}; takes exactly nn.Linear, for another class may compute something else"


class _Names:
    """Paths as the model has them, and without wrappers: a pattern may mean either."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = plain_paths(model)

    def plain(self, path: str) -> str:
        """The path without wrappers."""
        return self._plain[path]

    def is_whole(self, pattern: str, path: str) -> bool:
        """Whether the regular expression matches all of it."""
        return any(re.fullmatch(pattern, p) for p in (path, self._plain[path]))

    def is_or_ends_in(self, name: str, path: str) -> bool:
        """Whether its last components are ``name``."""
        return any(f".{p}".endswith(f".{name}") for p in (path, self._plain[path]))

    def inside(self, path: str, names: tuple[str, ...]) -> bool:
        """Whether `is_inside` holds of either path."""
        return is_inside(path, names) or is_inside(self._plain[path], names)
