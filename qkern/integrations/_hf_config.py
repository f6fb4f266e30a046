"""`QKernConfig`: what to quantise and how, as transformers takes it and as config.json says it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkern import _errors

LAYOUT = 1
"""Of the tensors in a directory of qkern's own method. Readers refuse what is above theirs."""

_OPTIONS = ("format", "block_size", "double_quant", "skip", "quantize_embeddings", "compute_dtype")


class _Method(str):
    """A method's name, as a member of transformers' enumeration of them is one."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name."""
        return str(self)


METHOD = _Method("qkern")


class QKernConfig(QuantizationConfigMixin):
    """Quantise while loading: ``from_pretrained(dir, quantization_config=QKernConfig())``.

    Which layers are taken is what :func:`qkern.nn.quantize_model` says of ``"all-linear"``: every
    linear layer but heads, layers that the model keeps in float32, and those whose weight is shared
    with something dense. The model is the one that ``quantize_model`` makes of the dense model, bit
    for bit, but nothing is frozen beyond the 4-bit weights.

    For a directory that is in 4 bits already, bitsandbytes' or qkern's, the directory says what is
    quantised and how. Of this object ``compute_dtype`` counts, and ``skip`` names what the
    directory does not have, as a new task's pooler; a warning names what else differs.

    Args:
        format: ``"nf4"`` or ``"fp4"``.
        block_size: elements that share a scale, as for :func:`qkern.quantize_4bit`.
        double_quant: whether the scales are quantised to 8 bits.
        skip: names of modules that stay dense, each a path or a run of whole components of one.
        quantize_embeddings: whether token tables become :class:`~qkern.nn.Embedding4bit`; a head
            that is tied to one shares its 4-bit weight.
        compute_dtype: what :class:`~qkern.nn.Linear4bit` computes in, a ``torch.dtype`` or its
            name; None for the dtype of its input, or what a directory in 4 bits says, if that
            differs from the dtype the model is loaded in.

    Raises TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip: Iterable[str] = (),
        quantize_embeddings: bool = False,
        compute_dtype: torch.dtype | str | None = None,
    ) -> None:
        self.quant_method = METHOD
        if format not in ("nf4", "fp4"):
            raise ValueError(f"format: got {format!r}; takes 'nf4' or 'fp4'")
        _errors.check_block_size(block_size)
        for name, value in (
            ("double_quant", double_quant),
            ("quantize_embeddings", quantize_embeddings),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}; takes True or False")
        names = None if isinstance(skip, str) else list(skip)
        if names is None or not all(isinstance(name, str) for name in names):
            raise TypeError(f"skip: got {skip!r}; takes a list of names")
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.skip = names
        self.quantize_embeddings = quantize_embeddings
        self.compute_dtype = as_dtype("compute_dtype", compute_dtype)
        self._written: dict[str, Any] | None = None
        self._read: dict[str, Any] | None = None
        self._new: list[str] = []

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that `to_dict` gave, of either method.

        Raises ValueError for fields that are unknown, and for a layout of a later version.
        """
        fields = dict(config_dict)
        if fields.get("quant_method") == "bitsandbytes":
            config = cls(**_from_bitsandbytes(fields))
            config._read = fields
        else:
            method, layout = fields.pop("quant_method", METHOD), fields.pop("layout", LAYOUT)
            if method != METHOD:
                raise ValueError(f"quant_method: got {method!r}; takes 'qkern'")
            if not isinstance(layout, int) or not 1 <= layout <= LAYOUT:
                raise ValueError(
                    f"layout: got {layout!r}; this version of qkern reads up to {LAYOUT}"
                )
            if unknown := fields.keys() - set(_OPTIONS):
                raise ValueError(f"quantization_config: got {sorted(unknown)}; takes {_OPTIONS}")
            config = cls(**fields)
        used = {key: value for key, value in kwargs.items() if key in _OPTIONS}
        if used:
            config = cls(**{name: getattr(config, name) for name in _OPTIONS} | used)
        unused = {key: value for key, value in kwargs.items() if key not in used}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of a model with this config, as plain JSON.

        Of a loaded model whose 4-bit layers bitsandbytes has a format for, it is what its
        ``BitsAndBytesConfig`` would write; else the fields of this object and ``"layout"``.
        """
        return copy.deepcopy(self._written) if self._written is not None else self.own_dict()

    def own_dict(self) -> dict[str, Any]:
        """The fields of this object, whatever the model is saved as."""
        fields: dict[str, Any] = {name: copy.copy(getattr(self, name)) for name in _OPTIONS}
        if self.compute_dtype is not None:
            fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return {"quant_method": str(METHOD), "layout": LAYOUT, **fields}

    def get(self, name: str, default: Any = None) -> Any:
        """A field of `to_dict`; transformers asks a config in memory like one of a file."""
        return self.to_dict().get(name, default)

    @property
    def read_from(self) -> dict[str, Any] | None:
        """The fields of bitsandbytes' config that this one was made of; None for no such."""
        return self._read

    @property
    def new(self) -> list[str]:
        """Names in ``skip`` of what a directory in 4 bits need not have."""
        return self._new

    def add_new(self, names: Iterable[str]) -> None:
        """Let a directory in 4 bits lack what these names are of; it stays dense."""
        self._new = [name for name in names if name not in self.skip]
        self.skip = [*self.skip, *self._new]

    def found(self, format: str, block_size: int, double_quant: bool) -> None:
        """Take over what a directory's tensors turned out to be in."""
        self.format, self.block_size, self.double_quant = format, block_size, double_quant

    def written_as(self, written: dict[str, Any] | None) -> None:
        """Have `to_dict` give ``written``, or the fields of this object for None."""
        self._written = written

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """For ``dict(config)``."""
        yield from self.to_dict().items()


def as_dtype(argument: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name, or itself; TypeError unless it is a floating one that qkern has."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        dtype = found if isinstance(found, torch.dtype) else dtype
    if dtype is not None:
        _errors.check_float_dtype(argument, dtype)
    return dtype  # type: ignore[return-value]  # checked there


def _from_bitsandbytes(fields: dict[str, Any]) -> dict[str, Any]:
    """The options that a config of bitsandbytes' means; the block size is in the tensors.

    Raises ValueError for one that is not of 4 bits.
    """
    if not (fields.get("load_in_4bit") or fields.get("_load_in_4bit")):
        raise ValueError("quantization_config: is bitsandbytes' of 8 bits; qkern reads 4-bit ones")
    return {
        "format": fields.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": fields.get("bnb_4bit_use_double_quant", False),
        "skip": fields.get("llm_int8_skip_modules") or (),
        "compute_dtype": fields.get("bnb_4bit_compute_dtype") or None,
    }
