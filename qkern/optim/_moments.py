"""A parameter's two moments, in 32 or 8 bits, and the forms in which checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qkern import formats

BLOCK = formats.STATE_BLOCK_SIZE
MAPS = ("signed", "unsigned")
"""Of the codes of ``exp_avg`` and of ``exp_avg_sq``."""
_ZERO_CODES = tuple(formats.map_tensor(map).eq(0).nonzero().item() for map in MAPS)


class Moments(NamedTuple):
    """``exp_avg`` and ``exp_avg_sq``, of one shape.

    Both float32; or uint8 codes of the dynamic maps, signed and unsigned, with float32 scales
    ``[ceil(n / 256)]``.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    @property
    def bits(self) -> int:
        """32 or 8."""
        return 32 if self.exp_avg_absmax is None else 8

    def absmaxes(self) -> tuple[Tensor, Tensor]:
        """The scales of 8-bit moments."""
        assert self.exp_avg_absmax is not None
        assert self.exp_avg_sq_absmax is not None
        return self.exp_avg_absmax, self.exp_avg_sq_absmax

    def view(self, shape: torch.Size | tuple[int, ...]) -> Moments:
        """The same in another shape."""
        return self._replace(
            exp_avg=self.exp_avg.view(shape), exp_avg_sq=self.exp_avg_sq.view(shape)
        )

    def to_bits(self, bits: int) -> Moments:
        """The same values in 32 or, quantised, in 8 bits."""
        if bits == self.bits:
            return self
        pair = (self.exp_avg, self.exp_avg_sq)
        if bits == 8:
            encoded = [
                torch.ops.qkern.quantize_8bit(
                    moment.contiguous(), formats.map_tensor(map, moment.device), BLOCK
                )
                for moment, map in zip(pair, MAPS, strict=True)
            ]
            (exp_avg, absmax), (exp_avg_sq, sq_absmax) = encoded
            return Moments(exp_avg, exp_avg_sq, absmax, sq_absmax)
        decoded = [
            torch.ops.qkern.dequantize_8bit(
                codes, absmax, formats.map_tensor(map, codes.device), BLOCK, torch.float32
            )
            for codes, absmax, map in zip(pair, self.absmaxes(), MAPS, strict=True)
        ]
        return Moments(*decoded)

    def to_reversible(self) -> Moments:
        """In 32 bits, from which `to_bits` makes the same codes and scales again.

        That holds for each block whose elements stay together. `to_bits` alone would not do: the
        signed map has 1 but not -1. Where the largest value of a block is negative, its code
        decodes to less than the block's scale, which would be lost.
        """
        if self.bits == 32:
            return self
        decoded = self.to_bits(32)
        _restore_largest(decoded.exp_avg.view(-1), self.absmaxes()[0])
        return decoded

    def on(self, device: torch.device) -> Moments:
        """The same on ``device``; the object itself if it is there already."""
        if self.exp_avg.device == device:
            return self
        return self._replace(**{name: t.to(device) for name, t in to_state(self).items()})

    def copy_(self, other: Moments) -> None:
        """Take over the values of others of the same shape and width."""
        for to, value in zip(to_state(self).values(), to_state(other).values(), strict=True):
            to.copy_(value)

    def like(self, param: Tensor, copy: bool = False) -> Moments:
        """The same on the parameter's device, in 32 bits as DTensors if the parameter is one.

        Codes stay plain tensors of the shard that is here: another number of shards would cut
        their blocks elsewhere.
        """
        found = [t.to(param.device, copy=copy) for t in to_state(self).values()]
        if self.bits == 8 or not is_sharded(param):
            return Moments(*found)
        from torch.distributed.tensor import DTensor

        assert isinstance(param, DTensor)
        strides = torch.empty(param.shape, device="meta").stride()
        return Moments(
            *(
                DTensor.from_local(
                    t, param.device_mesh, param.placements, shape=param.shape, stride=strides
                )
                for t in found
            )
        )


def of_zeros(param: Tensor, bits: int) -> Moments:
    """Moments before the first step, in the parameter's shape and on its device.

    For a sharded parameter: in 32 bits as DTensors, in 8 bits those of the shard that is here.
    """
    if bits == 32:
        return Moments(
            *(
                torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
                for _ in range(2)
            )
        )
    param = local(param)
    codes = (
        torch.full(param.shape, code, dtype=torch.uint8, device=param.device)
        for code in _ZERO_CODES
    )
    blocks = formats.num_blocks(param.numel(), BLOCK)
    scales = (torch.zeros(blocks, dtype=torch.float32, device=param.device) for _ in range(2))
    return Moments(*codes, *scales)


def _restore_largest(values: Tensor, absmax: Tensor) -> None:
    """Set the largest value of each block to its scale, as it was before it became a code.

    Where decoded values reach the scale it is there. Else the largest was negative. A positive one
    may decode to the same magnitude, and would get another code from the scale.
    """
    whole = values.numel() // BLOCK
    first_of_rest = whole * BLOCK
    parts = [(values[:first_of_rest].view(-1, BLOCK), absmax[:whole])]
    parts += [(values[first_of_rest:].view(1, -1), absmax[whole:])]
    for blocks, scales in parts:
        if blocks.numel():
            lost = blocks.abs().amax(1, keepdim=True) < scales[:, None]
            place = blocks.argmin(1, keepdim=True)
            lowest = torch.where(lost, -scales[:, None], blocks.gather(1, place))
            blocks.scatter_(1, place, lowest)


def to_state(moments: Moments) -> dict[str, Tensor]:
    """As ``state_dict`` has them."""
    return {name: value for name, value in moments._asdict().items() if value is not None}


_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a shard is here."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that is here; other tensors as they are."""
    if type(tensor) in _PLAIN:  # faster than to look for what is not there
        return tensor
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
