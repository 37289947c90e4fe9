from __future__ import annotations

import contextlib
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.download import unpack_zip
from overfly.core.errors import DownloadError


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members.items():
            archive.writestr(zipfile.ZipInfo(name), body, zipfile.ZIP_DEFLATED)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("top", ["Train/", ""])
def test_top_folder_is_left_out(tmp_path: Path, top: str) -> None:
    archive = make_zip(
        tmp_path / "Train.zip",
        {
            f"{top}Urban/": b"",
            f"{top}Urban/1.png": b"one",
            f"{top}Rural/Train/2.png": b"two",
        },
    )
    seen: list[tuple[int, int | None]] = []
    unpack_zip(archive, tmp_path / "Train", progress=lambda done, total: seen.append((done, total)))
    assert tree(tmp_path / "Train") == {"Urban/1.png": b"one", "Rural/Train/2.png": b"two"}
    assert seen == [(0, 6), (3, 6), (6, 6)]
    assert names(tmp_path) == ["Train", "Train.zip"]


def test_unpacked_folder_honors_the_umask(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    unpack_zip(make_zip(tmp_path / "a.zip", {"1.png": b""}), tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "Train/../../outside.png",
        "Train/a/../../../outside.png",
        "/tmp/outside.png",  # noqa: S108
        "//host/share/outside.png",
        "C:/outside.png",
        "C:outside.png",
        "..\\outside.png",
        "Train\\..\\..\\outside.png",
        "Train/a\n.png",
        "..",
    ],
)
def test_nothing_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"fine", name: b"evil"})
    with contextlib.suppress(DownloadError):
        unpack_zip(archive, root / "Train")
    assert names(tmp_path) == ["Train.zip", "deep"]
    assert names(tmp_path / "deep") == ["root"]
    assert names(root) in ([], ["Train"])
    assert not Path("/tmp/outside.png").exists()  # noqa: S108


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_become_files(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("Train/link.png")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as archive:
        archive.writestr(info, "/etc/hosts")
    unpack_zip(tmp_path / "Train.zip", tmp_path / "Train")
    assert stat.S_ISREG((tmp_path / "Train" / "link.png").lstat().st_mode)


def test_encrypted_files_raise(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.png": b"one"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flags of the file's own header
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
    path.write_bytes(bytes(raw))
    with pytest.raises(DownloadError, match="encrypted"):
        unpack_zip(path, tmp_path / "a")


def test_too_little_space_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {f"{i}.png": bytes(10_000) for i in range(10)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(DownloadError, match=r"100\.0 kB .* 1\.2 kB"):
        unpack_zip(archive, tmp_path / "a")
    assert names(tmp_path) == ["a.zip"]


def test_archive_with_wrong_sizes(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.png": bytes(1_000_000)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace((1_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(DownloadError, match=r"a\.zip"):
        unpack_zip(path, tmp_path / "a")
    assert names(tmp_path) == ["a.zip"]


@settings(deadline=None, max_examples=40)
@given(at=st.integers(0, 2000), length=st.integers(1, 400), cut=st.booleans())
def test_damaged_archive_unpacks_correctly_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, at: int, length: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    members = {f"{i}.png": os.urandom(300) + bytes(300) for i in range(4)}
    path = make_zip(folder / "a.zip", members)
    raw = path.read_bytes()
    at %= len(raw)
    path.write_bytes(raw[:at] if cut else raw[:at] + bytes(255 - b for b in raw[at : at + length]) + raw[at + length :])
    try:
        unpack_zip(path, folder / "a")
    except DownloadError:
        assert names(folder) == ["a.zip"]
    else:
        found = tree(folder / "a")
        assert set(found.values()) <= set(members.values())  # a damaged name alone goes unnoticed by a zip's own sums


@pytest.mark.parametrize("error", [KeyboardInterrupt, DownloadError, MemoryError])
def test_exception_while_unpacking_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    archive = make_zip(tmp_path / "Train.zip", {f"Train/{i}.png": b"x" for i in range(5)})

    def stop(done: int, _: int | None) -> None:
        assert [name for name in names(tmp_path) if name.startswith(".Train.") and name.endswith(".part")]
        if done == 3:
            raise error("stop")

    with pytest.raises(error):
        unpack_zip(archive, tmp_path / "Train", progress=stop)
    assert names(tmp_path) == ["Train.zip"]


def test_check_runs_before_the_folder_appears(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"x"})

    def check(unfinished: Path) -> None:
        assert tree(unfinished) == {"1.png": b"x"}
        assert not (tmp_path / "Train").exists()
        raise DownloadError("not what it should be")

    with pytest.raises(DownloadError, match="not what it should be"):
        unpack_zip(archive, tmp_path / "Train", check=check)
    assert names(tmp_path) == ["Train.zip"]


def test_nonempty_folder_is_not_replaced(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"new"})
    (tmp_path / "Train").mkdir()
    unpack_zip(archive, tmp_path / "Train")  # empty: taken
    (tmp_path / "Train" / "1.png").write_bytes(b"mine")
    with pytest.raises(DownloadError):
        unpack_zip(archive, tmp_path / "Train")
    assert tree(tmp_path / "Train") == {"1.png": b"mine"}
