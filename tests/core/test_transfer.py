from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from fileserver import FileServer, Served, md5, serving
from overfly.core import transfer
from overfly.core.download import download_file
from overfly.core.errors import DownloadError

BODY = bytes(range(256)) * 80  # 20480 bytes
OTHER = bytes(reversed(range(256))) * 80


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving(monkeypatch) as server:
        yield server


class Version(NamedTuple):
    etag: str | None
    modified: str | None


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Version('"v1"', None), Version('"v2"', None)),
        (Version(None, "Mon, 01 Nov 2021 10:00:00 GMT"), Version(None, "Tue, 02 Nov 2021 10:00:00 GMT")),
        (Version('W/"v1"', "Mon, 01 Nov 2021 10:00:00 GMT"), Version('W/"v2"', "Tue, 02 Nov 2021 10:00:00 GMT")),
        (Version(None, None), Version(None, None)),
        (Version('W/"v1"', None), Version('W/"v1"', None)),
    ],
)
def test_two_versions_are_never_glued(
    file_server: FileServer, tmp_path: Path, before: Version, after: Version, if_range: bool
) -> None:
    url = file_server.add("a.bin", Served(BODY, *before, breaks=[7000]))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin", retries=0)
    file_server.add("a.bin", Served(OTHER, *after, if_range=if_range))
    assert download_file(url, tmp_path / "a.bin", retries=0).read_bytes() == OTHER


def test_a_version_of_another_length_is_noticed(file_server: FileServer, tmp_path: Path) -> None:
    """A server without validators, and a digest that would have let the patchwork be tried."""
    url = file_server.add("a.bin", Served(BODY, None, None, breaks=[7000]))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin", retries=0, md5=md5(BODY))
    longer = OTHER + b"more"
    file_server.add("a.bin", Served(longer, None, None))
    assert download_file(url, tmp_path / "a.bin", md5=md5(longer)).read_bytes() == longer
    assert file_server.ranges() == [None, "bytes=7000-", None]


def test_a_part_of_another_address_is_not_built_on(file_server: FileServer, tmp_path: Path) -> None:
    first = file_server.add("a.bin", Served(BODY, breaks=[7000]))
    second = file_server.add("b.bin", OTHER)
    with pytest.raises(DownloadError):
        download_file(first, tmp_path / "a.bin", retries=0)
    assert download_file(second, tmp_path / "a.bin").read_bytes() == OTHER


def test_a_server_without_ranges_starts_anew(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, ranges=False, breaks=[7000, 3000]))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=7000-", "bytes=3000-"]


def test_a_server_without_ranges_that_always_breaks_is_given_up(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, ranges=False, breaks=[7000, 3000] * 50))
    with pytest.raises(DownloadError, match="3 attempts in a row"):
        download_file(url, tmp_path / "a.bin", retries=2)
    assert len(file_server.requests) == 3


@pytest.mark.parametrize("held", [len(BODY), len(BODY) + 10])
@pytest.mark.parametrize("digest", [True, False])
def test_a_part_that_is_too_long_or_whole_already(
    file_server: FileServer, tmp_path: Path, held: int, digest: bool
) -> None:
    url = file_server.add("a.bin", Served(BODY, breaks=[7000]))
    expected = md5(BODY) if digest else None
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin", retries=0, md5=expected)
    (tmp_path / "a.bin.part").write_bytes((BODY + b"x" * 10)[:held])
    assert download_file(url, tmp_path / "a.bin", md5=expected).read_bytes() == BODY
    asked_anew = not (digest and held == len(BODY))
    assert file_server.ranges() == [None, f"bytes={held}-"] + [None] * asked_anew


@pytest.mark.parametrize(
    ("status", "words"), [(404, "does not exist"), (410, "may have moved"), (403, "fetch it by hand"), (400, "refused")]
)
def test_a_refusal_is_final(file_server: FileServer, tmp_path: Path, status: int, words: str) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[status]))
    with pytest.raises(DownloadError, match=words):
        download_file(url, tmp_path / "a.bin")
    assert len(file_server.requests) == 1


def test_a_server_that_stumbles_is_asked_again(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[500, 503, 429], retry_after="0"))
    assert download_file(url, tmp_path / "a.bin", retries=3).read_bytes() == BODY


def test_a_server_that_stays_down_is_named(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[500] * 9))
    with pytest.raises(DownloadError, match=r"the server answers 500 .*\(3 attempts in a row\)"):
        download_file(url, tmp_path / "a.bin", retries=2)
    assert len(file_server.requests) == 3


def test_pauses_grow_and_heed_the_server(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(transfer, "PAUSE", 0.5)
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=slept.append))
    url = file_server.add("a.bin", Served(BODY, statuses=[500, 500, 500], retry_after=None))
    download_file(url, tmp_path / "a.bin")
    assert slept == [0.5, 1.0, 2.0]
    url = file_server.add("b.bin", Served(BODY, statuses=[429, 429], retry_after="7"))
    download_file(url, tmp_path / "b.bin")
    url = file_server.add("c.bin", Served(BODY, statuses=[429], retry_after="86400"))
    download_file(url, tmp_path / "c.bin")
    assert slept[3:] == [7.0, 7.0, 60.0]


def test_human_size() -> None:
    assert [transfer.format_bytes(size) for size in (0, 999, 1500, 4.2e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "4.2 GB",
        "3.0 TB",
    ]
