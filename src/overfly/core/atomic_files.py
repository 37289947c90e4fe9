"""Write files so that they appear complete or not at all, and lock files between processes.

A file ``name`` in progress is a hidden sibling ``.name.HOST.TOKEN.part``. Its writer holds a lock beside it, which the
system releases when the process ends; later writers remove the parts of killed processes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block ends without an error.

    The file gets the permissions given by the umask.

    Args:
        path: final name; its folder exists.

    Raises:
        OSError: the file cannot be written.
    """
    with temporary_path(path) as part:
        mode = part.stat().st_mode & 0o777
        yield part
        part.chmod(mode)
        part.replace(path)


@contextmanager
def temporary_path(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file or folder beside ``path``; remove it at the end unless the block has renamed it.

    Args:
        path: final name; its folder exists.
        folder: create a folder instead of a file.

    Raises:
        OSError: it cannot be created.
    """
    remove_stale(path)
    part = path.parent / f".{path.name}.{_host()}.{uuid.uuid4().hex[:12]}.part"
    with lock(_lock_of(part)):
        try:
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
            yield part
        finally:
            _remove(part)


def remove_stale(path: Path) -> None:
    """Remove parts of ``path`` left by killed processes of this machine; parts in progress are kept."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}\.[0-9a-f]{{12}}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for part in [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]:
            with suppress(OSError, Timeout), lock(_lock_of(part), wait=False):
                _remove(part)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively among threads and processes; it is removed at the end.

    Raises:
        Timeout: another thread or process holds it, and ``wait`` is False.
        OSError: the lock file cannot be created.
    """
    path.touch()  # `filelock` waits forever where a folder such as /proc takes no files
    with FileLock(path, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: a waiting process notices that the file is gone and starts over


def _lock_of(part: Path) -> Path:
    return part.with_name(part.name + ".lock")


def _host() -> str:
    """Eight hex digits of the machine's name: locks in a shared folder may be visible on one machine only."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()
