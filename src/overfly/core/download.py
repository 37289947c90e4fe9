"""Fetch a file over HTTP: resumed when it breaks, checked by its digest, in place only when it is whole.

Beside ``name`` stand, while it is fetched, ``name.part`` (the bytes so far), ``name.part.json`` (which version of the
file they belong to) and ``name.lock`` (held by the process that fetches; another one waits, then finds the file there).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overfly.core.errors import DownloadError
from overfly.core.transfer import CHUNK, Progress, Transfer, discard, transfer_file, writing


def cache_folder() -> Path:
    """Where fetched weights are kept: ``OVERFLY_CACHE``, else ``XDG_CACHE_HOME/overfly``, else ``~/.cache/overfly``."""
    own = os.environ.get("OVERFLY_CACHE", "")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if shared and Path(shared).is_absolute():  # the XDG specification says to ignore relative ones
        return Path(shared) / "overfly"
    return Path("~/.cache/overfly").expanduser()


def download_file(
    url: str,
    path: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    retries: int = 3,
    timeout: float = 30,
) -> Path:
    """Bring the file at ``url`` to ``path``, unless it is there already.

    A file that is there and has the right digest, or any file where no digest is given, is left alone. One with another
    digest is replaced, but only when the right one has arrived. A transfer that breaks, in this call or in an earlier
    one, is taken up where it broke if the server still has the same version. Processes that fetch the same file at
    once wait for each other.

    Args:
        url: an http or https address.
        path: name of the finished file; missing folders are made.
        md5: the file's MD5, 32 hex digits.
        sha256: the file's SHA-256, or its first 8 or more hex digits as they stand in names of torch hub files.
        progress: called after every piece with (bytes so far, bytes in all or None).
        retries: how often in a row a transfer may break without getting further before this gives up.
        timeout: seconds of silence after which a connection counts as broken.

    Returns:
        ``path``.

    Raises:
        DownloadError: the address is wrong or out of reach, the server refuses, the disk is full, the digest differs.
    """
    _check_request(url, md5, sha256)
    path = Path(path)
    if _is_finished(path, md5, sha256):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{path.parent} cannot be made ({error.strerror}); choose a folder you may write to"
        ) from error
    with exclusive_lock(path.with_name(path.name + ".lock")) as locked:
        if locked and _is_finished(path, md5, sha256):  # another process brought it while this one waited
            return path
        part = path.with_name(path.name + (".part" if locked else f".{uuid.uuid4().hex}.part"))
        transfer = Transfer(url, path, part, bool(md5 or sha256), progress, timeout)
        try:
            transfer_file(transfer, retries)
            _finish(transfer, md5, sha256)
        finally:
            if not locked:
                discard(transfer)
    return path


def wrong_digest(path: Path, md5: str | None = None, sha256: str | None = None) -> tuple[str, str] | None:
    """Compare a file with its digests: None when they fit, else (expected, got), such as ("md5 0f…", "md5 a1…")."""
    for name, expected in (("md5", md5), ("sha256", sha256)):
        if expected is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        if not digest.hexdigest().startswith(expected.lower()):
            return f"{name} {expected.lower()}", f"{name} {digest.hexdigest()[: len(expected)]}"
    return None


def _check_request(url: str, md5: str | None, sha256: str | None) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or re.search(r"[^\x21-\x7e]", url):
        raise DownloadError(f"{url!r} is not an address to fetch from; give one that begins with https:// or http://")
    if md5 is not None and not re.fullmatch(r"[0-9a-fA-F]{32}", md5):
        raise DownloadError(f"{md5!r} is not an MD5; give its 32 hex digits")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise DownloadError(f"{sha256!r} is not a SHA-256; give its 64 hex digits or the first 8 or more of them")


def _is_finished(path: Path, md5: str | None, sha256: str | None) -> bool:
    if path.is_dir():
        raise DownloadError(f"{path} is a folder, not a file; move it away or fetch to another name")
    return path.is_file() and wrong_digest(path, md5, sha256) is None


@contextmanager
def exclusive_lock(lock: Path) -> Iterator[bool]:
    """Wait until nobody else, thread or process, holds the file ``lock``, and hold it.

    The system lets go of it when the process ends, however it ends. Where it knows no such locks, gives False at once.

    Raises:
        DownloadError: the folder cannot be written to.
    """
    handle = _take(lock)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)  # while it is held: whoever waits notices below that the name is gone
            os.close(handle)


def _take(lock: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder to write to"
            raise DownloadError(f"{lock.parent} cannot be written to ({error.strerror}); {hint}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the system lets go of it even when the process is killed
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _finish(transfer: Transfer, md5: str | None, sha256: str | None) -> None:
    wrong = wrong_digest(transfer.part, md5, sha256)
    if wrong:
        discard(transfer)
        raise DownloadError(
            f"{transfer.path.name} from {transfer.shown} is not the file it should be: expected {wrong[0]}, "
            f"got {wrong[1]}; what came is deleted, fetch again, and if it differs again, the file there has changed"
        )
    with writing(transfer):
        transfer.part.replace(transfer.path)
        transfer.note.unlink(missing_ok=True)


__all__ = ["Progress", "cache_folder", "download_file", "exclusive_lock", "wrong_digest"]
