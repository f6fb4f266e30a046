"""bitsandbytes' layer on its own code and on qkern's kernels, in turn in one process.

Both sides have layers of bitsandbytes with copies of one weight. Before each call, untimed, qkern's
kernels are put in or taken out by `qkern.integrations.bitsandbytes`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

import qkern
from qkern import testing
from qkern.integrations import bitsandbytes as integration

from . import matmul, peers, weights
from .timing import Call, Candidate, Problem, SkippedError

OPS = {"enabled_forward": False, "enabled_forward_backward": True}
"""By name, whether the gradient of the input is computed too."""
ROWS = (1, 16, 512)

ON_QKERN = "bitsandbytes on qkern"
_OWN = "bitsandbytes"


def contest(
    op: str, shape: tuple[int, int], m: int, dtype: torch.dtype, choice: peers.Choice
) -> tuple[Problem, list[Candidate], list[str]]:
    """The layer on qkern's kernels, the layer on its own code, and qkern called directly."""
    backward = OPS[op]
    specs = [testing.OPS[name] for name in ("linear_4bit", "linear_4bit_dx")[: 1 + backward]]
    case = weights.case((m, *shape), dtype)
    qw = weights.random_weight(shape, dtype)
    x, dy = matmul.activations(m, shape, dtype)
    check = matmul.Check(qw, x, dy if backward else None)
    size = sum(spec.bytes(case) for spec in specs)

    def call(linear: peers.Linear) -> Call:
        if backward:
            return matmul.training_call(linear, x, dy)
        return matmul.inference_call(linear, x)

    ours = peers.qkern_linear(qw, dtype)
    direct = Candidate("qkern", lambda: call(ours.make(x)), check.exactly, size, qw.nbytes)
    problem = Problem(op, dtype, shape, m, sum(spec.flops(case) for spec in specs))
    try:
        bnb = peers.bitsandbytes(choice.limit is not None)
        theirs = peers.bitsandbytes_linear(qw, dtype)
    except SkippedError as error:
        return problem, [direct], [f"{ON_QKERN}: {error}"]

    def prepare() -> Call:
        return call(_layer(bnb, qw, dtype))

    def enable() -> None:
        integration.enable()

    judge = check.judge(_OWN, theirs)
    on = Candidate(ON_QKERN, prepare, check.exactly, size, qw.nbytes, before=enable)
    own = Candidate(_OWN, prepare, judge, size, qw.nbytes, before=integration.disable)
    return problem, [on, own, direct], []


def _layer(bnb: Any, qw: qkern.QuantizedTensor, dtype: torch.dtype) -> Any:
    """A layer in training mode, which packs nothing, with a copy of the weight."""
    packed, state = peers.to_bitsandbytes(deepcopy(qw), dtype)
    out_features, in_features = qw.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, quant_type=qw.format, compute_dtype=dtype
    )
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type=qw.format, bnb_quantized=True
    )
    return layer.train()
