"""The server as a program sees it, in this process."""

from __future__ import annotations

import io
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from overfly.core.records import Array
from overfly.exporting.predictor import Floats
from overfly.video.player import LatestFrame
from overfly.web.server import application, serve_stream, start
from overfly.web.service import Limits
from served import CLASSES, bright, encoded, finished, inverted, network, ramp

BASE = "http://127.0.0.1:8000"


def make_client(limits: Limits | None = None, **changes: Any) -> TestClient:
    networks = changes.pop("networks", None) or [network("0"), network("1", inverted)]
    return TestClient(application(networks, limits=limits, **changes), base_url=BASE)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with make_client() as result:
        yield result


def predict(client: TestClient, image: bytes, name: str = "a.png", **form: str) -> Any:
    return client.post("/predict", files={"image": (name, image)}, data=form)


@pytest.mark.parametrize(("height", "width"), [(40, 50), (1, 1), (200, 130), (64, 64), (3, 300)])
def test_predict_returns_class_ids_as_png(client: TestClient, height: int, width: int) -> None:
    image = ramp(height, width)
    result = predict(client, encoded(image))
    assert result.status_code == 200
    assert result.headers["content-type"] == "image/png"
    ids = np.asarray(Image.open(io.BytesIO(result.content)))
    np.testing.assert_array_equal(ids, image[..., 0] > 127)


def test_predict_returns_class_shares_of_the_named_network(client: TestClient) -> None:
    image = encoded(np.full((20, 20, 3), 200, np.uint8))
    one = predict(client, image, output="json").json()
    other = predict(client, image, output="json", network="1").json()
    assert [each["share"] for each in one["classes"]] == [0.0, 1.0]
    assert [each["share"] for each in other["classes"]] == [1.0, 0.0]
    assert one["classes"][1]["name"] == CLASSES.names[1]


def test_predict_geotiff_keeps_coordinates_and_no_data(client: TestClient, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    image = np.moveaxis(ramp(70, 90), -1, 0).copy()
    image[:, :10, :10] = 0
    transform = rasterio.Affine(0.5, 0.0, 500000.0, 0.0, -0.5, 3500000.0)
    path = tmp_path / "scene.tif"
    settings = {"height": 70, "width": 90, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32650", transform=transform, **settings) as file:
        file.write(image)
    result = predict(client, path.read_bytes(), "../../etc/passwd", output="tiff")
    assert result.status_code == 200
    assert result.headers["content-disposition"] == 'attachment; filename="map.tif"'
    with rasterio.MemoryFile(result.content) as memory, memory.open() as file:
        assert file.crs.to_epsg() == 32650
        assert file.transform == transform
        ids = file.read(1)
    assert (ids[:10, :10] == 255).all()
    np.testing.assert_array_equal(ids[20:, 20:], image[0, 20:, 20:] > 127)


def tiff(path: Path, image: Array, **settings: Any) -> bytes:
    """An image (H, W, C) as the bytes of a GeoTIFF."""
    rasterio = pytest.importorskip("rasterio")
    height, width, count = image.shape
    settings |= {"height": height, "width": width, "count": count, "dtype": image.dtype}
    with rasterio.open(path, "w", driver="GTiff", **settings) as file:
        file.write(np.moveaxis(image, -1, 0))
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("dtype", ["uint16", "int8", "int16", "uint32", "float32", "float64", "complex64"])
def test_other_data_types_need_max_value(client: TestClient, tmp_path: Path, dtype: str) -> None:
    image = (ramp() // 3).astype(dtype)
    sent = tiff(tmp_path / "scene.tif", image)
    result = predict(client, sent)
    assert result.status_code == 400
    words = "complex" if dtype == "complex64" else f"{dtype}.* max_value="
    assert re.search(words, result.json()["detail"])
    maps = client.post("/maps", files={"image": ("x", sent)})
    assert (maps.status_code, maps.json()) == (400, result.json())
    if dtype != "complex64":
        result = predict(client, sent, max_value="85")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result.content))), image[..., 0] * 3.0 > 127.5)


def test_bit_depth_must_match_the_network() -> None:
    deep = encoded(np.full((8, 8), 20000, np.uint16))
    several = [network("0", bands=1), network("1", bands=1, max_value=65535), network("2", bands=1, max_value=1)]
    with make_client(networks=several) as client:
        assert "values up to 1;" in predict(client, deep, network="2").json()["detail"]
        assert "uint16" in predict(client, deep).json()["detail"]
        assert predict(client, deep, network="1").status_code == 200
        assert "uint8" in predict(client, encoded(ramp()[..., 0]), network="1").json()["detail"]
        both = client.post("/maps", files={"image": ("x", deep)}, data={"network": "1", "other": "0"})
        assert both.status_code == 400


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_predict_geotiff_keeps_mask_and_control_points(client: TestClient, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, shown = tmp_path / "scene.tif", np.full((40, 50), 255, np.uint8)
    shown[:10, 20:] = 0
    corners = ((0, 0), (0, 50), (40, 0), (40, 50))
    points = [rasterio.control.GroundControlPoint(row, column, 5e5 + column, 3e6 - row) for row, column in corners]
    tiff(path, ramp(), gcps=points, crs="EPSG:32650")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(path, "r+") as file:
        file.write_mask(shown)
    result = predict(client, path.read_bytes(), output="tiff")
    with rasterio.MemoryFile(result.content) as memory, memory.open() as file:
        np.testing.assert_array_equal(file.read(1) == 255, shown == 0)
        assert [(p.row, p.col, p.x, p.y) for p in file.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        assert file.gcps[1].to_epsg() == 32650


def test_maps_are_stored_tiled_and_downloaded(client: TestClient) -> None:
    files = {"image": ("x", encoded(ramp(300, 400)))}
    summary = finished(client, client.post("/maps", files=files, data={"network": "0", "other": "1"}))
    assert (summary["state"], summary["progress"], summary["detail"]) == ("finished", 1.0, "")
    assert (summary["width"], summary["height"], summary["max_zoom"]) == (400, 300, 1)
    assert [each["network"] for each in summary["predictions"]] == ["0", "1"]
    key = summary["key"]
    assert client.get(f"/maps/{key}").json() == summary
    assert client.get(f"/map/{key}").status_code == 200
    for layer in ("image", "classes", "uncertainty"):
        tile = client.get(f"/maps/{key}/tiles/{layer}/1/1/1", params={"network": "1"})
        assert Image.open(io.BytesIO(tile.content)).size == (256, 256)
    assert client.get(f"/maps/{key}/tiles/image/1/2/0").status_code == 404
    response = client.get(f"/maps/{key}/file", params={"network": "1", "output": "png"})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(response.content))), ramp(300, 400)[..., 0] < 128)
    assert client.get("/maps/nothing").status_code == 404
    assert client.get("/map/nothing").status_code == 404
    assert client.get(f"/maps/{key}/file", params={"network": "9"}).status_code == 404


def test_least_recently_used_maps_are_evicted() -> None:
    with make_client(Limits(cache=3 * 2 * 100, pixels=100)) as client:
        keys = []
        for _ in range(5):
            result = client.post("/maps", files={"image": ("x", encoded(ramp(10, 10)))})
            keys.append(finished(client, result)["key"])
        there = [client.get(f"/maps/{key}").status_code for key in keys]
    assert there == [404, 404, 200, 200, 200]


def _bomb(side: int) -> bytes:
    """A PNG of side × side pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (_bomb(50_000), "pixels"),
        (_bomb(3100), "9 million"),
        (_bomb(100), "truncated or damaged"),
        (b"", "empty"),
        (b"hello", "text"),
        (encoded(ramp())[:100], "truncated"),
        (encoded(ramp()[..., 0]), "1 band, the network reads 3"),
    ],
)
def test_invalid_images_are_refused_without_their_path(client: TestClient, image: bytes, words: str) -> None:
    result = predict(client, image)
    assert result.status_code == 400
    assert words in result.json()["detail"]
    assert "overfly-" not in result.json()["detail"]
    assert "/tmp" not in result.json()["detail"]  # noqa: S108


def test_invalid_requests_name_the_field(client: TestClient) -> None:
    image = {"image": ("x", encoded(ramp()))}
    cut = client.post(
        "/predict", content=b"--X\r\nContent-", headers={"content-type": "multipart/form-data; boundary=X"}
    )
    cases = {
        "form field image is missing": [client.post("/predict"), client.post("/maps", data={"other": "1"}), cut],
        "form field output is invalid": [client.post("/predict", files=image, data={"output": "gif"})],
        "form field max_value is invalid": [client.post("/predict", files=image, data={"max_value": "0"})],
        "parameter one is missing and the parameter other": [client.get("/compare")],
        "part of the address number is invalid": [client.post("/scenes/x")],
    }
    for words, answers in cases.items():
        for answer in answers:
            assert answer.status_code == 422
            assert words in answer.json()["detail"]
            assert answer.json()["detail"].endswith("needs")
    schema = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    problem = schema["paths"]["/predict"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
    assert problem["$ref"].endswith("/Problem")


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_requests_are_answered(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200
    assert "head" not in client.get("/openapi.json").json()["paths"].get(path, {})


def test_request_times_out_and_the_server_continues() -> None:
    held = threading.Event()

    def slow(images: Floats) -> Floats:
        held.wait(5)
        return bright(images)

    with make_client(Limits(seconds=1.0), networks=[network("0", slow)]) as client:
        start_ = time.monotonic()
        result = predict(client, encoded(ramp()))
        assert result.status_code == 503
        assert time.monotonic() - start_ < 4
        held.set()
        assert predict(client, encoded(ramp())).status_code == 200


def test_pages_list_and_escape_networks(client: TestClient) -> None:
    page = client.get("/").text
    assert "network 1" in page
    assert "<b>bright" not in page
    assert client.get("/compare", params={"one": "0", "other": "1"}).status_code == 200
    assert client.get("/compare", params={"one": "0", "other": "<b>"}).status_code == 404
    assert client.get("/docs").status_code == 200
    assert "/predict" in client.get("/openapi.json").json()["paths"]
    assert client.get("/live").status_code == 200
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/vendor/../../server.py"):
        assert client.get(path).status_code == 404


def test_scenes_are_listed_by_number(tmp_path: Path) -> None:
    (tmp_path / "scene <1>.png").write_bytes(encoded(ramp()))
    with make_client(scenes=[tmp_path / "scene <1>.png"]) as client:
        assert "scene &lt;1&gt;.png" in client.get("/").text
        assert client.get("/scenes").json() == ["scene <1>.png"]
        assert client.post("/scenes/0", data={"other": "1"}).status_code == 201
        assert client.post("/scenes/1").status_code == 404


def test_metrics_count_requests_by_route_and_status() -> None:
    with make_client() as client:
        predict(client, encoded(ramp(40, 50)))
        predict(client, b"nothing")
        client.get("/nowhere")
        lines = client.get("/metrics").text.splitlines()
    counts = {line for line in lines if line.startswith("overfly_http_requests_total{")}
    for handler, method, status in (("/predict", "POST", 200), ("/predict", "POST", 400), ("none", "GET", 404)):
        assert f'overfly_http_requests_total{{handler="{handler}",method="{method}",status="{status}"}} 1.0' in counts


def test_stream_sends_frames() -> None:
    latest_frame = LatestFrame()
    running = start(application([network()], latest_frame=latest_frame))
    try:
        latest_frame.show(np.zeros((8, 8, 3), np.uint8))
        first = latest_frame.latest()
        assert first is not None
        with httpx.stream("GET", f"{running.address}stream", timeout=10) as answer:
            assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
            parts, seen = answer.iter_bytes(), b""
            while first.jpeg + b"\r\n--frame\r\n" not in seen:
                seen += next(parts)
            latest_frame.show(np.full((8, 8, 3), 255, np.uint8))
            second = latest_frame.latest()
            assert second is not None
            while second.jpeg + b"\r\n--frame\r\n" not in seen:
                seen += next(parts)
            latest_frame.close()
            assert first.jpeg not in b"".join(parts)
            assert seen.count(b"Content-Type: image/jpeg") >= 2
    finally:
        running.stop()


def test_ended_stream_shows_its_reason_and_last_frame() -> None:
    latest_frame = LatestFrame()
    with make_client(latest_frame=latest_frame) as client:
        assert client.get("/stream/state").json() == {"live": True, "frames": 0, "end_reason": ""}
        assert "has ended" not in client.get("/live").text
        latest_frame.show(np.zeros((8, 8, 3), np.uint8))
        latest_frame.close("it broke off (<b>gone</b>) after 1 frame")
        latest_frame.close("later words")
        last = client.get("/stream")
        assert last.headers["content-type"] == "image/jpeg"
        assert last.content.startswith(b"\xff\xd8")
        assert client.get("/stream/state").json()["end_reason"] == "it broke off (<b>gone</b>) after 1 frame"
        assert (
            "This stream has ended: it broke off (&lt;b&gt;gone&lt;/b&gt;) after 1 frame." in client.get("/live").text
        )
    empty = LatestFrame()
    empty.close()
    with make_client(latest_frame=empty) as client:
        assert client.get("/stream").status_code == 404
    with make_client() as client:
        assert client.get("/stream/state").status_code == 404


@pytest.mark.parametrize("order", ["01", "10"])
def test_networks_read_their_own_bands(order: str, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    four = network("1", lambda images: bright(images[:, 3:]), bands=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    networks = [network("0"), four] if order == "01" else [four, network("0")]
    clear = np.full((40, 50, 4), (10, 10, 10, 250), np.uint8)
    place = {"crs": "EPSG:32650", "transform": rasterio.Affine(0.5, 0.0, 500000.0, 0.0, -0.5, 3500000.0)}
    settings = {"height": 40, "width": 50, "count": 4, "dtype": "uint8", "photometric": "MINISBLACK"}
    with rasterio.open(tmp_path / "infrared.tif", "w", driver="GTiff", **settings, **place) as file:
        file.write(np.moveaxis(clear, -1, 0))
    infrared = (tmp_path / "infrared.tif").read_bytes()
    both = {"network": order[0], "other": order[1]}
    with make_client(networks=networks) as client:
        summary = finished(client, client.post("/maps", files={"image": ("x", encoded(clear))}, data=both))
        shares = {each["network"]: [one["share"] for one in each["classes"]] for each in summary["predictions"]}
        assert shares == {"0": [1.0, 0.0], "1": [0.0, 1.0]}
        for image, words in (
            (encoded(ramp()), "3 bands, network 1 reads 4"),
            (infrared, "4 bands, network 0 reads 3"),
        ):
            response = client.post("/maps", files={"image": ("x", image)}, data=both)
            assert response.status_code == 400
            assert words in response.json()["detail"]
        assert predict(client, infrared, network="1").status_code == 200


def test_serve_stream_shows_the_live_page_without_a_network() -> None:
    latest_frame = LatestFrame()
    latest_frame.show(np.zeros((8, 8, 3), np.uint8))
    with serve_stream(latest_frame) as address:
        assert httpx.get(address).status_code == 200
        root = address.removesuffix("live")
        assert httpx.get(root).headers["location"] == "/live"
        assert httpx.get(f"{root}stream/state").json()["frames"] == 1
        assert httpx.post(f"{root}predict").status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_requests_beyond_the_queue_are_refused() -> None:
    release = threading.Event()

    def slow(images: Floats) -> Floats:
        release.wait(10)
        return bright(images)

    with make_client(Limits(queue=1), networks=[network("0", slow)]) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(predict, client, encoded(ramp()))
        time.sleep(0.3)
        response = predict(client, encoded(ramp()))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert client.get("/health").status_code == 200
        release.set()
        assert first.result().status_code == 200
        assert predict(client, encoded(ramp())).status_code == 200


def test_a_failing_network_is_an_error_of_one_request() -> None:
    def fail(images: Floats) -> Floats:
        return bright(images) * np.nan

    with make_client(Limits(queue=1), networks=[network("0", fail), network("1")]) as client:
        for _ in range(3):
            assert predict(client, encoded(ramp())).status_code == 400
        assert predict(client, encoded(ramp()), network="1").status_code == 200
