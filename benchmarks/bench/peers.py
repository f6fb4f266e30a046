"""What a user would run instead, each on the very weights that qkern gets where its format allows.

A peer is a function of a weight that returns how to make one copy of its state and the footprint of
that copy. It raises `SkippedError` where it cannot run, saying why.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qkern
from qkern import formats

from . import llama_cpp, memory
from .timing import SkippedError

PEERS = ("bitsandbytes", "dense", "torchao", "llama.cpp")
INT4_GROUP = 64

Linear = Callable[[Tensor], Tensor]

_MEMORY_SHARE = 0.7  # of what is free, that all candidates of a contest may take
INT8 = "qkern (int8)"
INT8_ROWS = 8
"""The most rows of activations that qkern takes to 8 bits, where it is asked to."""
_SLOW_KIND_WEIGHTS = 1 << 27  # from more on, llama.cpp takes a minute to quantise to Q4_K


@dataclass(frozen=True)
class Choice:
    """Who takes part: instruction sets (empty: the one qkern chooses) and peers.

    `limit` is the instruction set beyond which a run hides what the processor has.
    """

    isas: tuple[str, ...] = ()
    peers: tuple[str, ...] = PEERS
    limit: str | None = None


@dataclass(frozen=True)
class LinearPeer:
    """One copy is `footprint` bytes; a call takes up to `scratch` more, and `held` is there always.

    ``make(x)`` makes a copy, whose first input will be `x`. `tolerance` bounds the relative error
    of a correct result. In a format of its own, a peer computes with ``rows(indices)`` of its
    weight where it tells them. `before` and `integers` are as in `timing.Candidate`.
    """

    make: Callable[[Tensor], Linear]
    footprint: int
    tolerance: float
    backward: bool = True
    scratch: int = 0
    held: int = 0
    rows: Callable[[Tensor], Tensor] | None = None
    before: Callable[[], None] | None = None
    integers: bool = False


def linear_peers(
    qw: qkern.QuantizedTensor,
    dtype: torch.dtype,
    choice: Choice,
    backward: bool = False,
    copies: int = 1,
) -> tuple[dict[str, LinearPeer], list[str]]:
    """The chosen peers by name, qkern first, and why others are missing.

    All are to live side by side, so a peer is left out where what is free would not hold `copies`
    of its state too.
    """
    ours = qkern_linear(qw, dtype)
    found, missing = {"qkern": ours}, []
    free = memory.available()
    taken, scratch = copies * ours.footprint, 0
    for name, make in _makers(choice):
        try:
            peer = make(qw, dtype)
        except SkippedError as error:
            missing.append(f"{name}: {error}")
            continue
        if backward and not peer.backward:
            continue
        size = copies * peer.footprint + peer.held
        if taken + size + max(scratch, peer.scratch) > _MEMORY_SHARE * free:
            gib, free_gib = (size + peer.scratch) / 2**30, free / 2**30
            missing.append(f"{name}: needs {gib:.1f} GiB, {free_gib:.1f} are free for all")
            continue
        found[name] = peer
        taken, scratch = taken + size, max(scratch, peer.scratch)
    return found, missing


def _makers(choice: Choice) -> Iterator[tuple[str, Callable[..., LinearPeer]]]:
    if "bitsandbytes" in choice.peers:
        hide = choice.limit is not None
        yield "bitsandbytes", partial(bitsandbytes_linear, hide_bf16=hide)
        yield "bitsandbytes (eval)", partial(bitsandbytes_packed_linear, hide_bf16=hide)
    if "llama.cpp" in choice.peers:
        for kind in llama_cpp.KINDS:
            yield f"llama.cpp {kind.name}", partial(llama_cpp_linear, kind=kind, limit=choice.limit)
    if "torchao" in choice.peers:
        yield "torchao int4", int4_linear
    if "dense" in choice.peers:
        yield "dense", dense_linear


@cache
def bitsandbytes(hide_bf16: bool = False) -> ModuleType:
    """The module, imported without its advice to download kernels.

    With `hide_bf16` it does not see AVX512-BF16, so that a run limited to AVX-512 takes the path of
    processors without it. Raises `SkippedError` where it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise SkippedError(f"bitsandbytes cannot be imported: {error}") from None
    if hide_bf16:
        bnb.nn.modules.has_avx512bf16 = lambda: False
    return bnb


def qkern_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """The contestant itself."""

    def make(_: Tensor) -> Linear:
        copy = deepcopy(qw)
        return lambda x: qkern.linear_4bit(x, copy)

    return LinearPeer(make, qw.nbytes, tolerance=0.0)  # held to a stricter rule


def qkern_in_8_bits(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """The contestant with activations in 8 bits, as llama.cpp's are; few rows, no backward."""

    def make(_: Tensor) -> Linear:
        copy = deepcopy(qw)

        def linear(x: Tensor) -> Tensor:
            with qkern.precision("int8"), torch.no_grad():
                return qkern.linear_4bit(x, copy)

        return linear

    return LinearPeer(make, qw.nbytes, tolerance=0.02, backward=False, integers=True)


def _require_memory(size: int) -> None:
    """Raise `SkippedError` where `size` bytes would not leave half of the free memory."""
    free = memory.available()
    if size > free / 2:
        raise SkippedError(f"needs {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")


def dense_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """``F.linear`` on the dequantised weight: the same function without 4-bit storage."""

    def make(_: Tensor) -> Linear:
        weight = qw.dequantize(dtype)
        return lambda x: F.linear(x, weight)

    return LinearPeer(make, qw.numel() * dtype.itemsize, 0.02)


def bitsandbytes_linear(
    qw: qkern.QuantizedTensor, dtype: torch.dtype, hide_bf16: bool = False
) -> LinearPeer:
    """``bitsandbytes.matmul_4bit``, which ``Linear4bit`` calls when training."""
    bnb = bitsandbytes(hide_bf16)
    if qw.shape[1] % qw.block_size:
        raise SkippedError("decodes wrong values where a block of weights spans two rows")

    def make(_: Tensor) -> Linear:
        packed, state = to_bitsandbytes(deepcopy(qw), dtype)
        return lambda x: bnb.matmul_4bit(x, packed.t(), state)

    dense = qw.numel() * dtype.itemsize  # every call dequantises the whole weight
    return LinearPeer(make, qw.nbytes, 0.02, scratch=dense)


def bitsandbytes_packed_linear(
    qw: qkern.QuantizedTensor, dtype: torch.dtype, hide_bf16: bool = False
) -> LinearPeer:
    """The layout that ``Linear4bit`` in eval mode takes on processors with AVX512-BF16.

    It computes in bfloat16 whatever x's dtype, holds its scales in bfloat16 and has no backward.
    """
    bnb = bitsandbytes(hide_bf16)
    if hide_bf16 or not bnb.functional.has_avx512bf16():
        raise SkippedError("needs AVX512-BF16")
    if qw.shape[0] % 32 or qw.shape[1] % qw.block_size:
        raise SkippedError("takes out_features divisible by 32, in_features by the block size")
    _require_memory(qw.numel() * 8)  # to convert
    packed, state = bnb.functional._convert_weight_packed_for_cpu(*to_bitsandbytes(qw, dtype))

    def make(_: Tensor) -> Linear:
        copy = packed.clone()
        return lambda x: bnb.matmul_4bit(x, copy, state)

    return LinearPeer(make, packed.nbytes + state.absmax.nbytes, 0.03, backward=False)


@cache
def _torchao() -> Any:
    """The class of torchao's int4 weights on a CPU.

    Raises `SkippedError` where it is not installed or has none.
    """
    # It complains of CUDA libraries that a CPU build lacks.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("torchao.prototype.quantization.int4")
    except ImportError as error:
        reason = f"torchao >= 0.17 cannot be imported: {error}"
        raise SkippedError(f"{reason}; pip install --no-deps torchao") from None
    return module.Int4OpaqueTensor


def int4_linear(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> LinearPeer:
    """Weight-only int4 of torchao on a CPU, a tensor subclass over a kernel that lies in torch.

    Another format, uniform and with larger errors, in groups of 64 with a scale and a zero each; no
    backward.
    """
    if dtype != torch.bfloat16:
        raise SkippedError("its kernel is fast in bfloat16 only")
    n, k = qw.shape
    if n % 16 or k % INT4_GROUP:
        raise SkippedError(f"takes out_features divisible by 16, in_features by {INT4_GROUP}")
    tensor = _torchao()
    _require_memory(qw.numel() * 20)  # to convert
    weight = tensor.from_hp(qw.dequantize(dtype), [1, INT4_GROUP])

    def make(_: Tensor) -> Linear:
        copy = weight.clone()
        return lambda x: F.linear(x, copy)

    footprint = weight.qdata.nbytes + weight.scale_and_zero.nbytes
    return LinearPeer(make, footprint, 0.2, backward=False)


def llama_cpp_linear(
    qw: qkern.QuantizedTensor,
    dtype: torch.dtype,
    kind: llama_cpp.Kind = llama_cpp.KINDS[0],
    limit: str | None = None,
) -> LinearPeer:
    """llama.cpp's product in the layout that its users get: see `bench.llama_cpp`.

    Other formats, uniform: 32 weights a scale (Q4_0), or 32 a scale and a minimum (Q4_K). No
    backward.
    """
    layouts = llama_cpp.layouts_within(limit)
    if dtype != torch.float32:
        raise SkippedError("takes float32 activations")
    if kind != llama_cpp.KINDS[0] and qw.numel() > _SLOW_KIND_WEIGHTS:
        raise SkippedError("so many weights take it minutes to quantise")
    weight = llama_cpp.Weight.quantize(kind, qw)
    first = llama_cpp.Linear(weight, layouts)
    layout, footprint = first.layout, first.nbytes
    made = [first]
    del first

    def make(x: Tensor) -> Linear:
        linear = made.pop() if made else llama_cpp.Linear(weight, (layout,))
        linear.bind(x)
        return linear

    return LinearPeer(
        make,
        footprint,
        tolerance=0.02,  # it rounds activations to 8 bits
        backward=False,
        held=weight.packed.nbytes,
        rows=weight.rows,
        before=llama_cpp.before_calls(layout),
        integers=True,
    )


def to_bitsandbytes(qw: qkern.QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, object]:
    """``(packed [bytes, 1], QuantState)`` on the same memory: both libraries pack alike."""
    functional = bitsandbytes().functional
    nested = {}
    if qw.nested_absmax is not None:
        state2 = functional.QuantState(
            absmax=qw.nested_absmax,
            code=formats.map_tensor("signed"),
            blocksize=formats.NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        nested = {"offset": qw.nested_offset, "state2": state2}
    state = functional.QuantState(
        absmax=qw.absmax,
        shape=torch.Size(qw.shape),
        code=formats.code_tensor(qw.format),
        blocksize=qw.block_size,
        quant_type=qw.format,
        dtype=dtype,
        **nested,
    )
    return qw.packed.view(-1, 1), state
