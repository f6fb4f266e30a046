"""AdamW with moments in 32 or 8 bits, in a device's memory, in the host's or in a file."""

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

from qkern import _errors, ops, reference
from qkern.optim import _driver
from qkern.optim._moments import Moments, from_state, local, of_zeros, to_state
from qkern.optim._unified import UnifiedPager
from qkern.optim.paging import DEFAULT_BUDGET_BYTES, FilePager, Piece

PAGERS = ("auto", "none", "unified", "mmap")


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), with moments outside fast memory if wanted.

    Drop-in for ``torch.optim.AdamW``: the same order of decay and update, the same state in 32
    bits, parameter groups, schedulers, closures and ``GradScaler``. One kernel call updates many
    parameters. On a GPU a step waits for nothing, and with the pager ``"none"`` a CUDA graph can
    capture it.

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
        pager: Where the moments are. ``"none"``: in memory, on the parameter's device.
            ``"unified"``, for parameters on GPUs: in host memory, from where they come to the GPU
            and leave again chunk by chunk during a step; as CUDA's managed memory, or where CPU and
            GPU cannot use that at the same time (WSL, Windows, ROCm) page-locked and copied:
            ``paging`` tells which. ``"mmap"``: in the file ``path``, read and written by chunks
            during a step. ``"auto"``: ``"mmap"`` where there is a ``path``, ``"unified"`` where all
            parameters are on GPUs, else ``"none"``; the attribute ``pager`` tells.
        path: The file, which must not exist; or with ``resume`` must, written by an optimizer of
            the same parameters, whose steps and moments are then taken as last committed. Every
            ``step`` commits: if the process is killed within one, the file has the step before.
        resume: See ``path``.
        budget_bytes: Most memory for moments, on each GPU (``"unified"``) or of the file
            (``"mmap"``). What was used least recently leaves first. 256 MiB by default; no bound
            with managed memory, of which the driver moves away what others need room for.
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
        if path is not None and pager == "auto":
            pager = "mmap"
        if pager == "mmap" and path is None:
            raise ValueError('path: got None with pager "mmap"; takes the name of a file')
        self.pager = pager
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._min_8bit_size = min_8bit_size
        self._seed = seed if stochastic_rounding else None
        self._pager: FilePager | UnifiedPager | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bits": bits,
        }
        super().__init__(params, defaults)
        params = self._params()
        if pager == "auto":
            on_gpus = all(_driver.driver.takes(param.device) for param in params)
            self.pager = "unified" if on_gpus else "none"
        _check_paging(self.pager, path, resume, durable, budget_bytes)
        if self.pager == "none":
            return
        layout = self._layout(self.param_groups)
        if path is not None:
            budget = DEFAULT_BUDGET_BYTES if budget_bytes is None else budget_bytes
            self._pager = FilePager(path, *layout, budget, resume=resume, durable=durable)
            for param, step in zip(params, self._pager.steps, strict=True):
                if step:
                    self.state[param]["step"] = torch.tensor(float(step))
        else:
            self._pager = UnifiedPager(budget_bytes)
            self._pager.add([param.device for param in params], *layout)
        # A hook, so that those of others see the moments too.
        self.register_state_dict_post_hook(_add_moments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does; not to an optimizer with a file."""
        pager = getattr(self, "_pager", None)
        if isinstance(pager, FilePager):
            raise RuntimeError(
                'param_group: got one after the file was made; with pager "mmap" all are given at'
                " construction"
            )
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check_group(group)
            layout = self._layout([group])
            if pager is not None:
                pager.add([param.device for param in group["params"]], *layout)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` does, or None.

        With ``GradScaler``, gradients that are not all finite leave everything as it was. With a
        file, an error (a full disk) leaves the file at the step before; parameters may then be
        updated already and must come from a checkpoint, as the message says. The same goes for an
        error (no memory) with the pager ``"unified"``.

        Raises:
            TypeError: A gradient is sparse, or of another dtype than its parameter.
            RuntimeError: A step broke off; or moments on a GPU are paged and a CUDA graph is being
                captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = self._collect()
        scale = self._grad_scale([grad for *_, grad in updates])
        found_inf = getattr(self, "found_inf", None)
        if isinstance(self._pager, FilePager) and found_inf is not None:
            if bool(found_inf):
                return loss
            found_inf = None
        if self._pager is None:
            self._step_in_memory(updates, scale, found_inf)
        elif updates:
            self._step_paged(self._pager, updates, scale, found_inf)
        return loss

    def _collect(self) -> list[_Update]:
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
        self,
        steps: Mapping[int, Tensor],
        scale: float | Tensor,
        skip: float | Tensor,
        device: torch.device,
    ) -> Tensor:
        """Factors for calls of the op on ``device``: a row for each parameter, by its number."""
        none = torch.zeros((), device=_device_of_steps(device))
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
        return torch.cat(tables).to(device)

    def _step_in_memory(
        self, updates: Sequence[_Update], scale: float | Tensor, found_inf: Tensor | None
    ) -> None:
        copies = []
        for device, mine in _by_device(updates).items():
            moments = [self._moments(param, group) for _, group, param, _ in mine]
            steps = {index: self.state[param]["step"] for index, _, param, _ in mine}
            skip = _on(found_inf, device)
            if device.type == "cuda":
                # In place, where a CUDA graph finds them again.
                torch._foreach_add_(list(steps.values()), 1 - skip)
            else:
                # All at once: one by one they would take as long as a small model's update.
                after = torch.stack(list(steps.values())).add_(1 - skip).unbind()
                steps = dict(zip(steps, after, strict=True))
                for (_, _, param, _), step in zip(mine, after, strict=True):
                    self.state[param]["step"] = step
            calls = _Calls({device: self._factors(steps, scale, skip, device)}, self._seed)
            for (index, _, param, grad), of_param in zip(mine, moments, strict=True):
                data = local(param)
                if not data.is_contiguous():
                    copies.append((data, data.contiguous()))
                    data = copies[-1][1]
                calls.add(index, 0, data, local(grad), of_param)
            calls.run()
        for data, changed in copies:
            data.copy_(changed)

    def _step_paged(
        self,
        pager: FilePager | UnifiedPager,
        updates: Sequence[_Update],
        scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        found = {}
        for index, _, param, grad in updates:
            data = local(param)
            found[index] = (data.contiguous().view(-1), local(grad).contiguous().view(-1))
        numbers = list(pager.steps) if isinstance(pager, FilePager) else []
        steps: dict[int, Tensor] = {}
        factors = {}
        for device, mine in _by_device(updates).items():
            skip = _on(found_inf, device)
            if isinstance(pager, FilePager):
                for index, *_ in mine:
                    numbers[index] += 1
                    steps[index] = torch.tensor(float(numbers[index]))
            else:
                none = torch.zeros((), device=_device_of_steps(device))
                before = [self.state.get(param, {}).get("step", none) for _, _, param, _ in mine]
                after = torch._foreach_add(before, 1 - skip)
                steps |= {index: step for (index, *_), step in zip(mine, after, strict=True)}
            factors[device] = self._factors(steps, scale, skip, device)

        def update(pieces: Sequence[tuple[Piece, Moments]]) -> None:
            calls = _Calls(factors, self._seed)
            brought = []
            for piece, moments in pieces:
                if piece.param in found:
                    data, grad = (
                        t[piece.first : piece.first + piece.numel] for t in found[piece.param]
                    )
                    there = moments.on(data.device)
                    if there is not moments:
                        brought.append((moments, there))
                    calls.add(piece.param, piece.first, data, grad, there)
            calls.run()
            for moments, there in brought:
                moments.copy_(there)

        if isinstance(pager, FilePager):
            pager.step(found, update, numbers)
        else:
            pager.step(found, update)
        for index, _, param, _ in updates:
            data = local(param)
            if not data.is_contiguous():
                data.copy_(found[index][0].view(data.shape))
            self.state[param]["step"] = steps[index]

    def _moments(self, param: Tensor, group: dict[str, Any]) -> Moments:
        """The parameter's moments in memory, made of zeros at its first step."""
        state = self.state[param]
        if "exp_avg" not in state:
            state.setdefault("step", torch.zeros((), device=_device_of_steps(param.device)))
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

    def _layout(self, groups: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, ...]], list[int]]:
        """The shape that each parameter has here, and the bits of its moments."""
        pairs = [(param, group) for group in groups for param in group["params"]]
        shapes = [tuple(local(param).shape) for param, _ in pairs]
        return shapes, [self._bits(param, group) for param, group in pairs]

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.Optimizer``; with a pager the moments are copies on the CPU.

        With a file they are mapped from an unnamed one beside it, so that a state of any size fits.
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
                # Paged, they need not all fit the parameter's device at a time.
                place = param.device if self._pager is None else torch.device("cpu")
                step, moments = from_state(f"state[{name}]", state, local(param), place)
                wanted[index] = (step, moments.to_bits(self._bits(param, group)))
        if isinstance(self._pager, FilePager):
            self._pager.load(wanted)
        elif self._pager is not None:
            self._pager.load({index: moments for index, (_, moments) in wanted.items()})
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for index, (step, moments) in wanted.items():
            param = pairs[index][0]
            where = _device_of_steps(param.device)
            found[param] = {"step": torch.tensor(float(step), device=where)}
            if self._pager is None:
                found[param] |= to_state(moments.like(param, copy=True))
        self.__setstate__({"state": found, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._pager is not None:
            raise TypeError(
                f'pager: got "{self.pager}", whose memory cannot be copied or pickled with its'
                " optimizer; take state_dict() instead"
            )
        mine = ("pager", "max_grad_norm", "grad_norm", "_min_8bit_size", "_seed", "_pager")
        return super().__getstate__() | {name: getattr(self, name) for name in mine}

    @property
    def held_bytes(self) -> int:
        """Bytes of paged moments that are in fast memory now: on the GPUs, or of the file."""
        return 0 if self._pager is None else self._pager.held_bytes

    @property
    def paging(self) -> dict[str, str]:
        """For each GPU with the pager ``"unified"``, what its moments are in and why."""
        return self._pager.report if isinstance(self._pager, UnifiedPager) else {}

    def close(self) -> None:
        """Free the memory of a pager; a file keeps the last step."""
        if self._pager is not None:
            self._pager.close()


class PagedAdamW8bit(PagedAdamW):
    """`PagedAdamW` with ``bits=8``."""

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **{"bits": 8} | options)


class _Calls:
    """Updates gathered into one call of the op for each device and width of moments."""

    def __init__(self, factors: Mapping[torch.device, Tensor], seed: int | None) -> None:
        self._factors, self._seed = factors, seed
        self._found: defaultdict[Any, list[tuple[Any, ...]]] = defaultdict(list)

    def add(self, index: int, first: int, param: Tensor, grad: Tensor, moments: Moments) -> None:
        """One parameter or piece of one, contiguous, with its number and first element."""
        if param.numel():
            piece = (param, grad.contiguous(), moments, index, first)
            self._found[param.device, moments.bits].append(piece)

    def run(self) -> None:
        for (device, bits), pieces in self._found.items():
            params, grads, moments, indices, offsets = zip(*pieces, strict=True)
            scales = [m.absmaxes() for m in moments if bits == 8]
            ops.adamw_step(
                params,
                grads,
                [m.exp_avg for m in moments],
                [m.exp_avg_sq for m in moments],
                [of_exp_avg for of_exp_avg, _ in scales],
                [of_exp_avg_sq for _, of_exp_avg_sq in scales],
                self._factors[device],
                self._seed,
                indices,
                offsets,
            )


_Update = tuple[int, dict[str, Any], Tensor, Tensor]
"""A parameter's number, its group, itself and its gradient."""


def _by_device(updates: Sequence[_Update]) -> dict[torch.device, list[_Update]]:
    found = defaultdict(list)
    for update in updates:
        found[update[2].device].append(update)
    return found


def _device_of_steps(device: torch.device) -> torch.device:
    """Where the number of steps is of a parameter on ``device``.

    With it on a GPU, so that no step waits for the host and may be in a CUDA graph.
    """
    return device if device.type == "cuda" else torch.device("cpu")


def _on(found_inf: Tensor | None, device: torch.device) -> float | Tensor:
    if found_inf is None:
        return 0.0
    return found_inf.to(_device_of_steps(device), torch.float32).reshape(())


def _check_paging(
    pager: str, path: object, resume: bool, durable: bool, budget_bytes: int | None
) -> None:
    given = {"path": path, "resume": resume or None, "durable": durable or None}
    for name, value in given.items():
        if pager != "mmap" and value is not None:
            raise ValueError(f'{name}: got {value!r} with pager "{pager}"; goes with "mmap"')
    if pager == "none" and budget_bytes is not None:
        raise ValueError(
            f'budget_bytes: got {budget_bytes} with pager "none"; goes with "unified" and "mmap"'
        )


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
    """To a ``state_dict``, from the optimizer's pager."""
    assert isinstance(optimizer, PagedAdamW)
    assert optimizer._pager is not None
    params = optimizer._params()
    wanted = [i for i, param in enumerate(params) if "step" in optimizer.state.get(param, {})]
    for index, moments in optimizer._pager.read(wanted).items():
        param = params[index]
        shaped = moments.view(local(param).shape)
        if local(param) is not param:
            shaped = shaped.like(param)
        # Another dict: the one there is the optimizer's own.
        state_dict["state"][index] = state_dict["state"][index] | to_state(shaped)


def _check_grad(param: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError("grad: got a sparse tensor; takes a dense one")
    if grad.dtype != param.dtype:
        raise TypeError(f"grad: got {grad.dtype}; takes {param.dtype}, as the parameter has")
