"""The training loop: resumable, with a held-out evaluation in between."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel

import qkern.io
import qkern.nn

from . import UserError
from .checkpoint import (
    STATE,
    checkpoints,
    new_checkpoint_path,
    prune,
    read_state,
    rng_state,
    set_rng_state,
)
from .config import Config
from .loss import TargetLoss
from .output import DamagedError, OutputDirectory, atomic_directory, check_whole
from .report import current_memory
from .sequences import Batch, Example, collate, epoch_batches

_TRAINING_STATE = "training_state.pt"
# What the readers of a checkpoint's files raise where these do not fit.
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError),
    *(UnpicklingError, SafetensorError, FileNotFoundError),
)


@dataclass
class StepRecord:
    step: int
    loss: float  # mean over the step's target tokens
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # without padding
    seconds: float


@dataclass
class HeldOutRecord:
    step: int
    loss: float


@dataclass
class History:
    """What a run has done so far: in every checkpoint, and in run.json at the end."""

    warmup_steps: int
    sample_prompt: str = ""
    sample_before: str = ""
    seconds: float = 0.0  # of training, held-out evaluations in between included
    steps: list[StepRecord] = field(default_factory=list)
    held_out: list[HeldOutRecord] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.steps)

    @staticmethod
    def from_json(state: Any) -> History:
        """Raises ValueError for anything but what ``asdict`` gives of a history."""
        history = _record(History, state)
        history.steps = [_record(StepRecord, record) for record in history.steps]
        history.held_out = [_record(HeldOutRecord, record) for record in history.held_out]
        if [record.step for record in history.steps] != list(range(1, history.step + 1)):
            raise ValueError("history: its steps are not 1, 2, ...")
        if not history.held_out:
            raise ValueError("history: it has no held-out loss, which every run begins with")
        return history


_Record = TypeVar("_Record", History, StepRecord, HeldOutRecord)


def _record(kind: type[_Record], value: Any) -> _Record:
    """`value` as a dataclass: its fields and no others, each of its type."""
    known = {f.name: str(f.type).partition("[")[0] for f in fields(kind)}
    if not isinstance(value, dict) or value.keys() != known.keys():
        raise ValueError(f"{kind.__name__}: takes the fields {sorted(known)}")
    for name, of_type in known.items():
        if type(value[name]).__name__ != of_type:
            found = type(value[name]).__name__
            raise ValueError(f"{kind.__name__}.{name}: got {found}; takes {of_type}")
    return kind(**value)


class Trainer:
    """A model with its optimizer, schedule and place in the data; all of it saved and restored.

    A step's batches are a function of the seed and the step number alone, so the place in the data
    is the step number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train: Sequence[Example],
        held_out: Sequence[Example],
        config: Config,
        pad_id: int,
        fingerprint: dict[str, Any],
        began: str = "",
    ) -> None:
        self.model = model
        self.train_examples = train
        self.held_out = held_out
        self.config = config
        self.pad_id = pad_id
        self.fingerprint = fingerprint
        self.began = began  # what chat templates write as today's date
        self.device = next(model.parameters()).device
        self.output = OutputDirectory(config.output)
        self.checkpoint_root = config.output / "checkpoints"
        self._state_file: Path | None = None
        self._damaged: list[Path] = []
        self._saved_step = -1
        self.history = History(warmup_steps=math.ceil(config.warmup_ratio * config.max_steps))
        self._epoch_order: tuple[int, list[list[int]]] | None = None
        self.parameters = list(qkern.nn.lora_parameters(self.model))
        self._make_optimizer()
        self.loss = TargetLoss(model)
        qkern.nn.prepare_for_training(model, config.gradient_checkpointing)

    def _make_optimizer(self) -> None:
        config = self.config
        options: dict[str, Any] = {}
        if config.pager == "mmap":
            # Scratch: checkpoints have the state, and this file's step is later than theirs.
            self._remove_state_file()
            self._state_file = options["path"] = self.output.optimizer_state
        if config.budget is not None:
            options["budget_bytes"] = config.budget << 20
        try:
            self.optimizer = qkern.optim.PagedAdamW(
                self.parameters,
                lr=config.learning_rate,
                betas=(0.9, config.adam_beta2),
                weight_decay=0.0,
                bits=config.optim_bits,
                pager=config.pager,
                **options,
            )
        except ValueError as error:
            raise UserError(f"--pager {config.pager}: {error}") from None
        warmup = max(1, self.history.warmup_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup)
        )

    def evaluate(self) -> float:
        """The mean loss of a held-out target token, without dropout; added to the history."""
        total, targets = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            by_length = sorted(self.held_out, key=len)
            for start in range(0, len(by_length), self.config.batch_size):
                batch = self._collate(by_length[start : start + self.config.batch_size])
                total += self.loss(batch.to(self.device)).item()
                targets += batch.targets
        self.model.train()
        self.history.held_out.append(HeldOutRecord(self.history.step, total / targets))
        return total / targets

    def run(self) -> bool:
        """Train to the step or time limit. False where a signal asked to stop; then it is saved."""
        try:
            return self._run()
        finally:
            self.optimizer.close()
            self._remove_state_file()

    def _remove_state_file(self) -> None:
        if self._state_file is not None:
            self._state_file.unlink(missing_ok=True)

    def _run(self) -> bool:
        config, history = self.config, self.history
        limit = 60 * config.max_minutes
        with _stop_request() as stop, _ProgressBar(config, history, self.device) as bar:
            last = 0.0
            while history.step < config.max_steps and history.seconds + last <= limit:
                start = time.perf_counter()
                record = self.train_step()
                if history.step % config.eval_steps == 0 and history.step < config.max_steps:
                    self.evaluate()
                last = time.perf_counter() - start
                history.seconds += last
                bar.update(record)
                if stop:
                    self.save()
                    return False
                if history.step % config.save_steps == 0:
                    self.save()
        self.save()
        return True

    def train_step(self) -> StepRecord:
        """Forward, backward and an update; adds the step to the history."""
        config, history = self.config, self.history
        start = time.perf_counter()
        batches = list(self._batches(history.step))
        targets = sum(batch.targets for batch in batches)
        loss = 0.0
        for batch in batches:
            # Divided by the whole step's targets: accumulation equals one large batch.
            part = self.loss(batch.to(self.device)) / targets
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {history.step + 1}; a lower --learning-rate or "
                "--dtype float32 or bfloat16 usually helps"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):  # clipped by it, gradients are zero or NaN
            raise UserError(
                f"the gradient's norm is {norm} at step {history.step + 1}; a lower "
                "--learning-rate or --dtype float32 or bfloat16 usually helps"
            )
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for batch in batches)
        seconds = time.perf_counter() - start
        record = StepRecord(history.step + 1, loss, norm, learning_rate, tokens, seconds)
        history.steps.append(record)
        return record

    def _batches(self, step: int) -> Iterator[Batch]:
        config = self.config
        per_epoch = math.ceil(len(self.train_examples) / config.batch_size)
        for number in range(step * config.accumulation, (step + 1) * config.accumulation):
            epoch, index = divmod(number, per_epoch)
            yield self._collate([self.train_examples[i] for i in self._epoch(epoch)[index]])

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.pad_id, train_on_source=self.config.train_on_source)

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            batches = epoch_batches(
                [len(example) for example in self.train_examples],
                self.config.batch_size,
                group_by_length=self.config.group_by_length,
                seed=self.config.seed,
                epoch=epoch,
            )
            self._epoch_order = (epoch, batches)
        return self._epoch_order[1]

    def save(self) -> None:
        """Write a checkpoint of this step, whole or not at all, and then remove the oldest."""
        if self._saved_step == self.history.step:
            return
        work = self.output.work
        target = new_checkpoint_path(self.checkpoint_root, self.history.step)
        with atomic_directory(target, work) as path:
            rest = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": rng_state(),
            }
            with disk_errors(target):
                qkern.io.save_adapter(self.model, path, self.config.model)
                torch.save(rest, path / _TRAINING_STATE)
            state = {
                "fingerprint": self.fingerprint,
                "began": self.began,
                "history": asdict(self.history),
            }
            (path / STATE).write_text(json.dumps(state), encoding="utf-8")
        self._saved_step = self.history.step
        prune(self.checkpoint_root, self.config.keep_checkpoints, work, self._damaged)

    def resume(self) -> Path:
        """Continue from the newest checkpoint that is whole; damaged ones are named on the screen.

        Raises `UserError` where there is none, and where it is of a run with other settings.
        """
        found = checkpoints(self.checkpoint_root)
        if not found:
            raise UserError(f"{self.config.output}: no checkpoint to resume from")
        self._damaged = []
        for path in reversed(found):
            if (damage := self._try_to_restore(path)) is None:
                self._saved_step = self.history.step
                return path
            self._damaged.append(path)
            print(f"damaged   {path}: {damage}", flush=True)
        raise UserError(
            f"{self.config.output}: none of its {len(found)} checkpoints is whole (the last one "
            f"tried: {found[0].name}); --overwrite starts again"
        )

    def _try_to_restore(self, path: Path) -> DamagedError | None:
        """Continue from a checkpoint; what is wrong with it where it is damaged."""
        try:
            check_whole(path)
            state = read_state(path)
            self._check_settings(path, state)
            self._restore(path, state)
        except DamagedError as error:
            return error
        return None

    def _check_settings(self, path: Path, state: dict[str, Any]) -> None:
        theirs = state.get("fingerprint")
        if not isinstance(theirs, dict):
            raise DamagedError(f"{STATE} has no settings")
        changes = [
            f"{name} was {theirs.get(name)!r}, now {self.fingerprint.get(name)!r}"
            for name in [*theirs, *(self.fingerprint.keys() - theirs.keys())]
            if self.fingerprint.get(name) != theirs.get(name)
        ]
        if changes:
            raise UserError(
                f"{path} belongs to a run with other settings: {'; '.join(changes)}. "
                "Resume with the old ones, or start again with --overwrite"
            )

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        try:
            self.history = History.from_json(state.get("history"))
            qkern.io.load_adapter(self.model, path)
            # After the history: the schedule keeps the warm-up it began with.
            self.optimizer.close()
            self._make_optimizer()
            saved = torch.load(path / _TRAINING_STATE, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            set_rng_state(saved["rng"])
        except torch.OutOfMemoryError:
            raise
        except _UNREADABLE as error:
            raise DamagedError(f"cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let a full disk be an ``OSError`` where torch or safetensors writes, too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written, is the disk full? {error}") from error


@contextmanager
def _stop_request() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second signal interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        tqdm.write("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ProgressBar:
    """tqdm over the fraction of the run that is done, by whichever limit comes first."""

    _SMOOTHING = 0.1

    def __init__(self, config: Config, history: History, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.history = history
        self.loss = history.steps[-1].loss if history.steps else math.nan

    def __enter__(self) -> _ProgressBar:
        self.bar = tqdm(
            total=1.0,
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}{postfix}]",
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, record: StepRecord) -> None:
        config, history = self.config, self.history
        if math.isnan(self.loss):
            self.loss = record.loss
        self.loss += self._SMOOTHING * (record.loss - self.loss)
        steps_left = (config.max_steps - record.step) * history.seconds / record.step
        left = max(0.0, min(steps_left, 60 * config.max_minutes - history.seconds))
        self.bar.n = history.seconds / (history.seconds + left) if left else 1.0
        self.bar.set_description_str(f"step {record.step}", refresh=False)
        self.bar.set_postfix_str(
            f"{tqdm.format_interval(left)} left, loss {self.loss:.3f}, "
            f"{record.tokens / record.seconds:.0f} tokens/s, "
            f"{current_memory(self.device) / 2**20:,.0f} MiB"
        )
