"""What examples/finetune.py keeps, replaces and removes in its output, whatever happens to it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import finetune
import pytest
import torch
from finetuning import UserError, output
from finetuning.checkpoint import began, checkpoints, prune
from finetuning.config import parse_args
from finetuning.dataset import load_dataset
from finetuning.model import choose_device, load_model, padding_id, quantize
from finetuning.output import MANIFEST, OutputDirectory, atomic_directory, check_whole
from finetuning.training import Trainer
from safetensors.torch import load_file

from lab.processes import environment


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    records = [{"instruction": f"Say {n}.", "output": f"{n}, {n * n}"} for n in range(12)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        *("--model", str(tiny_model), "--data", str(data), "--device", "cpu", "--threads", "1"),
        *("--dtype", "float32", "--lora-r", "2", "--lora-targets", "q_proj", "--batch-size", "2"),
        *("--warmup-ratio", "0", "--sample-tokens", "2", "--max-steps", "4", "--save-steps", "1"),
    ]


@pytest.fixture
def run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(finetune, "plot_losses", lambda *_: None)

    def run(*more: str) -> int:
        return finetune.main([*settings, "--output", str(tmp_path / "out"), *more])

    return run


def make_trainer(settings: list[str], path: Path, *more: str) -> Trainer:
    config = parse_args([*settings, "--output", str(path), *more])
    finetune.seed_everything(config.seed)
    device, dtype = choose_device(config)
    _, model, tokenizer = load_model(config)
    dataset = load_dataset(config, tokenizer)
    quantize(model, config, device, dtype)
    trainer = Trainer(model, dataset.train, dataset.held_out, config, padding_id(tokenizer), {})
    trainer.evaluate()
    return trainer


@pytest.fixture(scope="module")
def saved(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A trainer and its checkpoints of steps 1 and 2."""
    path = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(settings, path)
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    return trainer, path / "checkpoints"


def _names(root: Path) -> list[str]:
    return [path.name for path in checkpoints(root)]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = {
    "removed": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": _truncate,
    "flipped": _flip,
    "longer": _lengthen,
    "directory": _make_directory,
    "link": _link,
}
FILES = [
    *("adapter_config.json", "adapter_model.safetensors"),
    *("manifest.json", "state.json", "training_state.pt"),
]


def test_the_files_to_damage_are_all(saved: tuple[Trainer, Path]) -> None:
    _, root = saved
    assert sorted(path.name for path in checkpoints(root)[-1].iterdir()) == FILES


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    file: str,
    damage: Callable[[Path], object],
    saved: tuple[Trainer, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer, root = saved
    shutil.copytree(root, tmp_path / "checkpoints")
    monkeypatch.setattr(trainer, "checkpoint_root", tmp_path / "checkpoints")
    older, newer = checkpoints(tmp_path / "checkpoints")
    assert trainer.resume() == newer
    assert trainer.history.step == 2
    damage(newer / file)
    assert trainer.resume() == older
    assert trainer.history.step == 1
    assert f"damaged   {newer}: " in capsys.readouterr().out
    damage(older / file)
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        trainer.resume()


def _rewrite_state(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json, and the manifest with it."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    (path / MANIFEST).unlink()
    output._write_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("history"),
        lambda state: state.pop("fingerprint"),
        lambda state: state.update(history=[]),
        lambda state: state["history"].update(unknown=1),
        lambda state: state["history"].update(steps={}),
        lambda state: state["history"].update(seconds="1"),
        lambda state: state["history"]["steps"][0].update(step=True),
        lambda state: state["history"]["steps"][0].update(step=7),
        lambda state: state["history"]["steps"][0].pop("loss"),
        lambda state: state["history"]["held_out"].append(3),
        lambda state: state["history"]["held_out"].clear(),
    ],
)
def test_a_state_that_does_not_fit_is_a_damage(
    change: Callable[[dict[str, Any]], object],
    saved: tuple[Trainer, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, root = saved
    shutil.copytree(root, tmp_path / "checkpoints")
    monkeypatch.setattr(trainer, "checkpoint_root", tmp_path / "checkpoints")
    older, newer = checkpoints(tmp_path / "checkpoints")
    _rewrite_state(newer, lambda state: None)
    assert trainer.resume() == newer
    _rewrite_state(newer, change)
    assert trainer.resume() == older


def test_code_in_a_checkpoint_does_not_run(
    saved: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "was here"),))

    trainer, root = saved
    shutil.copytree(root, tmp_path / "checkpoints")
    monkeypatch.setattr(trainer, "checkpoint_root", tmp_path / "checkpoints")
    older, newer = checkpoints(tmp_path / "checkpoints")
    torch.save({"optimizer": Hostile()}, newer / "training_state.pt")
    _rewrite_state(newer, lambda state: None)
    assert trainer.resume() == older
    assert not (tmp_path / "was here").exists()


def test_a_run_goes_on_over_a_damaged_checkpoint(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out/checkpoints"
    assert run("--keep-checkpoints", "2") == 0
    whole = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    _flip(root / "checkpoint-000004/training_state.pt")
    assert run("--keep-checkpoints", "2", "--resume") == 0
    said = capsys.readouterr().out
    assert "checkpoint-000004: training_state.pt has another SHA-256" in said
    assert f"resumed   {root}/checkpoint-000003" in said
    # The damaged one is not written over, and goes when a whole one is there.
    assert _names(root) == ["checkpoint-000003", "checkpoint-000004.2"]
    again = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    for path in checkpoints(root):
        _flip(path / "state.json")
    assert run("--resume") == 2
    assert "none of its 2 checkpoints is whole" in capsys.readouterr().err
    assert run("--overwrite") == 0


def test_the_last_step_is_saved_once(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    save = torch.save

    def noting(state: object, path: Path) -> None:
        written.append(path.parent.name)
        save(state, path)

    monkeypatch.setattr(torch, "save", noting)
    assert run("--save-steps", "2") == 0
    assert len(written) == 2
    assert run("--save-steps", "2", "--resume") == 0
    assert len(written) == 2


# The calls of C by which a save touches the file system.
_CALLS = (
    *("open", "write", "close", "flush", "fsync", "mkdir", "rename", "replace", "unlink"),
    *("remove", "rmdir", "scandir", "listdir", "serialize_file", "save_file", "renameat2"),
    *("write_record", "write_end_of_file", "PyTorchFileWriter", "truncate", "chmod", "utime"),
)


def _every_kill(act: Callable[[], object], directory: Path) -> list[Path]:
    """Copies of the directory as a kill before each of the calls of `act` would leave it.

    What is in a program's own buffers is lost with it and is in no copy either.
    """
    states = directory.with_name(f"{directory.name} killed")
    count = 0

    def profile(frame: FrameType, event: str, called: Any) -> None:
        nonlocal count
        if event == "c_call" and called.__name__ in _CALLS:
            shutil.copytree(directory, states / f"{count:04d}", symlinks=True)
            count += 1

    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
    assert count > 20
    return sorted(states.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint(
    keep: int, saved: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, template = saved
    out = tmp_path / "out"
    shutil.copytree(template, out / "checkpoints")
    (out / "checkpoints/notes.txt").write_text("of somebody else")
    monkeypatch.setattr(trainer, "checkpoint_root", out / "checkpoints")
    monkeypatch.setattr(trainer, "output", OutputDirectory(out))
    trainer.resume()
    monkeypatch.setattr(trainer, "_saved_step", -1)
    monkeypatch.setattr(trainer, "config", parse_args(["--keep-checkpoints", str(keep)]))

    seen = set()
    resumed: dict[str, int] = {}  # by what is in the checkpoints: most kills leave the same
    for state in _every_kill(trainer.save, out):
        root = state / "checkpoints"
        left = _names(root)
        seen.add(tuple(left))
        assert len(left) >= keep
        for path in checkpoints(root):
            check_whole(path)
        content = "".join(
            f"{path.name} {(path / MANIFEST).read_text()}" for path in checkpoints(root)
        )
        if content not in resumed:
            resumed[content] = _step_to_go_on_from(trainer, root)
        assert resumed[content] == 2
        with OutputDirectory(state).locked():
            assert [path.name for path in (state / ".finetune").iterdir()] == ["lock"]
        assert (root / "notes.txt").exists()
    # Step 2 is saved a second time, under a name of its own: nothing is replaced.
    before = ("checkpoint-000001", "checkpoint-000002")
    assert seen >= {before, (*before, "checkpoint-000002.2")}
    assert _names(out / "checkpoints") == [*before, "checkpoint-000002.2"][-keep:]


def _step_to_go_on_from(trainer: Trainer, root: Path) -> int:
    """The step from which a run would go on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "checkpoint_root", root)
        trainer.resume()
    return trainer.history.step


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_call_of_a_replacement_leaves_the_old_or_the_new(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda a, b: False)

    def write(content: str) -> None:
        with atomic_directory(out / "adapter", out / ".finetune") as path:
            (path / "file").write_text(content)
            (path / f"only {content}").write_text(content)

    write("old")
    seen = set()
    absent = 0
    for state in _every_kill(lambda: write("new"), out):
        target = state / "adapter"
        absent += not target.exists()
        with OutputDirectory(state).locked():  # as the next run does
            pass
        content = (target / "file").read_text()
        seen.add(content)
        names = sorted(path.name for path in target.iterdir())
        assert names == ["file", MANIFEST, f"only {content}"]
        check_whole(target)
        assert [path.name for path in (state / ".finetune").iterdir()] == ["lock"]
    assert seen == {"old", "new"}
    assert (absent == 0) == exchange
    assert (out / "adapter/file").read_text() == "new"


@pytest.mark.parametrize("number", [-1, errno.EINVAL, errno.EPERM])
def test_a_replacement_where_directories_cannot_be_exchanged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(*_: object, **__: object) -> SimpleNamespace:
        ctypes.set_errno(number)
        return SimpleNamespace() if number < 0 else SimpleNamespace(renameat2=lambda *_: -1)

    monkeypatch.setattr(output.ctypes, "CDLL", library)
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "adapter", tmp_path / "work") as path:
            (path / content).write_text(content)
    assert (tmp_path / "adapter/new").exists()
    assert not list((tmp_path / "work").iterdir())


def test_directories_that_cannot_be_synced_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_fault = [False]  # whether it is a directory

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == at_fault[-1]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)

    def write() -> None:
        with atomic_directory(tmp_path / "adapter") as path:
            (path / "file").write_text("x")

    with pytest.raises(OSError, match="Invalid argument"):
        write()
    at_fault.append(True)
    write()
    check_whole(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_the_lock_where_the_file_system_has_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputDirectory(tmp_path).locked():
        held = re.escape(f"remove {tmp_path}/.finetune/lock")
        with pytest.raises(UserError, match=held), OutputDirectory(tmp_path).locked():
            pass
    with OutputDirectory(tmp_path).locked():
        pass


def test_a_failed_replacement_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    with atomic_directory(target) as path:
        (path / "file").write_text("old")
    monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and self.name.startswith("scratch"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"), atomic_directory(target) as path:
        (path / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_directories_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "atomic") as path:
        (path / "file").write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _tree(path: Path) -> dict[str, bytes | None]:
    """Everything in it but the lock."""
    return {
        str(found.relative_to(path)): found.read_bytes() if found.is_file() else None
        for found in path.rglob("*")
        if ".finetune" not in found.parts
    }


STRANGERS: dict[str, Callable[[Path], object]] = {
    "adapter": lambda out: (out / "adapter").mkdir(),
    "adapter/notes.txt": lambda out: (
        (out / "adapter").mkdir() or (out / "adapter/notes.txt").write_text("mine")
    ),
    "adapter link": lambda out: (out / "adapter").symlink_to(out.parent),
    "run.json": lambda out: (out / "run.json").write_text("{}"),
    "loss.png": lambda out: (out / "loss.png").write_bytes(b"\x89PNG of somebody"),
    "loss.png link": lambda out: (out / "loss.png").symlink_to(out / "nowhere"),
    "checkpoints": lambda out: (out / "checkpoints").write_text("a file"),
    "checkpoints link": lambda out: (out / "checkpoints").symlink_to(out.parent),
    "checkpoints/checkpoint-5": lambda out: (out / "checkpoints/checkpoint-5").mkdir(parents=True),
    ".finetune": lambda out: (
        (out / ".finetune").mkdir() or (out / ".finetune/mine").write_text("x")
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_what_others_wrote_is_refused_by_name(
    name: str,
    more: tuple[str, ...],
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    STRANGERS[name](out)
    before = _tree(out)
    assert run(*more) == 2
    assert f"{out}/{name.split()[0].removesuffix('/notes.txt')} " in capsys.readouterr().err
    assert _tree(out) == before


def test_what_does_not_collide_is_left_alone(run: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = {
        "optimizer.state": "moments",
        "checkpoints/epoch=3.ckpt": "weeks of work",
        "checkpoints/best/model.bin": "weights",
        "adapter.bak/adapter_model.safetensors": "weights",
        ".run.json.unfinished": "half",
        "checkpoints/.checkpoint-000001.unfinished/state.json": "half",
    }
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    for more in ((), ("--overwrite",), ("--pager", "mmap"), ("--resume", "--max-steps", "6")):
        assert run(*more) == 0
        assert {name: (out / name).read_text() for name in mine} == mine


@pytest.mark.parametrize("where", ["adapter", "checkpoints/checkpoint-000004"])
def test_a_file_put_into_a_result_keeps_it(
    where: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run() == 0
    (out / where / "README.md").write_text("a model card")
    before = _tree(out)
    for more in ((), ("--overwrite",)):
        assert run(*more) == 2
        assert f"{out / where} " in (error := capsys.readouterr().err)
        assert "it holds README.md" in error
        assert _tree(out) == before


def test_an_adapter_of_the_same_names_is_not_ours(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    weights = tmp_path / "out/adapter/adapter_model.safetensors"
    _flip(weights)
    before = _tree(tmp_path / "out")
    assert run() == 2
    assert "adapter_model.safetensors has another SHA-256" in capsys.readouterr().err
    assert _tree(tmp_path / "out") == before
    weights.unlink()
    assert run() == 0


def test_what_comes_while_a_run_trains_is_not_replaced(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = tmp_path / "out/adapter"
    train = Trainer.run

    def with_a_visitor(self: Trainer) -> bool:
        adapter.mkdir()
        (adapter / "theirs").write_text("x")
        return train(self)

    monkeypatch.setattr(Trainer, "run", with_a_visitor)
    assert run() == 2
    assert f"{adapter} was not written by finetune.py" in capsys.readouterr().err
    assert (adapter / "theirs").exists()
    monkeypatch.setattr(Trainer, "run", train)
    adapter.rename(tmp_path / "theirs")
    assert run("--resume") == 0
    assert (adapter / "adapter_model.safetensors").exists()


def test_pruning_leaves_a_checkpoint_with_other_files(
    saved: tuple[Trainer, Path], tmp_path: Path
) -> None:
    _, template = saved
    root = tmp_path / "checkpoints"
    shutil.copytree(template, root)
    (root / "checkpoint-000001/notes.txt").write_text("mine")
    theirs = ["checkpoint-000000", "checkpoint-000009"]  # neither is counted, nor removed
    for name in theirs:
        (root / name).mkdir()
    shutil.copytree(root / "checkpoint-000002", root / "checkpoint-000003")
    prune(root, 1, tmp_path / "work", [root / "checkpoint-000000"])
    assert _names(root) == [theirs[0], "checkpoint-000001", "checkpoint-000003", theirs[1]]


def test_a_second_run_is_refused(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    train = Trainer.train_step

    def with_another(self: Trainer) -> Any:
        record = train(self)
        if record.step == 2:
            monkeypatch.setattr(Trainer, "train_step", train)
            before = _tree(tmp_path / "out")
            for more in ((), ("--overwrite",), ("--resume",)):
                # In a thread: the first run handles signals in the main one.
                thread = threading.Thread(target=lambda more=more: found.append(run(*more)))
                thread.start()
                thread.join()
            assert _tree(tmp_path / "out") == before
        return record

    monkeypatch.setattr(Trainer, "train_step", with_another)
    assert run() == 0
    assert found == [2, 2, 2]
    assert capsys.readouterr().err.count("another run is writing there") == 3


def test_a_killed_holder_frees_the_directory(tmp_path: Path) -> None:
    holding = (
        "import pathlib, sys, time\n"
        "from finetuning.output import OutputDirectory\n"
        "with OutputDirectory(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another run"), OutputDirectory(tmp_path).locked():
                pass
        finally:
            holder.kill()
    with OutputDirectory(tmp_path).locked():
        pass


@pytest.mark.parametrize("change", [{"began": "yesterday"}, {"began": 3}, {"began": ""}])
def test_the_beginning_is_that_of_the_newest_checkpoint_that_tells_it(
    change: dict[str, Any], saved: tuple[Trainer, Path], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(saved[1], root)
    older, newer = checkpoints(root)
    _rewrite_state(older, lambda state: state.update(began="2030-01-02T03:04:05"))
    for at_fault in (lambda state: state.update(change), lambda state: state.pop("began")):
        _rewrite_state(newer, at_fault)
        assert began(root) == datetime(2030, 1, 2, 3, 4, 5)
    _flip(older / "state.json")
    assert began(root) is None


def test_a_run_goes_on_after_midnight(
    run: Callable[..., int],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A template that writes the time: the tokens stay those of the beginning."""
    model = tmp_path / "dated"
    shutil.copytree(tiny_model, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y %f') }} " + template.read_text())
    monkeypatch.setattr(finetune, "datetime", _Clock)
    dated = ("--model", str(model))
    assert run(*dated, "--max-steps", "2") == 0
    assert run(*dated, "--resume") == 0
    first = _losses(tmp_path / "out")
    _Clock.day = 1
    assert run(*dated) == 0
    assert _losses(tmp_path / "out") == first
    _Clock.day = 2
    assert run(*dated) == 0
    assert _losses(tmp_path / "out") != first


class _Clock(datetime):
    day = 1

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        """A day that only the test changes."""
        return datetime(2030, 1, cls.day)


def _losses(path: Path) -> list[float]:
    steps = json.loads((path / "run.json").read_text())["history"]["steps"]
    return [step["loss"] for step in steps]
