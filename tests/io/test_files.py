"""Files appear whole, whoever writes or is killed at the same time, and nothing stays mapped."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qkern import io
from qkern import nn as qnn
from qkern.io import _files, adapters
from tests.io.llamas import randomised

NAMES = ["adapter_config.json", "adapter_model.safetensors"]


def make(alpha: float | None = None, r: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = qnn.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    if alpha is not None:
        randomised(qnn.add_lora(model, qnn.LoRAConfig(r=r, alpha=alpha)))
    return model


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_many_writers_of_one_file(tmp_path):
    """Their temporaries do not meet, and what is there at the end is one of the files."""
    errors = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                _files.write_file(tmp_path / "file", lambda path: path.write_text(text * 1000))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["file"]
    assert len(set((tmp_path / "file").read_text())) == 1


def test_adapters_saved_at_once_are_of_one_piece(tmp_path):
    models = [make(alpha) for alpha in (1, 2, 3)]
    errors = []

    def save(model: nn.Module) -> None:
        try:
            for _ in range(5):
                io.save_adapter(model, tmp_path)
                io.load_adapter(make(), tmp_path)
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == NAMES


@pytest.mark.parametrize("last", [None, "unlink", "replace", "second replace"])
def test_a_kill_leaves_the_old_adapter_or_the_new_one(last, tmp_path, monkeypatch):
    """Between any two steps in the directory; a reader that finds both files finds one pair."""
    old, new = make(1), make(8, r=4)
    x = torch.randn(3, 64)
    io.save_adapter(old, tmp_path)
    done: list[str] = []

    def step(real, name):
        def act(self, *args):
            if self.parent == tmp_path or (args and Path(args[0]).parent == tmp_path):
                if done and done[-1] == last:
                    raise KeyboardInterrupt
                result = real(self, *args)
                done.append(name if name not in done else f"second {name}")
                return result
            return real(self, *args)

        return act

    monkeypatch.setattr(Path, "unlink", step(Path.unlink, "unlink"))
    monkeypatch.setattr(Path, "replace", step(Path.replace, "replace"))
    if last in (None, "second replace"):
        io.save_adapter(new, tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            io.save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert done == ["unlink", "replace", "second replace"][: len(done)]
    expected = old if last == "unlink" else new
    assert torch.equal(io.load_adapter(make(), tmp_path)(x), expected(x))
    assert (names(tmp_path) == NAMES) == (last in (None, "second replace"))
    # The next save mends the directory.
    io.save_adapter(old, tmp_path)
    assert names(tmp_path) == NAMES


def test_weights_beside_another_configuration_are_refused(tmp_path):
    io.save_adapter(make(1), tmp_path / "a")
    io.save_adapter(make(8), tmp_path / "b")
    (tmp_path / "a/adapter_config.json").replace(tmp_path / "b/adapter_config.json")
    with pytest.raises(ValueError, match=r"lora_alpha: got 1; .* was saved with 8, .* two saves"):
        io.load_adapter(make(), tmp_path / "b")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    text = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(_files.__file__).parent)!r})  # without torch
import _files
def write(path):
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
_files.write_file(pathlib.Path({str(tmp_path / "a[1]")!r}), write)
"""
    done = subprocess.run([sys.executable, "-c", text], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    _files.write_file(tmp_path / "other", lambda path: path.write_text("x"))
    assert left.exists()
    _files.write_file(tmp_path / "a[1]", lambda path: path.write_text("x"))
    assert names(tmp_path) == ["a[1]", "other"]


def test_what_a_living_writer_has_is_left_alone(tmp_path):
    with _files.staged(tmp_path, "a", {"a": lambda path: path.write_text("slow")}) as files:
        _files.write_file(tmp_path / "a", lambda path: path.write_text("fast"))
        _files.commit(files, tmp_path)
    assert (tmp_path / "a").read_text() == "slow"
    assert names(tmp_path) == ["a"]


def test_filesystems_without_locks(tmp_path, monkeypatch):
    """Then nobody can tell what is abandoned, and nothing is removed."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(_files.fcntl, "flock", flock)
    (tmp_path / ".model.safetensors.x.tmp").mkdir()
    io.save_adapter(make(1), tmp_path)
    io.save_bnb(make(), tmp_path / "model.safetensors")
    io.load_adapter(make(), tmp_path)
    assert names(tmp_path) == [".model.safetensors.x.tmp", *NAMES, "model.safetensors"]


def test_modes(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o027)
    try:
        io.save_adapter(make(1), tmp_path)
        io.save_bnb(make(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o640}
    (tmp_path / "model.safetensors").chmod(0o604)
    io.save_bnb(make(), tmp_path / "model.safetensors")
    assert mode(tmp_path / "model.safetensors") == 0o604


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "precious")
    io.save_bnb(make(), tmp_path / "model.safetensors")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "model.safetensors").is_symlink()


@pytest.mark.parametrize("start", ["meta", "dense", "quantised"])
def test_a_model_does_not_follow_its_file(start, tmp_path):
    file = tmp_path / "model.safetensors"
    io.save_bnb(make(), file)
    model = make() if start == "quantised" else nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    model = io.load_bnb(model.to("meta") if start == "meta" else model, file)
    check_independent(model, make(), file)


def test_adapters_do_not_follow_their_file(tmp_path):
    source = make(3)
    source[1].requires_grad_(True)
    io.save_adapter(source, tmp_path)
    model = io.load_adapter(make(), tmp_path)
    check_independent(model, source, tmp_path / "adapter_model.safetensors")


def check_independent(model: nn.Module, source: nn.Module, file: Path) -> None:
    x = torch.randn(3, 64)
    expected = source(x)
    # In place, as a mapping would see it; a file cut short would end the process.
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert torch.equal(model(x), expected)
    os.truncate(file, 0)
    assert torch.equal(model(x), expected)


def test_what_is_loaded_is_frozen_and_keeps_its_mode(tmp_path):
    io.save_bnb(make(), tmp_path / "model.safetensors")
    for training in (True, False):
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).train(training)
        model[1].train(not training)
        io.load_bnb(model, tmp_path)
        assert isinstance(model[0], qnn.Linear4bit)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert [m.training for m in model.modules()] == [training, training, not training]


def test_the_weights_say_what_they_were_saved_with(tmp_path):
    io.save_adapter(make(3), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", adapters._CONFIG_KEY}
    saved = json.loads(metadata[adapters._CONFIG_KEY])
    assert saved == json.loads((tmp_path / "adapter_config.json").read_text())
    assert load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_directories_that_cannot_be_synced_do_not_matter(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def without_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", without_directories)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            io.save_adapter(make(alpha=4.0), tmp_path)
    else:
        io.save_adapter(make(alpha=4.0), tmp_path)
        assert names(tmp_path) == NAMES
