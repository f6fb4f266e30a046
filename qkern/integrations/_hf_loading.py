"""How transformers fills 4-bit modules: from dense weights, and from bitsandbytes' tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from qkern import _bnb, quantize_4bit
from qkern.experts import quantize_each
from qkern.integrations._hf_pages import release
from qkern.integrations._hf_plan import Plan
from qkern.integrations._hf_versions import hold_codes
from qkern.nn import _sources
from qkern.nn._module import TENSORS, QuantizedModule
from qkern.nn._options import replace_module
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit
from qkern.tensor import QuantizedTensor, Stored

STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BNB_NAMES = (*(f"weight.{part}" for part in _bnb.PARTS), *STATES, "weight")
"""All that bitsandbytes may keep of a weight, from its module on; the first that fits counts."""


class Loading:
    """One model's loading: what is to be in 4 bits, and the first thing that went wrong."""

    def __init__(self, plan: Plan, on_disk: Callable[[str], bool]) -> None:
        self.plan = plan
        self.on_disk = on_disk
        """Whether the tensor of a name is to be offloaded to a file."""
        self.error: Exception | None = None
        self.from_files = False
        """Whether transformers reads the tensors from files, so that nobody has changed them."""
        self.experts_in_4_bits = False
        """Whether the files have experts that bitsandbytes put in 4 bits, layer by layer."""
        self.packed: set[str] = set()
        """Names of weights that the files have in 4 bits."""

    def attempt(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives; its error gets the name.

        It is kept too, since transformers keeps the text alone of some.
        """
        try:
            return make()
        except (TypeError, ValueError, RuntimeError) as error:
            named = type(error)(f"{name}: {error}")
            if self.error is None:
                self.error = named
            raise named from error

    def name_of_experts(self, name: str) -> str:
        """The name of a weight for that of a tensor of experts in 4 bits; others as they are.

        In a file it may lack the prefix of the model within one with a head.
        """
        for path, module in self.plan.paths.items():
            if isinstance(module, Experts4bit) and f".{path}".endswith(f".{name}"):
                return f"{name}.weight"
        return name

    def quantized_experts(
        self, path: str, experts: Experts4bit, matrices: Iterable[Tensor], count: int
    ) -> dict[str, Tensor]:
        """Dense experts, each asked for when the one before is in 4 bits; as `parts` gives them."""
        plan, (number, *shape) = self.plan, experts._weight_shape

        def checked() -> Iterator[Tensor]:
            takes = shape[::-1] if experts.transposed else shape
            for matrix in matrices:
                if list(matrix.shape) != takes:
                    raise ValueError(f"got shape {list(matrix.shape)}; takes {takes}")
                yield matrix.contiguous()
                if self.from_files:
                    release(matrix)

        if count != number:
            raise ValueError(f"got {count} experts; takes {number}")
        options = plan.format, plan.block_size, plan.double_quant
        qw = quantize_each(checked(), count, *options, transposed=experts.transposed)
        return parts(path, experts, qw)

    def offloaded(self, made: dict[str, Tensor], missing_keys: Any) -> dict[str, Tensor]:
        """``made``, with the codes under another name where they are to be offloaded.

        transformers has the name of the weight down for the dense one in the file that it read,
        and would not write the codes anywhere.
        """
        renamed: dict[str, Tensor] = {}
        for name, tensor in made.items():
            if self.plan.owner(name) is not None and self.on_disk(name):
                if missing_keys is not None:
                    missing_keys.discard(name)
                if name.endswith(".weight"):
                    name = f"{name}{_CODES}"
            renamed[name] = tensor
        return renamed

    def name_offloaded(self, model: nn.Module) -> None:
        """Tell accelerate's hooks where the codes of offloaded weights are."""
        for index in {id(found): found for found in _offload_indices(model)}.values():
            for name in [name for name in index if name.endswith(_CODES)]:
                index[name.removesuffix(_CODES)] = index.pop(name)


_CODES = "-codes"


def _offload_indices(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What accelerate's hooks know of files, by the names of tensors."""
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            found = getattr(one, "weights_map", None)
            while found is not None and not hasattr(found, "index"):
                found = getattr(found, "dataset", None)
            if found is not None:
                yield found.index


class _Op(ConversionOps):
    """An operation of transformers that is part of a loading."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # transformers makes a copy for each weight; the loading, and the model in it, are one.
        return copy.copy(self)


class Quantize(_Op):
    """A dense weight becomes the tensors of its 4-bit module, which is in the model already."""

    def convert(
        self, input_dict: Mapping[str, Any], *, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """``{name of the weight: [tensor]}`` to ``{name of each part: tensor}``."""
        made: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            made |= self.loading.attempt(name, lambda n=name, d=dense: self._quantized(n, d))  # type: ignore[misc]
        return self.loading.offloaded(made, missing_keys)

    def _quantized(self, name: str, dense: Tensor) -> dict[str, Tensor]:
        plan = self.loading.plan
        path = name.removesuffix(".weight")
        layer = plan.paths.get(path)
        if layer is None:
            return {name: dense}  # one of several that a converter of the model's gives
        if isinstance(layer, Experts4bit):
            return self.loading.quantized_experts(path, layer, dense, len(dense))
        if isinstance(layer, Linear4bit) and _sources.is_conv1d(layer.source_class):
            dense = dense.T
        if tuple(dense.shape) != layer._weight_shape:
            raise ValueError(f"got shape {list(dense.shape)}; takes {list(layer._weight_shape)}")
        qw = quantize_4bit(dense.contiguous(), plan.format, plan.block_size, plan.double_quant)
        if self.loading.from_files:
            release(dense)
        return parts(path, layer, qw)


def parts(path: str, layer: QuantizedModule, qw: Stored) -> dict[str, Tensor]:
    """The tensors of ``qw`` as ``layer`` holds them, by full name."""
    layer._weight_dtype = qw.dtype
    own = layer._own_layout(qw)
    assert own["weight"] is not None
    hold_codes(layer, own["weight"])
    return {f"{path}.{name}": part for name in TENSORS if (part := own.get(name)) is not None}


class ReadBitsAndBytes(_Op):
    """bitsandbytes' tensors of a weight become those of a 4-bit module; a dense one passes.

    What the tensors are decides, and the module is made to fit, whatever the config said.
    """

    dtype: torch.dtype | None = None
    """What transformers would cast a dense tensor to."""

    def convert(
        self,
        input_dict: Mapping[str, Any],
        *,
        full_layer_name: str,
        model: Any = None,
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """``{suffix: [tensor]}`` of one weight to ``{full name: tensor}``."""
        tensors: dict[str, Tensor] = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        path = full_layer_name.rpartition(".")[0]
        before = set(self._names(path))
        made = self.loading.attempt(full_layer_name, lambda: self._read(model, path, tensors))
        if missing_keys is not None:
            # Of a module that was made anew, to fit.
            missing_keys -= before - set(self._names(path))
        return made

    def _names(self, path: str) -> Iterable[str]:
        layer = self.loading.plan.paths.get(path)
        held = {} if layer is None else layer._parameters
        return (f"{path}.{name}" for name in TENSORS if held.get(name) is not None)

    def _read(self, model: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        module: Any = model.get_submodule(path)
        if tensors.keys() == {"weight"} and tensors["weight"].is_floating_point():
            return self._dense(model, path, module, tensors["weight"])
        states = [state for state in STATES if state in tensors]
        if len(states) != 1:
            raise ValueError(f"got {', '.join(sorted(tensors))}; takes one of {', '.join(STATES)}")
        qw = _bnb.read("weight", states[0], tensors)
        if isinstance(module, Linear4bit):
            shape, dtype = module._weight_shape, module._weight_dtype
        else:
            _sources.check_layer("the module", module, _sources.LINEAR_OR_CONV1D)
            shape, dtype = tuple(_sources.matrix(module).shape), module.weight.dtype
        if qw.shape != shape:
            raise ValueError(f"got shape {list(qw.shape)}; takes {list(shape)}")
        qw = qw.to(dtype)
        # What safetensors gives may be mapped to the file, which can change or go.
        qw = replace(qw, **{name: tensor.clone() for name, tensor in qw.tensors().items()})  # type: ignore[arg-type]
        if self.loading.from_files:
            release(tensors["weight"])
        return parts(path, self._fitted(model, path, module, qw), qw)

    def _fitted(self, model: Any, path: str, module: Any, qw: QuantizedTensor) -> QuantizedModule:
        """The module at ``path``, in the format of ``qw``."""
        if isinstance(module, Linear4bit):
            found = module._format, module._block_size, module._double_quant()
            if found == (qw.format, qw.block_size, qw.double_quant):
                return module
        plan = self.loading.plan
        meta: dict[str, Any] = {name: tensor.to("meta") for name, tensor in qw.tensors().items()}
        layer = Linear4bit.from_quantized(replace(qw, **meta), module.bias)
        layer.take_over(module)
        layer.compute_dtype = plan.compute_dtype
        layer._is_hf_initialized = True
        paths = _paths(model, module)
        replace_module(model, paths, layer)
        plan.paths.update(dict.fromkeys(paths, layer))
        return layer

    def _dense(self, model: Any, path: str, module: Any, weight: Tensor) -> dict[str, Tensor]:
        """A tensor that bitsandbytes left as it was; its module is then a dense one."""
        dtype = self.dtype
        if isinstance(module, QuantizedModule):
            plan = self.loading.plan
            paths = _paths(model, module)
            dense: Any = plan.dense[path]
            dtype = dense.weight.dtype
            dense.bias = module.bias  # which may be loaded already
            replace_module(model, paths, dense)
            for each in paths:
                del plan.paths[each]
        return {f"{path}.weight": weight if dtype is None else weight.to(dtype)}


def _paths(model: nn.Module, module: nn.Module) -> list[str]:
    return [p for p, m in model.named_modules(remove_duplicate=False) if m is module]


class Converter(WeightConverter):
    """Loads bitsandbytes' tensors, and remembers which weights a directory has in 4 bits."""

    __slots__ = ()

    def __init__(self, loading: Loading) -> None:
        super().__init__(
            source_patterns=list(BNB_NAMES),
            target_patterns="weight",
            operations=[ReadBitsAndBytes(loading)],
        )

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As every converter of transformers: the key in the model, and what matched."""
        renamed, pattern = super().rename_source_key(source_key)
        if pattern in STATES:
            self.operations[0].loading.packed.add(renamed)
        return renamed, pattern

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(self.operations[0].loading)
