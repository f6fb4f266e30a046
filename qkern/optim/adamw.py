"""AdamW with moments in 32 or 8 bits, in memory or in a file."""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

import qkern.ops  # noqa: F401  registers torch.ops.qkern
from qkern import _errors, reference
from qkern.optim._moments import Moments, from_state, local, of_zeros, to_state
from qkern.optim.paging import FilePager, Piece

PAGERS = ("auto", "none", "mmap")
DEFAULT_BUDGET = 256 << 20


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), of which the moments may live in a file.

    Drop-in for ``torch.optim.AdamW``: the same order of decay and update, the same state in 32
    bits, parameter groups, schedulers, closures and ``GradScaler``. One kernel call updates all
    parameters of a group.

    Args:
        params: Parameters or groups, as ``torch.optim.Optimizer`` takes them: float32, bfloat16 or
            float16, each with gradients of its own dtype. The arithmetic is float32 and rounded
            once.
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each from 0 to below 1.
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled: a step first scales a parameter by ``1 - lr * weight_decay``.
        amsgrad: False; there is no AMSGrad here.
        bits: 32, or 8: moments as codes of the 8-bit dynamic map, a scale for each 256 (Dettmers
            et al., arXiv 2110.02861), the nearest code exactly. A parameter of fewer than
            ``min_8bit_size`` elements has 32 all the same. May differ between groups.
        pager: Where the moments are. ``"none"``: in memory, on the parameter's device. ``"mmap"``:
            in the file ``path``, read and written chunk by chunk during a step, with at most
            ``budget_bytes`` of it in memory; for parameters on a CPU. ``"auto"``: ``"mmap"`` where
            there is a ``path``. The attribute ``pager`` tells which it is.
        path: The file, which must not exist; or with ``resume`` must, written by an optimizer of
            the same parameters, whose steps and moments are then taken as last committed. Every
            ``step`` commits: if the process is killed within one, the file has the step before.
        resume: See ``path``.
        budget_bytes: Most memory that holds parts of the file, 256 MiB by default.
        durable: Let every step wait for the disk, so that a power cut loses no commit either.
        max_grad_norm: Clip gradients to this global norm, as ``torch.nn.utils.clip_grad_norm_``
            does, but within the step: the gradients themselves stay. ``grad_norm`` is the last one.
        maximize: Ascend instead. May differ between groups.
        min_8bit_size: See ``bits``.
        stochastic_rounding: Round bfloat16 parameters up or down at random, by how near each is,
            so that updates below half a step are not lost. The numbers follow from ``seed``.
        seed: From 0 to 2^32 - 1.

    Raises:
        TypeError: A parameter's dtype is none of the three.
        ValueError: An argument is out of its range, or arguments contradict each other.
        FileExistsError, FileNotFoundError, qkern.optim.ChunkFileError: See ``path``.
    """

    # GradScaler leaves inverse scaling and the check for infinities to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bits: int = 32,
        pager: str = "auto",
        path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        budget_bytes: int | None = None,
        durable: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        _check_amsgrad(amsgrad)
        if pager not in PAGERS:
            raise ValueError(f"pager: got {pager!r}; takes one of {', '.join(PAGERS)}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}; takes a norm above 0, or None")
        if not (isinstance(seed, int) and 0 <= seed < 1 << 32):
            raise ValueError(f"seed: got {seed}; takes 0 to 2^32 - 1")
        if pager == "auto":
            pager = "none" if path is None else "mmap"
        in_file = {"path": path, "budget_bytes": budget_bytes}
        in_file |= {"resume": resume or None, "durable": durable or None}
        for name, value in in_file.items():
            if pager == "none" and value is not None:
                raise ValueError(f'{name}: got {value!r} with pager "none"; goes with "mmap"')
        if pager == "mmap" and path is None:
            raise ValueError('path: got None with pager "mmap"; takes the name of a file')
        self.pager = pager
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._min_8bit_size = min_8bit_size
        self._seed = seed if stochastic_rounding else None
        self._file: FilePager | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bits": bits,
        }
        super().__init__(params, defaults)
        if path is not None:
            budget_bytes = DEFAULT_BUDGET if budget_bytes is None else budget_bytes
            self._open_file(path, resume, budget_bytes, durable)

    def _open_file(
        self, path: str | os.PathLike[str], resume: bool, budget_bytes: int, durable: bool
    ) -> None:
        params = self._params()
        for param in params:
            if not param.is_cpu:
                raise ValueError(
                    f'pager: got "mmap" with a parameter on {param.device}; takes those on a cpu'
                )
        shapes = [tuple(local(param).shape) for param in params]
        bits = [
            self._bits(param, group) for group in self.param_groups for param in group["params"]
        ]
        self._file = FilePager(path, shapes, bits, budget_bytes, resume=resume, durable=durable)
        # A hook, so that those of others see the moments too.
        self.register_state_dict_post_hook(_add_moments)
        for param, step in zip(params, self._file.steps, strict=True):
            if step:
                self.state[param]["step"] = torch.tensor(float(step))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does; not to an optimizer with a file."""
        if getattr(self, "_file", None) is not None:
            raise RuntimeError(
                'param_group: got one after the file was made; with pager "mmap" all are given at'
                " construction"
            )
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                self._bits(param, self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` does, or None.

        With ``GradScaler``, gradients that are not all finite leave everything as it was. With a
        file, an error (a full disk) leaves the file at the step before; parameters may then be
        updated already and must come from a checkpoint, as the message says.

        Raises:
            TypeError: A gradient is sparse, or of another dtype than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = self._collect()
        scale = self._grad_scale([grad for *_, grad in updates])
        found_inf = getattr(self, "found_inf", None)
        if self._file is None:
            self._step_in_memory(updates, scale, found_inf)
        elif found_inf is None or not bool(found_inf):
            self._step_in_file(updates, scale)
        return loss

    def _collect(self) -> list[tuple[int, dict[str, Any], Tensor, Tensor]]:
        """Each parameter with a gradient: its number, group, and both."""
        updates = []
        index = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _check_grad(param, param.grad)
                    updates.append((index, group, param, param.grad))
                index += 1
        return updates

    def _grad_scale(self, grads: Sequence[Tensor]) -> float | Tensor:
        """What gradients are to be multiplied by; no number of a GPU is waited for."""
        scale: float | Tensor = 1.0
        inverse = getattr(self, "grad_scale", None)
        if inverse is not None:
            scale = 1.0 / inverse.double()
        if self.max_grad_norm is not None and grads:
            if any(grad.dtype is not torch.float32 for grad in grads):
                # In their own dtype float16's norm may overflow where no gradient does.
                grads = torch._foreach_norm(list(grads), 2.0, dtype=torch.float32)
            norm = get_total_norm(grads)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if isinstance(scale, Tensor):
                scale = scale.to(norm.device)
            self.grad_norm = (norm * scale).to(norm.dtype)
            # The same small number as in torch's clip_grad_norm_; and a NaN stays one.
            clip = self.max_grad_norm / (self.grad_norm.double() + 1e-6)
            scale = scale * clip.clamp(max=1.0)
        return scale

    def _factors(
        self, steps: Mapping[int, Tensor], scale: float | Tensor, skip: float | Tensor, like: Tensor
    ) -> Tensor:
        """Factors for a call of the op with parameters where ``like`` is, a row for each number."""
        device = _device_of_steps(like)
        none = torch.zeros((), device=device)
        tables = []
        first = 0
        for group in self.param_groups:
            numbers = range(first, first + len(group["params"]))
            first = numbers.stop
            if numbers:
                tables.append(
                    reference.adamw_factors(
                        torch.stack([steps.get(number, none) for number in numbers]),
                        group["lr"],
                        group["betas"][0],
                        group["betas"][1],
                        group["eps"],
                        group["weight_decay"],
                        -scale if group["maximize"] else scale,
                        skip,
                    )
                )
        return torch.cat(tables).to(like.device)

    def _step_in_memory(
        self,
        updates: Sequence[tuple[int, dict[str, Any], Tensor, Tensor]],
        scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        copies = []
        by_device = defaultdict(list)
        for update in updates:
            by_device[update[2].device].append(update)
        for device, found in by_device.items():
            moments = [self._moments(param, group) for _, group, param, _ in found]
            steps = {index: self.state[param]["step"] for index, _, param, _ in found}
            skip = 0.0 if found_inf is None else found_inf.to(device, torch.float32)
            torch._foreach_add_(list(steps.values()), 1 - skip)
            calls = _Calls(self._factors(steps, scale, skip, found[0][2]), self._seed)
            for (index, _, param, grad), of_param in zip(found, moments, strict=True):
                data = local(param)
                if not data.is_contiguous():
                    copies.append((data, data.contiguous()))
                    data = copies[-1][1]
                calls.add(index, 0, data, local(grad), of_param)
            calls.run()
        for data, changed in copies:
            data.copy_(changed)

    def _step_in_file(
        self,
        updates: Sequence[tuple[int, dict[str, Any], Tensor, Tensor]],
        scale: float | Tensor,
    ) -> None:
        assert self._file is not None
        if not updates:
            return
        found = {index: (param, grad) for index, _, param, grad in updates}
        steps = list(self._file.steps)
        flat = {}
        for index, (param, grad) in found.items():
            steps[index] += 1
            data = local(param)
            flat[index] = (data.contiguous().view(-1), local(grad).contiguous().view(-1))
        tensors = {index: torch.tensor(float(steps[index])) for index in found}
        factors = self._factors(tensors, scale, 0.0, updates[0][2])

        def update(pieces: Sequence[tuple[Piece, Moments]]) -> None:
            calls = _Calls(factors, self._seed)
            for piece, moments in pieces:
                if piece.param in found:
                    data, grad = (
                        t[piece.first : piece.first + piece.numel] for t in flat[piece.param]
                    )
                    calls.add(piece.param, piece.first, data, grad, moments)
            calls.run()

        self._file.step(found, update, steps)
        for index, (param, _) in found.items():
            data = local(param)
            if not data.is_contiguous():
                data.copy_(flat[index][0].view(data.shape))
            self.state[param]["step"] = tensors[index]

    def _moments(self, param: Tensor, group: dict[str, Any]) -> Moments:
        """The parameter's moments in memory, made of zeros at its first step."""
        state = self.state[param]
        if "exp_avg" not in state:
            state.setdefault("step", torch.zeros((), device=_device_of_steps(param)))
            state |= to_state(of_zeros(param, self._bits(param, group)))
        return Moments(
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            state.get("exp_avg_absmax"),
            state.get("exp_avg_sq_absmax"),
        )

    def _bits(self, param: Tensor, group: dict[str, Any]) -> int:
        if group["bits"] == 32 or param.numel() < max(self._min_8bit_size, 1):
            return 32
        if local(param) is not param:
            raise ValueError("bits: got 8 with a sharded parameter (DTensor); takes 32")
        return 8

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.Optimizer``; with a file, the moments come from it.

        Those tensors are mapped from an unnamed file beside it, so that a state of any size fits.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of any pager and width, of this class or another AdamW.

        Others are torch's AdamW and Adam, and bitsandbytes' AdamW (paged or not, 32 or 8 bits).
        Moments come to this optimizer's width: 8-bit codes are decoded for 32 bits exactly, and
        32-bit moments quantised for 8 with the error of 8 bits. Where they are stays as it is.

        Raises:
            ValueError: The groups or the shapes do not fit, or the state is of another optimizer.
        """
        # All of it is done here: torch's own loading casts moments to the parameter's dtype.
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = _fitting_groups(state_dict["param_groups"], self.param_groups)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        pairs = [(param, group) for group in groups for param in group["params"]]
        wanted: dict[int, tuple[int, Moments]] = {}
        for index, (name, (param, group)) in enumerate(zip(names, pairs, strict=True)):
            if state := state_dict["state"].get(name):
                step, moments = from_state(f"state[{name}]", state, local(param))
                wanted[index] = (step, moments.to_bits(self._bits(param, group)))
        if self._file is not None:
            self._file.load(wanted)
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for index, (step, moments) in wanted.items():
            param = pairs[index][0]
            found[param] = {"step": torch.tensor(float(step), device=_device_of_steps(param))}
            if self._file is None:
                found[param] |= to_state(moments.like(param, copy=True))
        self.__setstate__({"state": found, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._file is not None:
            raise TypeError(
                'pager: got "mmap", and a file cannot be copied or pickled with its optimizer; take'
                " state_dict() instead"
            )
        mine = ("pager", "max_grad_norm", "grad_norm", "_min_8bit_size", "_seed", "_file")
        return super().__getstate__() | {name: getattr(self, name) for name in mine}

    def close(self) -> None:
        """Close the file, if there is one; it keeps the last step."""
        if self._file is not None:
            self._file.close()


class PagedAdamW8bit(PagedAdamW):
    """`PagedAdamW` with ``bits=8``."""

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **{"bits": 8} | options)


class _Calls:
    """Updates gathered into one call of the op for each width of moments."""

    def __init__(self, factors: Tensor, seed: int | None) -> None:
        self._factors, self._seed = factors, seed
        self._found: defaultdict[int, list[tuple[Any, ...]]] = defaultdict(list)

    def add(self, index: int, first: int, param: Tensor, grad: Tensor, moments: Moments) -> None:
        """One parameter or piece of one, contiguous, with its number and first element."""
        if param.numel():
            piece = (param, grad.contiguous(), moments, index, first)
            self._found[moments.bits].append(piece)

    def run(self) -> None:
        for bits, pieces in self._found.items():
            params, grads, moments, indices, offsets = zip(*pieces, strict=True)
            scales = [m.absmaxes() for m in moments if bits == 8]
            torch.ops.qkern.adamw_step(
                params,
                grads,
                [m.exp_avg for m in moments],
                [m.exp_avg_sq for m in moments],
                [of_exp_avg for of_exp_avg, _ in scales],
                [of_exp_avg_sq for _, of_exp_avg_sq in scales],
                self._factors,
                self._seed,
                indices,
                offsets,
            )


def _device_of_steps(param: Tensor) -> torch.device:
    """Where the number of a parameter's steps is.

    On a GPU with the parameter, so that no step waits for the host and may be in a CUDA graph.
    """
    return param.device if param.is_cuda else torch.device("cpu")


def _check_group(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr: got shape {list(group['lr'].shape)}; takes one number")
    for name in ("lr", "eps", "weight_decay"):
        value = float(group[name])
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}; takes a number of 0 and above")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas: got {group['betas']}; takes two numbers from 0 to below 1")
    if group["bits"] not in (32, 8):
        raise ValueError(f"bits: got {group['bits']!r}; takes 32 or 8")
    _check_amsgrad(group.get("amsgrad"))
    for param in group["params"]:
        _errors.check_float_tensor("params", param)


def _check_amsgrad(amsgrad: object) -> None:
    if amsgrad:
        raise ValueError("amsgrad: got True; takes False: use torch.optim.AdamW for AMSGrad")


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
        _check_amsgrad(group.get("amsgrad"))
        options = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
        found.append(own | options | {"bits": own["bits"]})
    return found


def _add_moments(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """To a ``state_dict``, from the optimizer's file."""
    assert isinstance(optimizer, PagedAdamW)
    assert optimizer._file is not None
    params = optimizer._params()
    for index, moments in optimizer._file.read().items():
        param = params[index]
        shaped = moments.view(local(param).shape).like(param)
        # Another dict: the one there is the optimizer's own.
        state_dict["state"][index] = state_dict["state"][index] | to_state(shaped)


def _check_grad(param: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError("grad: got a sparse tensor; takes a dense one")
    if grad.dtype != param.dtype:
        raise TypeError(f"grad: got {grad.dtype}; takes {param.dtype}, as the parameter has")
