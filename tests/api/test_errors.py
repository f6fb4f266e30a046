"""Bad input: each public function says which argument, what it got and what it takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkern
from qkern import QuantizedExperts, QuantizedTensor, backends, formats, testing
from qkern.testing import OPS, Case

needs_native = pytest.mark.skipif(
    backends.available("cpu")["cpu"] is not None, reason="qkern._C is not built"
)


def weight(**changes: Any) -> QuantizedTensor:
    arguments = {"w": torch.randn(6, 64), "double_quant": True} | changes
    return qkern.quantize_4bit(**arguments)


def experts(**changes: Any) -> QuantizedExperts:
    return qkern.quantize_experts(**{"w": torch.randn(3, 6, 64)} | changes)


def map_of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


W = torch.zeros(4, 64)
X = torch.zeros(2, 64)
ENDS = torch.tensor([1, 1, 2])
CODEBOOK = torch.linspace(-1, 1, 16)
RAMP = torch.linspace(-1, 1, 256)
NAN_RAMP = RAMP.where(torch.arange(256) != 9, math.nan)

Call = Callable[[], Any]

BAD_CALLS: list[tuple[str, type[Exception], Call, str]] = [
    # quantize_4bit
    *(
        (f"quantize_4bit-w-{kind}", TypeError, call, message)
        for kind, call, message in (
            ("list", lambda: qkern.quantize_4bit([1.0]), "w: got list; takes a torch.Tensor"),
            ("none", lambda: qkern.quantize_4bit(None), "w: got NoneType; takes"),
            ("float64", lambda: qkern.quantize_4bit(W.double()), "w: got torch.float64; takes"),
            ("int8", lambda: qkern.quantize_4bit(W.to(torch.int8)), "w: got torch.int8; takes"),
            ("bool", lambda: qkern.quantize_4bit(W.bool()), "w: got torch.bool; takes"),
            ("complex", lambda: qkern.quantize_4bit(W * 1j), "w: got torch.complex64; takes"),
            ("sparse", lambda: qkern.quantize_4bit(W.to_sparse()), "w: got layout torch.sparse"),
        )
    ),
    *(
        (
            f"quantize_4bit-block_size-{size}",
            ValueError,
            lambda size=size: qkern.quantize_4bit(W, block_size=size),
            f"block_size: got {size}; takes a power of two from 32 to 16384",
        )
        for size in (0, -64, 1, 16, 48, 65, 32768, 1 << 40)
    ),
    *(
        (
            f"quantize_4bit-block_size-{type(size).__name__}",
            TypeError,
            lambda size=size: qkern.quantize_4bit(W, block_size=size),
            f"block_size: got {type(size).__name__}; takes an int",
        )
        for size in (64.0, "64", None, True)
    ),
    (
        "quantize_4bit-format-unknown",
        ValueError,
        lambda: qkern.quantize_4bit(W, format="int4"),
        "format: got 'int4'; takes one of nf4, fp4, custom",
    ),
    (
        "quantize_4bit-format-type",
        TypeError,
        lambda: qkern.quantize_4bit(W, format=4),
        "format: got int; takes a str",
    ),
    (
        "quantize_4bit-codebook-missing",
        ValueError,
        lambda: qkern.quantize_4bit(W, format="custom"),
        'codebook: got None with format="custom"; takes a tensor',
    ),
    (
        "quantize_4bit-codebook-superfluous",
        ValueError,
        lambda: qkern.quantize_4bit(W, codebook=CODEBOOK),
        'codebook: got a tensor with format="nf4"; takes',
    ),
    *(
        (
            f"quantize_4bit-codebook-{kind}",
            error,
            lambda book=book: qkern.quantize_4bit(W, format="custom", codebook=book),
            message,
        )
        for kind, error, book, message in (
            ("list", TypeError, [0.0] * 16, "codebook: got list; takes a torch.Tensor"),
            ("dtype", TypeError, CODEBOOK.double(), "codebook: got torch.float64; takes"),
            ("short", ValueError, CODEBOOK[:15], r"codebook: got shape \[15\]; takes \[16\]"),
            ("2d", ValueError, CODEBOOK.view(4, 4), r"codebook: got shape \[4, 4\]; takes \[16\]"),
            ("strided", ValueError, RAMP[::16], r"codebook: got strides \[16\]; takes"),
            ("nan", ValueError, CODEBOOK / 0, "codebook: got .*; takes finite values"),
            ("sum", ValueError, CODEBOOK * 3.4e38, "codebook: got .*; takes .* two are added"),
            ("inf", ValueError, CODEBOOK.exp() * math.inf, "codebook: got .*inf.*; takes finite"),
        )
    ),
    # dequantize_4bit
    (
        "dequantize_4bit-qw",
        TypeError,
        lambda: qkern.dequantize_4bit(W),
        "qw: got torch.float32 tensor; takes a QuantizedTensor",
    ),
    *(
        (
            f"dequantize_4bit-dtype-{dtype}",
            TypeError,
            lambda dtype=dtype: qkern.dequantize_4bit(weight(), dtype=dtype),
            "dtype: got .*; takes",
        )
        for dtype in (torch.float64, torch.int8, "float32", float)
    ),
    *(
        (
            f"dequantize_4bit-out-{kind}",
            error,
            lambda out=out: qkern.dequantize_4bit(weight(), dtype=torch.float32, out=out),
            message,
        )
        for kind, error, out, message in (
            ("list", TypeError, [], "out: got list; takes"),
            ("dtype", TypeError, torch.empty(6, 64).half(), "out: got torch.float16; takes"),
            ("int", TypeError, torch.zeros(6, 64).int(), "out: got torch.int32; takes"),
            ("shape", ValueError, torch.empty(64, 6), r"out: got shape \[64, 6\]; takes \[6, 64\]"),
            ("flat", ValueError, torch.empty(384), r"out: got shape \[384\]; takes \[6, 64\]"),
            ("strided", ValueError, torch.empty(64, 6).mT, "out: got strides .*; takes a contig"),
            ("meta", ValueError, torch.empty(6, 64, device="meta"), "out: got a tensor on meta"),
            ("grad", ValueError, torch.empty(6, 64, requires_grad=True), "out: .*requires grad"),
        )
    ),
    # linear_4bit
    *(
        (f"linear_4bit-{kind}", error, lambda args=args: qkern.linear_4bit(*args()), message)
        for kind, error, args, message in (
            ("x-list", TypeError, lambda: ([1.0], weight()), "x: got list; takes a torch.Tensor"),
            ("x-float64", TypeError, lambda: (X.double(), weight()), "x: got torch.float64; takes"),
            ("x-int", TypeError, lambda: (X.long(), weight()), "x: got torch.int64; takes float32"),
            (
                "x-last-dimension",
                ValueError,
                lambda: (X[:, :63], weight()),
                r"x: got shape \[2, 63\]; takes \[\.\.\., 64\]",
            ),
            (
                "x-swapped",
                ValueError,
                lambda: (torch.zeros(2, 6), weight()),
                r"x: got shape \[2, 6\]; takes \[\.\.\., 64\]",
            ),
            ("x-scalar", ValueError, lambda: (torch.tensor(1.0), weight()), r"x: got shape \[\]"),
            ("x-meta", ValueError, lambda: (X.to("meta"), weight()), "x: got a tensor on meta"),
            ("qw-dense", TypeError, lambda: (X, W), "qw: got torch.float32 tensor; takes a Quant"),
            ("qw-none", TypeError, lambda: (X, None), "qw: got NoneType; takes a Quant"),
            (
                "qw-1d",
                ValueError,
                lambda: (X, weight(w=torch.zeros(64))),
                r"qw: got shape \[64\]; takes two dimensions",
            ),
            (
                "qw-3d",
                ValueError,
                lambda: (X, weight(w=torch.zeros(2, 3, 64))),
                r"qw: got shape \[2, 3, 64\]; takes two dimensions",
            ),
            ("qw-meta", ValueError, lambda: (X, weight().to("meta")), "x: got a tensor on cpu"),
            ("bias-list", TypeError, lambda: (X, weight(), [0.0] * 6), "bias: got list; takes"),
            (
                "bias-dtype",
                TypeError,
                lambda: (X.bfloat16(), weight(), torch.zeros(6)),
                "bias: got torch.float32; takes torch.bfloat16",
            ),
            (
                "bias-long",
                ValueError,
                lambda: (X, weight(), torch.zeros(64)),
                r"bias: got shape \[64\]; takes \[6\]",
            ),
            (
                "bias-2d",
                ValueError,
                lambda: (X, weight(), torch.zeros(1, 6)),
                r"bias: got shape \[1, 6\]; takes \[6\]",
            ),
            (
                "bias-meta",
                ValueError,
                lambda: (X, weight(), torch.zeros(6, device="meta")),
                "bias: got a tensor on meta",
            ),
        )
    ),
    # quantize_experts: what quantize_4bit raises, with the expert's number
    *(
        (
            f"quantize_experts-{kind}",
            error,
            lambda w=w, options=options: qkern.quantize_experts(w, **options),
            message,
        )
        for kind, error, w, options, message in (
            ("w-2d", ValueError, W, {}, r"w: got shape \[4, 64\]; takes three dimensions"),
            ("w-4d", ValueError, W[None, None], {}, r"w: got shape \[1, 1, 4, 64\]; takes three"),
            ("w-none", ValueError, W[None][:0], {}, "w: got no experts; takes one or more"),
            ("w-empty", ValueError, [], {}, "w: got no experts; takes one or more"),
            ("w-number", TypeError, 3, {}, "w: got int; takes a tensor or a sequence of them"),
            ("w-nothing", TypeError, None, {}, "w: got NoneType; takes a tensor or a sequence"),
            ("w-of-lists", TypeError, [W, [1.0]], {}, "expert 1: w: got list; takes a torch.Tens"),
            ("w-dtype", TypeError, W[None].double(), {}, "^w: got torch.float64; takes"),
            (
                "w-dtypes",
                ValueError,
                [W, W.half()],
                {},
                r"expert 1: w: got \[4, 64\] torch.float16 on cpu; takes \[4, 64\] torch.float32",
            ),
            (
                "w-devices",
                ValueError,
                [W, W.to("meta")],
                {},
                r"expert 1: w: got \[4, 64\] torch.float32 on meta; takes .* on cpu, expert 0's",
            ),
            (
                "w-shapes",
                ValueError,
                [W, W, W[:3]],
                {},
                r"expert 2: w: got \[3, 64\] .*; takes \[4, 64\] torch.float32 on cpu, expert 0's",
            ),
            (
                "w-of-vectors",
                ValueError,
                [W[0]],
                {},
                r"expert 0: w: got shape \[64\]; takes two dimensions",
            ),
            (
                "w-nan",
                ValueError,
                [W, W / 0],
                {},
                r"expert 1: w: got a NaN or an infinity in block 0 .*; takes",
            ),
            (
                "block_size",
                ValueError,
                [W],
                {"block_size": 48},
                "^block_size: got 48; takes a power of two",
            ),
            ("format", ValueError, [W], {"format": "int4"}, "^format: got 'int4'; takes"),
            (
                "codebook",
                ValueError,
                [W],
                {"codebook": CODEBOOK},
                '^codebook: got a tensor with format="nf4"; takes',
            ),
        )
    ),
    # grouped_linear_4bit
    *(
        (
            f"grouped_linear_4bit-{kind}",
            error,
            lambda changes=changes: qkern.grouped_linear_4bit(
                **{"x": X, "qw": experts(), "offsets": ENDS} | changes()
            ),
            message,
        )
        for kind, error, changes, message in (
            ("x-list", TypeError, lambda: {"x": [1.0]}, "x: got list; takes a torch.Tensor"),
            ("x-float64", TypeError, lambda: {"x": X.double()}, "x: got torch.float64; takes"),
            (
                "x-columns",
                ValueError,
                lambda: {"x": X[:, :63]},
                r"x: got shape \[2, 63\]; takes \[rows, 64\] for qw of shape \[3, 6, 64\]",
            ),
            ("x-1d", ValueError, lambda: {"x": X[0]}, r"x: got shape \[64\]; takes \[rows, 64\]"),
            ("x-3d", ValueError, lambda: {"x": X[None]}, r"x: got shape \[1, 2, 64\]; takes"),
            ("x-meta", ValueError, lambda: {"x": X.to("meta")}, "x: got a tensor on meta; takes"),
            (
                "qw-dense",
                TypeError,
                lambda: {"qw": torch.zeros(3, 6, 64)},
                "qw: got torch.float32 tensor; takes a QuantizedExperts",
            ),
            (
                "qw-one",
                TypeError,
                lambda: {"qw": weight()},
                "qw: got QuantizedTensor; takes a QuantizedExperts",
            ),
            ("qw-meta", ValueError, lambda: {"qw": experts().to("meta")}, "x: got a tensor on cpu"),
            (
                "offsets-list",
                TypeError,
                lambda: {"offsets": [1, 1, 2]},
                "offsets: got list; takes a torch.Tensor",
            ),
            (
                "offsets-dtype",
                TypeError,
                lambda: {"offsets": ENDS.float()},
                "offsets: got torch.float32; takes torch.int32 or torch.int64",
            ),
            (
                "offsets-long",
                ValueError,
                lambda: {"offsets": torch.tensor([0, 1, 1, 2])},
                r"offsets: got shape \[4\]; takes \[3\], an end for each expert",
            ),
            (
                "offsets-2d",
                ValueError,
                lambda: {"offsets": ENDS[None]},
                r"offsets: got shape \[1, 3\]; takes \[3\]",
            ),
            (
                "offsets-meta",
                ValueError,
                lambda: {"offsets": ENDS.to("meta")},
                "offsets: got a tensor on meta; takes",
            ),
            (
                "offsets-strided",
                ValueError,
                lambda: {"offsets": ENDS.repeat_interleave(2)[::2]},
                r"offsets: got strides \[2\]; takes a contiguous tensor",
            ),
            (
                "offsets-descending",
                ValueError,
                lambda: {"offsets": ENDS.flip(0)},
                "offsets: got 1 for expert 1 after 2; takes ascending numbers from 0 to 2",
            ),
            (
                "offsets-beyond",
                ValueError,
                lambda: {"offsets": ENDS + 1, "check_offsets": True},
                "offsets: got 3 for expert 2 after 2; takes ascending numbers from 0 to 2",
            ),
            ("bias-list", TypeError, lambda: {"bias": []}, "bias: got list; takes a torch.Tensor"),
            (
                "bias-dtype",
                TypeError,
                lambda: {"bias": torch.zeros(3, 6).half()},
                "bias: got torch.float16; takes torch.float32, x's dtype",
            ),
            (
                "bias-shape",
                ValueError,
                lambda: {"bias": torch.zeros(6)},
                r"bias: got shape \[6\]; takes \[3, 6\]",
            ),
            (
                "bias-meta",
                ValueError,
                lambda: {"bias": torch.zeros(3, 6, device="meta")},
                "bias: got a tensor on meta; takes",
            ),
        )
    ),
    # linears_4bit
    *(
        (f"linears_4bit-{kind}", error, lambda args=args: qkern.linears_4bit(*args()), message)
        for kind, error, args, message in (
            ("qws-empty", ValueError, lambda: (X, []), "qws: got none; takes one"),
            ("qws-dense", TypeError, lambda: (X, [weight(), W]), r"qws\[1\]: got torch.float32 te"),
            ("qws-one", TypeError, lambda: (X, weight()), "qws: got QuantizedTensor; takes a list"),
            ("x-int", TypeError, lambda: (X.long(), [weight()]), "x: got torch.int64; takes"),
            (
                "qws-width",
                ValueError,
                lambda: (X, [weight(), weight(w=torch.zeros(6, 32))]),
                r"x: got shape \[2, 64\]; takes \[\.\.\., 32\]",
            ),
            (
                "biases-number",
                TypeError,
                lambda: (X, [weight()], 3),
                "biases: got int; takes a list of tensors and None, or None",
            ),
            (
                "biases-few",
                ValueError,
                lambda: (X, [weight(), weight()], [None]),
                "biases: got 1 for 2 weights; takes as many",
            ),
            (
                "biases-dtype",
                TypeError,
                lambda: (X, [weight()], [torch.zeros(6).half()]),
                "bias: got torch.float16; takes torch.float32",
            ),
        )
    ),
    (
        "nf4_linear-qw-fp4",
        ValueError,
        lambda: qkern.nf4_linear(X, weight(format="fp4")),
        "qw: got format 'fp4'; takes \"nf4\"",
    ),
    (
        "nf4_linear-qw-dense",
        TypeError,
        lambda: qkern.nf4_linear(X, W),
        "qw: got torch.float32 tensor",
    ),
    (
        "fp4_linear-qw-nf4",
        ValueError,
        lambda: qkern.fp4_linear(X, weight()),
        "qw: got format 'nf4'; takes \"fp4\"",
    ),
    ("fp4_linear-x-list", TypeError, lambda: qkern.fp4_linear([], weight(format="fp4")), "x: got"),
    # linear_cross_entropy: the others are in its own file
    (
        "linear_cross_entropy-labels-shape",
        ValueError,
        lambda: qkern.linear_cross_entropy(X, weight(), torch.arange(3)),
        r"labels: got shape \[3\]; takes \[2\]",
    ),
    # grouped_lora_linear
    *(
        (
            f"grouped_lora_linear-{kind}",
            error,
            lambda changes=changes: qkern.grouped_lora_linear(
                **{"x": X, "qw": experts(), "offsets": ENDS, "scaling": 1.0}
                | {"lora_a": torch.zeros(3, 2, 64), "lora_b": torch.zeros(3, 6, 2)}
                | changes
            ),
            message,
        )
        for kind, error, changes, message in (
            ("x", TypeError, {"x": None}, "x: got NoneType; takes"),
            ("x-3d", ValueError, {"x": X[None]}, r"x: got shape \[1, 2, 64\]; takes"),
            ("qw", TypeError, {"qw": weight()}, "qw: got QuantizedTensor; takes a QuantizedExp"),
            ("offsets", ValueError, {"offsets": ENDS[:2]}, r"offsets: got shape \[2\]; takes"),
            ("offsets-list", TypeError, {"offsets": [1]}, "offsets: got list; takes"),
            ("lora_a-list", TypeError, {"lora_a": []}, "lora_a: got list; takes"),
            (
                "lora_a-experts",
                ValueError,
                {"lora_a": torch.zeros(2, 2, 64)},
                r"lora_a: got shape \[2, 2, 64\]; takes \[3, r, 64\], or \[r, 64\] for all",
            ),
            ("lora_a-1d", ValueError, {"lora_a": torch.zeros(64)}, r"lora_a: got shape \[64\]"),
            (
                "lora_b-rank",
                ValueError,
                {"lora_b": torch.zeros(3, 6, 4)},
                r"lora_b: got shape \[3, 6, 4\]; takes \[3, 6, 2\], or \[6, 2\] for all",
            ),
            ("lora_b-dtype", TypeError, {"lora_b": torch.zeros(3, 6, 2).int()}, "lora_b: got tor"),
            ("dropout", ValueError, {"dropout_p": 1.0}, r"dropout_p: got 1\.0; takes"),
            ("bias", ValueError, {"bias": torch.zeros(6)}, r"bias: got shape \[6\]; takes"),
        )
    ),
    # lora_linear
    *(
        (
            f"lora_linear-{kind}",
            error,
            lambda changes=changes: qkern.lora_linear(
                **{
                    "x": X,
                    "qw": weight(),
                    "lora_a": torch.zeros(3, 64),
                    "lora_b": torch.zeros(6, 3),
                    "scaling": 1.0,
                }
                | changes
            ),
            message,
        )
        for kind, error, changes, message in (
            ("x", TypeError, {"x": None}, "x: got NoneType; takes"),
            ("x-0d", ValueError, {"x": torch.tensor(1.0)}, r"x: got shape \[\]; takes"),
            ("x-features", ValueError, {"x": torch.ones(99, 4)}, r"x: got shape \[99, 4\]; takes"),
            ("qw", TypeError, {"qw": W}, "qw: got torch.float32 tensor; takes"),
            ("lora_a-list", TypeError, {"lora_a": []}, "lora_a: got list; takes"),
            ("lora_a-dtype", TypeError, {"lora_a": torch.zeros(3, 64).int()}, "lora_a: got torch"),
            (
                "lora_a-shape",
                ValueError,
                {"lora_a": torch.zeros(64, 3)},
                r"lora_a: got shape \[64, 3\]; takes \[r, 64\]",
            ),
            (
                "lora_a-1d",
                ValueError,
                {"lora_a": torch.zeros(64)},
                r"lora_a: got shape \[64\]; takes \[r, 64\]",
            ),
            (
                "lora_b-rank",
                ValueError,
                {"lora_b": torch.zeros(6, 4)},
                r"lora_b: got shape \[6, 4\]; takes \[6, 3\]",
            ),
            (
                "lora_b-shape",
                ValueError,
                {"lora_b": torch.zeros(3, 6)},
                r"lora_b: got shape \[3, 6\]; takes \[6, 3\]",
            ),
            ("lora_b-none", TypeError, {"lora_b": None}, "lora_b: got NoneType; takes"),
            (
                "lora_b-meta",
                ValueError,
                {"lora_b": torch.zeros(6, 3, device="meta")},
                "lora_b: got a tensor on meta; takes cpu",
            ),
            ("dropout_p-negative", ValueError, {"dropout_p": -0.1}, "dropout_p: got -0.1; takes"),
            ("dropout_p-one", ValueError, {"dropout_p": 1.0}, "dropout_p: got 1.0; takes"),
            ("bias-shape", ValueError, {"bias": torch.zeros(3)}, r"bias: got shape \[3\]; takes"),
        )
    ),
    # quantize_8bit, dequantize_8bit
    *(
        (f"quantize_8bit-{kind}", error, lambda args=args: qkern.quantize_8bit(*args), message)
        for kind, error, args, message in (
            ("x-list", TypeError, ([],), "x: got list; takes a torch.Tensor"),
            ("x-float64", TypeError, (X.double(),), "x: got torch.float64; takes"),
            ("map-name", ValueError, (X, "linear"), 'map: got .linear.; takes "signed" or "uns'),
            ("map-list", TypeError, (X, [0.0] * 256), "map: got list; takes"),
            ("map-dtype", TypeError, (X, RAMP.double()), "map: got torch.float64; takes"),
            ("map-shape", ValueError, (X, CODEBOOK), r"map: got shape \[16\]; takes \[256\]"),
            ("map-order", ValueError, (X, RAMP.flip(0)), "map: .*; takes 256 ascending values"),
            ("map-nan", ValueError, (X, NAN_RAMP), "map: .*; takes 256 ascending values"),
            ("map-meta", ValueError, (X, RAMP.to("meta")), "map: got a tensor on meta; takes cpu"),
            ("block_size", ValueError, (X, "signed", 100), "block_size: got 100; takes"),
            ("block_size-type", TypeError, (X, "signed", 64.0), "block_size: got float; takes"),
        )
    ),
    *(
        (f"dequantize_8bit-{kind}", error, lambda args=args: qkern.dequantize_8bit(*args), message)
        for kind, error, args, message in (
            ("codes-list", TypeError, ([], X), "codes: got list; takes a torch.Tensor"),
            ("codes-dtype", TypeError, (X, X), "codes: got torch.float32; takes torch.uint8"),
            ("absmax-list", TypeError, (X.byte(), []), "absmax: got list; takes"),
            ("absmax-dtype", TypeError, (X.byte(), torch.ones(1).half()), "absmax: got torch.fl"),
            (
                "absmax-shape",
                ValueError,
                (X.byte(), torch.ones(2)),
                r"absmax: got shape \[2\]; takes \[1\]",
            ),
            (
                "absmax-meta",
                ValueError,
                (X.byte(), torch.ones(1, device="meta")),
                "absmax: got a tensor on meta",
            ),
            ("map", ValueError, (X.byte(), torch.ones(1), "x"), "map: got 'x'; takes"),
            (
                "block_size",
                ValueError,
                (X.byte(), torch.ones(4), "signed", 33),
                "block_size: got 33; takes",
            ),
            (
                "dtype",
                TypeError,
                (X.byte(), torch.ones(1), "signed", 256, torch.int8),
                "dtype: got torch.int8; takes",
            ),
        )
    ),
]


@pytest.mark.parametrize(
    ("error", "call", "message"), [entry[1:] for entry in BAD_CALLS], ids=[e[0] for e in BAD_CALLS]
)
def test_bad_argument(error: type[Exception], call: Call, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error
    assert "; takes" in str(raised.value)


MATMUL_CALLS = [entry for entry in BAD_CALLS if "linear" in entry[0].split("-")[0]]


@needs_native
@pytest.mark.parametrize("call", [e[2] for e in MATMUL_CALLS], ids=[e[0] for e in MATMUL_CALLS])
def test_errors_do_not_depend_on_who_reads_the_tensors(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkern.linear_4bit(X, weight())  # so that the backend is chosen, and the kernel called first
    with pytest.raises((TypeError, ValueError)) as read_by_the_binding:
        call()
    monkeypatch.setattr(backends.cpu, "fast", {})
    with pytest.raises(read_by_the_binding.type) as read_in_python:
        call()
    assert str(read_by_the_binding.value) == str(read_in_python.value)


def test_every_public_function_is_covered() -> None:
    functions = {
        name
        for name in qkern.__all__
        if callable(getattr(qkern, name)) and not isinstance(getattr(qkern, name), type)
    }
    tested = {entry[0].split("-")[0] for entry in BAD_CALLS}
    assert functions - {"batch_invariant", "precision"} == tested


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.DTYPE_NAMES.get)
def test_nonfinite_weights_name_the_first_bad_block(dtype: torch.dtype, bad: float) -> None:
    w = torch.randn(10, 100).to(dtype)
    for element, block, span in (
        (0, 0, "0 to 63"),
        (511, 7, "448 to 511"),
        (999, 15, "960 to 999"),
    ):
        broken = w.clone()
        broken.view(-1)[element:] = bad
        message = f"w: got a NaN or an infinity in block {block} (elements {span}"
        with pytest.raises(ValueError, match=re.escape(message)):
            qkern.quantize_4bit(broken)
        with pytest.raises(ValueError, match=re.escape(message)):
            qkern.quantize_4bit(broken.double().to(dtype).mT.contiguous().mT)


def test_nonfinite_weights_unchecked_are_never_clean() -> None:
    w = torch.randn(10, 100)
    w[3, 3] = math.inf
    plain = qkern.quantize_4bit(w, double_quant=False, check_finite=False).dequantize().view(-1)
    assert plain[256 : 256 + 64].isnan().logical_or(plain[256 : 256 + 64] == 0).all()
    assert plain[256 + 47].isnan()
    assert plain[:256].isfinite().all()
    assert plain[320:].isfinite().all()
    assert qkern.quantize_4bit(w, check_finite=False).dequantize().isnan().any()


FIELDS: list[tuple[str, type[Exception], dict[str, Any], str]] = [
    ("packed-list", TypeError, {"packed": [0]}, "packed: got list; takes"),
    ("packed-dtype", TypeError, {"packed": torch.zeros(192)}, "packed: got torch.float32; takes"),
    ("packed-short", ValueError, {"packed": torch.zeros(191, dtype=torch.uint8)}, "packed: got sh"),
    ("packed-2d", ValueError, {"packed": torch.zeros(192, 1, dtype=torch.uint8)}, "packed: got sh"),
    ("absmax-dtype", TypeError, {"absmax": torch.ones(6)}, "absmax: got torch.float32; takes"),
    (
        "absmax-short",
        ValueError,
        {"absmax": torch.zeros(5, dtype=torch.uint8)},
        "absmax: got shape",
    ),
    ("nested_absmax-none", ValueError, {"nested_absmax": None}, "got only one; takes both"),
    ("nested_offset-none", ValueError, {"nested_offset": None}, "got only one; takes both"),
    (
        "nested_absmax-long",
        ValueError,
        {"nested_absmax": torch.ones(2)},
        "nested_absmax: got shape",
    ),
    ("nested_offset-1d", ValueError, {"nested_offset": torch.ones(1)}, "nested_offset: got shape"),
    ("codebook-superfluous", ValueError, {"codebook": CODEBOOK}, "codebook: got a tensor with"),
    ("format", ValueError, {"format": "nf3"}, "format: got 'nf3'; takes"),
    ("format-custom", ValueError, {"format": "custom"}, "codebook: got None with"),
    ("block_size", ValueError, {"block_size": 96}, "block_size: got 96; takes"),
    ("block_size-other", ValueError, {"block_size": 32}, "absmax: got shape"),
    ("shape", ValueError, {"shape": (6, 65)}, "packed: got shape"),
    ("dtype", TypeError, {"dtype": torch.int8}, "dtype: got torch.int8; takes"),
    ("device", ValueError, {"absmax": torch.zeros(6, dtype=torch.uint8, device="meta")}, "absmax"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), [field[1:] for field in FIELDS], ids=[f[0] for f in FIELDS]
)
def test_quantized_tensor_refuses_parts_that_do_not_fit(
    error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(weight(), **changes)


def test_layouts_work() -> None:
    """Any strides give what the contiguous copy gives."""
    w, x = torch.randn(7, 5, 66), torch.randn(4, 6, 66)
    for layout in testing.LAYOUTS:
        strided = testing.with_layout(w, layout)
        ours, theirs = (qkern.quantize_4bit(t) for t in (strided, strided.contiguous()))
        for name, tensor in ours.tensors().items():
            testing.assert_bitwise(tensor, theirs.tensors()[name], f"{layout} {name}")
        qw = qkern.quantize_4bit(w[0])
        strided = testing.with_layout(x, layout)
        y, expected = qkern.linear_4bit(strided, qw), qkern.linear_4bit(strided.contiguous(), qw)
        testing.assert_bitwise(y, expected, layout)


@pytest.mark.parametrize("shape", [(5, 100), (3, 33), (1, 1), (7, 4097)], ids=str)
def test_rows_that_blocks_do_not_divide_work(shape: tuple[int, int]) -> None:
    qw = qkern.quantize_4bit(torch.randn(shape))
    x = torch.randn(3, shape[1], requires_grad=True)
    y = qkern.linear_4bit(x, qw)
    y.sum().backward()
    testing.assert_matmul(y, x, qw.dequantize(torch.float32))
    testing.assert_matmul(x.grad, torch.ones(3, shape[0]), qw.dequantize(torch.float32).mT)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (3, 0, 5)], ids=str)
def test_empty_weights_work(shape: tuple[int, ...], double_quant: bool) -> None:
    qw = qkern.quantize_4bit(torch.empty(shape), double_quant=double_quant)
    assert qw.packed.shape == (0,)
    assert qw.dequantize().shape == shape
    if len(shape) == 2:
        x = torch.randn(5, shape[1], requires_grad=True)
        bias = torch.randn(shape[0])
        y = qkern.linear_4bit(x, qw, bias)
        testing.assert_bitwise(y, bias.expand(5, -1))
        y.sum().backward()
        testing.assert_bitwise(x.grad, torch.zeros_like(x))
    codes, absmax = qkern.quantize_8bit(torch.empty(shape))
    assert qkern.dequantize_8bit(codes, absmax).shape == shape


def test_empty_batches_work() -> None:
    x = torch.empty(2, 0, 64, requires_grad=True)
    y = qkern.linear_4bit(x, weight(), torch.randn(6))
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_weights_that_require_grad_are_quantised_without_a_graph() -> None:
    w = torch.nn.Parameter(torch.randn(6, 64))
    qw = qkern.quantize_4bit(w)
    assert not any(t.requires_grad for t in qw.tensors().values())
    assert not qw.dequantize().requires_grad


def test_meta_weights_give_meta_parts() -> None:
    qw = qkern.quantize_4bit(torch.empty(8, 64, device="meta", dtype=torch.bfloat16))
    assert all(t.is_meta for t in qw.tensors().values())
    assert qw.dequantize().shape == (8, 64)
    y = qkern.linear_4bit(torch.empty(3, 64, device="meta"), qw)
    assert y.is_meta
    assert y.shape == (3, 8)


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name: got 'gpu'; takes one of"), backends.use("gpu"):
        pass
    with pytest.raises(ValueError, match="isa: got"), backends.use("reference", isa="avx2"):
        pass
    backends.selected.clear()
    monkeypatch.setenv("QKERN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="QKERN_BACKEND: got 'gpu'; takes one of"):
        qkern.quantize_4bit(W)
    backends.selected.clear()


@needs_native
def test_an_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ValueError, match="sse9"), backends.use("cpu", isa="sse9"):
        pass


def op_inputs(name: str, double_quant: bool = True) -> testing.Inputs:
    spec = OPS[name]
    shape = (3, 40, 130) if spec.multiplies else (13, 100)
    case = Case(shape, format="custom", codebook="unsorted", double_quant=double_quant, bias=True)
    return spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))


# Arguments whose size the others determine, and which must be contiguous.
SIZED = ("packed", "absmax", "nested_absmax", "nested_offset", "codebook", "bias", "map")


@needs_native
@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_what_would_be_unsafe(name: str) -> None:
    """Called past the public functions, an op still never reads through a wrong pointer."""
    op, inputs = OPS[name].op.overload, OPS[name].by_name(op_inputs(name))
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        changed = [value.double() if value.is_floating_point() else value.short()]
        if key in SIZED and name != "quantize_absmax":
            changed += [torch.cat([value.view(-1), value.view(-1)])]
            changed += [value.view(-1)[:-1]]
        # How many offsets there are determines the sizes of others.
        has_no_strides = (key in SIZED and name != "quantize_absmax") or key == "offsets"
        if has_no_strides and value.numel() > 1:
            changed += [value.view(-1).repeat_interleave(2)[::2]]
        for wrong in changed:
            with pytest.raises((TypeError, ValueError), match=f"^{key}: got"):
                op(**inputs | {key: wrong})
    for bad in ({"block_size": 48}, {"format": "nf5"}):
        if bad.keys() <= inputs.keys():
            with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
                op(**inputs | bad)


BIG = (1 << 31) + 3 * 4096 + 5


@pytest.fixture
def sparse_file(tmp_path: Path) -> Iterator[Path]:
    """A file of `BIG` float16 zeros that takes no space until written."""
    path = tmp_path / "weight.f16"
    with path.open("wb") as file:
        file.truncate(BIG * 2)
    yield path
    path.unlink()


@pytest.fixture
def big_file(sparse_file: Path) -> Path:
    """Zeros but for a few runs before, at and after element 2^31."""
    with sparse_file.open("r+b") as file:
        for start in RUNS:
            file.seek(start * 2)
            file.write(run_at(start).numpy().tobytes())
    return sparse_file


RUNS = (0, (1 << 31) - 4096, 1 << 31, BIG - 4096 - 5)


def run_at(start: int) -> Tensor:
    return torch.randn(4096, generator=torch.Generator().manual_seed(start % 97)).half()


@needs_native
@pytest.mark.unpoisoned
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
def test_more_than_2_31_elements_of_a_memory_mapped_tensor(
    big_file: Path, double_quant: bool
) -> None:
    w = torch.from_file(str(big_file), shared=False, size=BIG, dtype=torch.float16)
    qw = qkern.quantize_4bit(w, block_size=4096, double_quant=double_quant)
    assert qw.numel() == BIG
    for start in RUNS:
        small = qkern.quantize_4bit(run_at(start), block_size=4096, double_quant=False)
        block = start // 4096
        assert start % 4096 == 0, "runs are whole blocks, so that codes can be compared"
        testing.assert_bitwise(qw.packed[start // 2 :][:2048], small.packed, f"codes at {start}")
        if not double_quant:
            testing.assert_bitwise(qw.absmax[block : block + 1], small.absmax, f"absmax {start}")
    assert (qw.packed[1 << 20 : (1 << 20) + 4096] == 0x77).all()
    assert qw.packed[-1] & 0xF == 7


@needs_native
@pytest.mark.unpoisoned
def test_more_than_2_31_elements_name_the_bad_block(big_file: Path) -> None:
    with big_file.open("r+b") as file:
        file.seek((BIG - 2) * 2)
        file.write(torch.tensor([math.nan]).half().numpy().tobytes())
    w = torch.from_file(str(big_file), shared=False, size=BIG, dtype=torch.float16)
    with pytest.raises(ValueError, match=f"in block {(BIG - 1) // 4096} "):
        qkern.quantize_4bit(w, block_size=4096)


@needs_native
@pytest.mark.slow
@pytest.mark.unpoisoned
def test_dequantize_more_than_2_31_elements(sparse_file: Path) -> None:
    """Slow, because the file fills: 4.3 GB."""
    blocks = formats.num_blocks(BIG, 4096)
    out = torch.from_file(str(sparse_file), shared=True, size=BIG, dtype=torch.float16)
    packed = torch.from_numpy(np.zeros(formats.packed_size(BIG), dtype=np.uint8))
    packed[-3:] = torch.tensor([0x12, 0x34, 0x5F])
    absmax = torch.arange(blocks).remainder(7) + 1.0
    qw = QuantizedTensor(packed, absmax, None, None, None, "nf4", 4096, (BIG,), torch.float16)
    qw.dequantize(out=out)
    codes = torch.tensor([1, 2, 3, 4, 5])
    tail = formats.code_tensor("nf4")[codes] * absmax[-1]
    testing.assert_bitwise(out[-5:], tail.half())
    for start in (0, (1 << 31) - 4096, 1 << 31, (1 << 31) + 4096):
        assert (out[start : start + 4096] == -absmax[start // 4096]).all()


@needs_native
@pytest.mark.unpoisoned
def test_matmuls_with_more_than_2_31_weights() -> None:
    out_features, in_features = 32_769, 65_537
    assert out_features * in_features > 1 << 31
    numel = out_features * in_features
    # Never written, so these pages cost no memory; code 0 is -1.
    packed = torch.from_numpy(np.zeros(formats.packed_size(numel), dtype=np.uint8))
    packed[-in_features // 2 :] = 0xFF
    absmax = torch.ones(formats.num_blocks(numel, 4096))
    qw = QuantizedTensor(
        packed, absmax, None, None, None, "nf4", 4096, (out_features, in_features), torch.float32
    )
    x = torch.zeros(1, in_features, requires_grad=True)
    x.data[0, -1] = 3.0
    y = qkern.linear_4bit(x, qw)
    assert (y[0, :-1] == -3).all()
    assert y[0, -1] == 3
    dy = torch.zeros_like(y)
    dy[0, -1] = 2.0
    y.backward(dy)
    assert (x.grad[0, 1:] == 2).all()


@needs_native
@pytest.mark.unpoisoned
def test_matmuls_with_more_than_2_31_activations() -> None:
    rows = (1 << 31) // 64 + 3
    x = torch.from_numpy(np.zeros((rows, 64), dtype=np.float16))
    x[-1] = 1.0
    x[-3, 5] = 1.0
    qw = qkern.quantize_4bit(torch.ones(1, 64))
    y = qkern.linear_4bit(x, qw)
    assert y[-1] == 64
    assert y[-2] == 0
    assert y[-3] == 1
    assert y[: 1 << 20].count_nonzero() == 0


@pytest.mark.parametrize("field", ["absmax", "nested_absmax", "nested_offset", "codebook"])
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx", "dequantize_4bit"])
def test_a_weight_that_is_partly_on_meta_is_refused(op: str, field: str) -> None:
    """torch would take the op for one on meta, and return memory that nobody filled."""
    inputs = op_inputs(op)
    tensor = getattr(inputs["weight"], field).to("meta")
    inputs["weight"] = inputs["weight"]._replace(**{field: tensor})
    with pytest.raises(ValueError, match=f"{field}: got a tensor on meta"):
        OPS[op].run(inputs)
