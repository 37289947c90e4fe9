"""One file over HTTP into a part file: request, resume, write, retry. `overfly.core.download` checks and places it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, NamedTuple

from overfly.core.errors import DownloadError

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are on disk and the bytes there will be, or None where the server does not say."""

CHUNK = 1 << 20
"""Bytes read and written at a time."""
PAUSE = 0.5
"""Seconds before the first retry; each further one waits twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds that no retry waits longer than, whatever the server asks for."""


class Transfer(NamedTuple):
    """What is to be fetched.

    Attributes:
        url: an http or https address.
        path: name of the finished file, for messages.
        part: name of the file that grows; ``part.json`` beside it says which version of the file it belongs to.
        guarded: whether a digest will be compared afterwards, so that a patchwork of two versions would be noticed.
        progress: told how far it is.
        timeout: seconds of silence after which a connection counts as broken.
    """

    url: str
    path: Path
    part: Path
    guarded: bool
    progress: Progress | None
    timeout: float

    @property
    def note(self) -> Path:
        """The file beside the part that says which version the part belongs to."""
        return self.part.with_name(self.part.name + ".json")

    @property
    def shown(self) -> str:
        """The address without what may be secret in it: user, password, query."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _BrokenError(Exception):
    """A transfer that broke in a way that another attempt may mend."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def transfer_file(transfer: Transfer, retries: int) -> None:
    """Attempt after attempt until the part is whole; one that got further than all before starts a new count.

    Raises:
        DownloadError: more than ``retries`` breaks in a row, or an answer that another attempt would not mend.
    """
    failures, furthest = 0, _size(transfer.part)
    while True:
        try:
            if _attempt(transfer):
                return
        except _BrokenError as error:
            size = _size(transfer.part)
            failures = 1 if size > furthest else failures + 1
            furthest = max(size, furthest)
            if failures > retries:
                kept = f"; the {format_bytes(size)} that came are kept and taken up again" if size else ""
                raise DownloadError(
                    f"{transfer.shown} could not be fetched: {error} ({failures} attempts in a row); "
                    f"check the address and the connection, then try again{kept}"
                ) from error
            time.sleep(min(max(error.wait, PAUSE * 2 ** (failures - 1)), LONGEST_PAUSE))


def _attempt(transfer: Transfer) -> bool:
    """One request. True when the part is whole; False when it was of another version, is gone, and must start anew."""
    held, headers = _resumption(transfer)
    headers = {"User-Agent": "overfly", **headers}
    request = urllib.request.Request(transfer.url, headers=headers)  # noqa: S310  `fetch` has checked the scheme
    try:
        with _opener().open(request, timeout=transfer.timeout) as response:
            return _receive(transfer, response, held)
    except urllib.error.HTTPError as error:
        with error:
            return _refusal(transfer, error, held)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{transfer.shown} shows a certificate that cannot be verified ({error.reason.verify_message}); "
                "check the clock and the certificates of this machine, or fetch the file by hand"
            ) from error
        raise _BrokenError(
            f"{urllib.parse.urlsplit(transfer.url).hostname} cannot be reached ({error.reason})"
        ) from error
    except TimeoutError as error:
        raise _BrokenError(f"nothing came for {transfer.timeout:g} s") from error
    except (OSError, HTTPException) as error:
        raise _BrokenError(f"the connection broke ({str(error) or type(error).__name__})") from error


def _resumption(transfer: Transfer) -> tuple[int, dict[str, str]]:
    """How many bytes can be built on, and the headers that ask for the rest of that version only."""
    held = _size(transfer.part)
    note = _read_note(transfer)
    if not held or note.get("url") != transfer.url:
        return 0, {}
    headers = {"Range": f"bytes={held}-"}
    etag, modified = note.get("etag"), note.get("modified")
    if etag and not etag.startswith("W/"):  # weak ones say nothing about bytes (RFC 9110, 13.1.5)
        return held, {**headers, "If-Range": etag}
    if modified:
        return held, {**headers, "If-Range": modified}
    return (held, headers) if transfer.guarded else (0, {})  # without a digest nobody would notice a patchwork


def _receive(transfer: Transfer, response: Any, held: int) -> bool:
    """Write the body behind the bytes that are held, or, if the server sends all of it, in their place."""
    headers: HTTPMessage = response.headers
    length = _number(headers.get("Content-Length"))
    start, total = 0, length
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
        if not held:
            raise DownloadError(
                f"{transfer.shown} answers with a part of the file only; fetch it by hand to {transfer.path}"
            )
        note = _read_note(transfer)
        start, total = (int(match[1]), _number(match[3])) if match else (-1, None)
        changed = any(
            headers.get(header) and note.get(key) and headers[header] != note[key]
            for header, key in (("ETag", "etag"), ("Last-Modified", "modified"))
        )
        if start != held or changed or (total and note.get("total") and str(total) != note["total"]):
            discard(transfer)
            return False
    elif response.status != 200:
        raise DownloadError(
            f"{transfer.shown} answers with status {response.status}, not with a file; check the address"
        )
    if total is None and length is not None:
        total = start + length
    _check_space(transfer, start, total)
    with writing(transfer), transfer.part.open("ab" if start else "wb") as file:
        if not start:
            _write_note(transfer, headers, total)
        done = _copy(transfer, response, file, start, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done != total:
        raise _BrokenError(f"it ended after {done} of {total} bytes")
    return True


def _copy(transfer: Transfer, response: Any, file: IO[bytes], done: int, total: int | None) -> int:
    if transfer.progress:
        transfer.progress(done, total)
    while total is None or done < total:
        try:
            piece: bytes = response.read1(CHUNK if total is None else min(CHUNK, total - done))
        except TimeoutError as error:
            raise _BrokenError(f"nothing came for {transfer.timeout:g} s") from error
        except (OSError, HTTPException) as error:  # apart from the write below: its OSErrors are the disk's
            raise _BrokenError(f"the connection broke ({str(error) or type(error).__name__})") from error
        if not piece:
            break
        file.write(piece)
        done += len(piece)
        if transfer.progress:
            transfer.progress(done, total)
    return done


def _refusal(transfer: Transfer, error: urllib.error.HTTPError, held: int) -> bool:
    if error.code == 416 and held:
        match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
        if match and int(match[1]) == held and transfer.guarded:
            return True  # all bytes are there; the digest decides
        discard(transfer)
        return False
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _BrokenError(
            f"the server answers {error.code} {error.reason}", _number(error.headers.get("Retry-After")) or 0
        )
    if error.code in (401, 403):
        raise DownloadError(
            f"{transfer.shown} is not open to everyone ({error.code}); fetch it by hand to {transfer.path}"
        )
    if error.code in (404, 410):
        raise DownloadError(
            f"{transfer.shown} does not exist ({error.code}); check the address, the file may have moved"
        )
    raise DownloadError(f"{transfer.shown} is refused ({error.code} {error.reason}); check the address")


def _check_space(transfer: Transfer, start: int, total: int | None) -> None:
    free = shutil.disk_usage(transfer.path.parent).free + (_size(transfer.part) if not start else 0)
    if total is not None and total - start > free:
        raise DownloadError(
            f"{transfer.path} needs {format_bytes(total - start)} more and {format_bytes(free)} are free there; "
            "free some space or choose another folder"
        )


@contextmanager
def writing(transfer: Transfer) -> Iterator[None]:
    """Turn what the disk says into sentences."""
    try:
        yield
    except BrokenPipeError:  # no disk's: whoever listened to the progress has gone
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk is full; free some space, then fetch again: {format_bytes(_size(transfer.part))} are kept"
        else:
            text = f"it cannot be written ({error.strerror or error}); choose a folder you may write to"
        raise DownloadError(f"{transfer.path}: {text}") from error


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS, proxies of the environment, redirects that do not fall from https to http; nothing else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0917  the library's own signature
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            host = urllib.parse.urlsplit(req.full_url).hostname
            raise DownloadError(f"{host} sends on to {newurl!r}, which is not safe to follow; fetch the file by hand")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_note(transfer: Transfer) -> dict[str, str]:
    try:
        note = json.loads(transfer.note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in note.items()} if isinstance(note, dict) else {}


def _write_note(transfer: Transfer, headers: HTTPMessage, total: int | None) -> None:
    """Which version the part belongs to. The part is empty when this is written: they cannot disagree."""
    facts = {"url": transfer.url, "etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "total": total}
    transfer.note.write_text(
        json.dumps({key: value for key, value in facts.items() if value is not None}), encoding="utf-8"
    )


def discard(transfer: Transfer) -> None:
    """Forget what came so far."""
    transfer.part.unlink(missing_ok=True)
    transfer.note.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdigit() else None


def format_bytes(size: float) -> str:
    """A number of bytes as people read it: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
