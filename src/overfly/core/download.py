"""Download files over HTTP with `pooch`: cached, verified by hash, and resumed when the connection breaks.

Next to ``name`` an unfinished download keeps ``name.part`` (the received bytes) and ``name.part.json`` (URL and version
of the file they belong to); ``name`` appears when it is complete and its hash matches.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfly.core.atomic_files import lock
from overfly.core.errors import DownloadError

Progress = Callable[[int, int | None], None]
"""Called with the number of bytes received and of all bytes, or None where the server does not state it."""

CHUNK = 1 << 16
"""Bytes read and written at a time."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
MAX_PAUSE = 60.0
"""Longest pause before a retry, in seconds, whatever the server asks for."""


def cache_folder() -> Path:
    """Folder of downloaded weights and decoded images: ``OVERFLY_CACHE``, else the user's cache folder."""
    import pooch

    return Path(os.environ.get("OVERFLY_CACHE") or pooch.os_cache("overfly")).expanduser()


def download_file(
    url: str,
    path: Path,
    *,
    known_hash: str | None = None,
    progress: Progress | None = None,
    retries: int = 3,
    timeout: float = 30,
) -> Path:
    """Download a file unless it exists with the right hash.

    An existing file with another hash is replaced when the download is complete. An interrupted download resumes if
    the server still has the same version. Processes that download the same file wait for each other.

    Args:
        url: http or https URL.
        path: path of the file; missing folders are created.
        known_hash: ``md5:…`` or ``sha256:…``, in hex digits; of SHA-256 the first 8 or more are enough, as in the file
            names of torch.hub. None accepts any existing file.
        progress: called after each chunk.
        retries: failures in a row, without new bytes between them, after which the download is given up.
        timeout: seconds without data after which a connection counts as broken.

    Returns:
        ``path``.

    Raises:
        DownloadError: the URL is wrong or unreachable, the disk is full, or the hash differs.
    """
    import pooch

    path = Path(path)
    if known_hash is not None and not re.fullmatch(r"(?i)md5:[0-9a-f]{32}|sha256:[0-9a-f]{8,64}", known_hash):
        raise DownloadError(f"known_hash must be md5: or sha256: and hex digits, got {known_hash!r}")
    if path.is_dir():
        raise DownloadError(f"{path} is a folder, not a file; move it away or download to another path")
    whole = known_hash if known_hash is None or len(known_hash) in (len("md5:") + 32, len("sha256:") + 64) else None
    downloader = _ResumingDownloader(path, known_hash, whole is None, progress, retries, timeout)
    pooch.get_logger().setLevel("WARNING")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(path.name + ".lock")):
            if known_hash and not whole and path.is_file() and hash_error(path, known_hash):
                path.unlink()  # `pooch` compares whole hashes only
            try:
                pooch.retrieve(url, whole, path.name, path.parent, downloader=downloader)
            except ValueError as error:  # another hash; `pooch` has deleted the file
                raise DownloadError(f"{path.name} from {_public_part(url)}: {error}") from None
    return path


def hash_error(path: Path, known_hash: str) -> str | None:
    """Compare a file with a hash such as ``md5:0f…``; return a text with both if they differ."""
    import pooch

    algorithm, _, expected = known_hash.lower().partition(":")
    digest = pooch.file_hash(str(path), alg=algorithm)
    if digest.startswith(expected):
        return None
    return f"expected {algorithm} {expected}, got {digest[: len(expected)]}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise errors of writing ``path`` to disk as `DownloadError`."""
    try:
        yield
    except BrokenPipeError:  # raised by a progress callback whose reader has gone
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; free some space and try again"
        else:
            reason = f"cannot be written ({error.strerror or error}); choose a writable folder"
        raise DownloadError(f"{path}: {reason}") from error


def check_free_space(path: Path, size: int) -> None:
    """Check that ``size`` more bytes fit on the disk of ``path``.

    Raises:
        DownloadError: they do not.
    """
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise DownloadError(
            f"{path} needs {format_bytes(size)} more, and {format_bytes(free)} are free; "
            "free some space or choose another folder"
        )


def format_bytes(size: float) -> str:
    """Format a number of bytes: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class _RetryError(Exception):
    """A failure that another attempt may repair."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class _ResumingDownloader:
    """Downloader for `pooch.retrieve` that resumes with HTTP range requests."""

    path: Path
    known_hash: str | None
    check_hash: bool
    progress: Progress | None
    retries: int
    timeout: float

    def __post_init__(self) -> None:
        self.part = self.path.with_name(self.path.name + ".part")
        self.note = self.path.with_name(self.path.name + ".part.json")

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Download to ``output_file``, with as many requests as it takes."""
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
                        f"URL and the connection and try again, the {format_bytes(received)} received are kept"
                    ) from error
                time.sleep(min(max(error.pause, PAUSE * 2 ** (failures - 1)), MAX_PAUSE))
        different = hash_error(self.part, self.known_hash) if self.known_hash and self.check_hash else None
        if different is None:
            self.part.replace(output_file)
        self._discard()
        if different is not None:
            raise DownloadError(f"{self.path.name} from {_public_part(url)}: {different}; it is deleted, try again")

    def _request(self, url: str) -> None:
        import requests

        note = self._read_note()
        known = note.get("url") == url and (note.get("version") or self.known_hash)
        received = self._received() if known else 0
        headers = {"User-Agent": "overfly", "Accept-Encoding": "identity"}
        if received:
            headers |= {"Range": f"bytes={received}-", **({"If-Range": note["version"]} if note["version"] else {})}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
                if url.startswith("https:") and not response.url.startswith("https:"):
                    raise DownloadError(f"{_public_part(url)} redirects to an insecure URL; download it by hand")
                _check_status(response, url)
                start = received if response.status_code == 206 else 0
                if response.status_code == 416 or (start and not _same_version(response, start, note["version"])):
                    self._discard()
                    raise _RetryError("the file on the server has changed")
                self._receive(url, response, start)
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
            raise DownloadError(
                f"{_public_part(url)} is not, or redirects to something else than, an http URL"
            ) from None
        except requests.exceptions.SSLError as error:
            raise DownloadError(
                f"the certificate of {_public_part(url)} is invalid; check this machine's clock"
            ) from error
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
            self.note.write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")
        received = start
        with self.part.open("ab") as file:
            if self.progress:
                self.progress(received, total)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                received += len(chunk)
                if self.progress:
                    self.progress(received, total)
        if total is not None and received != total:
            raise _RetryError(f"the connection ended after {received} of {total} bytes")

    def _received(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _read_note(self) -> dict[str, str]:
        try:
            return {"version": "", **json.loads(self.note.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError):
            return {}

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _check_status(response: Any, url: str) -> None:
    status, reason = response.status_code, response.reason
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        pause = response.headers.get("Retry-After", "")
        raise _RetryError(f"the server answers {status} {reason}", float(pause) if pause.isdigit() else 0.0)
    if status in (401, 403):
        raise DownloadError(f"{_public_part(url)} requires a login ({status}); download it by hand")
    raise DownloadError(f"{_public_part(url)}: the server answers {status} {reason}; check the URL")


def _same_version(response: Any, start: int, version: str | None) -> bool:
    """Whether a partial response continues at byte ``start`` of the same version of the file."""
    current = [response.headers[name] for name in ("ETag", "Last-Modified") if name in response.headers]
    continues = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    return continues and (not version or not current or version in current)


def _public_part(url: str) -> str:
    """A URL without user, password and query, which may be secret."""
    return re.sub(r"//[^/]*@", "//", re.split("[?#]", url, maxsplit=1)[0])


__all__ = ["Progress", "cache_folder", "check_free_space", "disk_errors", "download_file", "format_bytes", "hash_error"]
