"""Takes the state of an optimizer out and in: its own, and that of other AdamWs."""

from __future__ import annotations

import copy
import numbers
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern import formats
from qkern.optim._moments import BLOCK, MAPS, Moments, is_sharded, local, to_state
from qkern.optim._options import check_options, is_integer
from qkern.optim._pager import MOST_STEPS
from qkern.optim._updates import number as number_tensor

if TYPE_CHECKING:
    from qkern.optim.optimizer import PagedAdamW


def add_moments(optimizer: PagedAdamW, state_dict: dict[str, Any]) -> None:
    """Add to the optimizer's ``state_dict`` the moments that torch does not find there.

    These are a pager's, and the 8-bit moments of sharded parameters. The latter are saved as
    floats, because codes cannot be resharded: their scale is shared with elements that may go to
    another shard. The copies are on the CPU, because floats or paged moments may not fit the GPU;
    then all moments are, because torch wants a state on one device.
    """
    pairs = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    state = optimizer.state
    with_state = [i for i, (param, _) in enumerate(pairs) if "step" in state.get(param, {})]
    if optimizer._pager is not None:
        bits = {
            i: 32 if is_sharded(pairs[i][0]) else optimizer._bits(*pairs[i]) for i in with_state
        }
        found = optimizer._pager.read(bits)
    elif any(is_sharded(pairs[i][0]) and optimizer._bits(*pairs[i]) == 8 for i in with_state):
        found = {i: optimizer._moments(*pairs[i]) for i in with_state}
    else:
        return
    for index, moments in found.items():
        param, _ = pairs[index]
        moments = moments.view(local(param).shape)
        if is_sharded(param):
            moments = moments.to_reversible().like(param)
        # Another dict: the one there is the optimizer's own.
        others = {k: v for k, v in state_dict["state"][index].items() if k not in Moments._fields}
        state_dict["state"][index] = others | to_state(moments.on(torch.device("cpu")))


def load(optimizer: PagedAdamW, state_dict: dict[str, Any]) -> None:
    """The optimizer's ``load_state_dict``.

    All of it is done here, because torch's own casts moments to the parameter's dtype.
    """
    state_dict = state_dict.copy()
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    groups = _fitting_groups(state_dict["param_groups"], optimizer.param_groups)
    names = [name for group in state_dict["param_groups"] for name in group["params"]]
    pairs = [(param, group) for group in groups for param in group["params"]]
    pager = optimizer._pager
    wanted: dict[int, tuple[int, Moments]] = {}
    for index, (name, (param, group)) in enumerate(zip(names, pairs, strict=True)):
        if state := state_dict["state"].get(name):
            if is_integer(param):
                raise ValueError(f"state[{name}]: got moments of a {param.dtype} parameter")
            # Paged, they need not all fit the parameter's device at a time.
            place = param.device if pager is None else torch.device("cpu")
            step, moments = _from_state(f"state[{name}]", state, local(param), place)
            wanted[index] = (step, moments.to_bits(optimizer._bits(param, group)))
    found: defaultdict[Tensor, Any] = defaultdict(dict)
    for index, (step, moments) in wanted.items():
        param = pairs[index][0]
        where = optimizer._device_of_steps(param.device)
        found[param] = {"step": number_tensor(step, where)}
        if pager is None:
            found[param] |= to_state(moments.like(param, copy=True))

    def take() -> None:
        optimizer.__setstate__({"state": found, "param_groups": groups})
        if pager is not None:
            optimizer._steps_seen = pager.steps

    version = 0 if pager is None else pager.version
    try:
        if pager is not None:
            pager.load(wanted)
        take()
    except BaseException:
        # With what the pager has committed goes the rest, though an interrupt came in between.
        if pager is not None and pager.version != version:
            take()
        raise
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _looks_like_codes(moments: Moments) -> bool:
    """Whether all are whole numbers from 0 to 255, and not just 0 and 1.

    Moments never are. Codes become such floats where ``torch.distributed.checkpoint`` reads them
    into a state of 32 bits: it copies whatever it finds, of whatever dtype.
    """
    pair = (moments.exp_avg.view(-1), moments.exp_avg_sq.view(-1))

    def whole(moment: Tensor) -> bool:
        return bool(((moment == moment.round()) & (moment >= 0) & (moment <= 255)).all())

    return (
        pair[0].numel() >= BLOCK
        # Of real ones a look at a few is enough.
        and all(whole(moment[:BLOCK]) for moment in pair)
        and all(whole(moment) for moment in pair)
        and any(bool((moment > 1).any()) for moment in pair)
    )


def _fitting_groups(
    saved: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The options of a checkpoint's groups, for the parameters of these.

    Other classes' groups lack some options; the width of moments stays.
    """
    if len(saved) != len(mine):
        raise ValueError(f"param_groups: got {len(saved)} groups; takes {len(mine)}")
    found = []
    for number, (group, own) in enumerate(zip(saved, mine, strict=True)):
        if len(group["params"]) != len(own["params"]):
            raise ValueError(
                f"param_groups[{number}].params: got {len(group['params'])} parameters;"
                f" takes {len(own['params'])}"
            )
        options = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
        found.append(own | options | {"bits": own["bits"]})
        check_options(found[-1], f"param_groups[{number}].")
    return found


# bitsandbytes' names, and under which key it hides them from FSDP.
_BITSANDBYTES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax",
}
_BITSANDBYTES_NESTED = "__bnb_optimizer_quant_state__"


def _from_state(
    name: str, state: Mapping[str, Any], param: Tensor, device: torch.device
) -> tuple[int, Moments]:
    """The step and the moments that a checkpoint has for ``param``, on ``device``.

    Raises ``ValueError``, starting with ``name``, for what is not AdamW's or does not fit.
    """
    state = {**state, **state.get(_BITSANDBYTES_NESTED, {})}
    for number, map in enumerate(MAPS, 1):
        found = state.get(f"qmap{number}")
        if found is not None and not torch.equal(found.cpu().float(), formats.map_tensor(map)):
            raise ValueError(f"{name}.qmap{number}: got another map; takes the dynamic map")
    state = {_BITSANDBYTES.get(key, key): value for key, value in state.items()}
    if state.get("max_exp_avg_sq") is not None:
        raise ValueError(f"{name}: got max_exp_avg_sq, of AMSGrad; takes AdamW's state")
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
    if missing:
        flattened = (
            ": a flattened state (flatten_optimizer_state_dict) does not fit an optimizer with a"
            " pager, for torch leaves out its moments; take one that is not flattened"
        )
        raise ValueError(
            f"{name}: got no {missing[0]}; takes the state of an Adam or AdamW"
            + (flattened if "step" in state else "")
        )
    step = _step(f"{name}.step", state["step"])
    moments = [
        _moment(f"{name}.{key}", state[key], param, device) for key in ("exp_avg", "exp_avg_sq")
    ]
    narrow = [moment.dtype is torch.uint8 for moment in moments]
    if narrow[0] != narrow[1]:
        raise ValueError(
            f"{name}.exp_avg_sq: got {moments[1].dtype}; takes codes or floats, as exp_avg:"
            f" {moments[0].dtype}"
        )
    if not narrow[0]:
        for key in ("exp_avg_absmax", "exp_avg_sq_absmax"):
            # torch puts an empty dict for a tensor that a flattened checkpoint lacks.
            if torch.is_tensor(state.get(key)):
                raise ValueError(f"{name}.{key}: got scales; takes none beside {moments[0].dtype}")
        found = Moments(*(moment.float() for moment in moments))
        _check_values(f"{name}.exp_avg", found.exp_avg, signed=True)
        _check_values(f"{name}.exp_avg_sq", found.exp_avg_sq, signed=False)
        if _looks_like_codes(found):
            raise ValueError(
                f"{name}.exp_avg: got whole numbers from 0 to 255 as floats, which codes of 8 bits"
                " become when they are copied into a state of 32; takes moments: read the"
                " checkpoint into a state of its own width, then load that"
            )
        return step, found
    blocks = formats.num_blocks(param.numel(), BLOCK)
    absmaxes = []
    for key in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        absmax = state.get(key)
        if not isinstance(absmax, Tensor) or absmax.numel() != blocks:
            got = f"{absmax.numel()} scales" if isinstance(absmax, Tensor) else "none"
            raise ValueError(f"{name}.{key}: got {got}; takes {blocks}, one for each {BLOCK} codes")
        if not absmax.dtype.is_floating_point or absmax.device.type == "meta":
            raise ValueError(
                f"{name}.{key}: got {absmax.dtype} on {absmax.device}; takes floats with values"
            )
        absmax = absmax.to(device, torch.float32).reshape(-1)
        _check_values(f"{name}.{key}", absmax, signed=False)
        absmaxes.append(absmax)
    return step, Moments(*moments, *absmaxes)


def _step(name: str, step: Any) -> int:
    """The number of steps that a checkpoint has as a number or a tensor."""
    if isinstance(step, Tensor) and (step.numel() != 1 or step.device.type == "meta"):
        raise ValueError(f"{name}: got shape {list(step.shape)} on {step.device}; takes one number")
    value = step.item() if isinstance(step, Tensor) else step
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 <= value <= MOST_STEPS or value != int(value):
        raise ValueError(f"{name}: got {value!r}; takes a whole number from 0 to {MOST_STEPS}")
    return int(value)


def _moment(name: str, moment: Any, param: Tensor, device: torch.device) -> Tensor:
    """A moment of a checkpoint, contiguous and on ``device``."""
    if not isinstance(moment, Tensor):
        raise ValueError(f"{name}: got {type(moment).__name__}; takes a tensor")
    moment = local(moment)
    if moment.dtype is not torch.uint8 and not moment.dtype.is_floating_point:
        raise ValueError(f"{name}: got {moment.dtype}; takes floats, or codes as torch.uint8")
    if moment.layout is not torch.strided or moment.device.type == "meta":
        raise ValueError(
            f"{name}: got {moment.layout} on {moment.device}; takes a dense tensor with values"
        )
    if moment.shape != param.shape:
        raise ValueError(f"{name}: got shape {list(moment.shape)}; takes {list(param.shape)}")
    return moment.to(device).contiguous()  # torch's have the parameter's strides


def _check_values(name: str, values: Tensor, signed: bool) -> None:
    """Raises ``ValueError`` for what no step leaves: it would go to the parameters unseen."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: got infinities or NaN; takes finite values")
    if not signed and bool((values < 0).any()):
        raise ValueError(f"{name}: got values below 0; takes 0 and above")
