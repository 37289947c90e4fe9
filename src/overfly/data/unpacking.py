"""Unpack a zip archive that somebody else made: nothing outside its folder, nothing too large, all of it or nothing."""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from overfly.core.errors import DownloadError
from overfly.core.transfer import format_bytes

CHUNK = 1 << 20
"""Bytes unpacked at a time."""
CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
"""What file managers leave in archives; not unpacked."""

Check = Callable[[Path], None]
"""Looks at the unpacked folder before it gets its name, and raises if it is not what it should be."""


def unpack_zip(
    archive: Path,
    folder: Path,
    *,
    check: Check | None = None,
    most_bytes: int = 20 * 10**9,
    most_files: int = 50_000,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Unpack ``archive`` as ``folder``, which appears only when all of it is written and checked.

    A top folder of the same name within the archive is left out: ``Train/Urban/…`` and ``Urban/…`` both come out as
    ``folder/Urban/…``. What is unfinished lies in a hidden temporary folder beside ``folder``, which is removed on
    every error; `remove_stale` removes what a killed process left.

    Args:
        archive: the zip file.
        folder: what it becomes; absent, or empty.
        check: called with the unfinished folder.
        most_bytes: unpacked size that is refused when exceeded.
        most_files: number of files that is refused when exceeded.
        progress: called with (bytes unpacked, bytes in all).

    Raises:
        DownloadError: the archive is damaged, encrypted or too large, names files outside the folder; the disk is full.
    """
    with _sentences(archive, folder), _opened(archive) as opened:
        members = _members(opened, archive, folder.name)
        total = sum(info.file_size for info, _ in members)
        if total > most_bytes or len(members) > most_files:
            raise DownloadError(
                f"{archive} unpacks to {len(members)} files of {format_bytes(total)}, more than the plausible "
                f"{most_files} files or {format_bytes(most_bytes)}; nothing was unpacked, check where it comes from"
            )
        free = shutil.disk_usage(folder.parent).free
        if total > free:
            raise DownloadError(
                f"{archive} needs {format_bytes(total)} unpacked and {format_bytes(free)} are free in {folder.parent}; "
                "free some space, then try again"
            )
        with tempfile.TemporaryDirectory(prefix=_prefix(folder), dir=folder.parent) as scratch:
            unfinished = Path(scratch) / folder.name  # not the scratch folder itself, which only its owner may read
            unfinished.mkdir()
            _extract(opened, members, unfinished, progress)
            if check:
                check(unfinished)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            unfinished.rename(folder)


def remove_stale(folder: Path) -> None:
    """Remove the temporary folders that killed processes left while they unpacked ``folder``.

    Call it only while nobody else can be unpacking the same folder.
    """
    for left in folder.parent.glob(f"{_prefix(folder)}*"):
        shutil.rmtree(left)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.unpacking-"


def _members(opened: zipfile.ZipFile, archive: Path, top: str) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of the archive with their paths below the folder, each of them looked at."""
    found: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    seen: set[str] = set()
    for info in opened.infolist():
        path = _safe_path(info, archive)
        if info.is_dir() or any(part in CLUTTER or part.startswith("._") for part in path.parts):
            continue
        if path.parts[0] == top and len(path.parts) > 1:
            path = PurePosixPath(*path.parts[1:])
        key = str(path).casefold()  # some file systems know no difference between A and a
        if key in seen:
            raise DownloadError(
                f"{archive} holds {info.filename!r} twice; nothing was unpacked, fetch the archive again"
            )
        seen.add(key)
        found.append((info, path))
    return found


def _safe_path(info: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    name = info.orig_filename
    path = PurePosixPath(name)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
        reason = "would be written outside its folder or has no proper name"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a link or a device, not a file"
    elif info.flag_bits & 0x1:
        reason = "is encrypted"
    else:
        return path
    raise DownloadError(
        f"{archive} is not safe to unpack: {name!r} {reason}; nothing was unpacked, check where the archive comes from"
    )


def _extract(
    opened: zipfile.ZipFile,
    members: list[tuple[zipfile.ZipInfo, PurePosixPath]],
    folder: Path,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    done, total = 0, sum(info.file_size for info, _ in members)
    for info, path in members:
        goal = folder / path
        goal.parent.mkdir(parents=True, exist_ok=True)
        with _damage(opened.filename), opened.open(info) as packed, goal.open("xb") as file:
            while piece := packed.read(CHUNK):  # ends at the size that the archive states; what differs fails its CRC
                file.write(piece)
                done += len(piece)
        if progress:
            progress(done, total)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    with _damage(archive):
        opened = zipfile.ZipFile(archive)
    with opened:
        yield opened


@contextmanager
def _damage(archive: Path | str | None) -> Iterator[None]:
    """Turn all that `zipfile` says of damaged archives into one sentence; RuntimeError is its word for encryption."""
    damage = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, RuntimeError)
    try:
        yield
    except damage as error:
        raise DownloadError(
            f"{archive} is not an intact zip archive ({error}); delete it and fetch it again"
        ) from error


@contextmanager
def _sentences(archive: Path, folder: Path) -> Iterator[None]:
    """Turn what the disk says into sentences."""
    try:
        yield
    except BrokenPipeError:  # no disk's: whoever listened to the progress has gone
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "the disk is full; free some space, then try again, nothing unfinished was left behind"
        else:
            text = f"it cannot be unpacked from {archive.name} ({error.strerror or error}); check the folder's rights"
        raise DownloadError(f"{folder}: {text}") from error
