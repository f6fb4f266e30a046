"""qkern's kernels in bitsandbytes itself: models and scripts stay as they are.

>>> from qkern.integrations import bitsandbytes
>>> bitsandbytes.enable()

From then on its 4-bit layers and functions compute on CPUs by qkern's kernels, the backward
included. ``QKERN_BITSANDBYTES=1`` in the environment does the same wherever bitsandbytes is
imported.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import threading
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NoReturn

import torch

from qkern import backends
from qkern.integrations import _bnb_matmul
from qkern.integrations._bnb_ops import OPS

__all__ = ["Enabled", "disable", "enable", "enabled_devices"]

VARIABLE = "QKERN_BITSANDBYTES"

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
"""Device types that have kernels of qkern's, and what torch's dispatcher calls them."""

_VERSIONS = (0, 50), (0, 51)
"""The first version of bitsandbytes that is taken, and the first that no longer is."""

_PACKS = "support_avx512bf16_for_cpu"
"""The attribute by which a layer decides to pack its weight for CPU inference."""


class _Replacements:
    """Attributes of bitsandbytes that have others in their place for a time."""

    def __init__(self) -> None:
        self._places: list[tuple[Any, str, Any, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Have ``value`` as the attribute ``name``, until `undo`."""
        self._places.append((owner, name, vars(owner).get(name, self), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put back what was there, unless somebody put something else there since."""
        while self._places:
            owner, name, before, value = self._places.pop()
            if vars(owner).get(name) is not value:
                continue
            if before is self:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


_lock = threading.RLock()
_libraries: dict[str, torch.library.Library] = {}
"""The registered ops, by device type."""
_on_any, _on_cpu = _Replacements(), _Replacements()
"""What is replaced while any device is enabled, and while CPUs are."""


class Enabled:
    """What `enable` gives: a context manager that undoes it at the end of its block."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        """The device types that this call enabled; those that were enabled before are not here."""

    def __enter__(self) -> Enabled:
        """Nothing: what is enabled is so since the call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disable what the call enabled."""
        disable(self.devices)


def enable(devices: Iterable[str] = ("cpu",)) -> Enabled:
    """Have bitsandbytes compute by qkern's kernels on tensors of these device types.

    Its ops ``quantize_4bit``, ``dequantize_4bit``, ``gemv_4bit`` and ``gemm_4bit`` are replaced,
    and ``matmul_4bit`` with its gradient, which no longer makes a dense weight. Layers do not pack
    their weights for CPU inference any more: after an evaluation they have gradients still, and
    save the scales that they loaded. A weight packed before is unpacked at its next forward, with a
    warning, for its scales were rounded. 8-bit ops and optimizers stay bitsandbytes' own.

    Args:
        devices: ``"cpu"``, ``"cuda"`` or both. Those already enabled stay so.

    Returns:
        A context manager. Without a ``with`` block it may be ignored: all stays enabled until
        :func:`disable`.

    Raises:
        ImportError: bitsandbytes is not installed.
        RuntimeError: it is of another version than 0.50, or has other functions than that one; or
            qkern has no kernels for the device type here.
        TypeError: ``devices`` is one string.
        ValueError: another device type.
    """
    wanted = _checked_devices(devices)
    bitsandbytes = _imported()  # which may enable some itself, by `enable_as_asked`
    with _lock:
        new = tuple(device for device in wanted if device not in _libraries)
        if not new:
            return Enabled(())
        for device in new:
            _check_kernels(device)
        _check_version(bitsandbytes)
        if not _libraries:
            _check_parts(bitsandbytes)
            _replace_functions(bitsandbytes)
        for device in new:
            _libraries[device] = _registered(_DISPATCH_KEYS[device])
        if "cpu" in new:
            _stop_packing(bitsandbytes.nn.modules)
        _bnb_matmul.devices = tuple(_libraries)
    return Enabled(new)


def disable(devices: Iterable[str] | None = None) -> None:
    """Give these device types, by default all, back to bitsandbytes' own code.

    Those that are not enabled are passed over. Raises as :func:`enable` for wrong ``devices``.
    """
    gone = tuple(_DISPATCH_KEYS) if devices is None else _checked_devices(devices)
    with _lock:
        for device in gone:
            if (library := _libraries.pop(device, None)) is not None:
                library._destroy()
        _bnb_matmul.devices = tuple(_libraries)
        if "cpu" not in _libraries:
            _on_cpu.undo()
        if not _libraries:
            _on_any.undo()


def enabled_devices() -> tuple[str, ...]:
    """The device types on which bitsandbytes computes by qkern's kernels now."""
    return tuple(_libraries)


def enable_as_asked() -> None:
    """What bitsandbytes calls at its import: `enable` where ``QKERN_BITSANDBYTES`` says so.

    ``1`` stands for CPUs, ``cpu,cuda`` names device types; without it, or with ``0``, bitsandbytes
    stays as it is. Raises as `enable`.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0"):
        return
    devices = ["cpu"] if value == "1" else [name.strip() for name in value.split(",")]
    try:
        enable(devices)
    except ValueError as error:
        raise ValueError(
            f'{VARIABLE}: got {value!r}; takes 0, 1 or device types, such as "cpu,cuda"'
        ) from error


def _checked_devices(devices: Iterable[str]) -> tuple[str, ...]:
    if isinstance(devices, str):
        raise TypeError(f'devices: got {devices!r}; takes several, such as ("cpu",)')
    found = tuple(dict.fromkeys(devices))
    for device in found:
        if device not in _DISPATCH_KEYS:
            raise ValueError(f"devices: got {device!r}; takes {', '.join(_DISPATCH_KEYS)}")
    return found


def _check_kernels(device: str) -> None:
    reasons = backends.available(device)
    reasons.pop("reference")
    if None not in reasons.values():
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"devices: qkern has no kernels for {device!r} here ({why})")


def _imported() -> Any:
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ImportError("bitsandbytes is not installed: pip install 'qkern[peers]'") from error
    return bitsandbytes


def _check_version(bitsandbytes: Any) -> None:
    # At its entry point, the module has no version yet.
    found = getattr(bitsandbytes, "__version__", None)
    found = found or importlib.metadata.version("bitsandbytes")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    first, end = _VERSIONS
    if numbers is None or not first <= tuple(map(int, numbers.groups())) < end:
        raise RuntimeError(
            f"bitsandbytes: got version {found}; takes {_name(first)} and above, below {_name(end)}"
        )


def _name(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _check_parts(bitsandbytes: Any) -> None:
    """``RuntimeError`` unless all that is replaced is there, with the parameters it should have."""
    for name, (_, wanted) in OPS.items():
        packet, _, overload = name.partition(".")
        try:
            op = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")
        except AttributeError:
            _raise_for(f"the op {name}", "none", wanted.split())
        found = [argument.name for argument in op._schema.arguments]
        if found != wanted.split():
            _raise_for(f"the op {name}", found, wanted.split())
    functions, modules = bitsandbytes.autograd._functions, bitsandbytes.nn.modules
    for owner, name, parameters in (
        (bitsandbytes, "matmul_4bit", _MATMUL),
        (functions, "matmul_4bit", _MATMUL),
        (functions, "MatMul4Bit.forward", ["ctx", "A", "B", "out", "bias", "quant_state"]),
        (modules, "_convert_weight_packed_for_cpu_inverse", _INVERSE),
        (modules, "Linear4bit.forward", ["self", "x"]),
    ):
        part = owner
        for step in name.split("."):
            part = getattr(part, step, None)
        if not callable(part):
            _raise_for(f"{owner.__name__}.{name}", "none", parameters)
        found = list(inspect.signature(part).parameters)
        if found != parameters:
            _raise_for(f"{owner.__name__}.{name}", found, parameters)


_MATMUL = ["A", "B", "quant_state", "out", "bias"]
_INVERSE = ["packed_weight", "quant_state", "block_n"]


def _raise_for(part: str, got: Any, takes: list[str]) -> NoReturn:
    got = got if isinstance(got, str) else f"({', '.join(got)})"
    raise RuntimeError(f"bitsandbytes: {part}: got {got}; takes ({', '.join(takes)})")


def _registered(dispatch_key: str) -> torch.library.Library:
    """The ops for a device type; they are there as long as the library is."""
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # torch warns of each kernel that is replaced.
        warnings.simplefilter("ignore")
        for name, (kernel, _) in OPS.items():
            library.impl(name, kernel, dispatch_key)
    return library


def _replace_functions(bitsandbytes: Any) -> None:
    functions = bitsandbytes.autograd._functions
    if _bnb_matmul.own_matmul_4bit is None:
        _bnb_matmul.own_matmul_4bit = functions.matmul_4bit
        _bnb_matmul.own_function = functions.MatMul4Bit
    _on_any.put(bitsandbytes, "matmul_4bit", _bnb_matmul.matmul_4bit)
    _on_any.put(functions, "matmul_4bit", _bnb_matmul.matmul_4bit)
    _on_any.put(functions, "MatMul4Bit", _bnb_matmul.MatMul4Bit)


def _stop_packing(modules: Any) -> None:
    """Layers keep their codes and scales in evaluation, and undo a packing without more loss."""
    _on_cpu.put(modules.Linear4bit, _PACKS, property(_never, _keep))
    _on_cpu.put(modules, "_convert_weight_packed_for_cpu_inverse", _bnb_matmul.unpack)


def _never(layer: Any) -> bool:
    return False


def _keep(layer: Any, value: bool) -> None:
    """For the time after `disable`."""
    vars(layer)[_PACKS] = value
