"""Heads: the layers that make a model's outputs, found by structure where it can tell.

They stay dense unless they are targeted themselves. What is rounded in an output embedding goes
straight into the logits. A head that a task added is new and random: it has to be trained, and a
4-bit layer cannot be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

OUTPUT_NAMES = ("lm_head", "embed_out")
"""Modules of these names are output embeddings in every model."""

TASK_NAMES = ("score", "classifier", "qa_outputs")
"""Layers of these names are a task's head, in models that say nothing of their structure."""

_TASKS_WITHOUT_BASE = re.compile(r"For\w*Classification$")


@dataclass
class Heads:
    """Ids of the modules that are heads."""

    spared: set[int] = field(default_factory=set)
    """All of them."""

    added: set[int] = field(default_factory=set)
    """Those that a task added to a base model, which stay as trainable as they are."""


def find_heads(model: nn.Module) -> Heads:
    """The heads of ``model`` and of the models in it."""
    heads = Heads()
    inside: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if any(part in OUTPUT_NAMES for part in path.split(".")):
            heads.spared.add(id(module))
        # What makes a model's outputs: transformers' models say so, and those of timm.
        for method in ("get_output_embeddings", "get_classifier"):
            heads.spared |= _ids(_ask(module, method))
        if _is_pretrained(module):
            inside |= _ids(module)
            around = _outside_of_base(module)
            heads.spared |= around
            pretrained = type(module).__name__.endswith("ForPreTraining")
            if not pretrained and _ask(module, "get_output_embeddings") is None:
                heads.added |= around
    if inside:
        # Somebody put it around a model of transformers; where it is the larger part, it is a
        # model of its own.
        around = _ids(model) - inside
        if _size(model, around) < _size(model, inside):
            heads.added |= around
    else:
        heads.added |= {
            id(module)
            for path, module in model.named_modules(remove_duplicate=False)
            if path.rpartition(".")[2] in TASK_NAMES
        }
    heads.spared |= heads.added
    return heads


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits of ``model``: what it says itself, or one of that name."""
    found = _ask(model, "get_output_embeddings")
    if found is not None:
        return found
    named = (m for path, m in model.named_modules() if path.rpartition(".")[2] in OUTPUT_NAMES)
    return next(named, None)


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(inner) for inner in module.modules()}


def _size(model: nn.Module, ids: set[int]) -> int:
    """Elements of the parameters that these modules hold themselves."""
    modules = (module for module in model.modules() if id(module) in ids)
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


def _ask(module: nn.Module, method: str) -> nn.Module | None:
    """What the method gives, where the class has it and it gives a module."""
    if not callable(getattr(type(module), method, None)):
        return None
    try:
        found = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None  # a model without such a layer, or a method that means something else
    return found if isinstance(found, nn.Module) else None


def _is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers, or is built like one."""
    return isinstance(getattr(type(module), "base_model_prefix", None), str) and hasattr(
        module, "config"
    )


def _outside_of_base(model: nn.Module) -> set[int]:
    """What ``model`` has beside its base model; nothing where it is one."""
    kind = type(model)
    its_own = kind.__module__.startswith("transformers.")
    if its_own and kind.__name__.endswith("Model") and "Head" not in kind.__name__:
        return set()  # a base model, whatever it calls its parts
    prefix: str = getattr(kind, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if isinstance(base, nn.Module) and base is not model:
        bases = [base]
    elif _TASKS_WITHOUT_BASE.search(kind.__name__):
        bases = [m for m in model.modules() if m is not model and _is_pretrained(m)]
    else:
        return set()
    within = set().union(*map(_ids, bases)) if bases else set()
    return _ids(model) - within if within else set()
