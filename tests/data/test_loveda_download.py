from __future__ import annotations

import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fileserver import FOLDERS, FileServer, Served, archive_of, md5, publish, serving
from overfly.core.errors import DataError, DownloadError
from overfly.data import loveda
from overfly.data.domain import Split
from overfly.data.loveda import LOVEDA, Archive, LoveDA, download_loveda


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def bodies(file_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> dict[Split, bytes]:
    """The three archives, small, served where ``OVERFLY_LOVEDA_URL`` points to, and known by their checksums."""
    made = {split: archive_of(split) for split in FOLDERS}
    monkeypatch.setenv("OVERFLY_LOVEDA_URL", f"{file_server.address}/")
    publish(monkeypatch, file_server, made)
    return made


def requested(server: FileServer) -> list[str]:
    return [path for path, _ in server.requests]


def test_archives_match_the_zenodo_record() -> None:
    assert LOVEDA["train"] == Archive("Train.zip", "de2b196043ed9b4af1690b3f9a7d558f", 5044)
    assert LOVEDA["val"] == Archive("Val.zip", "84cae2577468ff0b5386758bb386d31d", 3338)
    assert LOVEDA["test"] == Archive("Test.zip", "a489be0090465e01fb067795d24e6b47", 1796, masks=False)
    assert LoveDA.sheet().download["url"] == "https://zenodo.org/records/5706578/files"


@pytest.mark.usefixtures("bodies")
def test_download_all_splits_and_license(file_server: FileServer, tmp_path: Path) -> None:
    seen: list[str] = []
    got = download_loveda(tmp_path / "loveda", progress=lambda what, _done, _total: seen.append(what))
    assert requested(file_server) == ["/Train.zip", "/Val.zip", "/Test.zip"]
    assert [(part.split, part.files, part.downloaded, part.archive) for part in got.splits] == [
        ("train", 10, True, None), ("val", 10, True, None), ("test", 5, True, None),
    ]  # fmt: skip
    assert "CC BY-NC-SA 4.0" in got.license
    assert "Google Earth" in got.license
    assert "no commercial use" in got.license
    assert str(got).splitlines() == [
        f"downloaded: {got.root / 'Train'} (10 images and masks)",
        f"downloaded: {got.root / 'Val'} (10 images and masks)",
        f"downloaded: {got.root / 'Test'} (5 images and masks)",
        f"license: {got.license}",
    ]
    assert names(got.root) == ["Test", "Train", "Val"]
    assert (got.root / "Train/Urban/images_png/2.png").read_text() == "train Urban 2" * 200
    assert (got.root / "Val/Rural/masks_png/1.png").read_bytes() == b"mask"
    assert list(dict.fromkeys(seen)) == [
        f"{verb} {name}.zip" for name in FOLDERS.values() for verb in ("download", "unpack")
    ]


@pytest.mark.usefixtures("bodies")
def test_complete_splits_are_skipped(file_server: FileServer, tmp_path: Path) -> None:
    download_loveda(tmp_path, ["val"])
    before = len(file_server.requests)
    got = download_loveda(tmp_path, ["val", "val"])
    assert [(part.split, part.files, part.downloaded) for part in got.splits] == [("val", 10, False)]
    assert len(file_server.requests) == before
    assert [part.downloaded for part in download_loveda(tmp_path, ["val", "test"]).splits] == [False, True]


@pytest.mark.usefixtures("bodies")
def test_base_url(file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFLY_LOVEDA_URL", "http://127.0.0.1:9/none")
    download_loveda(tmp_path, ["test"], base=file_server.address)
    assert requested(file_server) == ["/Test.zip"]


def test_interrupted_download_resumes(file_server: FileServer, tmp_path: Path, bodies: dict[Split, bytes]) -> None:
    file_server.add("Train.zip", Served(bodies["train"], breaks=[1000, 0, 0, 0, 0]))
    with pytest.raises(DownloadError, match=r"1\.0 kB"):
        download_loveda(tmp_path, ["train"])
    assert not (tmp_path / "Train").exists()
    file_server.requests.clear()
    file_server.files["/Train.zip"].breaks.clear()
    assert download_loveda(tmp_path, ["train"]).splits[0].files == 10
    assert file_server.ranges() == ["bytes=1000-"]


@pytest.mark.usefixtures("bodies")
def test_keep_archives(file_server: FileServer, tmp_path: Path) -> None:
    got = download_loveda(tmp_path, ["train"], keep_archives=True)
    assert got.splits[0].archive == tmp_path / "Train.zip"
    shutil.rmtree(tmp_path / "Train")
    again = download_loveda(tmp_path, ["train"])
    assert again.splits[0].downloaded
    assert again.splits[0].archive == tmp_path / "Train.zip", "it existed before"
    assert (tmp_path / "Train.zip").exists()
    assert len(file_server.requests) == 1


def test_wrong_checksum_leaves_no_file(file_server: FileServer, tmp_path: Path, bodies: dict[Split, bytes]) -> None:
    file_server.add("Train.zip", bodies["train"][:-100])  # whole for the server, cut off for us
    with pytest.raises(DownloadError, match=md5(bodies["train"])):
        download_loveda(tmp_path, ["train"])
    assert names(tmp_path) == []


def test_damaged_archive_with_matching_checksum(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bodies: dict[Split, bytes]
) -> None:
    publish(monkeypatch, file_server, {"train": bodies["train"][:-100]})
    with pytest.raises(DownloadError, match=r"Train\.zip"):
        download_loveda(tmp_path, ["train"])
    assert names(tmp_path) == [".Train.zip"]


def test_archive_with_path_outside_the_folder(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bodies: dict[Split, bytes]
) -> None:
    packed = io.BytesIO(bodies["train"])
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("Train/../../evil.png", b"evil")
    publish(monkeypatch, file_server, {"train": packed.getvalue()})
    download_loveda(tmp_path / "root", ["train"])
    assert names(tmp_path) == ["root"]
    assert names(tmp_path / "root") == ["Train"]


@pytest.mark.parametrize(
    "body",
    [archive_of("train", urban=0), archive_of("train", masks=False), archive_of("val")],
    ids=["no urban", "no masks", "val"],
)
def test_archive_with_another_layout(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    publish(monkeypatch, file_server, {"train": body})
    with pytest.raises(DownloadError, match="LoveDA"):
        download_loveda(tmp_path, ["train"], base=file_server.address)
    assert not (tmp_path / "Train").exists()


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_unpacking_leaves_no_split(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "unpack Train.zip" and total and done > total / 2:
            raise error("stop")

    with pytest.raises((KeyboardInterrupt, DownloadError)):
        download_loveda(tmp_path, ["train"], progress=stop)
    assert names(tmp_path) == [".Train.zip"]
    assert download_loveda(tmp_path, ["train"]).splits[0].files == 10


@pytest.mark.usefixtures("bodies")
def test_incomplete_split_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    download_loveda(tmp_path, ["train"])
    file_server.requests.clear()
    (tmp_path / "Train/Urban/masks_png/1.png").unlink()
    with pytest.raises(DataError, match=r"Train holds 9 .* 10"):
        download_loveda(tmp_path, ["val", "train"])
    assert file_server.requests == [], "folders are checked before any download"
    assert len(list((tmp_path / "Train").rglob("*.png"))) == 9


@pytest.mark.usefixtures("bodies")
def test_split_without_receipt_is_checked_by_its_size(tmp_path: Path) -> None:
    for scene, count in (("Urban", 1796 - 5), ("Rural", 4)):
        folder = tmp_path / "Test" / scene / "images_png"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").touch()
    with pytest.raises(DataError, match=r"1795 .* 1796"):
        download_loveda(tmp_path, ["test"])
    (tmp_path / "Test/Rural/images_png/4.png").touch()
    assert not download_loveda(tmp_path, ["test"]).splits[0].downloaded


@pytest.mark.usefixtures("bodies")
def test_blocked_folders_and_unknown_splits(tmp_path: Path) -> None:
    (tmp_path / "Val").mkdir()  # empty: nothing is lost
    assert download_loveda(tmp_path, ["val"]).splits[0].downloaded
    (tmp_path / "Train").write_text("mine")
    with pytest.raises(DataError, match=r"Train|Test"):
        download_loveda(tmp_path, ["train"])
    (tmp_path / "Test").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"Train|Test"):
        download_loveda(tmp_path, ["test"])
    with pytest.raises(DownloadError):
        download_loveda(tmp_path / "Train" / "root", ["train"])
    with pytest.raises(DataError, match="dev"):
        download_loveda(tmp_path, ["dev"])  # type: ignore[list-item]


@pytest.mark.usefixtures("bodies")
def test_invalid_receipt_is_ignored(tmp_path: Path) -> None:
    download_loveda(tmp_path, ["test"])
    receipt = tmp_path / "Test" / loveda.RECEIPT
    assert json.loads(receipt.read_text())["files"] == 5
    for text in ("{", "[]", '{"files": null}'):
        receipt.write_text(text)
        with pytest.raises(DataError, match="1796"):
            download_loveda(tmp_path, ["test"])


def test_concurrent_downloads_wait_for_each_other(
    file_server: FileServer, tmp_path: Path, bodies: dict[Split, bytes]
) -> None:
    file_server.add("Train.zip", Served(bodies["train"], pace=0.02))
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda: got.append(download_loveda(tmp_path, ["train"]).splits[0].downloaded))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((tmp_path / "Train").rglob("*.png"))) == 10
    assert sorted(got) == [False, False, True]
    assert len(file_server.requests) == 1
    assert names(tmp_path) == ["Train"]


@pytest.mark.usefixtures("bodies")
def test_archive_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException): ...

    def die(*_: object, **__: object) -> None:
        raise KilledError

    remove = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".Train.zip":
            raise KilledError
        remove(path, missing_ok)

    for owner, name, killed in ((loveda, "unpack_zip", die), (Path, "unlink", unlink)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KilledError):
                download_loveda(tmp_path, ["train"])
        assert (tmp_path / ".Train.zip").exists()
    assert (tmp_path / "Train").is_dir()
    assert download_loveda(tmp_path, ["train"]).splits[0].files == 10
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == ["Train"]
