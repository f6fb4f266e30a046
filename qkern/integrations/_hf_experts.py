"""How transformers fills experts in 4 bits: from dense ones, and from bitsandbytes' layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming

from qkern import _bnb, _bnb_experts
from qkern.experts import QuantizedExperts
from qkern.integrations._hf_loading import STATES, Loading, parts
from qkern.integrations._hf_pages import release
from qkern.nn._module import TENSORS
from qkern.nn._options import replace_module
from qkern.nn.experts import Experts4bit
from qkern.tensor import QuantizedTensor


class ExpertsConverter(WeightConverter):
    """A converter of a model's that merges experts, each of which is quantised when it is read."""

    __slots__ = ("loading", "of_quantized", "original")

    def __init__(self, loading: Loading, original: WeightConverter) -> None:
        targets = original._original_target_patterns
        sources = self._sources(original._original_source_patterns)
        super().__init__(sources, targets, list(original.operations), original.force_cpu)
        for name in ("scope_prefix", "base_model_prefix"):
            setattr(self, name, getattr(original, name))
        self.loading, self.original = loading, original
        self.of_quantized = False

    @staticmethod
    def _sources(patterns: list[str]) -> list[str]:
        """The patterns of what is read, for those of the original."""
        return patterns

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The operations are a weight's own, the loading, and the model in it, are one.
        return type(self)(self.loading, copy.deepcopy(self.original))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As of every converter; a tensor of experts in 4 bits is their module's weight."""
        renamed, pattern = super().rename_source_key(source_key)
        if pattern is not None:
            dense, renamed = renamed, self.loading.name_of_experts(renamed)
            self.of_quantized |= renamed != dense
        return renamed, pattern

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """The tensors of experts in 4 bits, or what the model's converter gives."""
        path = layer_name.removesuffix(".weight")
        experts = self.loading.plan.paths.get(path)
        columns = list(self.collected_tensors.values())
        merges = type(self.operations[0]).__name__ == "MergeModulelist"
        if not isinstance(experts, Experts4bit) or not merges or not columns:
            return super().convert(layer_name, *args, **kwargs)
        names = list(self.collected_tensors)
        self.collected_tensors.clear()

        def matrices() -> Iterator[Tensor]:
            for expert in zip(*columns, strict=True):
                read = [_read(part) for part in expert]
                merged: Any = {name: [part] for name, part in zip(names, read, strict=True)}
                for operation in self.operations:
                    merged = operation.convert(
                        merged,
                        source_patterns=self.source_patterns,
                        target_patterns=self.target_patterns,
                        full_layer_name=layer_name,
                        model=kwargs.get("model"),
                        config=kwargs.get("config"),
                    )
                (one,) = merged.values()
                yield (one[0] if isinstance(one, list) else one)[0]
                if self.loading.from_files:
                    for part in read:
                        release(part)

        info = kwargs.get("loading_info")
        made = self.loading.attempt(
            layer_name,
            lambda: self.loading.quantized_experts(path, experts, matrices(), len(columns[0])),
        )
        return self.loading.offloaded(made, None if info is None else info.missing_keys)


class BitsAndBytesExperts(ExpertsConverter):
    """A converter of a model's that merges experts, each of which is in 4 bits in the files.

    Gate and up are layers of their own there. The module is made to fit what they give together.
    """

    __slots__ = ()

    @staticmethod
    def _sources(patterns: list[str]) -> list[str]:
        return [name + part for name in patterns for part in ("", *_PARTS_OF_EXPERTS)]

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """The tensors of experts in 4 bits, or what the model's converter gives."""
        path = layer_name.removesuffix(".weight")
        experts = self.loading.plan.paths.get(path)
        if not isinstance(experts, Experts4bit):
            return super().convert(layer_name, *args, **kwargs)
        model, info = kwargs.get("model"), kwargs.get("loading_info")
        missing_keys = None if info is None else info.missing_keys
        before = {f"{path}.{name}" for name in TENSORS}
        made = self.loading.attempt(layer_name, lambda: self._read(model, path, experts))
        if missing_keys is not None:
            missing_keys -= before - made.keys()
        return self.loading.offloaded(made, missing_keys)

    def _read(self, model: Any, path: str, experts: Experts4bit) -> dict[str, Tensor]:
        columns = {
            pattern: [_read(part) for part in parts]
            for pattern, parts in self.collected_tensors.items()
        }
        self.collected_tensors.clear()
        patterns = self._layer_patterns(path)
        layers = [self._layers(pattern, columns) for pattern in patterns]
        if len({len(each) for each in layers}) != 1:
            counts = ", ".join(str(len(each)) for each in layers)
            raise ValueError(f"got {counts} layers; takes as many of each kind, one an expert")
        number, *shape = experts._weight_shape
        if len(layers[0]) != number:
            raise ValueError(f"got {len(layers[0])} experts; takes {number}")
        names = [pattern.rpartition(".experts.")[2] for pattern in patterns]
        found = [
            _bnb_experts.joined([*each], names).to(experts._weight_dtype)
            for each in zip(*layers, strict=True)
        ]
        if list(found[0].shape) != shape:
            raise ValueError(f"got shape {list(found[0].shape)} of an expert; takes {shape}")
        qw = QuantizedExperts.stack(found)
        return parts(path, self._fitted(model, path, experts, qw), qw)

    def _layer_patterns(self, path: str) -> list[str]:
        """The patterns of the layers whose rows follow one another in an expert's weight."""
        kinds = [(type(each).__name__, getattr(each, "dim", 0)) for each in self.operations]
        if kinds not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            raise ValueError(f"{path}: its experts are not put together by rows, as 4-bit ones are")
        sources: list[str] = self.original.source_patterns
        return [self.source_patterns[i * (1 + len(_PARTS_OF_EXPERTS))] for i in range(len(sources))]

    @staticmethod
    def _layers(pattern: str, columns: Mapping[str, list[Tensor]]) -> list[QuantizedTensor]:
        """Each expert's weight of one kind."""
        own = {
            part: columns[pattern + part]
            for part in ("", *_PARTS_OF_EXPERTS)
            if pattern + part in columns
        }
        states = [part for part in own if part.startswith(".quant_state.")]
        if len(states) != 1 or len({len(column) for column in own.values()}) != 1:
            raise ValueError(
                f"got {', '.join(f'{len(c)} {pattern}{part}' for part, c in own.items())}; takes "
                "the parts of a 4-bit weight for each expert, of one format"
            )
        return [
            _bnb.read("", states[0], dict(zip(own, each, strict=True)))
            for each in zip(*own.values(), strict=True)
        ]

    def _fitted(
        self, model: Any, path: str, experts: Experts4bit, qw: QuantizedExperts
    ) -> Experts4bit:
        """The module at ``path``, in the format of ``qw``."""
        found = experts._format, experts._block_size, experts._double_quant()
        if found == (qw.format, qw.block_size, qw.double_quant):
            return experts
        meta: dict[str, Any] = {name: tensor.to("meta") for name, tensor in qw.tensors().items()}
        fitted = Experts4bit.from_quantized(replace(qw, **meta), experts.bias)
        fitted.compute_dtype = experts.compute_dtype
        fitted.implementation_before = experts.implementation_before
        replace_module(model, [path], fitted.train(experts.training))
        self.loading.plan.paths[path] = fitted
        return fitted


_PARTS_OF_EXPERTS = tuple(
    f".{part}" for part in (*_bnb.PARTS, *(state.removeprefix("weight.") for state in STATES))
)
"""What follows the name of a weight, of bitsandbytes' tensors of it."""


def has_quantized_experts(files: Iterable[Any]) -> bool:
    """Whether files of a model have experts in 4 bits, as layers of their own."""
    from safetensors import safe_open

    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                if any(".experts." in name and ".quant_state." in name for name in names):
                    return True
    return False


def _read(part: Any) -> Tensor:
    """A tensor of a file: what reads it, or is reading it, or has read it."""
    if hasattr(part, "result"):
        part = part.result()
    found: Tensor = part() if callable(part) else part
    return found


class ExpertsRenaming(WeightRenaming):
    """The tensor of experts in 4 bits, dense in a file, is the weight of their module."""

    __slots__ = ("loading",)

    def __init__(self, loading: Loading) -> None:
        super().__init__(r"(gate_up_proj|up_proj|down_proj)$", r"\1.weight")
        self.loading = loading

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(self.loading)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Of such a tensor the name of the weight, any other as it is."""
        renamed = self.loading.name_of_experts(source_key)
        return renamed, None if renamed == source_key else self.source_patterns[0]
