"""Adapters of experts as PEFT's ``target_parameters`` has them in files.

PEFT wraps the module that has the tensor, once for each tensor, the first one innermost. So an
adapter's keys name the module, and how deep its wrapper is: ``experts`` is the outermost one,
``experts.base_layer`` the next. All experts' A are one matrix ``[E * r, in]``, an expert's rows
side by side; their B one of ``[out, r * E]``, an expert's columns E apart.

Whether A is on the inputs PEFT knows from the module's ``is_transposed``. Llama 4's has none, and
its tensors are transposed: there A is on the outputs, with B the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qkern.nn.experts import Experts4bit
from qkern.nn.lora_experts import LoRAExperts

Factors = dict[str, tuple[Tensor, Tensor]]
"""By path A and B."""

_WRAPPED = ".base_layer"


def is_experts(module: object) -> bool:
    """Whether it is experts in 4 bits, with an adapter or without."""
    return isinstance(module, Experts4bit | LoRAExperts)


def _stacks(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The names of the tensors of experts of the module at ``path``, in their order."""
    names = modules[path]._modules if path in modules else {}
    return [name for name in names if is_experts(modules.get(f"{path}.{name}"))]


def names_of_experts(modules: Mapping[str, nn.Module]) -> list[str]:
    """The tensors of all experts in 4 bits, with adapters or without, as dense models name them."""
    return [f"{path}.{name}" for path in modules for name in _stacks(modules, path)]


def _places(path: str, names: Collection[str]) -> dict[str, str]:
    """By tensor the path of its wrapper."""
    return {name: path + _WRAPPED * depth for depth, name in enumerate(reversed([*names]))}


def _is_swapped(module: nn.Module, experts: Any) -> bool:
    base = experts.base_layer if isinstance(experts, LoRAExperts) else experts
    return bool(base.transposed) and not getattr(module, "is_transposed", False)


def to_peft(modules: Mapping[str, nn.Module], factors: Factors) -> Factors:
    """The adapters of experts, by the path of each tensor, as PEFT names and lays them out.

    ``modules`` has all of a model by path.
    """
    found: Factors = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in factors):
        names = [name for name in _stacks(modules, path) if f"{path}.{name}" in factors]
        for name, place in _places(path, names).items():
            a, b = factors[f"{path}.{name}"]
            if _is_swapped(modules[path], modules[f"{path}.{name}"]):
                a, b = b.mT, a.mT
            found[place] = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return found


def from_peft(
    modules: Mapping[str, nn.Module], factors: Factors, targets: Iterable[str]
) -> Factors:
    """All adapters of a file, those of experts by the path of their tensor and as `LoRAExperts`.

    Raises ValueError for one of ``targets``, PEFT's ``target_parameters``, that is no tensor of
    experts in 4 bits, and for sizes that are not those of so many experts.
    """
    targets, found = list(targets), dict(factors)
    unused = set(targets)
    for path in [path for path in modules if _stacks(modules, path)]:
        names: list[str] = []
        for name in _stacks(modules, path):
            matching = {t for t in targets if f".{path}.{name}".endswith(f".{t}")}
            unused -= matching
            names += [name] if matching else []
        for name, place in _places(path, names).items():
            if place not in found:
                raise ValueError(f"{place}: has no lora_A and lora_B, for the tensor {path}.{name}")
            a, b = found.pop(place)
            found[f"{path}.{name}"] = _own(f"{path}.{name}", modules, path, name, a, b)
    if unused:
        raise ValueError(
            f"target_parameters: got {min(unused)!r}; takes experts that the model has in 4 bits"
        )
    return found


def _own(
    whole: str, modules: Mapping[str, nn.Module], path: str, name: str, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    experts: Any = modules[f"{path}.{name}"]
    count = experts.num_experts
    if a.dim() != 2 or b.dim() != 2 or len(a) % count or b.shape[1] != len(a):
        raise ValueError(
            f"{whole}: got lora_A {list(a.shape)} and lora_B {list(b.shape)}; takes "
            f"[{count} * r, in] and [out, r * {count}], for {count} experts"
        )
    a, b = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)
    return (b.mT, a.mT) if _is_swapped(modules[path], experts) else (a, b)


def target_parameters(adapted: Collection[str], all_names: Iterable[str]) -> list[str]:
    """What makes PEFT choose exactly these tensors: ends of their names, or whole names.

    ``all_names`` are those of every tensor that PEFT would look at.
    """
    others = [name for name in all_names if name not in adapted]
    ends = sorted({".".join(name.split(".")[-2:]) for name in adapted})
    if any(f".{name}".endswith(f".{end}") for name in others for end in ends):
        return sorted(adapted)
    return ends
