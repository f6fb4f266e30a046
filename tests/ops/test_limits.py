"""Every backend takes the same arguments: a table of wrong ones, each refused alike everywhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qkern
from qkern import backends, formats, ops, reference
from qkern.backends import Backend, CpuBackend, CudaBackend, TritonBackend
from qkern.testing import OPS
from qkern.weight import Weight

CPU = torch.device("cpu")


class Reader:
    """Reads arguments as a backend for GPUs does, and starts nothing."""

    def missing_reason(self) -> str | None:
        return None

    def _launch(self, op: str, device: torch.device, *arguments: Any) -> None:
        pass

    def _multiply(self, product: Any) -> None:
        pass


class CudaReader(Reader, CudaBackend):
    pass


class TritonReader(Reader, TritonBackend):
    pass


class CpuInPython(CpuBackend):
    """The CPU kernels without the functions that read tensors themselves."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.fast = {}


def readers() -> dict[str, Backend]:
    found: dict[str, Backend] = {
        "reference": backends.reference,
        "cuda": CudaReader("cuda"),
        "triton": TritonReader("triton"),
    }
    if backends.cpu.missing_reason() is None:
        found |= {"cpu": backends.cpu, "cpu in Python": CpuInPython()}
    return found


READERS = readers()
N, ROWS, COLS = 300, 3, 130
BLOCK_SIZES = (0, 1, 16, 48, 32768, -64, True, 64.0, "64", None)


@functools.cache
def weight(double_quant: bool, format: str = "nf4") -> Weight:
    codebook = torch.linspace(-1, 1, 16) if format == "custom" else None
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    qw = qkern.quantize_4bit(w, format, 64, double_quant, codebook)
    return qw.weight


def step_arguments() -> dict[str, Any]:
    lists = {"params": torch.ones(N), "grads": torch.ones(N)}
    codes, absmax = reference.quantize_8bit(torch.zeros(N), formats.map_tensor("signed"), 256)
    lists |= {"exp_avgs": codes, "exp_avg_sqs": codes.clone()}
    lists |= {"exp_avg_absmaxes": absmax, "exp_avg_sq_absmaxes": absmax.clone()}
    factors = reference.adamw_factors(torch.tensor([1.0]), 1e-3, 0.9, 0.99, 1e-8, 0.0)
    found: dict[str, Any] = {name: [tensor] for name, tensor in lists.items()}
    return found | {"factors": factors, "seed": None, "indices": [0], "offsets": [0]}


def forward_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, COLS),
        "weight": weight(True),
        "out_features": ROWS,
        "bias": torch.zeros(ROWS),
        "batch_invariant": False,
    }


def with_term(arguments: dict[str, Any], features: int) -> dict[str, Any]:
    last = {"batch_invariant": arguments.pop("batch_invariant")}
    term = {"left": torch.randn(2, 5), "right": torch.randn(5, features), "alpha": 1.0}
    return arguments | term | last


def gradient_arguments() -> dict[str, Any]:
    return {
        "dy": torch.randn(2, ROWS),
        "weight": weight(True),
        "in_features": COLS,
        "batch_invariant": False,
    }


EXPERTS = 3


def stacked(one: Weight) -> Weight:
    """The same weight for each expert."""
    fields: list[Any] = [
        None if field is None else torch.cat([field.reshape(-1)] * EXPERTS) for field in one[:4]
    ]
    fields += one[4:]
    return Weight(*fields)


def with_experts(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a matmul as those of one by experts, of which the second has no rows."""
    arguments = arguments | {"weight": stacked(arguments["weight"])}
    found = dict(list(arguments.items())[:3]) | {"offsets": torch.tensor([1, 1, 2])}
    if "bias" in arguments:
        found["bias"] = arguments["bias"].expand(EXPERTS, -1).contiguous()
    return found | {"batch_invariant": False}


def with_grouped_term(arguments: dict[str, Any], features: int) -> dict[str, Any]:
    found = with_term(with_experts(arguments), features)
    return found | {"right": torch.randn(EXPERTS, 5, features)}


RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "quantize_4bit": lambda: {
        "x": torch.randn(N),
        "format": "nf4",
        "block_size": 64,
        "codebook": None,
    },
    "dequantize_4bit": lambda: {
        "weight": weight(True),
        "shape": [ROWS, COLS],
        "dtype": torch.float32,
    },
    "dequantize_4bit_out": lambda: {"weight": weight(True), "out": torch.empty(ROWS, COLS)},
    "quantize_8bit": lambda: {
        "x": torch.randn(N),
        "map": formats.map_tensor("signed"),
        "block_size": 256,
    },
    "dequantize_8bit": lambda: {
        "codes": torch.zeros(N, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "map": formats.map_tensor("signed"),
        "block_size": 256,
        "dtype": torch.float32,
    },
    "quantize_absmax": lambda: {"absmax": torch.rand(N)},
    "adamw_step": step_arguments,
    "linear_4bit": forward_arguments,
    "linear_4bit_int8": forward_arguments,
    "linear_4bit_dx": gradient_arguments,
    "grouped_linear_4bit": lambda: with_experts(forward_arguments()),
    "grouped_linear_4bit_dx": lambda: with_experts(gradient_arguments()),
    "grouped_linear_4bit_add": lambda: with_grouped_term(forward_arguments(), ROWS),
    "grouped_linear_4bit_dx_add": lambda: with_grouped_term(gradient_arguments(), COLS),
    "grouped_matmul_into": lambda: {
        "out": torch.empty(ROWS, COLS),
        "a": torch.randn(ROWS, 7),
        "b": torch.randn(EXPERTS, 7, COLS),
        "offsets": torch.tensor([1, 1, 2]),
        "alpha": 1.0,
        "accumulate": False,
    },
    "linear_4bit_add": lambda: with_term(forward_arguments(), ROWS),
    "linear_4bit_dx_add": lambda: with_term(gradient_arguments(), COLS),
    "matmul_into": lambda: {
        "out": torch.empty(ROWS, COLS),
        "a": torch.randn(ROWS, 7),
        "b": torch.randn(7, COLS),
        "alpha": 1.0,
        "accumulate": False,
    },
}
"""Right arguments of each op, by name."""

FREE_LENGTH = {("quantize_4bit", "x"), ("quantize_8bit", "x"), ("quantize_absmax", "absmax")}
"""Tensors of any length."""


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int16 if tensor.dtype is torch.uint8 else torch.float64)


def shorter(tensor: Tensor) -> Tensor:
    return tensor.flatten()[: tensor.numel() // 3]


def wrong_tensors(op: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}-dtype", other_dtype(tensor)
    if (op, name) in FREE_LENGTH:
        return
    if tensor.dim() == 0:
        yield f"{name}-long", tensor.expand(2).contiguous()
    else:
        yield f"{name}-short", shorter(tensor)


def wrong_weights(op: str) -> Iterator[tuple[str, Weight]]:
    of_op = stacked if op.startswith("grouped") else lambda one: one
    for double_quant in (True, False):
        whole = of_op(weight(double_quant, "custom"))
        kind = "nested" if double_quant else "plain"
        for name, tensor in whole.named_tensors().items():
            for what, wrong in wrong_tensors(op, name, tensor):
                yield f"{kind}-{what}", whole._replace(**{name: wrong})
        for size in BLOCK_SIZES[:-2]:
            yield f"{kind}-block_size-{size}", whole._replace(block_size=size)
        yield f"{kind}-codebook-missing", whole._replace(codebook=None)
        yield f"{kind}-codebook-superfluous", whole._replace(format="nf4")
        yield f"{kind}-format", whole._replace(format="int4")
    nested = of_op(weight(True))
    yield "nested_offset-alone", nested._replace(nested_absmax=None)
    yield "nested_absmax-alone", nested._replace(nested_offset=None)


def wrong_offsets(offsets: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Beside those of every tensor; what numbers they hold is not asked on every backend."""
    yield "offsets-long", torch.cat([offsets, offsets[-1:]])
    yield "offsets-int16", offsets.to(torch.int16)
    yield "offsets-bool", offsets.bool()
    yield "offsets-2d", offsets[None]
    yield "offsets-scalar", offsets[-1]
    yield "offsets-none", offsets[:0]


def wrong_calls() -> Iterator[Any]:
    for op, right in RIGHT.items():
        for name, value in right().items():
            wrong: list[tuple[str, Any]] = []
            if isinstance(value, Weight):
                wrong += wrong_weights(op)
            elif isinstance(value, Tensor):
                wrong += wrong_tensors(op, name, value)
                wrong += wrong_offsets(value) if name == "offsets" else []
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                wrong += [(what, [bad]) for what, bad in wrong_tensors(op, name, value[0])]
                wrong.append((f"{name}-empty", []))
            elif name == "block_size":
                wrong += [(f"block_size-{size}", size) for size in BLOCK_SIZES]
            elif name == "dtype":
                wrong += [(f"dtype-{dtype}", dtype) for dtype in (torch.float64, torch.uint8)]
            elif name == "shape":
                wrong += [("shape", [ROWS, COLS + 1]), ("shape-negative", [-ROWS, -COLS])]
            elif name in ("out_features", "in_features"):
                wrong += [(name, value + 1), (f"{name}-less", value - 1)]
            elif name in ("indices", "offsets"):
                wrong += [(f"{name}-negative", [-256]), (f"{name}-long", [0, 0])]
            for what, bad in wrong:
                if (op, what) != ("adamw_step", "params-empty"):  # nothing to do
                    yield pytest.param(op, {name: bad}, id=f"{op}-{what}")
    superfluous = {"codebook": torch.linspace(-1, 1, 16)}
    yield pytest.param("quantize_4bit", superfluous, id="quantize_4bit-codebook-superfluous")
    missing = {"format": "custom"}
    yield pytest.param("quantize_4bit", missing, id="quantize_4bit-codebook-missing")
    for what, book in wrong_tensors("quantize_4bit", "codebook", superfluous["codebook"]):
        yield pytest.param(
            "quantize_4bit", missing | {"codebook": book}, id=f"quantize_4bit-{what}"
        )


@contextlib.contextmanager
def reading(reader: Backend) -> Iterator[None]:
    with backends.use(reader):
        backends.select(CPU)
        yield


def outcome(op: str, arguments: dict[str, Any], reader: Backend, direct: bool) -> tuple[Any, str]:
    """What is raised and how it begins, by torch's dispatcher or past it."""
    declared = ops.OPS[op]
    with reading(reader):
        try:
            if direct:
                ops.call(op, *arguments.values())
            else:
                declared.overload(*declared.spread(tuple(arguments.values())))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return type(error), str(error).split(";")[0]
    return None, ""


@pytest.mark.parametrize("op", RIGHT)
def test_right_arguments_are_taken(op: str) -> None:
    assert set(RIGHT) == {*OPS, "dequantize_4bit_out"}
    for name, reader in READERS.items():
        for direct in (True, False):
            assert outcome(op, RIGHT[op](), reader, direct) == (None, ""), name


@pytest.mark.parametrize(("op", "changes"), list(wrong_calls()))
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "dispatched"])
def test_wrong_arguments_are_refused_alike(op: str, changes: dict[str, Any], direct: bool) -> None:
    found = {
        name: outcome(op, RIGHT[op]() | changes, reader, direct)
        for name, reader in READERS.items()
        # What reads tensors itself leaves wrong arguments to the dispatcher.
        if not (direct and op in reader.fast)
    }
    error, message = found["cuda"]
    assert error in (TypeError, ValueError, RuntimeError), found
    assert set(found.values()) == {(error, message)}, found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*weight(True)._fields[:4], "codebook"])
@pytest.mark.parametrize("shift", [-64, 0, 12])
def test_a_result_over_the_weights_memory_is_refused(reader: str, name: str, shift: int) -> None:
    """Whole or in part, by views of one storage."""
    whole = weight(True, "custom")
    memory = torch.zeros(4096, dtype=torch.uint8)
    out = memory[1024 : 1024 + 4 * ROWS * COLS].view(torch.float32).view(ROWS, COLS)
    held = getattr(whole, name)
    first = 1024 + (shift if shift >= 0 else -held.nbytes + held.itemsize)
    shared = memory[first : first + held.nbytes].view(held.dtype).view(held.shape)
    shared.copy_(held)
    before = memory.clone()
    with reading(READERS[reader]):
        with pytest.raises(ValueError, match=f"out: got a tensor that shares memory with {name}"):
            torch.ops.qkern.dequantize_4bit_out(*whole._replace(**{name: shared}), out)
        parts = whole._replace(**{name: shared})
        qw = qkern.QuantizedTensor(*parts, shape=(ROWS, COLS), dtype=torch.float32)
        for call in (lambda: qkern.dequantize_4bit(qw, out=out), lambda: qw.dequantize(out=out)):
            with pytest.raises(ValueError, match=f"shares memory with {name}"):
                call()
        assert torch.equal(memory, before)
        # Beside it, they do not touch.
        beside = memory[1024 + out.nbytes :][: held.nbytes].view(held.dtype).view(held.shape)
        beside.copy_(held)
        torch.ops.qkern.dequantize_4bit_out(*whole._replace(**{name: beside}), out)
