from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

from overfly.core import atomic_files as parts
from overfly.core.errors import DownloadError, WeightsError
from overfly.exporting import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "exports"
    folder.mkdir()
    for name, text in {
        "a.xml": "graph",
        "a.bin": "weights",
        "a.json": "{}",
        "a.md": "# A card",
        "b.onnx": "other",
    }.items():
        (folder / name).write_text(text)
    return folder / "a.xml"


def test_a_folder_is_laid_out_like_a_hub(export: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path / 'share'}"
    files, said = hub.push(export, place)
    assert files == ["a.xml", "a.bin", "a.json", "README.md"]
    assert said == str(tmp_path / "share")
    page = (tmp_path / "share" / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: overfly")
    assert page.endswith("# A card")
    loaded = hub.load(place, tmp_path / "here")
    assert loaded[0] == tmp_path / "here" / "a.xml"
    assert {file.name for file in loaded} == {"a.xml", "a.bin", "a.json", "a.md"}
    assert (tmp_path / "here" / "a.md").read_text() == "# A card"
    assert (tmp_path / "here" / "a.bin").read_text() == "weights"


def test_what_a_killed_push_left_is_cleared_away(export: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    part, handle = parts._new(share / "a.xml", False)
    if handle is None:
        pytest.skip("no locks here")
    part.write_text("gra")
    hub.push(export, f"file://{share}")  # while the other one lives
    assert part.exists()
    (share / "a.xml").unlink()
    os.close(handle)  # as the system does for the dead
    hub.push(export, f"file://{share}")
    assert sorted(path.name for path in share.iterdir()) == ["README.md", "a.bin", "a.json", "a.xml"]


def test_what_is_no_export_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.json is no exported file"):
        hub.push(export.with_suffix(".json"), "file:///nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match="holds no exported file"):
        hub.load(f"file://{tmp_path / 'empty'}", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_files_of_somebody_else_are_left_alone(export: Path, tmp_path: Path) -> None:
    share, here = tmp_path / "share", tmp_path / "here"
    for folder in (share, here):
        folder.mkdir()
        (folder / "README.md").write_text("# mine")
    with pytest.raises(DownloadError, match=r"share/README\.md is there already and is none of overfly's files"):
        hub.push(export, f"file://{share}")
    assert [file.name for file in share.iterdir()] == ["README.md"]
    (share / "README.md").unlink()
    hub.push(export, f"file://{share}")
    export.with_suffix(".md").write_text("# Another card")
    hub.push(export, f"file://{share}")
    assert (share / "README.md").read_text().endswith("# Another card")
    (share / "package.json").write_text("{}")
    (share / "map.aux.xml").write_text("<PAMDataset/>")
    (here / "other.pt2").write_text("there before")
    loaded = hub.load(f"file://{share}", here)
    assert sorted(file.name for file in loaded) == ["a.bin", "a.json", "a.md", "a.xml"]
    assert (here / "README.md").read_text() == "# mine"
    (here / "a.bin").write_text("mine")
    with pytest.raises(DownloadError, match=r"here/a\.bin is there already"):
        hub.load(f"file://{share}", here)
    assert (here / "a.bin").read_text() == "mine"


def test_addresses_that_name_no_folder_or_the_same(export: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path / 'share'}"
    hub.push(export, place)
    with pytest.raises(DownloadError, match="file:// names no folder"):
        hub.load("file://", tmp_path / "here")
    with pytest.raises(DownloadError, match="file:// names no folder"):
        hub.push(export, "file://")
    with pytest.raises(DownloadError, match="is the repository itself; give another folder as --out"):
        hub.load(place, tmp_path / "share")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "map.tif.aux.xml").write_text("<PAMDataset/>")
    with pytest.raises(DownloadError, match="maps holds no exported file"):
        hub.load(f"file://{tmp_path / 'maps'}", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_damaged_exports_are_neither_pushed_nor_loaded(export: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"graph").hexdigest()
    figures = {"file": "a.xml", "bytes": 12, "sha256": digest, "settings": {}, "metadata": {}}
    export.with_suffix(".json").write_text(json.dumps(figures))
    share = tmp_path / "share"
    hub.push(export, f"file://{share}")
    for name, content in (("a.xml", "grapH"), ("a.bin", "weigh")):
        whole = (share / name).read_text()
        for folder in (export.parent, share):
            (folder / name).write_text(content)
        with pytest.raises(WeightsError, match=r"exports/a\.xml"):
            hub.push(export, f"file://{tmp_path / 'there'}")
        with pytest.raises(WeightsError, match=r"share/a\.xml"):
            hub.load(f"file://{share}", tmp_path / "there")
        assert not (tmp_path / "there").exists()
        for folder in (export.parent, share):
            (folder / name).write_text(whole)


def test_a_full_disk_leaves_nothing_behind(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shutil.copyfile
    share, here = tmp_path / "share", tmp_path / "here"
    hub.push(export, f"file://{share}")

    def full(source: Path, target: Path) -> None:
        honest(source, target)
        if source.name == "a.bin":
            target.write_text("wei")
            raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    for carry in (lambda: hub.push(export, f"file://{here}"), lambda: hub.load(f"file://{share}", here)):
        with pytest.raises(DownloadError, match=r"here/a\.bin: the disk is full; free some space there"):
            carry()
        assert not here.exists()


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as pushing and loading small files asks for."""

    files: ClassVar[dict[str, bytes]] = {}

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self._json({"url": "http://127.0.0.1/me/net"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._json(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        elif "/commit/" in self.path:
            import base64

            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._json({"commitUrl": f"http://127.0.0.1/me/net/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self._json({})

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name = unquote(self.path.split("?")[0].rsplit("/", 1)[-1])
            body = self.files[name]
            self._send(body, ETag=f'"{len(body)}-{name}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in self.files.items()]
            self._json(tree)
        elif self.path.startswith("/api/models/me/net"):
            self._json({"id": "me/net", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self._send(b"{}", 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@pytest.fixture
def address() -> Iterator[str]:
    _Hub.files = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_push_and_load_over_http(export: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub.push(export, "me/net", endpoint=address)
    assert set(_Hub.files) == {"a.xml", "a.bin", "a.json", "README.md"}
    loaded = hub.load("me/net", tmp_path / "here", endpoint=address)
    assert loaded[0].name == "a.xml"
    assert {file.name for file in (tmp_path / "here").iterdir()} == {"a.xml", "a.bin", "a.json", "a.md"}
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DownloadError, match="cannot be loaded from the hub"):
        hub.load("me/other", tmp_path / "there", endpoint=address)
