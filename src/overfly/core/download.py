"""Download files over HTTP, verified by hash and resumed when the connection breaks, and unpack archives.

An unfinished download is stored as ``name.part`` (received bytes) and ``name.part.json`` (URL and version of the
file); it is renamed to ``name`` when it is complete and its hash matches.
"""

import errno
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import struct
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from overfly.core.atomic_files import lock, temporary_path
from overfly.core.errors import DownloadError, OverflyError

OnBytes = Callable[[int, int | None], None]
"""Called with the number of bytes received and of all bytes, or None if unknown."""
CHUNK = 1 << 16
"""Bytes read and written at a time."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
MAX_PAUSE = 60.0
"""Longest pause before a retry, in seconds, including that of a Retry-After header."""
MAX_DEPTH = 32
"""Largest number of nested folders in an archive."""
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, RuntimeError)
"""Errors of a damaged archive; RuntimeError is that of an encrypted one."""


def cache_folder() -> Path:
    """Folder of downloaded weights and decoded images: ``OVERFLY_CACHE``, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("OVERFLY_CACHE") or platformdirs.user_cache_dir("overfly", False)).expanduser()


def download_file(
    url: str, path: Path, *, known_hash: str | None = None, progress: OnBytes | None = None, retries: int = 3,
    timeout: float = 30,
) -> Path:  # fmt: skip
    """Download a file from an http or https URL to ``path`` unless it exists with the right hash, and return ``path``.

    An existing file with another hash is replaced when the download is complete. An interrupted download resumes if the
    server still has the same version. Processes that download the same file wait for each other. ``known_hash`` is
    ``md5:…`` or ``sha256:…``, in hex digits; of SHA-256 the first 8 or more are enough, as in the file names of
    torch.hub. None accepts any existing file. After ``retries`` failures in a row, without new bytes between them, the
    download is given up; ``timeout`` seconds without data break a connection. Raises `DownloadError`: the URL is wrong
    or unreachable, the disk is full, or the hash differs.
    """
    path = Path(path)
    if known_hash is not None and not re.fullmatch(r"(?i)md5:[0-9a-f]{32}|sha256:[0-9a-f]{8,64}", known_hash):
        raise DownloadError(f"known_hash must be md5: or sha256: and hex digits, got {known_hash!r}")
    if path.is_dir():
        raise DownloadError(f"{path} is a folder, not a file; move it away or download to another path")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(path.name + ".lock")):
            if not path.is_file() or (known_hash and hash_error(path, known_hash)):
                _ResumingDownloader(path, known_hash, progress, retries, timeout).download(url)
    return path


def hash_error(path: Path, known_hash: str) -> str | None:
    """Compare a file with a hash such as ``md5:0f…``; return a message with both if they differ."""
    algorithm, _, expected = known_hash.lower().partition(":")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if digest.startswith(expected):
        return None
    return f"expected {algorithm} {expected}, got {digest[: len(expected)]}"


@contextmanager
def disk_errors(path: Path, kind: type[OverflyError] = DownloadError) -> Iterator[None]:
    """Raise errors of writing ``path`` to disk as errors of a ``kind``."""
    try:
        yield
    except BrokenPipeError:  # raised by a progress callback whose reader has gone
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; free some space and try again"
        else:
            reason = f"cannot be written ({error.strerror or error}); choose a writable folder"
        raise kind(f"{path}: {reason}") from error


def check_free_space(path: Path, size: int) -> None:
    """Raise `DownloadError` unless ``size`` more bytes fit on the disk of ``path``."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise DownloadError(
            f"{path} needs {decimal(size)} more, and {decimal(free)} are free; free some space or choose another folder"
        )


class _RetryError(Exception):
    """A temporary failure; the download is retried."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class _ResumingDownloader:
    """Downloads one file to ``path``, and resumes with HTTP range requests."""

    path: Path
    known_hash: str | None
    progress: OnBytes | None
    retries: int
    timeout: float

    def __post_init__(self) -> None:
        self.part = self.path.with_name(self.path.name + ".part")
        self.info = self.path.with_name(self.path.name + ".part.json")

    def download(self, url: str) -> None:
        """Download, and retry failed requests."""
        failures, furthest = 0, self._received()
        while True:
            try:
                self._request(url)
                break
            except _RetryError as error:
                received = self._received()
                failures = 1 if received > furthest else failures + 1
                furthest = max(furthest, received)
                if failures > self.retries:
                    raise DownloadError(
                        f"{_public_part(url)} cannot be downloaded: {error} ({failures} attempts in a row); check the "
                        f"URL and the connection and try again; it resumes after {decimal(received)}"
                    ) from error
                time.sleep(min(max(error.pause, PAUSE * 2 ** (failures - 1)), MAX_PAUSE))
        difference = hash_error(self.part, self.known_hash) if self.known_hash else None
        if difference:
            self._discard()
            raise DownloadError(f"{self.path.name} from {_public_part(url)}: {difference}; try again")
        self.part.replace(self.path)
        self._discard()

    def _request(self, url: str) -> None:
        import requests

        info: dict[str, str] = {}
        with suppress(OSError, ValueError, TypeError):
            info = dict(json.loads(self.info.read_text(encoding="utf-8")))
        version = info.get("version")
        received = self._received() if info.get("url") == url and (version or self.known_hash) else 0
        headers = {"User-Agent": "overfly", "Accept-Encoding": "identity"}
        if received:
            headers |= {"Range": f"bytes={received}-"} | ({"If-Range": version} if version else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
                _check_response(response, url)
                start = received if response.status_code == 206 else 0
                current = [response.headers[name] for name in ("ETag", "Last-Modified") if name in response.headers]
                continues = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                same = continues and (not version or not current or version in current)
                if response.status_code == 416 or (start and not same):
                    self._discard()
                    raise _RetryError("the file on the server has changed")
                self._receive(url, response, start)
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise DownloadError(f"{_public_part(url)} is not an http URL, or redirects to another URL") from error
        except requests.exceptions.SSLError as error:
            raise DownloadError(f"{_public_part(url)} has an invalid certificate; check the machine's clock") from error
        except requests.RequestException as error:
            reason = f"no connection to {urllib.parse.urlsplit(url).hostname}, or no data for {self.timeout:g} s"
            raise _RetryError(f"{reason} ({type(error).__name__})") from error

    def _receive(self, url: str, response: Any, start: int) -> None:
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        check_free_space(self.path, (total or start) - start)
        if not start:
            version = response.headers.get("ETag", "")
            version = response.headers.get("Last-Modified") if not version or version.startswith("W/") else version
            self._discard()
            self.info.write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")
        received = start
        with self.part.open("ab") as file:
            for chunk in itertools.chain([b""], response.iter_content(CHUNK)):
                received += file.write(chunk)
                if self.progress:
                    self.progress(received, total)
        if total is not None and received != total:
            raise _RetryError(f"the connection ended after {received} of {total} bytes")

    def _received(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.info.unlink(missing_ok=True)


def _check_response(response: Any, url: str) -> None:
    status = response.status_code
    if url.startswith("https:") and not response.url.startswith("https:"):
        raise DownloadError(f"{_public_part(url)} redirects to an insecure URL; download the file in a browser")
    if status in (408, 425, 429) or status >= 500:
        pause = response.headers.get("Retry-After", "")
        raise _RetryError(f"HTTP status {status} {response.reason}", float(pause) if pause.isdecimal() else 0.0)
    if status not in (200, 206, 416):
        action = "download the file in a browser" if status in (401, 403) else "check the URL"
        raise DownloadError(f"{_public_part(url)}: HTTP status {status} {response.reason}; {action}")


def _public_part(url: str) -> str:
    """Remove user, password and query, which may be secret, from a URL."""
    return re.sub(r"//[^/]*@", "//", re.split("[?#]", url, maxsplit=1)[0])


def unpack_zip(
    archive: Path, folder: Path, *, check: Callable[[Path], None] | None = None, progress: OnBytes | None = None
) -> None:
    """Unpack an archive whose hash was verified into a folder, which is created only when it is complete and checked.

    A top-level folder of the same name in the archive is skipped: ``Train/Urban/…`` and ``Urban/…`` both unpack to
    ``folder/Urban/…``. Nothing is written outside the folder: `zipfile` drops ``..`` and makes absolute paths relative.

    ``folder`` does not exist, or is empty. ``check`` is called with it before it gets its name, and raises if its
    content is wrong; ``progress`` is called with the number of bytes unpacked and of all bytes. Raises `DownloadError`:
    the archive is damaged or encrypted, or the disk is full.
    """
    with disk_errors(folder), temporary_path(folder, folder=True) as part:
        try:
            with zipfile.ZipFile(archive) as opened:
                members = opened.infolist()
                done, total = 0, sum(info.file_size for info in members)
                check_free_space(folder, total)
                if any(info.filename.count("/") > MAX_DEPTH for info in members):
                    raise zipfile.BadZipFile(f"a file is more than {MAX_DEPTH} folders deep")
                for info in members:
                    opened.extract(info, part)
                    done += info.file_size
                    if progress:
                        progress(done, total)
        except ZIP_ERRORS as error:
            raise DownloadError(f"{archive} is a damaged zip archive ({error}); delete it and try again") from error
        inside = part / folder.name
        unpacked = inside if inside.is_dir() else part
        if check:
            check(unpacked)
        if folder.is_dir():
            folder.rmdir()
        unpacked.rename(folder)
