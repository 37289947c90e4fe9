"""Files and folders on the way to their names: nobody else's are touched, and those of dead processes are cleared away.

Beside ``name`` lies ``.name.HOST.TOKEN.part`` while it is made. Its process holds a lock on it, which the system lets
go of however the process ends: so a later one knows what was left by a process that was killed.
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


@contextmanager
def atomic_write(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file, or folder, beside ``path``, to be written and then renamed; what is not renamed is taken away.

    Parts of the same name that processes of this machine left when they were killed are taken away before.

    Args:
        path: the name that is to be had in the end; its folder is there.
        folder: whether a folder is wanted.

    Raises:
        OSError: it cannot be made.
    """
    remove_stale(path)
    part, handle = _new(path, folder)
    try:
        yield part
    finally:
        _remove(part)
        if handle is not None:
            os.close(handle)


def remove_stale(path: Path) -> None:
    """Take away the parts of a name that killed processes of this machine left; those of others are left alone."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}\.[0-9a-f]{{12}}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for part in [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]:
            with suppress(OSError):
                handle = lock(part, wait=False)
                if handle is not None:
                    _remove(part)
                    os.close(handle)


def _new(path: Path, folder: bool) -> tuple[Path, int | None]:
    """A part of one's own, and what holds its lock; None where the system knows no locks."""
    while True:
        part = path.parent / f".{path.name}.{_host()}.{uuid.uuid4().hex[:12]}.part"
        if folder:
            part.mkdir()
        else:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            handle = lock(part, wait=True)
        except OSError:
            return part, None
        if handle is not None:  # else another process swept it in the moment before it was held
            return part, handle


def lock(part: Path, *, wait: bool) -> int | None:
    """What holds the lock of a part for this process; None where the part is gone.

    Raises:
        OSError: another process holds it, and one is not to wait; or there are no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows, which keeps files that are open from being renamed
        raise OSError("there are no locks that end with their process") from None
    try:
        handle = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(handle), part.stat()):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _host() -> str:
    """Eight digits of this machine's name: locks of a shared folder may be seen on one machine alone."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()


__all__ = ["atomic_write", "remove_stale"]
