from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fileserver import FileServer, Served, free_address, md5, serving, sha256
from overfly.core import download as fetch_module
from overfly.core.download import cache_folder, download_file, exclusive_lock, wrong_digest
from overfly.core.errors import DownloadError

BODY = bytes(range(256)) * 80  # 20480 bytes
OTHER = bytes(reversed(range(256))) * 80


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving(monkeypatch) as server:
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_brings_the_file_and_leaves_nothing_else(file_server: FileServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "deep" / "down" / "a.bin"
    url = file_server.add("a.bin", BODY)
    got = download_file(
        url, path, md5=md5(BODY), sha256=sha256(BODY), progress=lambda done, total: seen.append((done, total))
    )
    assert got == path
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["a.bin"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_unsaid_length_arrives(file_server: FileServer, tmp_path: Path, chunked: bool) -> None:
    url = file_server.add("a.bin", Served(BODY, length=False, chunked=chunked))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY


def test_breaks_are_taken_up_where_they_happened(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, breaks=[1000, 500, 8000]))
    assert download_file(url, tmp_path / "a.bin", retries=1).read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=1000-", "bytes=1500-", "bytes=9500-"]
    assert {headers["If-Range"] for _, headers in file_server.requests[1:]} == {'"v1"'}


def test_a_chunked_body_that_breaks_is_not_taken_for_whole(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, chunked=True, breaks=[5000]))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=5000-"]


def test_a_later_call_takes_up_an_earlier_one(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, breaks=[7000]))
    path = tmp_path / "a.bin"
    with pytest.raises(DownloadError, match=r"7000 of 20480 bytes.*try again; the 7\.0 kB that came are kept"):
        download_file(url, path, retries=0)
    assert not path.exists()
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    seen: list[int] = []
    assert download_file(url, path, progress=lambda done, _: seen.append(done)).read_bytes() == BODY
    assert file_server.ranges() == [None, "bytes=7000-"]
    assert seen[0] == 7000
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "prefix"])
def test_a_wrong_digest_is_named_and_nothing_stays(file_server: FileServer, tmp_path: Path, algorithm: str) -> None:
    url = file_server.add("a.bin", OTHER)
    expected, got = (md5(BODY), md5(OTHER)) if algorithm == "md5" else (sha256(BODY), sha256(OTHER))
    wanted: dict[str, str] = {"md5": expected} if algorithm == "md5" else {"sha256": expected}
    if algorithm == "prefix":
        wanted, got = {"sha256": expected[:8]}, got[:8]
    with pytest.raises(DownloadError) as caught:
        download_file(url, tmp_path / "a.bin", md5=wanted.get("md5"), sha256=wanted.get("sha256"))
    message = str(caught.value)
    for word in ("a.bin", next(iter(wanted.values())), got, "fetch again"):
        assert word in message
    assert names(tmp_path) == []


def test_what_is_there_and_right_is_not_fetched(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(BODY)
    url = file_server.add("a.bin", OTHER)
    for wanted in ({"md5": md5(BODY)}, {"sha256": sha256(BODY).upper()}, {"sha256": sha256(BODY)[:10]}, {}):
        download_file(url, path, md5=wanted.get("md5"), sha256=wanted.get("sha256"))
    assert file_server.requests == []
    assert path.read_bytes() == BODY


def test_what_is_there_and_wrong_stays_until_the_right_one_is_whole(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(OTHER)
    url = file_server.add("a.bin", Served(BODY, breaks=[9000]))
    with pytest.raises(DownloadError):
        download_file(url, path, md5=md5(BODY), retries=0)
    assert path.read_bytes() == OTHER
    assert download_file(url, path, md5=md5(BODY)).read_bytes() == BODY


@pytest.mark.usefixtures("file_server")
def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached .*check the address and the connection"):
        download_file(f"{free_address()}/a.bin", tmp_path / "a.bin", retries=1)
    assert names(tmp_path) == []


def test_silence_is_a_break(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", Served(BODY, stall=2))
    with pytest.raises(DownloadError, match=r"nothing came for 0\.1 s"):
        download_file(url, tmp_path / "a.bin", retries=0, timeout=0.1)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hosts",
        "ftp://host/a",
        "a.bin",
        "http://",
        "http://host:x/a",
        "http://[::1/a",
        "http://h/a b",
        "http://h/ä",
    ],
)
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="not an address"):
        download_file(url, tmp_path / "a.bin")


@pytest.mark.parametrize("wanted", [{"md5": "12"}, {"md5": "g" * 32}, {"sha256": "abcdef1"}, {"sha256": "a" * 65}])
def test_digests_that_are_none(tmp_path: Path, wanted: dict[str, str]) -> None:
    with pytest.raises(DownloadError, match="hex digits"):
        download_file("http://127.0.0.1/a", tmp_path / "a.bin", md5=wanted.get("md5"), sha256=wanted.get("sha256"))


def test_secrets_of_an_address_are_not_shown(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin?token=hush", Served(BODY, statuses=[404]))
    with pytest.raises(DownloadError) as caught:
        download_file(url, tmp_path / "a.bin")
    assert "hush" not in str(caught.value)


def test_a_redirect_keeps_the_range(file_server: FileServer, tmp_path: Path) -> None:
    goal = file_server.add("goal.bin", Served(BODY, breaks=[6000]))
    url = file_server.add("a.bin", Served(b"", redirect=goal))
    assert download_file(url, tmp_path / "a.bin").read_bytes() == BODY
    assert file_server.ranges() == [None, None, "bytes=6000-", "bytes=6000-"]


@pytest.mark.parametrize("goal", ["file:///etc/hosts", "ftp://127.0.0.1/a"])
def test_a_redirect_elsewhere_is_not_followed(file_server: FileServer, tmp_path: Path, goal: str) -> None:
    url = file_server.add("a.bin", Served(b"", redirect=goal))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_too_little_space_is_said_before(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    url = file_server.add("a.bin", BODY)
    with pytest.raises(DownloadError, match=r"needs 20\.5 kB more and 1\.2 kB are free"):
        download_file(url, tmp_path / "a.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_is_said(file_server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    url = file_server.add("a.bin", BODY)
    with pytest.raises(DownloadError, match=r"a\.bin: the disk is full; free some space"):
        download_file(url, tmp_path / "a.bin")
    assert len(file_server.requests) == 1


def test_places_that_cannot_be_written(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add("a.bin", BODY)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError, match="cannot be made"):
        download_file(url, tmp_path / "file" / "a.bin")
    with pytest.raises(DownloadError, match="is a folder"):
        download_file(url, tmp_path / "folder")


def test_many_at_once_fetch_it_once(file_server: FileServer, tmp_path: Path) -> None:
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


def test_without_locks_each_has_its_own_part(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "_take", lambda _: None)
    url = file_server.add("a.bin", Served(BODY, breaks=[100, 100], pace=0.02))
    with pytest.raises(DownloadError):
        download_file(url, tmp_path / "a.bin", retries=0)
    assert names(tmp_path) == []
    file_server.files["/a.bin"].breaks.clear()
    threads = [threading.Thread(target=download_file, args=(url, tmp_path / "a.bin")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert names(tmp_path) == ["a.bin"]


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    """Although each one removes the file, while others wait for it and yet others come."""
    pytest.importorskip("fcntl", reason="locks of POSIX systems")
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(8):
            with exclusive_lock(tmp_path / "a.lock"):
                inside.append(1)
                time.sleep(0.001)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 48
    assert names(tmp_path) == []


def test_a_killed_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="locks of POSIX systems")
    lock = tmp_path / "a.lock"
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        entered = threading.Event()

        def wait() -> None:
            with exclusive_lock(lock) as locked:
                assert locked
                entered.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not entered.wait(0.2)
        process.kill()
        assert entered.wait(10)
        waiter.join()
    assert names(tmp_path) == []


def test_systems_without_locks_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl: Any = pytest.importorskip("fcntl", reason="locks of POSIX systems")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / "a.lock") as locked:
        assert not locked


def test_wrong_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"")
    assert wrong_digest(path) is None
    assert wrong_digest(path, md5="d41d8cd98f00b204e9800998ecf8427e", sha256="e3b0c442") is None
    assert wrong_digest(path, sha256="e3b0c443") == ("sha256 e3b0c443", "sha256 e3b0c442")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OVERFLY_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("OVERFLY_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "overfly"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "overfly"
    assert not (tmp_path / ".cache").exists()


@settings(deadline=None, max_examples=15)
@given(
    size=st.integers(0, 9000),
    breaks=st.lists(st.integers(0, 5000), max_size=6),
    ranges=st.booleans(),
    chunked=st.booleans(),
    etag=st.sampled_from([None, '"v1"', 'W/"v1"']),
)
def test_whatever_breaks_the_file_is_the_file(
    size: int, breaks: list[int], ranges: bool, chunked: bool, etag: str | None
) -> None:
    body = (BODY + OTHER)[:size]
    with pytest.MonkeyPatch.context() as patch, serving(patch) as server, tempfile.TemporaryDirectory() as folder:
        url = server.add("a.bin", Served(body, etag, None, ranges=ranges, chunked=chunked, breaks=breaks))
        assert download_file(url, Path(folder) / "a.bin", retries=6).read_bytes() == body
        assert names(Path(folder)) == ["a.bin"]
