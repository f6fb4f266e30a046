"""Backends of qkern's CPU kernels as another processor runs them, behind a server."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkern import backends, formats, reference
from qkern.backends import CpuBackend
from qkern.testing import Target

from . import build
from .build import Flavour

_ITEM_SIZE = (4, 2, 2)  # of the kernels' dtype numbers
_NONE = -(1 << 63)  # kNone of csrc/binding/arguments.h


class ServerError(RuntimeError):
    """What a kernel did that it must not do, or how the server ended."""


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Memory of this process that an op reads or writes there."""

    address: int
    nbytes: int
    written: bool = False
    read: bool = True


def _in(address: int | None, nbytes: int) -> _Buffer | int:
    return _Buffer(address, nbytes) if address is not None else _NONE


def _out(address: int, nbytes: int) -> _Buffer:
    return _Buffer(address, nbytes, written=True, read=False)


def _changed(address: int | None, nbytes: int) -> _Buffer | int:
    return _Buffer(address, nbytes, written=True) if address is not None else _NONE


class Server:
    """A running server with the kernels of one instruction set."""

    def __init__(self, flavour: Flavour, program: Path, isa: str) -> None:
        self._process = subprocess.Popen(
            build.command(flavour, program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"QKERN_CPU_ISA": isa},
        )
        self.active, *self.available, rate = self._line().replace(":", "").split()
        self.bfloat16_rate = float(rate)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().rstrip("\n")
        if not line:
            raise ServerError(f"the server ended with status {self._process.wait()}")
        return line

    def call(self, op: str, side: str, flush: bool, *arguments: _Buffer | int) -> None:
        """Run `op`; what it wrote is in the arguments' memory afterwards."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [op, side, str(int(flush))]
        buffers = [a for a in arguments if isinstance(a, _Buffer)]
        for argument in arguments:
            if isinstance(argument, _Buffer):
                sign = "<" if not argument.written else "+" if argument.read else ">"
                words.append(f"{sign}{argument.nbytes}")
            else:
                words.append(f"={int(argument)}")
        request = [" ".join(words).encode() + b"\n"]
        request += [ctypes.string_at(b.address, b.nbytes) for b in buffers]
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"".join(request))
            self._process.stdin.flush()
        answer = self._line()
        if answer != "ok":
            raise ServerError(f"{op}: {answer}")
        for buffer in buffers:
            if buffer.written:
                result = self._process.stdout.read(buffer.nbytes)
                if len(result) != buffer.nbytes:
                    raise ServerError(f"{op}: the answer breaks off")
                ctypes.memmove(buffer.address, result, buffer.nbytes)

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _weight(
    fields: Sequence[int | None], numel: int, experts: int = 1
) -> tuple[_Buffer | int | None, ...]:
    """The fields of a `qkern.weight.Weight` of ``numel`` elements, its tensors with their sizes.

    Or of several ``experts``, one after the other.
    """
    *addresses, format_id, block_size = fields
    blocks = formats.num_blocks(numel, block_size or 1)
    groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    scale = 4 if addresses[2] is None else 1
    nbytes = [n * experts for n in (formats.packed_size(numel), scale * blocks, 4 * groups, 4)]
    return (*map(_in, addresses, [*nbytes, 4 * 16]), format_id, block_size)


def _term(
    fields: Sequence[int], m: int, features: int, experts: int = 1
) -> tuple[_Buffer | int, ...]:
    """A term of low rank, or nothing; of several experts the last field is from one to the next."""
    if not fields:
        return ()
    rank, left, left_stride, right, row_stride, column_stride, alpha, *apart = fields
    last = (rank - 1) * row_stride + (features - 1) * column_stride
    last += (experts - 1) * sum(apart)
    left_bytes, right_bytes = 4 * ((m - 1) * left_stride + rank), 4 * (last + 1)
    factors = _in(left, left_bytes), left_stride, _in(right, right_bytes), row_stride, column_stride
    return rank, *factors, alpha, *apart


def _grouping(fields: Sequence[int]) -> tuple[_Buffer | int, ...]:
    """How many experts, where the rows of each end, and whether that is int64; or nothing."""
    if not fields:
        return ()
    experts, offsets, is_wide = fields
    return experts, _in(offsets, experts * (8 if is_wide else 4)), is_wide


class Library:
    """The functions of ``qkern._C`` that the CPU backend calls, run by a server."""

    def __init__(self, server: Server, side: str = "after", flush: bool = False) -> None:
        self._server, self._side, self._flush = server, side, flush

    def _call(self, op: str, *arguments: _Buffer | int) -> None:
        self._server.call(op, self._side, self._flush, *arguments)

    def quantize_4bit(
        self,
        x: int,
        dtype: int,
        n: int,
        codebook: int | None,
        format_id: int,
        block_size: int,
        packed: int,
        absmax: int,
        threads: int,
    ) -> None:
        self._call(
            "quantize_4bit",
            *(_in(x, n * _ITEM_SIZE[dtype]), dtype, n),
            *(_in(codebook, 4 * 16), format_id, block_size),
            _out(packed, formats.packed_size(n)),
            _out(absmax, 4 * formats.num_blocks(n, block_size)),
            threads,
        )

    def dequantize_4bit(self, *arguments: int) -> None:
        *weight, out, dtype, n, threads = arguments
        self._call(
            "dequantize_4bit",
            *(*_weight(weight, n), _out(out, n * _ITEM_SIZE[dtype]), dtype, n, threads),
        )

    def quantize_8bit(
        self,
        x: int,
        dtype: int,
        n: int,
        map: int,
        block_size: int,
        codes: int,
        absmax: int,
        threads: int,
    ) -> None:
        self._call(
            "quantize_8bit",
            *(_in(x, n * _ITEM_SIZE[dtype]), dtype, n, _in(map, 4 * 256), block_size),
            *(_out(codes, n), _out(absmax, 4 * formats.num_blocks(n, block_size)), threads),
        )

    def dequantize_8bit(
        self,
        codes: int,
        absmax: int,
        map: int,
        block_size: int,
        out: int,
        dtype: int,
        n: int,
        threads: int,
    ) -> None:
        self._call(
            "dequantize_8bit",
            *(_in(codes, n), _in(absmax, 4 * formats.num_blocks(n, block_size))),
            *(_in(map, 4 * 256), block_size, _out(out, n * _ITEM_SIZE[dtype]), dtype, n, threads),
        )

    def quantize_absmax(
        self,
        absmax: int,
        dtype: int,
        n: int,
        codes: int,
        nested_absmax: int,
        offset: int,
        threads: int,
    ) -> None:
        groups = formats.num_blocks(n, formats.NESTED_BLOCK_SIZE)
        self._call(
            "quantize_absmax",
            *(_in(absmax, 4 * n), dtype, n, _out(codes, n), _out(nested_absmax, 4 * groups)),
            *(_out(offset, 4), threads),
        )

    def adamw_step(
        self,
        pieces: Sequence[tuple[Any, ...]],
        seed: int | None,
        threads: int,
    ) -> None:
        arguments: list[_Buffer | int] = [len(pieces)]
        for (
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            absmax,
            sq_absmax,
            factors,
            dtype,
            n,
            *place,
        ) in pieces:
            item, state = _ITEM_SIZE[dtype], 4 if absmax is None else 1
            blocks = formats.num_blocks(n, formats.STATE_BLOCK_SIZE)
            arguments += [_changed(param, n * item), _in(grad, n * item)]
            arguments += [_changed(exp_avg, n * state), _changed(exp_avg_sq, n * state)]
            arguments += [_changed(absmax, 4 * blocks), _changed(sq_absmax, 4 * blocks)]
            arguments += [_in(factors, 4 * reference.ADAMW_FACTORS), dtype, n, *place]
        self._call("adamw_step", *arguments, _NONE if seed is None else seed, threads)

    def linear_4bit(self, *arguments: int) -> None:
        self._forward("linear_4bit", arguments)

    def linear_4bit_int8(self, *arguments: int) -> None:
        self._forward("linear_4bit_int8", arguments)

    def linear_4bit_add(self, *arguments: int) -> None:
        own, term, threads = arguments[:-8], arguments[-8:-1], arguments[-1]
        self._forward("linear_4bit_add", (*own, threads), term)

    def linear_4bit_dx(self, *arguments: int) -> None:
        self._input_gradient("linear_4bit_dx", arguments)

    def linear_4bit_dx_add(self, *arguments: int) -> None:
        own, term, threads = arguments[:-8], arguments[-8:-1], arguments[-1]
        self._input_gradient("linear_4bit_dx_add", (*own, threads), term)

    def grouped_linear_4bit(self, *arguments: int) -> None:
        own, grouping, threads = arguments[:-4], arguments[-4:-1], arguments[-1]
        self._forward("grouped_linear_4bit", (*own, threads), grouping=grouping)

    def grouped_linear_4bit_dx(self, *arguments: int) -> None:
        own, grouping, threads = arguments[:-4], arguments[-4:-1], arguments[-1]
        self._input_gradient("grouped_linear_4bit_dx", (*own, threads), grouping=grouping)

    def grouped_linear_4bit_add(self, *arguments: int) -> None:
        *own, experts, offsets, wide = arguments[:-9]
        term, threads = arguments[-9:-1], arguments[-1]
        grouping = experts, offsets, wide
        self._forward("grouped_linear_4bit_add", (*own, threads), term, grouping)

    def grouped_linear_4bit_dx_add(self, *arguments: int) -> None:
        *own, experts, offsets, wide = arguments[:-9]
        term, threads = arguments[-9:-1], arguments[-1]
        grouping = experts, offsets, wide
        self._input_gradient("grouped_linear_4bit_dx_add", (*own, threads), term, grouping)

    def grouped_matmul_into(self, *arguments: int) -> None:
        out, out_dtype, m, n, k, *rest = arguments
        a, a_dtype, *a_strides, b, b_dtype, b_row, b_column = rest[:8]
        alpha, accumulate, experts, offsets, wide, own_b, b_stride, threads = rest[8:]
        last_a = (m - 1) * a_strides[0] + (k - 1) * a_strides[1]
        last_b = (experts - 1) * b_stride + (k - 1) * b_row if own_b else (m - 1) * b_row
        last_b += (n - 1) * b_column
        rows = m if own_b else experts * k
        self._call(
            "grouped_matmul_into",
            *(_changed(out, rows * n * _ITEM_SIZE[out_dtype]), out_dtype, m, n, k),
            *(_in(a, (last_a + 1) * _ITEM_SIZE[a_dtype]), a_dtype, *a_strides),
            *(_in(b, (last_b + 1) * _ITEM_SIZE[b_dtype]), b_dtype, b_row, b_column),
            *(alpha, accumulate, *_grouping((experts, offsets, wide)), own_b, b_stride, threads),
        )

    def _forward(
        self,
        op: str,
        arguments: Sequence[int],
        term: Sequence[int] = (),
        grouping: Sequence[int] = (),
    ) -> None:
        x, dtype, m, stride, *weight, rows, cols, bias, y, invariant, threads = arguments
        item, experts = _ITEM_SIZE[dtype], grouping[0] if grouping else 1
        self._call(
            op,
            *(_in(x, ((m - 1) * stride + cols) * item), dtype, m, stride),
            *(*_weight(weight, rows * cols, experts), rows, cols),
            *(_in(bias, experts * rows * item), _out(y, m * rows * item), invariant),
            *(*_grouping(grouping), *_term(term, m, rows, experts), threads),
        )

    def _input_gradient(
        self,
        op: str,
        arguments: Sequence[int],
        term: Sequence[int] = (),
        grouping: Sequence[int] = (),
    ) -> None:
        dy, dtype, m, stride, *weight, rows, cols, dx, invariant, threads = arguments
        item, experts = _ITEM_SIZE[dtype], grouping[0] if grouping else 1
        self._call(
            op,
            *(_in(dy, ((m - 1) * stride + rows) * item), dtype, m, stride),
            *(*_weight(weight, rows * cols, experts), rows, cols),
            *(_out(dx, m * cols * item), invariant, *_grouping(grouping)),
            *(*_term(term, m, cols, experts), threads),
        )

    def matmul_into(self, *arguments: int) -> None:
        out, out_dtype, m, n, k, out_stride, *rest = arguments
        item = _ITEM_SIZE[out_dtype]
        words: list[_Buffer | int] = [_changed(out, ((m - 1) * out_stride + n) * item), out_dtype]
        words += [m, n, k, out_stride]
        for rows, columns, given in ((m, k, rest[:4]), (k, n, rest[4:8])):
            address, dtype, *strides = given
            last = (rows - 1) * strides[0] + (columns - 1) * strides[1]
            nbytes = (last + 1) * _ITEM_SIZE[dtype] if k else 0
            words += [_in(address, nbytes), dtype, *strides]
        self._call("matmul_into", *words, *rest[8:])


_servers: dict[tuple[Path, str], Server] = {}
_build = functools.cache(build.build)


def server(flavour: Flavour, isa: str, program: Path | None = None) -> Server:
    """The running server of an instruction set, built and started where it is not."""
    program = program or _build(flavour)
    key = (program, isa)
    if key not in _servers:
        _servers[key] = Server(flavour, program, isa)
    return _servers[key]


def close(isa: str | None = None) -> None:
    """End the servers; after a `ServerError`, another one starts at the next call."""
    for key in [k for k in _servers if isa in (None, k[1])]:
        _servers.pop(key).close()


class EmulatedTarget(Target):
    """A target of the conformance table: the kernels of one instruction set, behind a server.

    `side` is where the unmapped page lies at each buffer; with `flush`, subnormals are flushed to
    zero around each call.
    """

    __slots__ = ("flavour", "flush", "program", "side")

    def __init__(
        self,
        flavour: Flavour,
        isa: str,
        side: str = "after",
        flush: bool = False,
        program: Path | None = None,
    ) -> None:
        super().__init__(flavour.name, isa, reason=flavour.missing())
        object.__setattr__(self, "flavour", flavour)
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "flush", flush)
        object.__setattr__(self, "program", program)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Run every qkern op inside the context on the server."""
        assert self.isa is not None
        there = server(self.flavour, self.isa, self.program)
        library = Library(there, self.side, self.flush)
        with backends.use(CpuBackend(self.flavour.name, library)):
            try:
                yield
            except ServerError:
                close(self.isa)
                raise
