"""Files that appear whole or not at all, whoever writes them at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Write = Callable[[Path], object]


def write_file(target: Path, write: Write) -> None:
    """Let ``write`` fill a new file, then rename it to ``target``."""
    with staged(target.parent, target.name, {target.name: write}) as files:
        commit(files, target.parent)


@contextlib.contextmanager
def staged(directory: Path, name: str, writes: Mapping[str, Write]) -> Iterator[dict[str, Path]]:
    """Files on the disk of ``directory``, by name, each filled by its function and synced.

    They lie in a folder of their own in ``directory``, which is made if missing. The folder is
    locked while its writer lives, so that the next writer of ``name`` can tell what a killed one
    left, and removes it. Files get the mode of the one they will replace, or what the umask gives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory, name)
    folder, lock = _locked_folder(directory, name)
    try:
        files = {}
        for file, write in writes.items():
            path = folder / file
            path.touch(exist_ok=False)
            mode = _mode(directory / file, otherwise=path)
            write(path)
            _sync(path)
            # Some writers replace the file by one of their own, with a mode of their own.
            path.chmod(mode)
            files[file] = path
        yield files
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def commit(files: Mapping[str, Path], directory: Path) -> None:
    """Rename what was `staged` into ``directory``, one after the other in the order given."""
    for name, path in files.items():
        path.replace(directory / name)
    sync_directory(directory)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    try:
        _sync(path)
    except OSError as error:
        # Some network filesystems sync no directories.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


@contextlib.contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other writers, or with ``shared`` all writers, of this package out of ``directory``."""
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network filesystems cannot lock; then it is as for readers that do not.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _locked_folder(directory: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=directory))
        # Another writer may have taken it for abandoned before it is locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            if _try_lock(lock) and folder.is_dir():
                return folder, lock
            os.close(lock)


def _remove_abandoned(directory: Path, name: str) -> None:
    for folder in directory.glob(f".{_escaped(name)}.*.tmp"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _try_lock(lock, unless_unsupported=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _try_lock(lock: int, unless_unsupported: bool = True) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks: nothing can be told to be abandoned there
        return unless_unsupported
    return True


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _mode(existing: Path, *, otherwise: Path) -> int:
    try:
        return existing.stat().st_mode & 0o777
    except OSError:
        return otherwise.stat().st_mode & 0o777


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
