"""Write files so that they appear complete or not at all, with a digest of their content; lock files between processes.

A file ``name`` in progress is a hidden sibling ``.name.HOST.TOKEN.part``. Its writer holds a lock beside it, which the
system releases when the process ends; later writers remove the parts of killed processes.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

TRAILER = b"\nsha256:"
"""Bytes before the digest at the end of a file: readers of GeoTIFF, .npy and zip ignore them."""
TRAILER_BYTES = len(TRAILER) + 64
DIGEST = "digest"
"""Key of the digest in JSON files."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block ends without an error.

    The folder of ``path`` exists; the file gets the permissions given by the umask. Raises `OSError` if it cannot be
    written.
    """
    with temporary_path(path) as part:
        mode = part.stat().st_mode & 0o777
        yield part
        part.chmod(mode)
        part.replace(path)


@contextmanager
def temporary_path(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file or ``folder`` beside ``path``; remove it at the end unless the block has renamed it.

    The folder of ``path`` exists. Raises `OSError` if it cannot be created.
    """
    remove_stale(path)
    part = path.parent / f".{path.name}.{_host()}.{uuid.uuid4().hex[:12]}.part"
    with lock(part.with_name(f"{part.name}.lock")):
        try:
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
            yield part
        finally:
            _remove(part)


def file_sha256(*paths: Path) -> str:
    """Return the SHA-256 of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def append_digest(file: BufferedRandom, key: str = "") -> None:
    """Append the SHA-256 of a file's content and of ``key`` to a file that is open for reading and writing."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    digest.update(key.encode())
    file.write(TRAILER + digest.hexdigest().encode())


def has_digest(path: Path, key: str = "") -> bool:
    """Return whether a file can be read, ends in the digest that `append_digest` wrote, and is unchanged."""
    with suppress(OSError), path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - TRAILER_BYTES
        file.seek(0)
        digest = hashlib.sha256()
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(key.encode())
        return left == 0 and file.read() == TRAILER + digest.hexdigest().encode()
    return False


def json_sha256(values: object) -> str:
    """Return the SHA-256 of JSON values, whatever the order of their keys and their layout."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with its digest."""
    plain = json.loads(json.dumps(values))
    write_text(path, json.dumps({**plain, DIGEST: json_sha256(plain)}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `ValueError` if it is damaged. Files of before have no digest and are not checked."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    key = next(reversed(values), "")
    rest = {name: value for name, value in values.items() if name != key}
    digest = json_sha256(rest)
    if (key == DIGEST) != (values.get(key) == digest):
        raise ValueError("it differs from its digest")
    return rest if key == DIGEST else values


def remove_stale(path: Path) -> None:
    """Remove parts of ``path`` left by killed processes of this machine; parts in progress are kept."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}\.[0-9a-f]{{12}}\.part(\.lock)?")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for part in {Path(entry.path.removesuffix(".lock")) for entry in entries if pattern.fullmatch(entry.name)}:
            with suppress(OSError, Timeout), lock(part.with_name(f"{part.name}.lock"), wait=False):
                _remove(part)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively among threads and processes; it is removed at the end.

    Raises `Timeout`: another thread or process holds it, and ``wait`` is False, and `OSError`: the lock file cannot be
    created.
    """
    created = not path.exists()
    path.touch()  # `filelock` waits forever where a folder such as /proc takes no files
    held = FileLock(path, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except OSError as error:  # such as a full disk; `Timeout` is one too
        if created and not isinstance(error, Timeout):
            path.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still held: a waiting process notices that the file is gone and starts over
        held.release()


def _host() -> str:
    """Eight hex digits of the machine's name: locks in a shared folder may be visible on one machine only."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()
