"""An embedding table in 4 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkern import _errors, formats
from qkern._tables import map_on
from qkern.functional import check_memory_now
from qkern.nn import _sources
from qkern.nn._layouts import PARAMETERS
from qkern.nn._module import QuantizedModule, frozen, parameter, quantized_weight
from qkern.tensor import QuantizedTensor
from qkern.weight import Weight


class Embedding4bit(QuantizedModule):
    """Rows of a frozen 4-bit table; a lookup dequantises only the rows asked for.

    ``ids`` of any integer dtype and shape ``[...]`` give ``[..., embedding_dim]`` in
    ``quantized.dtype``, equal to indexing the dequantised table. Rows need not begin at a block:
    the blocks that cover a row are dequantised and the row is cut out, at most two blocks too many.

    Made from one of transformers' ``...ScaledWordEmbedding`` (of Gemma, BART and others), it
    multiplies the rows by that table's ``embed_scale`` as they do.

    A lookup reads whole blocks, so the parameter ``weight`` is padded to them where the size of
    the table is no multiple of the block size; ``quantized`` is without the padding.
    """

    source_class: type[nn.Embedding] = nn.Embedding
    """The class that :meth:`to_embedding` makes: the one of the table this was made of."""

    _embed_scale: float | None = None
    _scale_is_rounded = False

    def __init__(self, qw: QuantizedTensor, padding_idx: int | None = None) -> None:
        super().__init__()
        if len(qw.shape) != 2:
            raise ValueError(f"qw: got shape {tuple(qw.shape)}; takes [rows, embedding_dim]")
        self.num_embeddings, self.embedding_dim = qw.shape
        self.padding_idx = padding_idx
        self._set_quantized(qw)

    _maker = "from_embedding"

    def _own_layout(self, qw: QuantizedTensor) -> dict[str, Tensor | None]:
        parts = super()._own_layout(qw)
        padding = qw.absmax.numel() * qw.block_size // 2 - qw.packed.numel()
        if padding:
            parts["weight"] = F.pad(qw.packed, (0, padding)).view(-1, 1)
        return parts

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        *,
        codebook: Tensor | None = None,
        check_finite: bool = True,
    ) -> Embedding4bit:
        """A 4-bit copy of ``embedding``, with its hooks, attributes and train/eval mode.

        Raises TypeError for a subclass that may do more than look rows up (transformers' scaled
        ones are known), ValueError for a table with ``max_norm``, since that changes rows as they
        are used, and where something would be lost (see :func:`quantize_model`); other errors are
        those of :func:`qkern.quantize_4bit`.
        """
        _sources.check_layer("embedding", embedding, _sources.EMBEDDING)
        cls._check_norm(embedding)
        options = format, block_size, double_quant, codebook, check_finite
        with torch.inference_mode(False):  # its tensors could not be trained with
            qw = quantized_weight(embedding.weight, *options)
        return cls._around(qw, embedding)

    @staticmethod
    def _check_norm(embedding: nn.Embedding) -> None:
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm: got {embedding.max_norm}; takes a table without it")

    @classmethod
    def _around(cls, qw: QuantizedTensor, embedding: nn.Embedding) -> Embedding4bit:
        """A layer on ``qw``, its weight in 4 bits, with all else of ``embedding``."""
        with torch.inference_mode(False):
            layer = cls(qw, embedding.padding_idx)
        if _sources.has_scale(embedding):
            layer._take_scale(embedding)
            layer.source_class = type(embedding)
        _sources.carry_over(embedding, layer)
        return layer

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense table of class ``source_class``, with the dequantised weight, frozen.

        It is in ``dtype`` (float32, bfloat16 or float16), by default that of ``quantized``. Hooks,
        attributes and train/eval mode are the new table's too. Raises TypeError for another dtype,
        RuntimeError where the weight is sharded or offloaded.
        """
        return self._dense_around(self._dense_weight(dtype))

    def _dense_weight(self, dtype: torch.dtype | None) -> nn.Parameter:
        return frozen(self._dequantized(dtype))

    def _dense_around(self, weight: nn.Parameter) -> nn.Embedding:
        table = _sources.dense_layer(
            self,
            weight,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            padding_idx=self.padding_idx,
            max_norm=None,
            norm_type=2.0,
            scale_grad_by_freq=False,
            sparse=False,
        )
        assert isinstance(table, nn.Embedding)
        if self._scale_is_rounded:
            scale = torch.tensor(self._embed_scale, dtype=torch.float32, device=weight.device)
            table.register_buffer("embed_scale", scale, persistent=False)
        return table

    def _take_scale(self, embedding: nn.Module) -> None:
        """Multiply as it does: by a number, or by a buffer cast to the table's dtype first."""
        scale: Any = embedding.embed_scale
        self._scale_is_rounded = isinstance(scale, Tensor)
        if isinstance(scale, Tensor) and scale.is_meta:
            scale = embedding.scalar_embed_scale
        self._embed_scale = float(scale)

    def _scaled(self, values: Tensor) -> Tensor:
        if self._embed_scale is None:
            return values
        if self._scale_is_rounded:
            return values * values.new_full((), self._embed_scale)
        return values * self._embed_scale

    def _check_all_there(self) -> None:
        """ValueError where a storage was freed: of some of them torch would read at address 0."""
        for name in PARAMETERS:
            held = parameter(self, name)
            if held is not None:
                check_memory_now(name, held)

    def _without_padding(self, packed: Tensor) -> Tensor:
        check_memory_now("weight", packed)
        return packed[: formats.packed_size(math.prod(self._weight_shape))]

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``ids``; TypeError unless they are integers, IndexError unless they are in range."""
        _errors.check_tensor("ids", ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids: got {ids.dtype}; takes integers")
        rows = self._checked(ids.reshape(-1).long())
        self._check_all_there()
        table = self.as_operand().canonical()
        self._check_table(table)
        dim, block_size = self.embedding_dim, self._block_size
        # A row begins at a multiple of gcd(dim, block_size) within its first block.
        covered = formats.num_blocks(dim + block_size - math.gcd(dim, block_size), block_size)
        start = rows * dim
        first = start // block_size
        blocks = first[:, None] + torch.arange(covered, device=rows.device)
        # The last row may need fewer blocks; what stands in for them is cut off below.
        blocks = blocks.clamp_(max=table.absmax.numel() - 1).view(-1)
        values = QuantizedTensor(
            packed=table.packed.view(-1, block_size // 2).index_select(0, blocks).view(-1),
            absmax=_scales(table, blocks),
            nested_absmax=None,
            nested_offset=None,
            codebook=table.codebook,
            format=self._format,
            block_size=block_size,
            shape=(rows.numel(), covered * block_size),
            dtype=self._weight_dtype,
        ).dequantize()
        if covered * block_size != dim:
            columns = (start - first * block_size)[:, None] + torch.arange(dim, device=rows.device)
            values = values.gather(1, columns)
        return self._scaled(values.view(*ids.shape, dim))

    def _check_table(self, table: Weight) -> None:
        """Dtypes and sizes, since the rows that are cut out look right whatever they hold."""
        blocks = formats.num_blocks(self.num_embeddings * self.embedding_dim, self._block_size)
        groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
        nested = table.nested_absmax is not None
        expected = (
            ("weight", table.packed, torch.uint8, blocks * self._block_size // 2),
            ("absmax", table.absmax, torch.uint8 if nested else torch.float32, blocks),
            ("nested_absmax", table.nested_absmax, torch.float32, groups),
            ("nested_offset", table.nested_offset, torch.float32, 1),
            ("codebook", table.codebook, torch.float32, 16),
        )
        for name, tensor, dtype, numel in expected:
            if tensor is None:
                continue
            if tensor.dtype is not dtype:
                raise TypeError(f"{name}: got {tensor.dtype}; takes {dtype} or its bits")
            if tensor.numel() != numel:
                raise ValueError(f"{name}: got {tensor.numel()} elements; takes {numel}")

    def _checked(self, rows: Tensor) -> Tensor:
        # index_select checks its bounds on every device, on a GPU without waiting for it.
        zeros = rows.new_zeros(1).expand(self.num_embeddings)
        try:
            return rows + zeros.index_select(0, rows)
        except IndexError as error:
            low, high = rows.min().item(), rows.max().item()
            raise IndexError(
                f"ids: got values from {low} to {high}; takes 0 to {self.num_embeddings - 1}"
            ) from error

    def extra_repr(self) -> str:
        """The sizes and the format."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        scale = "" if self._embed_scale is None else f"embed_scale={self._embed_scale}, "
        sizes = f"{self.num_embeddings}, {self.embedding_dim}, {padding}{scale}"
        return sizes + self._format_repr()


def _scales(table: Weight, blocks: Tensor) -> Tensor:
    """Float32 scales of ``blocks``: two roundings, as in dequantising the whole table."""
    absmax = table.absmax.index_select(0, blocks)
    if table.nested_absmax is None or table.nested_offset is None:
        return absmax
    values = map_on("signed", absmax.device)
    nested = table.nested_absmax.index_select(0, blocks // formats.NESTED_BLOCK_SIZE)
    return values[absmax.long()] * nested + table.nested_offset
