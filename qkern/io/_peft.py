"""How PEFT finds the layers that an adapter's configuration names."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkern.nn._patterns import pattern_matches

PREFIX = "base_model.model."
"""Before the names of the model's modules, in an adapter's file."""

# Modules that a task's PeftModel takes whole, wherever it finds a path that ends so.
_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_INSIDE_LORA = (
    "base_layer",
    "lora_dropout",
    "lora_dropout.default",
    "lora_A",
    "lora_A.default",
    "lora_B",
    "lora_B.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_variant",
)


def modules_of_task(task_type: str | None) -> tuple[str, ...]:
    """What PEFT adds to ``modules_to_save`` for a task."""
    return _OF_TASK.get(task_type or "", ())


def is_saved_whole(path: str, entries: Iterable[str]) -> bool:
    """Whether PEFT takes the module at ``path`` for one of ``modules_to_save``.

    By the end of the whole string: ``score`` is also ``my_score``.
    """
    return any(path.endswith(entry) for entry in entries)


def entries_to_save(
    wanted: Collection[str], paths: Collection[str], lora: Collection[str]
) -> list[str]:
    """``modules_to_save`` that name the modules ``wanted``: by last component where that is enough.

    ``paths`` are those of all modules, ``lora`` those of layers with an adapter. An entry may name
    more than was wanted, see `is_saved_whole`. Raises ValueError where an entry would keep PEFT
    from putting an adapter on its layer.
    """
    entries = set()
    for path in wanted:
        name = path.rpartition(".")[2]
        found = {p for p in paths if p.endswith(name)}
        if found <= set(wanted) and not _hidden(name, lora):
            entries.add(name)
        elif hidden := _hidden(path, lora):
            raise ValueError(
                f"{path}: is trained, and in PEFT's modules_to_save it would take {hidden} as "
                "well, which has an adapter"
            )
        else:
            entries.add(path)
    return sorted(entries)


def paths_in_peft(paths: Iterable[str], lora: Iterable[str]) -> set[str]:
    """Paths of the modules where PEFT looks for ``modules_to_save``: its adapters are there."""
    return {*paths, *(f"{path}.{name}" for path in lora for name in _INSIDE_LORA)}


def _hidden(entry: str, lora: Iterable[str]) -> str | None:
    """A layer with an adapter that PEFT would not find any more because of ``entry``."""
    try:
        pattern = re.compile(rf"(^|.*\.){entry}($|\..*)")
    except re.error:
        return entry
    return next((path for path in lora if pattern.match(path) or path.endswith(entry)), None)


def target_modules(lora: Collection[str], paths: Iterable[str]) -> list[str] | str:
    """What makes PEFT choose exactly the layers ``lora`` of a model whose modules are at ``paths``.

    Last components of their paths; or whole paths, where those would match more; or a regular
    expression, where a path is also the end of another.
    """
    inside = tuple(f"{path}." for path in lora)
    others = [path for path in paths if path not in lora and not path.startswith(inside)]
    names = sorted({path.rpartition(".")[2] for path in lora})
    for targets in (names, sorted(lora)):
        ends = tuple(f".{target}" for target in targets)
        if not any(path in targets or path.endswith(ends) for path in others):
            return targets
    return "|".join(map(re.escape, sorted(lora)))


def by_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and for the other layers a pattern that matches only these.

    A path as it is, where it matches no other layer, since old versions of PEFT read only those;
    otherwise anchored.
    """
    (common, _), *_ = Counter(values.values()).most_common(1)
    patterns = {}
    for path, value in values.items():
        if value != common:
            others = any(other != path and _may_match(path, other) for other in values)
            exact = others or not _may_match(path, path)
            patterns[f"^{re.escape(path)}" if exact else path] = value
    return common, patterns


def _may_match(key: str, path: str) -> bool:
    try:
        return pattern_matches(key, path)
    except ValueError:  # a path that is no expression
        return True


def computed_otherwise(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str | None:
    """Why the installed PEFT would compute something else from an adapter; None if it would not.

    For models of which transformers 5 has other modules than transformers 4 had, PEFT rewrites the
    targets, so that old adapters still load. It cannot tell a new adapter from an old one.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None or "transformers" not in sys.modules:
        return None
    try:
        from transformers import conversion_mapping as mapping

        if mapping.get_checkpoint_conversion_mapping(model_type) is None:
            return None
        import peft
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # no PEFT, or versions that rewrite nothing
        return None
    read = peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})
    before = _targets(read)
    # Shapes are enough to see which keys become which.
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    who = f"PEFT {peft.__version__}, for models of type {model_type}"
    try:
        conversion.convert_peft_config_for_transformers(
            read,
            model,
            mapping.get_model_conversion_mapping(model),
        )
        if (after := _targets(read)) != before:
            return f"{who}, rewrites the target modules to {after}"
        keys = conversion.convert_peft_adapter_state_dict_for_transformers(model, read, shapes)
    except Exception as error:  # noqa: BLE001  # whatever PEFT raises is the answer
        return f"{who}, does not load it: {error}"
    if renamed := sorted(shapes.keys() - keys.keys()):
        return f"{who}, takes {renamed[0]} for another tensor"
    return None


def _targets(config: Any) -> str:
    modules = config.target_modules
    shown = modules if isinstance(modules, str) else sorted(modules or ())
    parameters = sorted(getattr(config, "target_parameters", None) or ())
    return f"{shown}" + (f" and the parameters {parameters}" if parameters else "")
