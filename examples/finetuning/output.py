"""The directory a run writes to: one run at a time, nothing of others touched, nothing half done.

Files and directories are made in ``.finetune`` and renamed into place once they are on the disk. A
directory carries a manifest: who made it, and the size and SHA-256 of each of its files. It is
removed only while it holds nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from . import UserError
from .strict_json import loads

WRITER = "qkern/examples/finetune.py"
MANIFEST = "manifest.json"
_MARKED_BYTES = 4096  # a file of the program names it within its first bytes
_ASIDE = "replaced-"
_SCRATCH = "scratch-"
_WORK = (_SCRATCH, _ASIDE, "lock")
# What network file systems answer that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DamagedError(Exception):
    """What is wrong with a directory: the reader adds its name."""


class OutputDirectory:
    """``--output``, locked for one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / ".finetune"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; made where it is missing, tidied of what a killed run left.

        The system drops the lock with the process. Raises `UserError` where another run has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._make_work()
            lock = _locked(self.work / "lock")
        except filelock.Timeout as held:
            raise UserError(
                f"--output {self.path}: another run is writing there; wait for it"
                f"{_hint(held.lock_file)}, or name another"
            ) from None
        except OSError as error:
            raise UserError(f"--output {self.path}: {error.strerror or error}") from None
        try:
            self._tidy()
            yield
        finally:
            lock.release()

    def _make_work(self) -> None:
        try:
            self.work.mkdir()
        except FileExistsError:
            is_ours = self.work.is_dir() and not self.work.is_symlink()
            if not is_ours or any(not path.name.startswith(_WORK) for path in self.work.iterdir()):
                raise UserError(_not_ours(self.work)) from None

    def _tidy(self) -> None:
        for path in list(self.work.iterdir()):
            if path.name.startswith(_ASIDE):
                # Between the two renames of a replacement: the old one is still the only one.
                target = self.path / path.name.removeprefix(_ASIDE)
                if not os.path.lexists(target):
                    path.rename(target)
                    continue
            if path.name.startswith((_SCRATCH, _ASIDE)):
                _remove(path)

    def refuse_strangers(self, directories: list[Path], files: list[Path]) -> None:
        """Raise `UserError` for the first of these that exists and is not the program's own."""
        for path in directories:
            if os.path.lexists(path) and (reason := stranger(path)):
                raise UserError(f"{_not_ours(path)} ({reason})")
        for path in files:
            if os.path.lexists(path) and not _is_marked(path):
                raise UserError(_not_ours(path))

    @property
    def optimizer_state(self) -> Path:
        """A place for the moments of this run, removed when it ends or before the next begins."""
        self.work.mkdir(parents=True, exist_ok=True)
        return _scratch(self.work, "optimizer.state")


def _locked(path: Path) -> filelock.BaseFileLock:
    """A lock that is held. Where the file system has none, the file itself is the lock."""
    lock: filelock.BaseFileLock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        # It names the process: one that died on this machine does not hold it any more.
        lock = filelock.SoftFileLock(path.with_name("lock.soft"), timeout=0)
        lock.acquire()
    return lock


def _hint(lock: str) -> str:
    """What to do about a lock that is a file, which says whose it is; others are empty."""
    path = Path(lock)
    return f", or remove {path} if it died" if path.exists() and path.stat().st_size else ""


@contextmanager
def atomic_directory(target: Path, work: Path | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `target` by a rename once its files are on the disk.

    It is filled in `work`, by default beside `target`. A crash at any point leaves the old `target`
    or the new one, whole, and at worst something in `work`. The caller makes sure that an old one
    may be replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = work or target.parent
    work.mkdir(parents=True, exist_ok=True)
    unfinished = _scratch(work, target.name)
    unfinished.mkdir()
    try:
        yield unfinished
        _write_manifest(unfinished)
        for path in [*unfinished.iterdir(), unfinished]:
            _fsync(path)
        if not os.path.lexists(target):
            unfinished.rename(target)
        elif not _exchange(unfinished, target):
            _replace(target, unfinished, work / f"{_ASIDE}{target.name}")
        _fsync(target.parent)
    finally:
        _remove(unfinished)  # the old one, or what an error left; nothing after a plain rename


@contextmanager
def atomic_file(target: Path, work: Path | None = None) -> Iterator[Path]:
    """A path to write a file to, which then becomes `target`: the old one or the new one, whole."""
    work = work or target.parent
    work.mkdir(parents=True, exist_ok=True)
    unfinished = _scratch(work, target.name)
    try:
        yield unfinished
        _fsync(unfinished)
        unfinished.replace(target)
        _fsync(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomic(target: Path, text: str, work: Path | None = None) -> None:
    """Write a text file so that it is the old one or the new one, whole."""
    with atomic_file(target, work) as path:
        path.write_text(text, encoding="utf-8")


def remove_directory(target: Path, work: Path) -> None:
    """Remove a directory that the program made, in one step; one with a stranger's files stays."""
    if not target.is_dir() or stranger(target, content=False):
        return
    work.mkdir(parents=True, exist_ok=True)
    removed = _scratch(work, target.name)
    target.rename(removed)
    _remove(removed)


def stranger(directory: Path, *, content: bool = True) -> str | None:
    """Why a directory is not the program's own; None where it is.

    With `content`, one whose files were changed is not. Missing files do not matter.
    """
    try:
        files = _read_manifest(directory)
    except DamagedError as error:
        return str(error)
    try:
        found = sorted(directory.iterdir())
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    for path in found:
        if path.name != MANIFEST and path.name not in files:
            return f"it holds {path.name}"
        if content and path.name in files and (reason := _difference(path, files[path.name])):
            return f"{path.name} {reason}"
    return None


def check_whole(directory: Path, names: list[str] | None = None) -> None:
    """Compare a directory, or some files of it, with its manifest. Raises `DamagedError`."""
    files = _read_manifest(directory)
    for name in files if names is None else names:
        if name not in files:
            raise DamagedError(f"{name} is not in its {MANIFEST}")
        if reason := _difference(directory / name, files[name]):
            raise DamagedError(f"{name} {reason}")


def _write_manifest(directory: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.iterdir())
    }
    text = json.dumps({"written_by": WRITER, "files": files}, indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    if directory.is_symlink() or not directory.is_dir():
        raise DamagedError("it is not a directory")
    try:
        if (directory / MANIFEST).is_symlink():
            raise DamagedError(f"{MANIFEST} is a link")
        manifest = loads((directory / MANIFEST).read_bytes().decode())
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DamagedError(f"{MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("written_by") != WRITER:
        raise DamagedError(f"{MANIFEST} is not one of {WRITER}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise DamagedError(f"{MANIFEST} does not list files")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, value = item
    return (
        name not in ("", ".", "..", MANIFEST)
        and "/" not in name
        and isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
    )


def _difference(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from its entry in the manifest."""
    if not os.path.lexists(path):
        return "is missing"
    if path.is_symlink() or not path.is_file():
        return "is not a file"
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"has {size} bytes instead of {entry['bytes']}"
        return None if _sha256(path) == entry["sha256"] else "has another SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _scratch(work: Path, name: str) -> Path:
    """A new path in `work`, which the next run removes if this one is killed."""
    return work / f"{_SCRATCH}{name}-{uuid.uuid4().hex}"


def _is_marked(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return WRITER.encode() in file.read(_MARKED_BYTES)
    except OSError:  # unreadable to us, so not of this program
        return False


def _not_ours(path: Path) -> str:
    return f"{path} was not written by finetune.py: move it away, or name another --output"


def _remove(path: Path) -> None:
    """Remove something of the program's own scratch."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step. False where that fails, be it that the system cannot."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    # File systems and sandboxes say in many ways that they cannot; two renames tell all else.
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _replace(target: Path, new: Path, aside: Path) -> None:
    """Replace a directory in two renames; a kill between them leaves the old one as `aside`."""
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    _remove(aside)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no directories.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
