from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fileserver import FileServer, Served, free_address, md5, serving, sha256
from overfly.core import download
from overfly.core.download import _ResumingDownloader, cache_folder, download_file, hash_error
from overfly.core.errors import DownloadError

BODY = bytes(range(256)) * 80  # 20480 bytes
OTHER = bytes(reversed(range(256))) * 80


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving(monkeypatch) as server:
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download_leaves_only_the_file(file_server: FileServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "deep" / "down" / "a.bin"
    url = file_server.add("a.bin", BODY)
    got = download_file(
        url, path, known_hash=f"md5:{md5(BODY)}", progress=lambda done, total: seen.append((done, total))
    )
    assert got == path
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["a.bin"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_without_length(file_server: FileServer, tmp_path: Path, chunked: bool) -> None:
    url = file_server.add("a.bin", Served(BODY, length=False, chunked=chunked))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY


def test_broken_connections_resume(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, breaks=[1000, 500, 8000]))
    assert download_file(url, tmp_path / "a.bin", retries=1).read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=1000-", "bytes=1500-", "bytes=9500-"]
    assert {headers["If-Range"] for _, headers in file_server.requests[1:]} == {'"v1"'}


def test_broken_chunked_body_resumes(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, chunked=True, breaks=[5000]))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=5000-"]


def test_later_call_resumes(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, breaks=[7000]))
    path = tmp_path / "a.bin"
    with pytest.raises(DownloadError, match=r"7\.0 kB"):
        download_file(url, path, retries=0)
    assert not path.exists()
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    seen: list[int] = []
    assert download_file(url, path, progress=lambda done, _: seen.append(done)).read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=7000-"]
    assert seen[0] == 7000
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "prefix"])
def test_wrong_hash_leaves_no_file(file_server: FileServer, tmp_path: Path, algorithm: str) -> None:
    url = file_server.add("a.bin", OTHER)
    expected, got = (md5(BODY), md5(OTHER)) if algorithm == "md5" else (sha256(BODY), sha256(OTHER))
    if algorithm == "prefix":
        algorithm, expected, got = "sha256", expected[:8], got[:8]
    with pytest.raises(DownloadError) as caught:
        download_file(url, tmp_path / "a.bin", known_hash=f"{algorithm}:{expected}")
    for word in ("a.bin", expected, got):
        assert word in str(caught.value)
    assert names(tmp_path) == []


def test_existing_file_with_right_hash_is_not_downloaded(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(BODY)
    url = file_server.add("a.bin", OTHER)
    for known_hash in (f"md5:{md5(BODY)}", f"sha256:{sha256(BODY).upper()}", f"sha256:{sha256(BODY)[:10]}", None):
        download_file(url, path, known_hash=known_hash)
    assert file_server.requests == []
    assert path.read_bytes() == BODY


def test_existing_file_with_wrong_hash_is_replaced_at_the_end(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(OTHER)
    url = file_server.add("a.bin", Served(BODY, breaks=[9000]))
    with pytest.raises(DownloadError):
        download_file(url, path, known_hash=f"md5:{md5(BODY)}", retries=0)
    assert path.read_bytes() == OTHER
    assert download_file(url, path, known_hash=f"md5:{md5(BODY)}").read_bytes() == BODY


@pytest.mark.usefixtures("file_server")
def test_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1"):
        download_file(f"{free_address()}/a.bin", tmp_path / "a.bin", retries=1)
    assert names(tmp_path) == []


def test_timeout(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, stall=2))
    with pytest.raises(DownloadError, match=r"0\.1 s"):
        download_file(url, tmp_path / "a.bin", retries=0, timeout=0.1)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hosts",
        "ftp://host/a",
        "a.bin",
        "http://",
        "http://host:x/a",
    ],
)
def test_invalid_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin")


def test_secrets_of_the_url_are_not_shown(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin?token=hush", Served(BODY, statuses=[404]))
    with pytest.raises(DownloadError) as caught:
        download_file(url, tmp_path / "a.bin")
    assert "hush" not in str(caught.value)


def test_redirect_keeps_the_range(file_server: FileServer, tmp_path: Path) -> None:
    goal = file_server.add("goal.bin", Served(BODY, breaks=[6000]))
    url = file_server.add("a.bin", Served(b"", redirect=goal))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, None, "bytes=6000-", "bytes=6000-"]


@pytest.mark.parametrize("goal", ["file:///etc/hosts", "ftp://127.0.0.1/a"])
def test_redirect_to_other_schemes_is_refused(file_server: FileServer, tmp_path: Path, goal: str) -> None:
    url = file_server.add("a.bin", Served(b"", redirect=goal))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_too_little_space(file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    url = file_server.add("a.bin", BODY)
    with pytest.raises(DownloadError, match=r"20\.5 kB .* 1\.2 kB"):
        download_file(url, tmp_path / "a.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk(file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ResumingDownloader, "_discard", lambda _: None)
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    url = file_server.add("a.bin", BODY)
    with pytest.raises(DownloadError, match=r"a\.bin"):
        download_file(url, tmp_path / "a.bin")
    assert len(file_server.requests) == 1


def test_unwritable_paths(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", BODY)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "file" / "a.bin")
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "folder")


def test_concurrent_calls_download_once(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, pace=0.02))
    got: list[bytes] = []
    path = tmp_path / "a.bin"
    threads = [threading.Thread(target=lambda: got.append(download_file(url, path).read_bytes())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [BODY] * 6
    assert len(file_server.requests) == 1
    assert names(tmp_path) == ["a.bin"]


def test_hash_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"")
    assert hash_error(path, "md5:d41d8cd98f00b204e9800998ecf8427e") is None
    assert hash_error(path, "sha256:E3B0C442") is None
    assert "e3b0c443" in str(hash_error(path, "sha256:e3b0c443"))


@pytest.mark.parametrize("known_hash", ["md5:12", f"md5:{32 * 'g'}", "sha256:abcdef1", f"sha256:{65 * 'a'}"])
def test_invalid_known_hash(tmp_path: Path, known_hash: str) -> None:
    with pytest.raises(DownloadError, match=known_hash):
        download_file("http://127.0.0.1/a", tmp_path / "a.bin", known_hash=known_hash)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OVERFLY_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("OVERFLY_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "overfly"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "overfly"


@settings(deadline=None, max_examples=15)
@given(
    size=st.integers(0, 9000),
    breaks=st.lists(st.integers(0, 5000), max_size=6),
    ranges=st.booleans(),
    chunked=st.booleans(),
    etag=st.sampled_from([None, '"v1"', 'W/"v1"']),
)
def test_file_is_complete_whatever_breaks(
    size: int, breaks: list[int], ranges: bool, chunked: bool, etag: str | None
) -> None:
    body = (BODY + OTHER)[:size]
    with pytest.MonkeyPatch.context() as patch, serving(patch) as server, tempfile.TemporaryDirectory() as folder:
        url = server.add("a.bin", Served(body, etag, None, ranges=ranges, chunked=chunked, breaks=breaks))
        assert download_file(url, Path(folder) / "a.bin", retries=20).read_bytes() == body
        assert names(Path(folder)) == ["a.bin"]


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
def test_versions_are_never_mixed(
    file_server: FileServer, tmp_path: Path, before: Version, after: Version, if_range: bool
) -> None:
    url = file_server.add("a.bin", Served(BODY, *before, breaks=[7000]))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin", retries=0)
    file_server.add("a.bin", Served(OTHER, *after, if_range=if_range))
    assert download_file(url, tmp_path / "a.bin", retries=1).read_bytes() == OTHER


def test_part_of_another_url_is_not_resumed(file_server: FileServer, tmp_path: Path) -> None:
    first = file_server.add("a.bin", Served(BODY, breaks=[7000]))
    second = file_server.add("b.bin", OTHER)
    with pytest.raises(DownloadError):
        download_file(first, tmp_path / "a.bin", retries=0)
    assert download_file(second, tmp_path / "a.bin").read_bytes() == OTHER


def test_server_without_ranges_starts_over(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, ranges=False, breaks=[7000, 3000]))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=7000-", "bytes=3000-"]


def test_server_without_ranges_that_always_breaks(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, ranges=False, breaks=[7000, 3000] * 50))
    with pytest.raises(DownloadError, match="3 attempts"):
        download_file(url, tmp_path / "a.bin", retries=2)
    assert len(file_server.requests) == 3


@pytest.mark.parametrize("status", [404, 410, 403, 400])
def test_client_errors_are_final(file_server: FileServer, tmp_path: Path, status: int) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[status]))
    with pytest.raises(DownloadError, match=str(status)):
        download_file(url, tmp_path / "a.bin")
    assert len(file_server.requests) == 1


def test_server_errors_are_retried(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[500, 503, 429], retry_after="0"))
    assert download_file(url, tmp_path / "a.bin", retries=3).read_bytes() == BODY


def test_lasting_server_errors(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, statuses=[500] * 9))
    with pytest.raises(DownloadError, match=r"500 .*3 attempts"):
        download_file(url, tmp_path / "a.bin", retries=2)
    assert len(file_server.requests) == 3


def test_pauses_grow_and_respect_retry_after(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(download, "PAUSE", 0.5)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=slept.append))
    url = file_server.add("a.bin", Served(BODY, statuses=[500, 500, 500], retry_after=None))
    download_file(url, tmp_path / "a.bin")
    assert slept == [0.5, 1.0, 2.0]
    url = file_server.add("b.bin", Served(BODY, statuses=[429, 429], retry_after="7"))
    download_file(url, tmp_path / "b.bin")
    url = file_server.add("c.bin", Served(BODY, statuses=[429], retry_after="86400"))
    download_file(url, tmp_path / "c.bin")
    assert slept[3:] == [7.0, 7.0, 60.0]
