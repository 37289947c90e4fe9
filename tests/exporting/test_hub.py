from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub, fake_hub
from overfly.core.errors import DownloadError, WeightsError
from overfly.exporting import hub

REPOSITORY = "me/net"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def address() -> Iterator[str]:
    with fake_hub() as address:
        yield address


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "exports"
    folder.mkdir()
    texts = {"a.xml": "graph", "a.bin": "weights", "a.md": "# A card\n", "b.onnx": "other"}
    report = {"file": "a.xml", "bytes": 12, "sha256": hashlib.sha256(b"graphweights").hexdigest()}
    for name, text in (texts | {"a.json": json.dumps(report)}).items():
        (folder / name).write_text(text)
    return folder / "a.xml"


def test_push_and_load(export: Path, tmp_path: Path, address: str) -> None:
    names, _ = hub.push(export, REPOSITORY, endpoint=address)
    assert set(names) == set(FakeHub.files) == {"a.xml", "a.bin", "a.json", "README.md"}
    page = FakeHub.files["README.md"].decode()
    assert "library_name: overfly" in page
    assert "pipeline_tag: image-segmentation" in page
    here = tmp_path / "here"
    for _ in range(2):  # the same files again are no conflict
        loaded = hub.load(REPOSITORY, here, endpoint=address)
    assert loaded[0] == here / "a.xml"
    assert {file.name for file in here.iterdir()} == {"a.xml", "a.bin", "a.json", "a.md"}
    assert (here / "a.bin").read_text() == "weights"
    assert (here / "a.md").read_text().strip() == "# A card"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DownloadError, match="else/net"):
        hub.load("else/net", tmp_path / "there", endpoint=address)


def test_files_that_are_not_exports_are_refused(export: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(WeightsError, match=r"a\.json"):
        hub.push(export.with_suffix(".json"), REPOSITORY, endpoint=address)
    FakeHub.files = {"map.aux.xml": b"<PAMDataset/>", "README.md": b"# mine"}
    with pytest.raises(DownloadError, match=REPOSITORY):
        hub.load(REPOSITORY, tmp_path / "here", endpoint=address)
    assert not (tmp_path / "here").exists()


def test_other_files_of_the_same_name_are_kept(export: Path, tmp_path: Path, address: str) -> None:
    hub.push(export, REPOSITORY, endpoint=address)
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.bin").write_text("mine")
    with pytest.raises(DownloadError, match=r"here/a\.bin"):
        hub.load(REPOSITORY, here, endpoint=address)
    assert [(file.name, file.read_text()) for file in here.iterdir()] == [("a.bin", "mine")]


@pytest.mark.parametrize(("name", "content"), [("a.xml", "grapH"), ("a.bin", "weigh")])
def test_damaged_exports_are_neither_pushed_nor_loaded(
    name: str, content: str, export: Path, tmp_path: Path, address: str
) -> None:
    hub.push(export, REPOSITORY, endpoint=address)
    FakeHub.files[name] = content.encode()
    with pytest.raises(WeightsError, match=r"a\.xml"):
        hub.load(REPOSITORY, tmp_path / "here", endpoint=address)
    assert not (tmp_path / "here").exists()
    (export.parent / name).write_text(content)
    with pytest.raises(WeightsError, match=r"exports/a\.xml"):
        hub.push(export, REPOSITORY, endpoint=address)


def test_a_pt2_file_with_foreign_parts_is_not_loaded(tmp_path: Path, address: str) -> None:
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data/constants/opaque_obj_0", b"cos\nsystem\n")
    FakeHub.files = {"a.pt2": content.getvalue()}
    with pytest.raises(WeightsError, match=r"a\.pt2"):
        hub.load(REPOSITORY, tmp_path / "here", endpoint=address)
    assert not (tmp_path / "here").exists()
