"""What every module with a 4-bit weight shares: its parameters, their bits, and the state dict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qkern import _bnb, _errors
from qkern.functional import quantize_4bit
from qkern.nn import _layouts
from qkern.nn._layouts import PARAMETERS
from qkern.tensor import QuantizedTensor, Stored
from qkern.weight import Weight

if TYPE_CHECKING:
    from typing_extensions import Self

TENSORS = (*PARAMETERS, "quant_meta")
"""All that a 4-bit weight adds to a module's parameters."""


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, faster: torch looks everywhere else before it looks among parameters.

    Elsewhere it is where the module was parametrised, or replicated by ``nn.DataParallel``.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


class QuantizedModule(nn.Module):
    """A module whose weight is frozen in 4 bits.

    The tensors of the weight are parameters that do not require grad, as frameworks expect of
    weights: they are sharded, offloaded and moved like others, and not broadcast before every
    forward as buffers are. :attr:`quantized` shows them as a :class:`~qkern.QuantizedTensor`.

    ``weight``
        the packed codes, uint8 ``[ceil(n / 2), 1]`` as in bitsandbytes.
    ``absmax``
        int32 ``[blocks]``, or uint8 ``[blocks]`` when double-quantised.
    ``nested_absmax``, ``nested_offset``
        int32 ``[ceil(blocks / 256)]`` and int32 ``[1]``; None unless double-quantised.
    ``codebook``
        int32 ``[16]``; None unless the format is ``"custom"``.
    ``quant_meta``
        format, block size and shape as JSON in uint8. A plain tensor survives whatever carries a
        state dict; ``get_extra_state`` and keys made up on saving do not.

    The int32 ones hold the bits of float32 values, so that no cast reaches them. A cast such as
    ``.half()`` changes only the dtype that the weight dequantises to, ``quantized.dtype``, as it
    casts the bias.

    ``load_state_dict`` takes the parameters' own names, bitsandbytes' keys
    (``weight.absmax``, ``weight.quant_state.bitsandbytes__nf4``, ...) and state dicts of version
    0.1.0. Scales of bitsandbytes that were rounded elsewhere, by a map of 256 values computed on
    another processor or to bfloat16, are restored exactly and held in float32: a double-quantised
    module is not one any more then. A checkpoint of another format, block size or shape is refused
    rather than read as the wrong numbers, as far as it tells: by ``quant_meta`` or by bitsandbytes'
    ``quant_state``. As with other modules the dtype is the module's own and is not loaded; only
    with ``assign=True`` it becomes the one in bitsandbytes' state.
    """

    weight: Tensor
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    codebook: nn.Parameter | None
    quant_meta: nn.Parameter

    _maker = "from_linear"
    """The method that makes one of a dense weight, for an error."""

    # transformers draws the weights of modules and parameters anew that do not say so.
    _is_hf_initialized = True

    def _set_quantized(self, qw: Stored) -> None:
        self._format = qw.format
        self._block_size = qw.block_size
        self._weight_shape = tuple(qw.shape)
        self._weight_dtype = qw.dtype
        for name, tensor in self._own_layout(qw).items():
            self.register_parameter(name, None if tensor is None else frozen(tensor))

    def _own_layout(self, qw: Any) -> dict[str, Tensor | None]:
        """The tensors of ``qw`` by parameter name, in the same memory."""
        meta = self._described(qw.format, qw.block_size, qw.double_quant, qw.shape)
        return _layouts.to_parameters(qw) | {"quant_meta": encoded(meta, qw.packed.device)}

    @property
    def quantized(self) -> QuantizedTensor:
        """The frozen weight: views of the parameters as what they hold, made at every call.

        Raises RuntimeError while the parameters are sharded (FSDP2), TypeError or ValueError where
        they do not fit one another.
        """
        weight = self.as_operand()
        if is_sharded(weight.packed):
            raise RuntimeError("weight: is sharded; takes a module after its unshard()")
        weight = weight.canonical()
        weight = weight._replace(packed=self._without_padding(weight.packed))
        return QuantizedTensor(*weight, self._weight_shape, self._weight_dtype)

    def _dequantized(self, dtype: torch.dtype | None) -> Tensor:
        """The dense weight in ``dtype``, by default that of `quantized`, to be trained with or not.

        RuntimeError where accelerate offloads it or it is sharded, TypeError for another dtype.
        """
        self._check_not_offloaded()
        with torch.inference_mode(False):
            return self.quantized.dequantize(dtype)

    def _check_not_offloaded(self) -> None:
        """RuntimeError where accelerate offloads the weight."""
        if "_hf_hook" in vars(self) and parameter(self, "weight").is_meta:
            raise RuntimeError(
                "weight: is offloaded by accelerate; takes it where it is computed, or remove the "
                "hooks (remove_hook_from_module)"
            )

    def as_operand(self) -> Weight:
        """The weight as the ops take it: the parameters themselves.

        Nothing is kept between calls, for ``param.data = other`` would make it stale, and it would
        keep memory alive that was offloaded.
        """
        held: dict[str, Any] = self._parameters
        try:
            # Weight(...) would go through a Python function, which takes as long as all the rest.
            return tuple.__new__(
                Weight,
                (
                    held["weight"],
                    held["absmax"],
                    held["nested_absmax"],
                    held["nested_offset"],
                    held["codebook"],
                    self._format,
                    self._block_size,
                ),
            )
        except KeyError:
            tensors = (parameter(self, name) for name in PARAMETERS)
            return Weight._make((*tensors, self._format, self._block_size))

    def _without_padding(self, packed: Tensor) -> Tensor:
        return packed

    def _double_quant(self) -> bool:
        return parameter(self, "nested_absmax") is not None

    def _format_repr(self) -> str:
        return (
            f"format={self._format}, block_size={self._block_size}, "
            f"double_quant={self._double_quant()}"
        )

    def _meta(self) -> dict[str, Any]:
        fields = self._format, self._block_size, self._double_quant(), self._weight_shape
        return self._described(*fields)

    def _described(
        self, format: str, block_size: int, double_quant: bool, shape: tuple[int, ...]
    ) -> dict[str, Any]:
        """What ``quant_meta`` says of a weight."""
        return {
            "block_size": block_size,
            "double_quant": double_quant,
            "format": format,
            "shape": list(shape),
        }

    def __setattr__(self, name: str, value: Any) -> None:
        """Take packed codes or scales as a plain tensor too, as ``module.weight.to(0)`` is one."""
        if (
            name in PARAMETERS
            and isinstance(value, Tensor)
            and not isinstance(value, nn.Parameter)
            and name in self._parameters
        ):
            value = frozen(value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module; a tensor of the weight in another dtype or shape is refused."""
        if name in PARAMETERS and name in self._parameters:
            self._check_new_value(name, self._parameters[name], param)
        super().register_parameter(name, param)
        if name in TENSORS:
            _keep_as_initialized(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in every module; copying a parameter drops what it says about itself."""
        super().__setstate__(state)
        self._keep_as_initialized()

    def _keep_as_initialized(self) -> None:
        for name in TENSORS:
            _keep_as_initialized(self._parameters.get(name))

    def _check_new_value(self, name: str, own: Tensor | None, new: Any) -> None:
        if getattr(new, "quant_state", None) is not None:
            raise TypeError(
                f"{name}: got a {type(new).__name__}, whose scales would be lost; load its state "
                "dict with load_state_dict"
            )
        if own is None or new is None:
            if own is not new:
                takes = "None" if own is None else f"{own.dtype} {list(own.shape)}"
                raise TypeError(f"{name}: got {_errors.type_name(new)}; takes {takes}")
            return
        _errors.check_tensor(name, new)
        if (new.dtype, new.shape) == (own.dtype, own.shape):
            return
        message = f"{name}: got {new.dtype} {list(new.shape)}; takes {own.dtype} {list(own.shape)}"
        if new.is_floating_point() and tuple(new.shape) == self._weight_shape:
            message += f"; of a dense weight {type(self).__name__}.{self._maker} makes a new layer"
        raise TypeError(message) if new.dtype != own.dtype else ValueError(message)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Change it for the parameters outside of the weight, which stays frozen: for the bias."""
        require_grad(self, requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        device = parameter(self, "weight").device
        for name, dtype in (("weight", torch.uint8), ("absmax", torch.int32)):
            if fn(torch.empty(0, dtype=dtype, device=device)).dtype != dtype:
                raise TypeError(f"{name}: holds packed codes or bits and cannot be cast")
        before = {n: (p, p.data) for n, p in self._parameters.items() if p is not None}
        was_meta = device.type == "meta"
        try:
            super()._apply(fn, recurse)
        except BaseException:
            for name, (param, data) in before.items():
                if torch._has_compatible_shallow_copy_type(param, data):
                    param.data = data
                    self._parameters[name] = param
                else:
                    self._parameters[name] = nn.Parameter(data, param.requires_grad)
            raise
        self._keep_as_initialized()
        now = self.quant_meta
        if not now.is_meta and (was_meta or not _same_memory(before["quant_meta"][1], now)):
            _write_meta(now, self._meta())  # it may be in empty memory
        dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=device)).dtype
        if dtype in _errors.FLOAT_DTYPES:
            self._weight_dtype = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            dtype = self._translate(state_dict, prefix)
            self._check_state(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if local_metadata.get("assign_to_params_buffers") and len(error_msgs) == errors:
            self._weight_dtype = dtype

    def _translate(self, state: dict[str, Any], prefix: str) -> torch.dtype:
        """Bring ``state`` to this module's layout, in place; the dtype of the weight in it."""
        name = prefix + "weight"
        theirs = [key for key in state if key.startswith(f"{name}.")]
        state_keys = [key for key in theirs if key.startswith(f"{name}.quant_state.")]
        own = [prefix + part for part in ("packed", *TENSORS[1:])]
        own = [key for key in own if key in state]
        twice = (theirs[0], own[0]) if theirs and own else (name, prefix + "packed")
        if all(key in state for key in twice):
            raise ValueError(f"{name}: the checkpoint holds it as {twice[0]} and as {twice[1]}")
        if prefix + "packed" in state:
            _layouts.from_0_1_0(state, prefix)
        if not theirs:
            return self._weight_dtype
        if len(state_keys) != 1:
            found = " and ".join(state_keys) or f"{theirs[0]} alone"
            raise ValueError(
                f"{name}: got {found}; takes one {name}.quant_state.bitsandbytes__nf4 or __fp4"
            )
        qw = _bnb.read(name, state_keys[0], state)
        if not qw.double_quant and f"{name}.nested_absmax" in state:
            self._hold_restored_scales(name, qw)
        for key in _bnb.names(name, state_keys[0]):
            state.pop(key, None)
        for part, tensor in self._own_layout(qw).items():
            if tensor is not None:
                state[prefix + part] = tensor
        return qw.dtype

    def _hold_restored_scales(self, name: str, qw: QuantizedTensor) -> None:
        """Make room for scales in float32, where those of a file cannot stay in 8 bits.

        In place, so that a layer which shares the parameters has them too.
        """
        own = self._format, self._block_size, self._weight_shape
        if not self._double_quant() or own != (qw.format, qw.block_size, qw.shape):
            return
        absmax, meta = parameter(self, "absmax"), parameter(self, "quant_meta")
        if is_sharded(absmax):
            raise ValueError(f"{name}: is sharded; load it before fully_shard")
        absmax.data = torch.zeros(qw.absmax.shape, dtype=torch.int32, device=absmax.device)
        self._parameters.update(nested_absmax=None, nested_offset=None)
        meta.data = encoded(self._meta(), meta.device)

    def _check_state(self, state: dict[str, Any], prefix: str) -> None:
        """ValueError where ``state``, in this module's layout, does not hold its weight."""
        name = prefix + "weight"
        meta, weight = state.get(prefix + "quant_meta"), state.get(name)
        if meta is None and isinstance(weight, Tensor) and weight.is_floating_point():
            raise ValueError(
                f"{name}: the checkpoint holds a dense weight; load it before quantising, "
                "or load a state dict saved from a quantised module"
            )
        # ZeRO-3 has empty tensors in place of all parameters, here and in its state dicts.
        partitioned = meta is not None and meta.numel() == self.quant_meta.numel() == 0
        if meta is not None and not meta.is_meta and not partitioned:
            whole = meta.full_tensor() if is_sharded(meta) else meta
            try:
                found = json.loads(bytes(whole.tolist()).decode())
            except (ValueError, TypeError, RecursionError):
                raise ValueError(
                    f"{name}: quant_meta is not the JSON that qkern writes; the checkpoint is "
                    "damaged"
                ) from None
            if found != self._meta():
                raise ValueError(
                    f"{name}: the checkpoint holds {found}; this module takes {self._meta()}"
                )
            if whole is meta:
                # Equal in meaning by now, and loaded in the module's own spelling.
                state[prefix + "quant_meta"] = encoded(self._meta(), meta.device)
        for part in PARAMETERS:
            own, loaded = parameter(self, part), state.get(prefix + part)
            # Module loading copies across dtypes, which would turn floats into codes.
            if own is not None and loaded is not None and own.dtype != loaded.dtype:
                raise ValueError(f"{prefix}{part}: got {loaded.dtype}; takes {own.dtype}")


def require_grad(module: nn.Module, requires_grad: bool) -> None:
    """``module.requires_grad_``, leaving 4-bit weights alone: integers cannot have gradients."""
    for param in module.parameters():
        if param.is_floating_point():
            param.requires_grad_(requires_grad)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not require grad, in the memory of ``tensor``."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    _keep_as_initialized(parameter)
    return parameter


def _keep_as_initialized(parameter: Any) -> None:
    """Have transformers' own `_init_weights` leave it alone: see QuantizedModule."""
    if parameter is not None:
        parameter._is_hf_initialized = True


def has_4_bit(model: nn.Module) -> bool:
    """Whether some module of ``model`` has its weight in 4 bits."""
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which can be asked without importing torch.distributed."""
    return hasattr(tensor, "full_tensor")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if is_sharded(a):
        return is_sharded(b)
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _write_meta(parameter: Tensor, meta: dict[str, Any]) -> None:
    new = encoded(meta, parameter.device)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        # Every rank has the whole, so that none needs to send it.
        new = distribute_tensor(new, mesh, placements, src_data_rank=None)
    parameter.data.copy_(new)


def encoded(meta: dict[str, Any], device: torch.device | str) -> Tensor:
    """``quant_meta`` as a parameter holds it."""
    text = json.dumps(meta, sort_keys=True).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device=device)


def quantized_weight(
    dense: Tensor,
    format: str,
    block_size: int,
    double_quant: bool,
    codebook: Tensor | None,
    check_finite: bool,
) -> QuantizedTensor:
    """A dense weight in 4 bits; the options are those of `quantize_4bit`."""
    return quantize_4bit(
        dense.detach(),
        format,
        block_size,
        double_quant,
        # A copy, since tensors that share memory cannot be saved as safetensors.
        codebook=None if codebook is None else codebook.clone(),
        check_finite=check_finite,
    )


def zeros_quantized(
    shape: tuple[int, ...],
    *,
    format: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> QuantizedTensor:
    """A weight of zeros in the right sizes, to be filled by a state dict."""
    sizes = quantize_4bit(
        torch.empty(shape, dtype=dtype, device="meta"),
        format,
        block_size,
        double_quant,
        codebook=torch.empty(16, device="meta") if format == "custom" else None,
    )
    zeros: dict[str, Any] = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in sizes.tensors().items()
    }
    return replace(sizes, **zeros)
