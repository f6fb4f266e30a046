"""AdamW with moments in 32 or 8 bits, in a device's memory, in the host's or in a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from qkern.optim import _checkpointing, _chunks, _driver, _updates
from qkern.optim._chunks import MomentSpec, Piece
from qkern.optim._file_pager import FilePager
from qkern.optim._gpu_pager import UnifiedPager
from qkern.optim._moments import Moments, local, of_zeros, to_state
from qkern.optim._options import check_arguments, check_group, check_paging, is_integer
from qkern.optim._pager import Pager
from qkern.optim._updates import Calls, Update, by_device, counted


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), with moments outside fast memory if wanted.

    Drop-in for ``torch.optim.AdamW``: the same order of decay and update, the same state in 32
    bits, parameter groups, schedulers, closures and ``GradScaler``. One kernel call updates many
    parameters. On a GPU a step waits for nothing, and with the pager ``"none"`` a CUDA graph can
    capture it.

    Args:
        params: Parameters or groups, as ``torch.optim.Optimizer`` takes them: float32, bfloat16 or
            float16, each with gradients of its own dtype. The arithmetic is float32 and rounded
            once. Integers, of which 4-bit weights are made, are let through: they have no
            gradients, are never updated and get no moments.
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each from 0 to below 1.
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled: a step first scales a parameter by ``1 - lr * weight_decay``.
        amsgrad: False; there is no AMSGrad here.
        bits: 32, or 8: moments as codes of the 8-bit dynamic map, a scale for each 256 (Dettmers
            et al., arXiv 2110.02861), the nearest code exactly. A parameter of fewer than
            ``min_8bit_size`` elements has 32 all the same. May differ between groups. Where a
            parameter is sharded (a DTensor, as of FSDP2), each shard has blocks of its own, of 256
            elements in the order of the local tensor.
        pager: Where the moments are. ``"none"``: in memory, on the parameter's device.
            ``"unified"``, for parameters on GPUs: in host memory, from where they come to the GPU
            and leave again chunk by chunk during a step; as CUDA's managed memory, or where CPU and
            GPU cannot use that at the same time (WSL, Windows, ROCm) page-locked and copied:
            ``paging`` tells which. ``"mmap"``: in the file ``path``, read and written by chunks
            during a step. ``"auto"``: ``"mmap"`` where there is a ``path``; ``"unified"`` where all
            parameters are on GPUs and a budget is given, or one of the GPUs has more than 256 MiB
            of moments; else ``"none"``. The attribute ``pager`` tells.
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
        min_8bit_size: See ``bits``; of a sharded parameter all elements count.
        stochastic_rounding: Round bfloat16 parameters up or down at random, by how near each is,
            so that updates below half a step are not lost. The numbers follow from ``seed``.
        seed: From 0 to 2^32 - 1.

    Raises:
        TypeError: A parameter's dtype is none of these, or an argument is of another type.
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
        flags = {
            "resume": resume,
            "durable": durable,
            "stochastic_rounding": stochastic_rounding,
        }
        check_arguments(amsgrad, pager, max_grad_norm, seed, min_8bit_size, budget_bytes, flags)
        if path is not None and pager == "auto":
            pager = "mmap"
        if pager == "mmap" and path is None:
            raise ValueError('path: got None with pager "mmap"; takes the name of a file')
        self.pager = pager
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.grad_norm: Tensor | None = None
        self._min_8bit_size = int(min_8bit_size)
        self._seed = int(seed) if stochastic_rounding else None
        self._pager: Pager | None = None
        self._steps_seen: Sequence[int] = ()
        """The pager's steps that the counters in ``state`` are."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bits": bits,
        }
        super().__init__(params, defaults)
        # A hook, so that those of others see the moments too.
        self.register_state_dict_post_hook(_add_moments)
        params = self._params()
        if pager == "auto":
            self.pager = self._choose_pager(budget_bytes)
        check_paging(self.pager, path, resume, durable, budget_bytes)
        if self.pager == "none":
            return
        specs = self._specs(self.param_groups)
        if path is not None:
            self._pager = FilePager(path, specs, budget_bytes, resume=resume, durable=durable)
        else:
            self._pager = UnifiedPager(budget_bytes)
            self._pager.add(0, specs)
        self._take_over_steps()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does; not to an optimizer with a file."""
        pager = getattr(self, "_pager", None)
        if pager is not None and not pager.takes_new_groups:
            raise RuntimeError(
                'param_group: got one after the file was made; with pager "mmap" all are given at'
                " construction"
            )
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            check_group(self.param_groups[-1])
            if pager is not None:
                first = sum(len(group["params"]) for group in self.param_groups[:count])
                pager.add(first, self._specs(self.param_groups[count:]))
        except BaseException:
            del self.param_groups[count:]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` does, or None.

        With ``GradScaler``, gradients that are not all finite leave everything as it was. With a
        file, an error (a full disk) or an interrupt (Ctrl-C, an exception of a signal handler)
        leaves the file at the step before, or, where it comes after the commit, the step whole;
        ``state_dict`` tells. At the step before, parameters may be updated already and must come
        from a checkpoint, as the message says: they are not kept twice. The same goes for the pager
        ``"unified"``, whose moments are then half updated too. A step that fails is not counted.

        Raises:
            TypeError: A gradient is sparse, of another dtype than its parameter, or of an integer
                parameter.
            RuntimeError: A step broke off; or moments on a GPU are paged and a CUDA graph is being
                captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = _updates.collect(self.param_groups)
        scale = self._grad_scale([grad for *_, grad in updates])
        found_inf = getattr(self, "found_inf", None)
        pager = self._pager
        if found_inf is not None and pager is not None and pager.waits_for_found_inf:
            if bool(found_inf):
                return loss
            found_inf = None
        if pager is None:
            self._step_in_memory(updates, scale, found_inf)
        elif updates:
            self._step_paged(pager, updates, scale, found_inf)
        return loss

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

    def _step_in_memory(
        self, updates: Sequence[Update], scale: float | Tensor, found_inf: Tensor | None
    ) -> None:
        for device, mine in by_device(updates).items():
            # Looked up once: torch makes a dictionary wait for the hash of a tensor.
            states = [self._state(param, group) for _, group, param, _ in mine]
            before = [state["step"] for state in states]
            skip = _updates.skipped(found_inf, device)
            after = dict(zip((index for index, *_ in mine), counted(before, skip), strict=True))
            factors = _updates.factors(self.param_groups, after, scale, skip, device)
            self._step_device(mine, states, after, factors)

    def _step_device(
        self,
        updates: Sequence[Update],
        states: Sequence[dict[str, Any]],
        after: Mapping[int, Tensor],
        factors: Tensor,
    ) -> None:
        """The updates of one device, with the step counters that they have afterwards."""
        of_index = {index: state for (index, *_), state in zip(updates, states, strict=True)}
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        left = set(of_index)

        def done(numbers: Collection[int]) -> None:
            # A step counts once its parameters have it, so that one that fails does not.
            for index in copies.keys() & numbers if copies else ():
                copies[index][0].copy_(copies[index][1])
            _count({index: of_index[index] for index in numbers}, after)
            left.difference_update(numbers)

        calls = Calls({factors.device: factors}, self._seed, done)
        for (index, _, param, grad), state in zip(updates, states, strict=True):
            data = local(param)
            if not data.is_contiguous():
                copies[index] = data, data.contiguous()
                data = copies[index][1]
            calls.add(index, 0, data, local(grad), _moments(state))
        calls.run()
        if left:  # of what no elements are here
            done(list(left))

    def _step_paged(
        self,
        pager: Pager,
        updates: Sequence[Update],
        scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        found = {}
        copies = []
        for index, _, param, grad in updates:
            data = local(param)
            found[index] = (data.contiguous().view(-1), local(grad).contiguous().view(-1))
            if not data.is_contiguous():
                copies.append((data, found[index][0].view(data.shape)))
        self._take_over_steps()
        steps: dict[int, Tensor] = {}
        factors = {}
        for device, mine in by_device(updates).items():
            skip = _updates.skipped(found_inf, device)
            none = _updates.number(0, pager.device_of_steps(device))
            before = [self.state.get(param, {}).get("step", none) for _, _, param, _ in mine]
            after = zip((index for index, *_ in mine), counted(before, skip), strict=True)
            of_device = dict(after)
            factors[device] = _updates.factors(self.param_groups, of_device, scale, skip, device)
            steps |= of_device

        def update(pieces: Sequence[tuple[Piece, Moments]]) -> None:
            calls = Calls(factors, self._seed)
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

        def finish() -> None:
            for data, changed in copies:
                data.copy_(changed)

        pager.step(found, update, finish)
        for index, _, param, _ in updates:
            self.state[param]["step"] = steps[index]
        self._steps_seen = pager.steps

    def _take_over_steps(self) -> None:
        """Set the counters by the pager's, where it has any that changed.

        An interrupt may come right after a commit, and before the counters here are set.
        """
        if self._pager is None or self._pager.steps is self._steps_seen:
            return
        steps = self._pager.steps
        for param, step in zip(self._params(), steps, strict=True):
            if step:
                self.state[param]["step"] = _updates.number(step, torch.device("cpu"))
            else:
                self.state.pop(param, None)
        self._steps_seen = steps

    def _state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state in memory, its moments made of zeros at its first step."""
        state: dict[str, Any] = self.state.get(param, {})
        if "exp_avg" not in state:
            none = _updates.number(0, self._device_of_steps(param.device))
            state = {"step": none} | state | to_state(of_zeros(param, self._bits(param, group)))
            self.state[param] = state
        return state

    def _moments(self, param: Tensor, group: dict[str, Any]) -> Moments:
        """The parameter's moments in memory."""
        return _moments(self._state(param, group))

    def _bits(self, param: Tensor, group: dict[str, Any]) -> int:
        narrow = group["bits"] == 8 and not is_integer(param)
        if not narrow or param.numel() < max(self._min_8bit_size, 1):
            return 32
        return 8

    def _choose_pager(self, budget_bytes: int | None) -> str:
        """``"unified"`` or ``"none"``, for the parameters there are so far.

        Moments within the default budget would never leave the GPU but to wait for others.
        """
        specs = self._specs(self.param_groups)
        if not all(_driver.current.takes(spec.device) for spec in specs):
            return "none"
        sizes: Counter[torch.device] = Counter()
        for spec in specs:
            sizes[spec.device] += spec.nbytes
        large = max(sizes.values(), default=0) > _chunks.DEFAULT_BUDGET_BYTES
        return "unified" if large or budget_bytes is not None else "none"

    def _specs(self, groups: Sequence[dict[str, Any]]) -> list[MomentSpec]:
        """What a pager must know of the groups' parameters, of whose shape a part may be here.

        For integers no elements, but a place: others keep their numbers.
        """
        return [
            MomentSpec(
                param.device,
                (0,) if is_integer(param) else tuple(local(param).shape),
                self._bits(param, group),
            )
            for group in groups
            for param in group["params"]
        ]

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _device_of_steps(self, device: torch.device) -> torch.device:
        """Device holding the step counter of a parameter on ``device``."""
        pager = self._pager
        return (_updates if pager is None else pager).device_of_steps(device)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.Optimizer``; with a pager the moments are copies on the CPU.

        With a file they are mapped from an unnamed one beside it, so that a state of any size fits.

        Moments of a sharded parameter are sharded likewise and float32, with 8 bits too, where they
        are copies on the CPU: so ``torch.distributed.checkpoint`` saves them from one number of
        processes and loads them into another, of either width. Where the shards are the same,
        codes and scales come back bit for bit. Where they are cut elsewhere, blocks that stay whole
        do, and the others are quantised once more, with the error of 8 bits. A distributed
        checkpoint of parameters that are not sharded has codes; it loads into a state like it.
        """
        self._take_over_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of any pager and width, of this class or another AdamW.

        Others are torch's AdamW and Adam, and bitsandbytes' AdamW (paged or not, 32 or 8 bits).
        Moments come to this optimizer's width: 8-bit codes are decoded for 32 bits exactly, and
        32-bit moments quantised for 8 with the error of 8 bits. Where they are stays as it is.
        After an exception all is as before; but for the pager ``"unified"``, which an interrupt or
        an error (no memory) may leave with a part of the state: load it again.

        Raises:
            ValueError: The groups or the shapes do not fit, or the state is of another optimizer,
                flattened for an optimizer with a pager, or of values that no step leaves.
            TypeError: An option of a group is of another type.
        """
        _checkpointing.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        if self._pager is not None:
            raise TypeError(
                f'pager: got "{self.pager}", whose memory cannot be copied or pickled with its'
                " optimizer; take state_dict() instead"
            )
        mine = ["pager", "max_grad_norm", "grad_norm", "_min_8bit_size", "_seed", "_pager"]
        mine += ["_steps_seen"]
        return super().__getstate__() | {name: getattr(self, name) for name in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._optimizer_state_dict_post_hooks:  # of a copy, which gets no hooks
            self.register_state_dict_post_hook(_add_moments)

    @property
    def held_bytes(self) -> int:
        """Bytes of paged moments that are in fast memory now: on the GPUs, or of the file."""
        return 0 if self._pager is None else self._pager.held_bytes

    @property
    def paging(self) -> dict[str, str]:
        """For each GPU with the pager ``"unified"``, what its moments are in and why."""
        return {} if self._pager is None else self._pager.report

    def close(self) -> None:
        """Free the memory of a pager; a file keeps the last step."""
        if self._pager is not None:
            self._pager.close()


class PagedAdamW8bit(PagedAdamW):
    """`PagedAdamW` with ``bits=8``."""

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **{"bits": 8} | options)


def _moments(state: Mapping[str, Any]) -> Moments:
    return Moments(
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        state.get("exp_avg_absmax"),
        state.get("exp_avg_sq_absmax"),
    )


def _count(states: Mapping[int, dict[str, Any]], after: Mapping[int, Tensor]) -> None:
    """Set the step counters in states of one device's parameters."""
    if next(iter(after.values())).device.type == "cuda":
        # In place, where a CUDA graph finds them again.
        before = [state["step"] for state in states.values()]
        torch._foreach_copy_(before, [after[index] for index in states])
    else:
        for index, state in states.items():
            state["step"] = after[index]


def _add_moments(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, PagedAdamW)
    _checkpointing.add_moments(optimizer, state_dict)
