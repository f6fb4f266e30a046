"""PagedAdamW under data and sharded parallelism, accelerate and transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qkern import testing
from qkern.optim import PagedAdamW
from tests.models import tiny_llama
from tests.optim import training
from tests.optim.processes import run_processes
from tests.optim.training import OPTIONS, STEPS

pagers = pytest.mark.parametrize("pager", ["none", "mmap"])


def one_process(steps: int = STEPS, **options: Any) -> tuple[nn.Module, PagedAdamW]:
    net = training.model()
    optimizer = PagedAdamW(net.parameters(), **OPTIONS, **options)
    training.train(net, optimizer, 0, steps, slice(None))
    return net, optimizer


def assert_trained_alike(result: dict[str, Any], bits: int = 32) -> None:
    """As one process on the whole batch, up to the order in which gradients are summed.

    An element whose gradient nearly cancels has an update that depends on that order; it is one in
    hundreds, and the loss of none.
    """
    net, optimizer = one_process(bits=bits)
    expected = training.found(net, optimizer)
    torch.testing.assert_close(result["grad_norm"], expected["grad_norm"], rtol=1e-4, atol=0)
    for actual, right in zip(result["params"], expected["params"], strict=True):
        assert actual.shape == right.shape
        off = (actual - right).abs()
        assert off.max() <= 2 * STEPS * OPTIONS["lr"]
        assert (off > 1e-4).float().mean() <= 0.01
    for actual, right in zip(result["state"], expected["state"], strict=True):
        assert actual.keys() == right.keys()
        assert actual["step"] == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert actual[key].dtype == right[key].dtype
            if bits == 32:
                scale = float(right[key].abs().max())
                torch.testing.assert_close(actual[key], right[key], rtol=0, atol=0.01 * scale)


def assert_same_results(a: dict[str, Any], b: dict[str, Any]) -> None:
    for one, other in zip(a["params"], b["params"], strict=True):
        testing.assert_bitwise(one, other)
    for one, other in zip(a["state"], b["state"], strict=True):
        for key, value in other.items():
            testing.assert_bitwise(one[key], value, key)


@pagers
@pytest.mark.slow
def test_ddp(tmp_path: Path, pager: str) -> None:
    first, second = run_processes(training, "ddp", pager, tmp_path)
    assert_same_results(first, second)
    assert_trained_alike(first, bits=8)


@pagers
@pytest.mark.slow
def test_fsdp2(tmp_path: Path, pager: str) -> None:
    first, second = run_processes(training, "fsdp", pager, tmp_path)
    assert_same_results(first, second)
    assert_trained_alike(first)


@pagers
@pytest.mark.slow
def test_fsdp2_in_8_bits(tmp_path: Path, pager: str) -> None:
    """Near one process, whose blocks are others; ``test_sharded.py`` compares bits."""
    first, second = run_processes(training, "fsdp_8bit", pager, tmp_path)
    assert_same_results(first, second)
    net, optimizer = one_process(bits=8, min_8bit_size=64)
    torch.testing.assert_close(first["grad_norm"], optimizer.grad_norm, rtol=0.01, atol=0)
    for actual, right in zip(first["params"], net.parameters(), strict=True):
        assert (actual - right).abs().mean() <= 0.05 * OPTIONS["lr"]


@pagers
@pytest.mark.slow
def test_fsdp2_distributed_checkpoints(tmp_path: Path, pager: str) -> None:
    (straight, _) = run_processes(training, "fsdp", pager, tmp_path)
    (tmp_path / "again").mkdir()
    for result in run_processes(training, "fsdp_checkpoint", pager, tmp_path / "again"):
        for kind in ("sharded", "full"):
            assert_same_results(result[kind], straight)


@pytest.mark.slow
def test_fsdp2_resumes_files(tmp_path: Path) -> None:
    (straight, _) = run_processes(training, "fsdp", "none", tmp_path)
    (tmp_path / "again").mkdir()
    for result in run_processes(training, "fsdp_resume", "mmap", tmp_path / "again"):
        assert_same_results(result, straight)


# accelerate and transformers.


@pagers
def test_accelerate(tmp_path: Path, pager: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    results = []
    for prepared in (False, True):
        net = training.model()
        path = {"path": tmp_path / f"state{prepared}"} if pager == "mmap" else {}
        optimizer: Any = PagedAdamW(net.parameters(), lr=1e-2, **path)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        x, y = (torch.cat(t) for t in zip(*training.batches(0, 4), strict=True))
        data: Any = DataLoader(TensorDataset(x, y), batch_size=8)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if prepared:
            net, optimizer, data, scheduler = accelerator.prepare(net, optimizer, data, scheduler)
            for x, y in data:
                with accelerator.accumulate(net):
                    accelerator.backward((net(x) - y).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            accelerator.save_state(str(tmp_path / "saved"), safe_serialization=False)
            before = [p.detach().clone() for p in net.parameters()]
            state = optimizer.state_dict()["state"]
            kept = [{k: v.clone() for k, v in state[i].items()} for i in sorted(state)]
            for (x, y), _ in zip(data, range(1), strict=False):
                accelerator.backward((net(x) - y).square().mean())
                optimizer.step()
            accelerator.load_state(str(tmp_path / "saved"))
            state = optimizer.state_dict()["state"]
            for mine, saved in zip((state[i] for i in sorted(state)), kept, strict=True):
                for key, value in saved.items():
                    testing.assert_bitwise(mine[key], value)
            results.append(before)
            for param, value in zip(net.parameters(), before, strict=True):
                testing.assert_bitwise(param.detach(), value)
        else:
            for step, (x, y) in enumerate(data):
                ((net(x) - y).square().mean() / 2).backward()
                if step % 2:
                    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            results.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        testing.assert_bitwise(one, other)


def trained(folder: Path, steps: int, pager: str, bits: int, resume: bool = False) -> list[Tensor]:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    path = {"path": folder / f"state{steps}{resume}"} if pager == "mmap" else {}
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, bits=bits, **path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, (64, 16), generator=generator)  # soon learnt to be below 4
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=8,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": i, "labels": i} for i in ids],
        optimizers=(optimizer, None),
        callbacks=[Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("pager", "bits"), [("none", 8), ("mmap", 32), ("mmap", 8)])
def test_trainer_resumes_from_its_checkpoint(tmp_path: Path, pager: str, bits: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = trained(tmp_path / "whole", 8, "none", bits)
    trained(tmp_path / "parts", 4, pager, bits)
    resumed = trained(tmp_path / "parts", 8, pager, bits, resume=True)
    for one, other in zip(resumed, whole, strict=True):
        testing.assert_bitwise(one, other)
