"""Routes of the HTTP API: predictions, maps and their tiles, networks, health, and the live stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, HTTPException, Query, UploadFile
from fastapi import Path as InPath
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from overfly.raster.raster_source import Georeference
from overfly.reporting.figures import accessible_colors, encode_png
from overfly.video.player import LatestFrame
from overfly.web.images import Layer, encode_geotiff, max_zoom, render_tile
from overfly.web.service import InferenceService, Prediction, ServedNetwork, StoredMap

OutputFormat = Literal["png", "tiff", "json"]
MapKey = Annotated[str, InPath(max_length=64, description="Key from the response of `POST /maps`.")]
NetworkKey = Annotated[str | None, Form(max_length=64, description="Key of a network; default: the first.")]
MaxValue = Annotated[
    float | None,
    Form(gt=0, allow_inf_nan=False, description="Value of full brightness in the image; default: the network's."),
]
LayerName = Literal["image", "classes", "uncertainty"]
RESEND_SECONDS = 1.0
"""Interval in seconds at which an unchanged frame is sent again, to detect closed connections."""
IMAGE = "PNG, JPEG, TIFF or GeoTIFF."
NO_STREAM = "there is no live stream; overfly serve --watch starts one"


class Problem(BaseModel):
    """An error: what is wrong, and what to do."""

    detail: str


class ClassShare(BaseModel):
    """A class, its colors, and its share of an image."""

    name: str
    color: str
    safe_color: str
    share: float


class NetworkSummary(BaseModel):
    """A network of this server."""

    key: str
    title: str
    about: dict[str, Any]


class PredictionSummary(BaseModel):
    """The prediction of a network: its classes with their shares of the image."""

    network: str
    title: str
    classes: list[ClassShare]


class MapSummary(BaseModel):
    """A map in memory; tiles at `max_zoom` have full resolution."""

    key: str
    width: int
    height: int
    max_zoom: int
    georeferenced: bool
    predictions: list[PredictionSummary]


class StreamState(BaseModel):
    """State of the live stream: whether it runs, number of frames, and reason of its end."""

    live: bool
    frames: int
    end_reason: str


class Health(BaseModel):
    """Health of the server."""

    status: Literal["ok"]
    networks: int


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route for the API description."""
    return {code: {"model": Problem, "description": "What is wrong, and what to do."} for code in codes}


def _binary(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return the file response of a route for the API description."""
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    if "application/json" in content:
        schema = PredictionSummary.model_json_schema(ref_template="#/components/schemas/{model}")
        content["application/json"] = {"schema": schema}
    return {200: {"content": content, "description": "The result."}}


UPLOAD_PROBLEMS = _problems(400, 401, 403, 404, 408, 413, 422, 429, 503)
MAP_PROBLEMS = _problems(401, 403, 404, 422)


def api_router(service: InferenceService, latest_frame: LatestFrame | None) -> APIRouter:
    """Return the routes of the API; without networks or a stream, those that need one are left out."""
    routes = APIRouter()
    if service.networks:
        _add_predict_routes(routes, service)
        _add_map_routes(routes, service)
    _add_stream_routes(routes, latest_frame, service.limits.viewers)

    @routes.get("/networks", responses=_problems(401, 403))
    def networks() -> list[NetworkSummary]:
        """List the networks of this server."""
        return [
            NetworkSummary(key=network.key, title=network.title, about=dict(network.about))
            for network in service.networks.values()
        ]

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses=_problems(400, 403))
    def health() -> Health:
        """Return the health of the server; needs no token."""
        return Health(status="ok", networks=len(service.networks))

    return routes


def _add_predict_routes(routes: APIRouter, service: InferenceService) -> None:
    kinds = _binary("image/png", "image/tiff", "application/json")

    @routes.post("/predict", response_class=Response, responses=UPLOAD_PROBLEMS | kinds)
    async def predict(
        image: Annotated[UploadFile, File(description=IMAGE)],
        network: NetworkKey = None,
        output: Annotated[OutputFormat, Form(description="A palette PNG, a GeoTIFF, or the classes' shares.")] = "png",
        max_value: MaxValue = None,
    ) -> Response:
        """Predict the class ids of an image, 255 for no data: as PNG or GeoTIFF with colors and names, or as shares."""
        chosen = _network(service, network)

        def task(deadline: float) -> Response:
            upload, predictions = service.predict_upload(image.file, [chosen], deadline, max_value)
            prediction = predictions[chosen.key]
            if output == "json":
                summary = _summarize_prediction(chosen.key, prediction)
                return Response(summary.model_dump_json(), media_type="application/json")
            return _map_file(prediction, upload.georeference, output)

        return await service.run(task)

    @routes.post("/maps", status_code=201, responses=UPLOAD_PROBLEMS)
    async def create_map(
        image: Annotated[UploadFile, File(description=IMAGE)],
        network: NetworkKey = None,
        other: Annotated[str | None, Form(max_length=64, description="Key of a second network to compare.")] = None,
        max_value: MaxValue = None,
    ) -> MapSummary:
        """Predict an image and keep the maps in memory for display and download."""
        chosen = _networks(service, network, other)

        def task(deadline: float) -> MapSummary:
            return summarize_map(service.store(*service.predict_upload(image.file, chosen, deadline, max_value)))

        return await service.run(task)

    @routes.post("/scenes/{number}", status_code=201, responses=UPLOAD_PROBLEMS)
    async def create_map_of_scene(
        number: Annotated[int, InPath(ge=0, le=10**6, description="Number in the server's list of scenes, from 0.")],
        network: Annotated[str | None, Query(max_length=64)] = None,
        other: Annotated[str | None, Query(max_length=64)] = None,
        max_value: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
    ) -> MapSummary:
        """Predict an image on the server's machine and keep the maps in memory."""
        if number >= len(service.scenes):
            raise HTTPException(404, "unknown scene; the first page lists the scenes")
        chosen, path = _networks(service, network, other), service.scenes[number]

        def task(deadline: float) -> MapSummary:
            return summarize_map(service.store(*service.predict_file(path, chosen, deadline, max_value)))

        return await service.run(task)


def _add_map_routes(routes: APIRouter, service: InferenceService) -> None:
    @routes.get("/maps/{key}", responses=MAP_PROBLEMS)
    def get_map(key: MapKey) -> MapSummary:
        """Describe a map."""
        return summarize_map(_stored_map(service, key))

    @routes.get(
        "/maps/{key}/file", response_class=Response, responses=MAP_PROBLEMS | _problems(400) | _binary("image/png")
    )
    def get_file(
        key: MapKey, network: Annotated[str, Query(max_length=64)], output: Literal["png", "tiff"] = "tiff"
    ) -> Response:
        """Download the prediction of a network."""
        stored = _stored_map(service, key)
        return _map_file(_prediction(stored, network), stored.georeference, output)

    @routes.get(
        "/maps/{key}/tiles/{layer}/{zoom}/{column}/{row}",
        response_class=Response,
        responses=MAP_PROBLEMS | _binary("image/png"),
    )
    def get_tile(
        *, key: MapKey, layer: LayerName, zoom: Annotated[int, InPath(ge=0, le=30)],
        column: Annotated[int, InPath(ge=0, le=10**6)], row: Annotated[int, InPath(ge=0, le=10**6)],
        network: Annotated[str | None, Query(max_length=64)] = None,
        own_colors: Annotated[bool, Query(description="The classes' own colors instead of accessible ones.")] = False,
    ) -> Response:  # fmt: skip
        """Return a tile of 256×256 pixels of the image, of its classes, or of the uncertainty."""
        stored = _stored_map(service, key)
        shown = Layer(stored.image)
        if layer != "image":
            prediction = _prediction(stored, network or next(iter(stored.predictions)))
            colors = prediction.classes if own_colors else accessible_colors(prediction.classes)
            shown = Layer(prediction.ids, colors) if layer == "classes" else Layer(prediction.uncertainty)
        tile = render_tile(shown, zoom, column, row)
        if tile is None:
            raise HTTPException(404, "the tile lies outside the image")
        return Response(tile, media_type="image/png", headers={"cache-control": "private, max-age=3600"})


def _add_stream_routes(routes: APIRouter, latest_frame: LatestFrame | None, limit: int) -> None:
    viewers = asyncio.Semaphore(limit)

    @routes.get(
        "/stream",
        response_class=Response,
        responses=_problems(401, 403, 404, 429) | _binary("multipart/x-mixed-replace", "image/jpeg"),
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

    @routes.get("/stream/state", responses=_problems(401, 403, 404))
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


def summarize_map(stored: StoredMap) -> MapSummary:
    """Describe a map for JSON."""
    height, width = stored.image.shape[:2]
    return MapSummary(
        key=stored.key, width=width, height=height, max_zoom=max_zoom(height, width),
        georeferenced=stored.georeference is not None,
        predictions=[_summarize_prediction(key, prediction) for key, prediction in stored.predictions.items()],
    )  # fmt: skip


def _summarize_prediction(key: str, prediction: Prediction) -> PredictionSummary:
    own, accessible = prediction.classes, accessible_colors(prediction.classes)
    shares = [
        ClassShare(name=name, color=_hex(color), safe_color=_hex(safe), share=share)
        for name, color, safe, share in zip(own.names, own.colors, accessible.colors, prediction.shares, strict=True)
    ]
    return PredictionSummary(network=key, title=prediction.title, classes=shares)


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{value:02x}" for value in color)


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


def _stored_map(service: InferenceService, key: str) -> StoredMap:
    stored = service.stored_map(key)
    if stored is None:
        raise HTTPException(404, "the map is no longer in memory; send the image again")
    return stored


def _prediction(stored: StoredMap, network: str) -> Prediction:
    if network not in stored.predictions:
        raise HTTPException(404, "the map has no prediction of this network")
    return stored.predictions[network]


def _map_file(prediction: Prediction, georeference: Georeference | None, output: Literal["png", "tiff"]) -> Response:
    """Return a class map as a download."""
    if output == "tiff":
        data, name = encode_geotiff(prediction.ids, prediction.classes, georeference), "map.tif"
    else:
        data, name = encode_png(prediction.ids, prediction.classes, transparent=True), "map.png"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=f"image/{output}", headers=headers)
