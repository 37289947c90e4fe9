"""The pages in headless Chromium: drop an image, see its map, swipe, download; the live stream."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.warp
from PIL import Image
from rasterio import Affine

from overfly.video.player import LatestFrame
from overfly.web.server import BackgroundServer, application, serve_stream, start
from rasters import write
from served import encoded, inverted, network

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        settings = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        try:
            result = engine.chromium.launch(executable_path=CHROMIUM, args=settings)
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield result
        result.close()


@pytest.fixture(scope="module")
def running() -> Iterator[BackgroundServer]:
    latest_frame = LatestFrame()
    latest_frame.show(np.full((48, 64, 3), 90, np.uint8))
    result = start(application([network("0"), network("1", inverted)], latest_frame=latest_frame))
    yield result
    latest_frame.close()
    result.stop()


@pytest.fixture
def page(browser: Any, running: BackgroundServer) -> Iterator[Any]:
    """A page of phone size; script errors, policy violations and requests to other hosts fail the test."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, accept_downloads=True)
    context.set_default_timeout(20_000)
    result = context.new_page()
    wrong: list[str] = []
    result.on("console", lambda message: wrong.append(message.text) if _is_error(message) else None)
    result.on("pageerror", lambda error: wrong.append(str(error)))
    result.on(
        "request",
        lambda request: wrong.append(request.url) if not request.url.startswith((running.address, "data:")) else None,
    )
    yield result
    context.close()
    assert wrong == []


@pytest.fixture(params=[390, 1280])
def wide(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A page of phone size and one of desktop size."""
    result = browser.new_page(viewport={"width": request.param, "height": 844})
    result.set_default_timeout(20_000)
    yield result
    result.close()


def _is_error(message: Any) -> bool:
    """Whether a script or the policy is not content; an answer of 400 that the page shows is no fault of it."""
    return bool(message.type in ("error", "warning") and "400 (Bad Request)" not in message.text)


def _shows(page: Any, image: str) -> bool:
    """Whether an image of the page comes to show its 64 columns, within a while."""
    for _ in range(200):
        page.wait_for_timeout(50)
        if page.evaluate(f"document.querySelector('{image}')?.naturalWidth") == 64:
            return True
    return False


def _bright_at(page: Any, x: int) -> bool:
    """Whether the map shows the bright class at the middle of a column of the map's box."""
    box = page.locator("#map").bounding_box()
    clip = {"x": box["x"] + x, "y": box["y"] + box["height"] / 2, "width": 2, "height": 2}
    shown = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")).astype(int)
    return bool(shown[0, 0].sum() > 300)


def test_dropped_image_opens_its_map(page: Any, running: BackgroundServer, tmp_path: Path) -> None:
    page.goto(running.address)
    image = np.full((200, 320, 3), 255, np.uint8)
    page.evaluate(DROP, [base64.b64encode(encoded(image)).decode(), "../<b>x</b>.png"])
    page.wait_for_url("**/map/*")
    page.wait_for_selector("img.leaflet-tile-loaded")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    map_, bar, text = (page.locator(name).bounding_box() for name in ("#map", "#swipe", "#pixel"))
    assert bar["y"] + bar["height"] < map_["y"] + map_["height"] <= text["y"], "they do not overlap"
    rows = page.locator("#legend tbody tr")
    assert rows.count() == 2
    assert "<b>bright</b>" in rows.nth(1).inner_text()
    assert "100.0 %" in rows.nth(1).locator("td").nth(2).inner_text()
    assert "0.0 %" in rows.nth(1).locator("td").nth(3).inner_text()

    page.check("#own-colors")
    page.locator("#opacity").evaluate(
        "(bar) => { bar.value = 100; bar.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    swipe = "(bar, value) => { bar.value = value; bar.dispatchEvent(new Event('input', {bubbles: true})); }"
    page.wait_for_timeout(700)
    seen = {}
    for value in (100, 900):
        page.locator("#swipe").evaluate(swipe, value)
        page.wait_for_timeout(200)
        seen[value] = _bright_at(page, 180)
    assert seen == {100: False, 900: True}, "the left network predicts bright, the right one dark"

    page.check("input[value=uncertainty]")
    page.wait_for_selector("img.leaflet-tile-loaded[src*=uncertainty]")
    assert "entropy" in page.locator("#hint").inner_text()
    page.check("input[value=image]")
    assert page.locator("#swipe").is_hidden()

    with page.expect_download() as saved:
        page.click("text=Download PNG of A")
    saved.value.save_as(tmp_path / "map.png")
    assert saved.value.suggested_filename == "map.png"
    assert (np.asarray(Image.open(tmp_path / "map.png")) == 1).all()


def test_invalid_file_shows_an_error(page: Any, running: BackgroundServer, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not an image")
    page.goto(running.address)
    with page.expect_response("**/maps") as answer:
        page.set_input_files("#file", tmp_path / "x.png")
    assert answer.value.status == 400
    page.wait_for_selector("#message.warn")
    assert "not a PNG" in page.locator("#message").inner_text()


def test_compare_api_and_live_pages(page: Any, running: BackgroundServer) -> None:
    page.goto(running.address)
    page.click("#compare")
    page.wait_for_url("**/compare?*")
    assert "Settings that differ" in page.inner_text("main")
    page.goto(f"{running.address}docs")
    page.wait_for_selector("#api details")
    assert "POST /predict" in page.inner_text("#api")
    page.goto(f"{running.address}live", wait_until="commit")
    assert _shows(page, ".frame")


def test_networks_fit_a_phone(wide: Any) -> None:
    about = {name: f"{name} of some length" for name in ("model", "method", "folder", "source", "target", "mIoU")}
    networks = [network("0"), network("1", inverted)]
    networks[0].about = about
    running = start(application(networks))
    try:
        wide.goto(running.address)
        assert wide.evaluate("[document.documentElement, ...document.querySelectorAll('.scroll')].every("
                             "(box) => box.scrollWidth <= box.clientWidth)")  # fmt: skip
        phone = wide.viewport_size["width"] == 390
        assert wide.locator(".networks thead").is_visible() != phone
        before = wide.evaluate(
            "getComputedStyle(document.querySelector('.networks td[data-name]'), '::before').content"
        )
        assert ("model" in before) == phone
        wide.check("input[name=network][value='1']")
        assert wide.evaluate("selected()") == {"network": "1", "other": "1"}
    finally:
        running.stop()


def test_ended_stream_is_grayed_out(wide: Any) -> None:
    latest_frame = LatestFrame()
    latest_frame.show(np.full((48, 64, 3), 90, np.uint8))
    running = start(application([network()], latest_frame=latest_frame))
    try:
        wide.goto(f"{running.address}live", wait_until="commit")
        assert _shows(wide, ".frame")
        assert wide.locator("#state").inner_text() == ""
        latest_frame.close("it came to its end after 1 frame")
        wide.wait_for_selector("#state.warn")
        assert wide.inner_text("#state") == "This stream has ended: it came to its end after 1 frame."
        assert wide.locator("#stream.ended").count() == 1
        wide.goto(f"{running.address}live")
        assert _shows(wide, ".frame")
        assert "came to its end" in wide.inner_text("#state")
        assert wide.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        running.stop()


def test_serve_stream_shows_the_end_of_the_stream(wide: Any) -> None:
    latest_frame = LatestFrame()
    latest_frame.show(np.full((48, 64, 3), 90, np.uint8))
    with serve_stream(latest_frame) as address:
        wide.goto(address, wait_until="commit")
        assert _shows(wide, ".frame")
        assert wide.locator("#state").inner_text() == ""
        latest_frame.close("it came to its end after 1 frame")
    wide.wait_for_selector("#stream.ended")
    assert "1 frame" in wide.inner_text("#state")
    assert wide.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_deep_scene_is_mapped_with_fields_and_its_pixels_are_read(wide: Any, tmp_path: Path) -> None:
    image = np.full((4, 300, 400), 2000, np.uint16)
    image[:, :, :200] = 10_000
    four = network("0", bands=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    running = start(application([four], scenes=[write(tmp_path / "scene.tif", image)]))
    try:
        wide.goto(running.address)
        wide.click("[data-scene]")
        wide.wait_for_selector("#message.warn")
        assert "uint16" in wide.inner_text("#message")
        fields = {name: wide.input_value(f"[name={name}]") for name in ("bands", "max_value", "nodata")}
        assert fields == {"bands": "1,2,3,4", "max_value": "10000", "nodata": ""}
        assert "400×300 pixels, 4 bands, uint16" in wide.inner_text("#about")
        wide.click("#make")
        wide.wait_for_url("**/map/*")
        wide.wait_for_selector("img.leaflet-tile-loaded")
        assert wide.locator(".leaflet-control-scale-line").inner_text().endswith(" m")
        box = wide.locator("#map").bounding_box()
        wide.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        wide.locator("#pixel", has_text="100 %").wait_for()
        assert "<b>bright</b>, 100 %" in wide.inner_text("#pixel")
        assert "° N" in wide.inner_text("#pixel")
        wide.locator("#legend input").nth(1).uncheck()
        wide.wait_for_selector("img.leaflet-tile-loaded[src*='hidden=1']")
        assert wide.locator("#legend tr.off").count() == 1
        assert wide.locator("text=Download GeoPackage").is_visible()
        assert wide.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        running.stop()


def _checkerboard(x: Any, y: Any) -> Any:
    """0 and 255 in squares of 100 meters of Web Mercator."""
    return ((np.floor(x / 100) + np.floor(y / 100)) % 2 * 255).astype(np.uint8)


class Tiles(BaseHTTPRequestHandler):
    """Tiles of a base map that shows the checkerboard."""

    def do_GET(self) -> None:
        zoom, column, row = map(int, self.path.removesuffix(".png").strip("/").split("/"))
        world = 2 * np.pi * 6378137
        at = (np.arange(256) + 0.5) / 256
        x, y = ((position + at) * world / 2**zoom - world / 2 for position in (column, row))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(encoded(np.repeat(_checkerboard(x[None], -y[:, None])[..., None], 3, -1)))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_base_map_fits_the_image(wide: Any, tmp_path: Path) -> None:
    grid = Affine(1.5, 0, 270_000, 0, -1.5, 5_600_000)  # turned by 2.4 degrees against Web Mercator
    centers = rasterio.transform.xy(grid, *np.indices((500, 600)).reshape(2, -1))
    x, y = rasterio.warp.transform("EPSG:32633", "EPSG:3857", *centers)
    image = np.repeat(_checkerboard(np.array(x), np.array(y)).reshape(1, 500, 600), 3, 0)
    scene = write(tmp_path / "scene.tif", image, crs="EPSG:32633", transform=grid)
    tiles = ThreadingHTTPServer(("127.0.0.1", 0), Tiles)
    threading.Thread(target=tiles.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{tiles.server_port}"
    running = start(application([network()], scenes=[scene], base_map=f"{address}/{{z}}/{{x}}/{{y}}.png"))
    contacted: list[str] = []
    wide.on("request", lambda request: contacted.append(request.url))
    try:
        wide.goto(running.address)
        wide.click("[data-scene]")
        wide.wait_for_url("**/map/*")
        wide.wait_for_selector("img.leaflet-tile-loaded")
        wide.check("[value=image]")
        wide.wait_for_load_state("networkidle")

        def shown() -> Any:
            pixels = np.asarray(Image.open(io.BytesIO(wide.locator("#map").screenshot())).convert("L")) > 127
            top, left = pixels.shape[0] // 2 - 80, pixels.shape[1] // 2 - 100
            return pixels[top : top + 160, left : left + 200]

        own = shown()
        assert not any(url.startswith(address) for url in contacted), "it is off at first"
        wide.check("#base-map")
        wide.uncheck("#image")
        wide.wait_for_selector("canvas.leaflet-tile-loaded")
        wide.wait_for_load_state("networkidle")
        wide.wait_for_timeout(500)  # tiles fade in
        assert 0.2 < own.mean() < 0.8
        assert (shown() == own).mean() > 0.95
        assert address.removeprefix("http://") in wide.inner_text(".leaflet-control-attribution")
    finally:
        running.stop()
        tiles.shutdown()
        tiles.server_close()
