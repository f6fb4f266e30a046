"""What reading and writing model files have in common: layers, names, and checked tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qkern.nn._adapters import LoRALayer
from qkern.nn._module import is_sharded
from qkern.nn._names import plain_name, plain_paths, wrapped_names
from qkern.nn._sources import can_be_quantized, is_linear
from qkern.nn.experts import Experts4bit
from qkern.nn.linear import Linear4bit
from qkern.nn.lora import LoRALinear
from qkern.nn.lora_experts import LoRAExperts

Layer = LoRALinear | LoRAExperts | Linear4bit | Experts4bit | nn.Linear

_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def linear_layers(model: nn.Module) -> dict[str, tuple[Layer, list[str]]]:
    """``{plain path: (layer, all its actual paths)}`` of the layers an adapter can be on."""
    found = _layers(model, _can_have_adapter)
    return {path: (cast(Layer, layer), paths) for path, (layer, paths) in found.items()}


def layers_for_4bit(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """The same of the layers whose weight can be in 4 bits: ``Conv1D`` of transformers too."""
    return _layers(model, _can_be_in_4_bits)


def _can_have_adapter(module: nn.Module) -> bool:
    return isinstance(module, LoRALayer | Linear4bit | Experts4bit) or is_linear(module)


def _can_be_in_4_bits(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear | Linear4bit) or can_be_quantized(module)


def _layers(
    model: nn.Module, is_one: Callable[[nn.Module], bool]
) -> dict[str, tuple[nn.Module, list[str]]]:
    plain = plain_paths(model)
    paths: dict[int, list[str]] = {}
    layers: dict[str, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_one(module):
            # A base layer has its adapter's path, and the adapter comes first.
            own = plain[path]
            if own not in layers or layers[own][0] is module:
                paths.setdefault(id(module), []).append(path)
                layers[own] = (module, paths[id(module)])
    return layers


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by plain names: the parameters and buffers themselves.

    Raises ValueError where two of them have one plain name, or where a value is no tensor.
    """
    # What a wrapper counts for itself.
    counters = {id(b) for m in model.modules() if wrapped_names(m) for b in m._buffers.values()}
    actual: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = plain_name(model, name)
        if id(tensor) in counters or tensors.get(plain) is tensor:
            continue
        if plain in tensors:
            raise ValueError(f"model: {actual[plain]} and {name} would both be called {plain}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}; safetensors hold tensors only")
        actual[plain], tensors[plain] = name, tensor
    return tensors


def check_fits(name: str, tensor: Tensor, slot: Tensor) -> None:
    """ValueError where a file's tensor cannot become the value of ``slot``, a model's.

    A floating tensor may come in another floating dtype, and any other in its own only. What a
    parameter is given is finite. Buffers may hold infinities, as masks do.
    """
    if list(tensor.shape) != list(slot.shape):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes {list(slot.shape)}")
    check_dtype(name, tensor, _FLOATS | {slot.dtype} if slot.is_floating_point() else {slot.dtype})
    if isinstance(slot, nn.Parameter) and slot.is_floating_point():
        check_finite(name, tensor.to(slot.dtype))


def check_floating(name: str, tensor: Tensor) -> None:
    """ValueError unless its dtype is one that weights have, and its values are finite."""
    check_dtype(name, tensor, _FLOATS)
    check_finite(name, tensor)


def check_dtype(name: str, tensor: Tensor, takes: Iterable[torch.dtype]) -> None:
    """ValueError unless it has one of these dtypes."""
    if tensor.dtype not in takes:
        wanted = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in takes))
        raise ValueError(f"{name}: got {tensor.dtype}; takes {wanted}")


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError where a value is NaN or infinite."""
    finite = torch.isfinite(tensor if tensor.dtype in _FLOATS else tensor.float())
    if not finite.all():
        count = int(finite.numel() - finite.sum())
        raise ValueError(f"{name}: got {count} values that are NaN or infinite; takes finite ones")


def whole(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, detached and contiguous; of a sharded one all shards together.

    Raises ValueError, with ``name``, for one on the meta device, or that DeepSpeed partitions.
    """
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(f"{name}: is partitioned by DeepSpeed; gather it first")
    tensor = tensor.detach()
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    if tensor.is_meta:
        raise ValueError(f"{name}: is on the meta device; takes a tensor with values")
    return tensor.cpu().contiguous()


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that own their memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3] or ["nothing"]) + more
