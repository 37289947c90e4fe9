"""Routes of the HTTP API (predictions, images, maps and tiles, networks, health, live stream), and HTML pages."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi import Path as InPath
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel

from overfly.adaptation.selection import flatten_settings
from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError, printable
from overfly.core.progress import percent
from overfly.data.headers import open_raster
from overfly.evaluation.scores import valid_scores
from overfly.raster.map_raster import map_raster
from overfly.reporting.figures import accessible_colors, encode_png, grouped_bars
from overfly.reporting.report import environment
from overfly.video.player import LatestFrame
from overfly.web import images
from overfly.web import service as api
from overfly.web.maps import MapStore, ServedMap
from overfly.web.service import InferenceService, ServedNetwork

WAIT = 1.0
"""Seconds for which a request for a new map waits for it to be finished."""
RESEND_SECONDS = 1.0
"""Interval in seconds at which an unchanged frame is sent again, to detect closed connections."""
NO_STREAM = "there is no live stream; overfly serve --watch starts one"
KINDS = {"png": "image/png", "tiff": "image/tiff", "gpkg": "application/geopackage+sqlite3"}
"""Media types of downloads."""
METRICS = (("mIoU", "miou"), ("pixel accuracy", "accuracy"), ("boundary mIoU", "boundary_miou"))
"""Metrics of a comparison: title and attribute of `Scores`."""


class StreamState(BaseModel):
    """State of the live stream: whether it runs, number of frames, and reason of its end."""

    live: bool
    frames: int
    end_reason: str


class Health(BaseModel):
    """Health of the server."""

    status: Literal["ok"]
    networks: int


def api_router(service: InferenceService, store: MapStore, latest_frame: LatestFrame | None) -> APIRouter:
    """Return the routes of the API; without networks or a stream, those that need one are left out."""
    routes = APIRouter()
    if service.networks:
        _add_predict_routes(routes, service)
        _add_new_map_routes(routes, service, store)
        _add_map_routes(routes, service, store)
    _add_stream_routes(routes, latest_frame, service.limits.viewers)

    @routes.get("/networks", response_model=list[api.NetworkSummary], responses=api.problems(401, 403))
    def networks() -> list[ServedNetwork]:
        """List the networks of this server."""
        return list(service.networks.values())

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses=api.problems(400, 403))
    def health() -> Health:
        """Return the health of the server; needs no token."""
        return Health(status="ok", networks=len(service.networks))

    return routes


def _add_predict_routes(routes: APIRouter, service: InferenceService) -> None:
    kinds = api.binary("image/png", "image/tiff", "application/json")

    @routes.post("/predict", response_class=Response, responses=api.UPLOAD_PROBLEMS | kinds)
    async def predict(
        image: api.Upload, settings: api.Settings, network: api.NetworkKey = None, output: api.Output = "png"
    ) -> Response:
        """Predict the class ids of an image, 255 for no data: as PNG or GeoTIFF with colors and names, or as shares."""
        chosen = _network(service, network)

        def task(deadline: float) -> Response:
            with images.stored_upload(image.file) as path:
                images.check_header(path, pixels=service.limits.pixels)
                out = path.with_name("map.tif")
                temporary = replace(settings, temporary=True)
                result = map_raster(chosen.limited(deadline), str(path), out, temporary, network="")
                if output == "json":
                    summary = api.summarize_prediction(chosen, result.shares)
                    return Response(summary.model_dump_json(), media_type="application/json")
                if output == "tiff":
                    return _attachment(out.read_bytes(), "tiff")
                return _map_as_png(out, chosen.predictor().metadata.classes, service.limits.pixels)

        return await service.run(task)

    @routes.post("/images", responses=api.UPLOAD_PROBLEMS)
    async def describe_image(image: api.Upload, network: api.NetworkKey = None) -> api.ImageSummary:
        """Describe an image, and suggest form fields by which a network reads it."""
        chosen = _network(service, network)

        def task(deadline: float) -> api.ImageSummary:
            del deadline
            with images.stored_upload(image.file) as path:
                return images.describe_image(path, chosen.predictor().metadata)

        return await service.run(task)


def _add_new_map_routes(routes: APIRouter, service: InferenceService, store: MapStore) -> None:
    async def create(add: Callable[[], ServedMap]) -> api.MapSummary:
        stored = await service.run(lambda _: add())
        if stored.future is not None:
            await asyncio.wait([asyncio.wrap_future(stored.future)], timeout=WAIT)
        return stored.summary

    def scene(number: int) -> Path:
        if number >= len(service.scenes):
            raise HTTPException(404, "unknown scene; /scenes lists them")
        return service.scenes[number]

    @routes.post("/maps", status_code=201, responses=api.UPLOAD_PROBLEMS)
    async def create_map(
        image: api.Upload, settings: api.Settings, network: api.NetworkKey = None, other: api.OtherKey = None
    ) -> api.MapSummary:
        """Begin the map of an image; `GET /maps/{key}` tells its progress."""
        chosen = _networks(service, network, other)
        return await create(lambda: store.add_upload(image.file, chosen, settings))

    @routes.get("/scenes", responses=api.problems(401, 403))
    def scenes() -> list[str]:
        """List the names of the images on the server's machine."""
        return [printable(path.name) for path in service.scenes]

    @routes.get("/scenes/{number}", responses=api.MAP_PROBLEMS)
    def describe_scene(number: api.Number, network: api.NetworkQuery = None) -> api.ImageSummary:
        """Describe an image on the server's machine, and suggest form fields by which a network reads it."""
        path = scene(number)
        with images.field_errors(path, path.name):
            return images.describe_image(path, _network(service, network).predictor().metadata, path.name)

    @routes.post("/scenes/{number}", status_code=201, responses=api.UPLOAD_PROBLEMS)
    async def create_map_of_scene(
        number: api.Number, settings: api.Settings, network: api.NetworkKey = None, other: api.OtherKey = None
    ) -> api.MapSummary:
        """Begin, resume or find the map of an image on the server's machine; `GET /maps/{key}` tells its progress."""
        path, chosen = scene(number), _networks(service, network, other)
        return await create(lambda: store.add_scene(path, chosen, settings))


def _add_map_routes(routes: APIRouter, service: InferenceService, store: MapStore) -> None:
    @routes.get("/maps/{key}", responses=api.MAP_PROBLEMS)
    def get_map(key: api.MapKey) -> api.MapSummary:
        """Describe a map, and its progress."""
        return _stored_map(store, key).summary

    @routes.get(
        "/maps/{key}/file", response_class=Response, responses=api.UPLOAD_PROBLEMS | api.binary(*KINDS.values())
    )
    async def get_file(
        key: api.MapKey, network: Annotated[str, Query(max_length=64)], output: Literal["png", "tiff", "gpkg"] = "tiff"
    ) -> Response:
        """Download the prediction of a network: a GeoTIFF, areas as GeoPackage, or a PNG of a small map."""
        stored = _finished_map(store, key)
        index = _index(stored, network)
        return await service.run(lambda _: _map_file(stored, index, output, service.limits.pixels))

    @routes.get(
        "/maps/{key}/tiles/{layer}/{zoom}/{column}/{row}",
        response_class=Response,
        responses=api.MAP_PROBLEMS | api.binary("image/png"),
    )
    def get_tile(
        *, key: api.MapKey, layer: api.LayerName, zoom: Annotated[int, InPath(ge=0, le=30)], column: api.TileIndex,
        row: api.TileIndex, network: api.NetworkQuery = None,
        own_colors: Annotated[bool, Query(description="The classes' own colors instead of accessible ones.")] = False,
        hidden: Annotated[str, Query(pattern="^[0-9,]*$", max_length=800, description="Class ids left out.")] = "",
    ) -> Response:  # fmt: skip
        """Return a tile of 256×256 pixels of the image, of its classes, or of the uncertainty."""
        stored = _stored_map(store, key) if layer == "image" else _finished_map(store, key)
        if stored.shown is None:
            raise HTTPException(404, "the image is being prepared; try again later")
        part = images.tile_part(stored.summary.height, stored.summary.width, zoom, column, row)
        if part is None:
            raise HTTPException(404, "the tile lies outside the image")
        index = 0 if network is None else _index(stored, network)
        with images.field_errors(stored.path, stored.summary.name):
            if layer == "image":
                tile = images.render_image(*stored.shown, part)
            else:
                classes = stored.classes(index) if own_colors else accessible_colors(stored.classes(index))
                left_out = [int(number) for number in hidden.split(",") if number]
                colors = images.COLORS if layer == "uncertainty" else images.class_colors(classes, left_out)
                tile = images.render_table(stored.file(index, layer), part, colors)
        return Response(tile, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    @routes.get("/maps/{key}/pixels/{column}/{row}", responses=api.MAP_PROBLEMS)
    def get_pixel(key: api.MapKey, column: api.PixelIndex, row: api.PixelIndex) -> api.PixelSummary:
        """Return the coordinates of a pixel, and its class and probability by each network."""
        stored = _finished_map(store, key)
        if column >= stored.summary.width or row >= stored.summary.height:
            raise HTTPException(404, "the pixel lies outside the image")
        return stored.pixel(column, row)


def _add_stream_routes(routes: APIRouter, latest_frame: LatestFrame | None, limit: int) -> None:
    viewers = asyncio.Semaphore(limit)

    @routes.get(
        "/stream",
        response_class=Response,
        responses=api.problems(401, 403, 404, 429) | api.binary("multipart/x-mixed-replace", "image/jpeg"),
    )
    async def stream() -> Response:
        """Stream the live frames for an `<img>` element; after the end of the stream, return its last frame as JPEG."""
        last = latest_frame.latest() if latest_frame is not None and latest_frame.closed else None
        if last is not None:
            return Response(last.jpeg, media_type="image/jpeg", headers={"cache-control": "no-store"})
        if latest_frame is None or latest_frame.closed:
            raise HTTPException(404, NO_STREAM)
        if viewers.locked():
            raise HTTPException(429, "the stream has too many viewers; try again later", {"retry-after": "10"})
        return StreamingResponse(_frames(latest_frame, viewers), media_type="multipart/x-mixed-replace; boundary=frame")

    @routes.get("/stream/state", responses=api.problems(401, 403, 404))
    def state() -> StreamState:
        """Return whether the live stream runs, its number of frames, and the reason of its end."""
        if latest_frame is None:
            raise HTTPException(404, NO_STREAM)
        return StreamState(live=not latest_frame.closed, frames=latest_frame.number, end_reason=latest_frame.end_reason)


async def _frames(latest_frame: LatestFrame, viewers: asyncio.Semaphore) -> AsyncIterator[bytes]:
    """Yield frames as parts of a multipart response.

    The boundary is sent with each frame, because browsers display a frame when they receive its end.
    """
    async with viewers:
        last, sent = 0, time.monotonic()
        yield b"--frame\r\n"
        while not latest_frame.closed:
            resend = time.monotonic() - sent > RESEND_SECONDS
            frame = await asyncio.to_thread(latest_frame.latest) if resend or latest_frame.number > last else None
            if frame is None:
                await asyncio.sleep(0.01)
                continue
            last, sent = frame.number, time.monotonic()
            header = f"Content-Type: image/jpeg\r\nContent-Length: {len(frame.jpeg)}\r\n\r\n"
            yield header.encode("ascii") + frame.jpeg + b"\r\n--frame\r\n"


def _network(service: InferenceService, key: str | None) -> ServedNetwork:
    if key in (None, ""):
        return next(iter(service.networks.values()))
    if key not in service.networks:
        raise HTTPException(404, "unknown network; /networks lists the keys")
    return service.networks[key]


def _networks(service: InferenceService, network: str | None, other: str | None) -> list[ServedNetwork]:
    """Return one network, or two different networks."""
    chosen = [_network(service, network)]
    if other not in (None, "") and _network(service, other) is not chosen[0]:
        chosen.append(_network(service, other))
    return chosen


def _stored_map(store: MapStore, key: str) -> ServedMap:
    stored = store.get(key)
    if stored is None:
        raise HTTPException(404, "the map was deleted; send the image again")
    return stored


def _finished_map(store: MapStore, key: str) -> ServedMap:
    stored = _stored_map(store, key)
    if stored.summary.state != "finished":
        raise HTTPException(404, "the map is not finished; /maps/KEY tells its progress")
    return stored


def _index(stored: ServedMap, network: str) -> int:
    """Return the position of a network in a map."""
    for index, each in enumerate(stored.networks):
        if each.key == network:
            return index
    raise HTTPException(404, "the map has no prediction of this network")


def _map_file(stored: ServedMap, index: int, output: Literal["png", "tiff", "gpkg"], pixels: int) -> Response:
    """Return a class map as a download; a PNG only up to a number of pixels."""
    if output == "png":
        return _map_as_png(stored.file(index), stored.classes(index), pixels)
    path = stored.file(index) if output == "tiff" else stored.polygons(index)
    return FileResponse(path, media_type=KINDS[output], filename=f"map{path.suffix}")


def _map_as_png(path: Path, classes: Classes, pixels: int) -> Response:
    """Return a file of class ids as PNG; raise `DataError` if it has more than a number of pixels."""
    with open_raster(path) as dataset:
        if dataset.height * dataset.width > pixels:
            raise DataError("the map is too large for a PNG; download it as GeoTIFF")
        return _attachment(encode_png(dataset.read(1), classes, transparent=True), "png")


def _attachment(data: bytes, kind: Literal["png", "tiff"]) -> Response:
    name = "map.png" if kind == "png" else "map.tif"
    return Response(data, media_type=KINDS[kind], headers={"content-disposition": f'attachment; filename="{name}"'})


def page_router(
    service: InferenceService, store: MapStore, latest_frame: LatestFrame | None, base_map: str | None
) -> APIRouter:
    """Return the routes of all pages; ``latest_frame`` is None without a live stream."""
    routes = APIRouter(default_response_class=HTMLResponse)
    templates = environment(Path(__file__).parent / "templates")

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = templates.get_template(f"{name}.html.jinja").render(
            stream=latest_frame is not None, networks=list(service.networks.values()), percent=percent, **values
        )
        return HTMLResponse(text, status)

    @routes.head("/")
    @routes.get("/")
    def networks_page() -> Response:
        networks = list(service.networks.values())
        if not networks:
            return RedirectResponse("/live")
        columns = list(dict.fromkeys(name for network in networks for name in network.about))
        scenes = [path.name for path in service.scenes]
        return page("networks", columns=columns, limits=service.limits, scenes=scenes)

    @routes.get("/map/{key}")
    def show_map(key: str) -> HTMLResponse:
        return page("map", key=key, base_map=base_map) if store.get(key) is not None else page("map_not_found", 404)

    @routes.get("/compare")
    def compare(one: Annotated[str, Query(max_length=64)], other: Annotated[str, Query(max_length=64)]) -> HTMLResponse:
        if one not in service.networks or other not in service.networks:
            raise HTTPException(404, "unknown network; /networks lists the keys")
        pair = [service.networks[one], service.networks[other]]
        scores = [valid_scores(network.run.scores if network.run is not None else {}) for network in pair]
        settings = [_settings(network) for network in pair]
        return page("compare", pair=pair, scores=scores, settings=settings, metrics=METRICS, bars=grouped_bars)

    @routes.get("/live")
    def live() -> HTMLResponse:
        closed = latest_frame is not None and latest_frame.closed
        return page("live", ended=closed, reason=latest_frame.end_reason if latest_frame is not None else "")

    @routes.get("/docs")
    def api() -> HTMLResponse:
        return page("api")

    return routes


def _settings(network: ServedNetwork) -> dict[str, str]:
    try:
        values = network.run.recipe.model_dump(mode="json") if network.run is not None else {}
    except OverflyError:
        return {}
    values |= {"start": "a recipe"} if isinstance(values.get("start"), dict) else {}
    return {name: "none" if value is None else str(value) for name, value in flatten_settings(values).items()}
