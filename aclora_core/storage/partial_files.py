"""Half-written files, and locks that tell whether somebody is still at work on a file or a folder.

A lock ends with its process, however that ends: a number of a process or a time in a file would outlive it.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCK = ".lock"  # in a folder that a training writes into
_SETTLED = 10.0  # seconds; a younger file may be one that is about to be locked or renamed
_ABANDONED = 3600.0  # seconds, where the drive has no locks
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # by another process


def partial_path(path: Path) -> Path:
    """Return the name under which a file is written before it gets its own; no other process uses it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def clear_partial_files(folder: Path, stem: str = "*", suffix: str = ".safetensors") -> None:
    """Delete the half-written files in a folder whose writer has died; failures are passed over.

    Args:
        folder: not the folders in it.
        stem: a pattern for the files' names without their suffix, such as "first_*".
        suffix: of the files.
    """
    with suppress(OSError):
        for path in folder.glob(f".{stem}{suffix}.*.partial"):
            with suppress(OSError):  # on Windows, that of a file which is open
                if _is_abandoned(path):
                    path.unlink()


def _is_abandoned(path: Path) -> bool:
    age = time.time() - path.stat().st_mtime
    if age < _SETTLED:
        return False
    with open(path, "rb+") as file:
        try:
            return lock(file)
        except OSError:
            return age > _ABANDONED


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed, and return whether that succeeded; False where another has locked it.

    Raises:
        OSError: the drive has no locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


@contextmanager
def reserved(folder: Path) -> Iterator[bool]:
    """Reserve a folder for this process while the context lasts; it is created if it is missing.

    Yields whether the folder is ours: False where another process has reserved it. Where the folder cannot be written
    to, or its drive has no locks, nobody can tell, and it counts as ours.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, ours = _open_locked(path)
    except OSError:
        yield True
        return
    try:
        with file:
            try:
                yield ours
            finally:
                if ours and sys.platform != "win32":  # still locked, so that nobody takes it for theirs
                    _unlink(path)
    finally:
        if ours and sys.platform == "win32":  # where an open file cannot be deleted
            _unlink(path)


def _open_locked(path: Path) -> tuple[IO[bytes], bool]:
    """Return a file, open, and whether it could be locked.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        file, ours = path.open("ab"), True
        with suppress(OSError):
            ours = lock(file)
        if not ours or _is_at(file, path):
            return file, ours
        file.close()  # whoever had it locked has just deleted it


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
