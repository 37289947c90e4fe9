"""Maps of the page: rasters of any kind, progress, tiles, pixels, downloads, and what is refused."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio import Affine
from starlette.testclient import TestClient

from overfly.exporting.predictor import Floats
from overfly.raster.polygons import write_polygons
from overfly.web import server
from overfly.web.server import application
from overfly.web.service import Limits, ServedNetwork
from rasters import write
from served import bright, finished, network

GRIDS: dict[str, dict[str, Any]] = {
    "north up": {},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 54.0, 0, -1e-5, 24.0)},
    "rotated": {"transform": Affine(0.4, 0.3, 300_000, 0.3, -0.4, 2_700_000)},
    "none": {"crs": None, "transform": Affine.identity()},
}


def deep(key: str = "0", bands: int = 4, max_value: float = 255.0, run: Any = bright) -> ServedNetwork:
    return network(key, run, bands=bands, mean=(0.0,) * bands, std=(1.0,) * bands, max_value=max_value)


def client_of(scenes: list[Path], networks: list[ServedNetwork] | None = None, **limits: Any) -> TestClient:
    app = application(networks or [deep()], limits=Limits(**limits), scenes=scenes)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def left_bright(bands: int, dtype: str, top: float, nodata: float | None) -> Any:
    """An image (bands, 300, 400): full brightness left of column 200, else dark; no data in the last ten rows."""
    image = np.full((bands, 300, 400), 0.2 * top)
    image[:, :, :200] = top
    if nodata is not None:
        image[:, -10:] = nodata
    return image.astype(dtype)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", None), ("uint16", 0), ("int16", -9999), ("float32", np.nan)])
@pytest.mark.parametrize("bands", [4, 6])
def test_scenes_of_every_type_are_mapped(tmp_path: Path, grid: str, dtype: str, nodata: float, bands: int) -> None:
    top = {"uint8": 255, "float32": 1.0}.get(dtype, 10_000)
    path = write(tmp_path / "scene.tif", left_bright(bands, dtype, top, nodata), nodata=nodata, **GRIDS[grid])
    with client_of([path]) as client:
        described = client.get("/scenes/0").json()
        assert (described["width"], described["image_bands"], described["dtype"]) == (400, bands, dtype)
        assert described["bands"] == "1,2,3,4"
        assert "--" not in described["problem"]
        assert str(tmp_path) not in described["problem"]
        assert bool(described["problem"]) == (dtype != "uint8" or bands != 4)
        assert float(described["max_value"]) == top
        fields = {name: described[name] for name in ("bands", "max_value", "nodata")}
        summary = finished(client, client.post("/scenes/0", data=fields))
        assert (summary["state"], summary["detail"]) == ("finished", "")
        assert (summary["georeferenced"], summary["meters_per_pixel"] is not None) == (grid != "none", grid != "none")
        (prediction,) = summary["predictions"]
        assert [share["share"] for share in prediction["classes"]] == [0.5, 0.5]

        base = f"/maps/{summary['key']}"
        image = tile(client, f"{base}/tiles/image/1/0/0")
        assert image[100, 100].tolist() == [255, 255, 255, 255]
        below = tile(client, f"{base}/tiles/image/1/0/1")
        assert below[:, :, 3].any(axis=1).sum() == (44 if nodata is None else 34)
        classes = tile(client, f"{base}/tiles/classes/1/0/0?hidden=0")
        assert classes[100, 100, 3] == 255
        assert not classes[100, 210:, 3].any()

        pixel = client.get(f"{base}/pixels/250/20").json()
        assert pixel["predictions"][0] == {"network": "0", "name": "dark", "probability": 80, "uncertainty": 72}
        if grid == "none":
            assert pixel["coordinates"] is pixel["degrees"] is None
        else:
            with rasterio.open(path) as file:
                assert pixel["coordinates"] == pytest.approx(file.xy(20, 250))
            assert 20 < pixel["degrees"][1] < 30
        last = client.get(f"{base}/pixels/0/299").json()["predictions"][0]
        assert last["name"] == (None if nodata is not None else "<b>bright</b>")
        assert client.get(f"{base}/pixels/400/0").status_code == 404


def tile(client: TestClient, address: str) -> Any:
    result = client.get(address)
    assert result.status_code == 200, result.text
    return np.asarray(Image.open(io.BytesIO(result.content)).convert("RGBA"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "5 bands, the network reads 4"),
        ({"bands": "1,2"}, "names 2 bands"),
        ({"bands": "1,2,3,9"}, "has the bands 1 to 5"),
        ({"bands": "x"}, "must be band numbers"),
        ({"bands": "1,2,3,4"}, "max_value="),
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, str], words: str) -> None:
    path = write(tmp_path / "scene.tif", left_bright(5, "uint16", 10_000, None))
    with client_of([path]) as client:
        for result in (
            client.post("/scenes/0", data=fields),
            client.post("/maps", data=fields, files={"image": ("x", path.read_bytes())}),
            client.post("/predict", data=fields, files={"image": ("x", path.read_bytes())}),
        ):
            assert result.status_code == 400
            assert words in result.json()["detail"]
            assert str(tmp_path) not in result.json()["detail"]
            assert "--" not in result.json()["detail"]
        described = client.post("/images", files={"image": ("x", path.read_bytes())}).json()
        assert "5 bands" in described["problem"]
        assert (described["bands"], described["max_value"]) == ("1,2,3,4", "10000")


@pytest.fixture
def gated() -> Iterator[tuple[ServedNetwork, threading.Event]]:
    """A network that waits after its first eight batches of windows."""
    release, calls = threading.Event(), []

    def run(images: Floats) -> Floats:
        calls.append(len(images))
        if len(calls) > 8:
            release.wait(30)
        return bright(images)

    yield deep(run=run), release
    release.set()


def test_a_map_has_progress_and_resumes_after_the_server_stops(
    tmp_path: Path, gated: tuple[ServedNetwork, threading.Event]
) -> None:
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None))
    slow, release = gated
    with client_of([path], [slow]) as client:
        key = client.post("/scenes/0").json()["key"]
        until = time.monotonic() + 30
        while (state := client.get(f"/maps/{key}").json())["progress"] < 0.4 and time.monotonic() < until:
            time.sleep(0.02)
        assert state["state"] == "running"
        assert 0.4 < state["progress"] < 0.95
        assert client.get(f"/map/{key}").status_code == 200
        assert client.get(f"/maps/{key}/file", params={"network": "0"}).status_code == 404
        assert tile(client, f"/maps/{key}/tiles/image/0/0/0")[50, 50, 3] == 255
        threading.Timer(0.5, release.set).start()
    calls = []

    def count(images: Floats) -> Floats:
        calls.append(len(images))
        return bright(images)

    with client_of([path], [deep(run=count)]) as client:
        summary = finished(client, client.post("/scenes/0"))
        assert (summary["key"], summary["state"]) == (key, "finished")
        resumed = sum(calls)
        assert client.post("/scenes/0").json()["key"] == key
        other = write(tmp_path / "other.tif", left_bright(4, "uint8", 255, None))
    with client_of([other], [deep(run=count)]) as client:
        calls.clear()
        assert finished(client, client.post("/scenes/0"))["state"] == "finished"
        assert 0 < resumed < sum(calls), "finished rows are not predicted again"


def test_a_large_scene_without_overviews_is_shown_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.web.maps.MAX_OVERVIEW", 128)
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None), driver="GTiff", tiled=False)
    with client_of([path], pixels=1000) as client:
        summary = finished(client, client.post("/scenes/0"))
        assert summary["state"] == "finished"
        shown = tile(client, f"/maps/{summary['key']}/tiles/image/0/0/0")
        assert shown[50, 20].tolist() == [255, 255, 255, 255]
        assert shown[50, 150].tolist() == [51, 51, 51, 255]
        assert not shown[150:, :, 3].any()
        assert client.get(f"/maps/{summary['key']}/file?network=0&output=png").status_code == 400


def test_downloads_of_a_map(tmp_path: Path) -> None:
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None))
    with client_of([path]) as client:
        key = finished(client, client.post("/scenes/0"))["key"]
        with rasterio.MemoryFile(client.get(f"/maps/{key}/file?network=0").content) as memory, memory.open() as file:
            assert json.loads(file.tags()["CLASS_NAMES"]) == {"0": "dark", "1": "<b>bright</b>"}
            assert file.crs.to_epsg() == 32640
        pyogrio = pytest.importorskip("pyogrio")
        result = client.get(f"/maps/{key}/file?network=0&output=gpkg")
        assert result.headers["content-disposition"] == 'attachment; filename="map.gpkg"'
        (tmp_path / "map.gpkg").write_bytes(result.content)
        assert sorted(pyogrio.raw.read(tmp_path / "map.gpkg")[3][1]) == ["<b>bright</b>", "dark"]


def test_a_download_that_is_slow_to_begin_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE", 0.2)

    def write_slowly(*given: Any) -> Path:
        time.sleep(1)
        return write_polygons(*given)

    monkeypatch.setattr("overfly.web.maps.write_polygons", write_slowly)
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None))
    running = server.start(application([deep()], scenes=[path]))
    try:
        with httpx.Client(base_url=running.address) as client:
            key = finished(client, client.post("/scenes/0"))["key"]
            slow, again = (client.get(f"/maps/{key}/file?network=0&output=gpkg", timeout=30) for _ in range(2))
            assert slow.status_code == 200
            assert slow.content.startswith(b"SQLite format 3")
            assert slow.content == again.content
    finally:
        running.stop()


def test_damaged_and_vanished_scenes_fail_with_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None), compress="none")
    link = tmp_path / "link.tif"
    link.symlink_to(path)
    with client_of([path, link]) as client:
        key = finished(client, client.post("/scenes/1"))["key"]
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: len(content) // 2])
        path.touch()
        assert client.post("/scenes/0").status_code == 400
        path.unlink()
        for address in ("/scenes/0", "/scenes/1", f"/maps/{key}/tiles/image/0/0/0"):
            result = client.get(address)
            assert result.status_code == 400
            assert str(tmp_path) not in result.json()["detail"]
        assert client.get("/scenes/2").status_code == 404


def test_maps_beyond_the_queue_are_refused(tmp_path: Path, gated: tuple[ServedNetwork, threading.Event]) -> None:
    path = write(tmp_path / "scene.tif", left_bright(4, "uint8", 255, None))
    slow, release = gated
    with client_of([path], [slow], queue=1) as client:
        assert client.post("/scenes/0").status_code == 201
        assert client.post("/scenes/0", data={"nodata": "7"}).status_code == 429
        assert client.get("/health").status_code == 200
        release.set()
