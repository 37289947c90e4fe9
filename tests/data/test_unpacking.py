from __future__ import annotations

import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.errors import DownloadError
from overfly.data.unpacking import remove_stale, unpack_zip


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
def test_the_top_folder_is_left_out(tmp_path: Path, top: str) -> None:
    archive = make_zip(
        tmp_path / "Train.zip",
        {
            f"{top}Urban/": b"",
            f"{top}Urban/1.png": b"one",
            f"{top}Rural/Train/2.png": b"two",
            "__MACOSX/Train/._1.png": b"",
            f"{top}Urban/.DS_Store": b"",
        },
    )
    seen: list[tuple[int, int | None]] = []
    unpack_zip(archive, tmp_path / "Train", progress=lambda done, total: seen.append((done, total)))
    assert tree(tmp_path / "Train") == {"Urban/1.png": b"one", "Rural/Train/2.png": b"two"}
    assert seen == [(3, 6), (6, 6)]
    assert names(tmp_path) == ["Train", "Train.zip"]


def test_others_may_read_what_was_unpacked(tmp_path: Path) -> None:
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
def test_no_path_leads_outside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"fine", name: b"evil"})
    with pytest.raises(DownloadError, match="not safe to unpack"):
        unpack_zip(archive, root / "Train")
    assert set(tree(tmp_path)) == {"Train.zip"}
    assert names(root) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("Train/link.png")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as archive:
        archive.writestr(info, "/etc/hosts")
    with pytest.raises(DownloadError, match="is a link or a device"):
        unpack_zip(tmp_path / "Train.zip", tmp_path / "Train")
    assert names(tmp_path) == ["Train.zip"]


def test_encrypted_files_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.png": b"one"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flags of the file's own header
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
    path.write_bytes(bytes(raw))
    with pytest.raises(DownloadError, match="is encrypted"):
        unpack_zip(path, tmp_path / "a")


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "Train.zip", {"Train/a.png": b"1", "Train/A.png": b"2"})
    with pytest.raises(DownloadError, match="twice"):
        unpack_zip(archive, tmp_path / "Train")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {f"{i}.png": bytes(10_000) for i in range(10)})
    assert archive.stat().st_size < 5000
    with pytest.raises(DownloadError, match=r"10 files of 100\.0 kB, more than the plausible"):
        unpack_zip(archive, tmp_path / "a", most_bytes=99_999)
    with pytest.raises(DownloadError, match="more than the plausible 9 files"):
        unpack_zip(archive, tmp_path / "a", most_files=9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(DownloadError, match=r"needs 100\.0 kB unpacked and 1\.2 kB are free"):
        unpack_zip(archive, tmp_path / "a")
    assert names(tmp_path) == ["a.zip"]


def test_an_archive_that_lies_about_its_sizes_writes_no_more_than_it_says(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.png": bytes(1_000_000)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace((1_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(DownloadError, match="not an intact zip"):
        unpack_zip(path, tmp_path / "a", most_bytes=2000)
    assert names(tmp_path) == ["a.zip"]


@settings(deadline=None, max_examples=40)
@given(at=st.integers(0, 2000), length=st.integers(1, 400), cut=st.booleans())
def test_a_damaged_archive_unpacks_right_or_not_at_all(
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
def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    archive = make_zip(tmp_path / "Train.zip", {f"Train/{i}.png": b"x" for i in range(5)})

    def stop(done: int, _: int | None) -> None:
        assert [name for name in names(tmp_path) if name.startswith(".Train.unpacking-")]
        if done == 3:
            raise error("stop")

    with pytest.raises(error):
        unpack_zip(archive, tmp_path / "Train", progress=stop)
    assert names(tmp_path) == ["Train.zip"]


def test_the_check_sees_the_folder_before_it_has_its_name(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"x"})

    def check(unfinished: Path) -> None:
        assert tree(unfinished) == {"1.png": b"x"}
        assert not (tmp_path / "Train").exists()
        raise DownloadError("not what it should be")

    with pytest.raises(DownloadError, match="not what it should be"):
        unpack_zip(archive, tmp_path / "Train", check=check)
    assert names(tmp_path) == ["Train.zip"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "Train.zip", {"Train/1.png": b"new"})
    (tmp_path / "Train").mkdir()
    unpack_zip(archive, tmp_path / "Train")  # empty: taken
    (tmp_path / "Train" / "1.png").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack_zip(archive, tmp_path / "Train")
    assert tree(tmp_path / "Train") == {"1.png": b"mine"}


def test_sweep_takes_only_what_is_left_of_this_folder(tmp_path: Path) -> None:
    for name in (".Train.unpacking-abc", ".Val.unpacking-abc", "Train"):
        (tmp_path / name / "deep").mkdir(parents=True)
    remove_stale(tmp_path / "Train")
    assert names(tmp_path) == [".Val.unpacking-abc", "Train"]
