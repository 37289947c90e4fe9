"""The HTTP API: predict an image, keep maps and hand out their tiles, list networks, say how the server is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, HTTPException, Query, UploadFile
from fastapi import Path as InPath
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from overfly.core.classes import Classes
from overfly.reporting.embedded import png, safe
from overfly.video.player import LatestFrame
from overfly.web.kept import Answer, Map
from overfly.web.networks import Network
from overfly.web.service import Desk
from overfly.web.tiles import Layer, depth, geotiff, tile

Kind = Literal["png", "tiff", "json"]
Key = Annotated[str, InPath(max_length=64, description="What `POST /maps` named the map.")]
Which = Annotated[str | None, Form(max_length=64, description="Key of a network; left out, the first.")]
Peak = Annotated[
    float | None,
    Form(gt=0, allow_inf_nan=False, description="Value of the image's brightest pixel; left out, the network's."),
]
Layers = Literal["image", "classes", "doubt"]
AGAIN = 1.0
"""Seconds after which a live picture that stands still is sent again."""
PROBLEM = "What is wrong, and what to do."


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: str


class ClassShare(BaseModel):
    """A class, its colors, and its share of an image."""

    name: str
    color: str
    safe_color: str
    share: float | None = None


class About(BaseModel):
    """A network of this server."""

    key: str
    title: str
    about: dict[str, Any]


class Prediction(BaseModel):
    """What a network says of an image."""

    network: str
    title: str
    classes: list[ClassShare]


class MapFacts(BaseModel):
    """A map that is kept for a while."""

    key: str
    width: int
    height: int
    depth: int
    placed: bool
    predictions: list[Prediction]


class Standing(BaseModel):
    """How the live picture stands."""

    live: bool
    frames: int
    ended: str


class Health(BaseModel):
    """That the server answers."""

    status: Literal["ok"]
    networks: int


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The answers that a route may give beside the good one, for the API's description."""
    return {code: {"model": Problem, "description": PROBLEM} for code in codes}


UPLOADED = problems(400, 401, 403, 404, 408, 413, 422, 429, 503)
ASKED = problems(401, 403, 404, 422)


def router(desk: Desk, screen: LatestFrame | None) -> APIRouter:
    """All routes of the API.

    Args:
        desk: the networks.
        screen: holds the live picture, where there is one.
    """
    routes = APIRouter()

    if desk.networks:
        _predict_routes(routes, desk)
        _map_routes(routes, desk)

    @routes.get("/networks", responses=problems(401, 403))
    def networks() -> list[About]:
        """The networks of this server."""
        return [About(key=each.key, title=each.title, about=dict(each.about)) for each in desk.networks.values()]

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses=problems(403))
    def health() -> Health:
        """Whether the server answers; needs no token."""
        return Health(status="ok", networks=len(desk.networks))

    @routes.get("/metrics", response_class=Response, responses=problems(401, 403) | _binary("text/plain"))
    def metrics() -> Response:
        """Counters in the format that Prometheus reads."""
        return Response(desk.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    watchers = asyncio.Semaphore(desk.limits.streams)

    @routes.get(
        "/stream",
        response_class=Response,
        responses=problems(401, 403, 404, 429) | _binary("multipart/x-mixed-replace", "image/jpeg"),
    )
    async def stream() -> Response:
        """The live picture of `overfly serve --watch`, frame after frame, as an `<img>` shows it.

        Once the stream has ended it is the last frame alone, as a JPEG.
        """
        last = screen.latest() if screen is not None and screen.closed else None
        if last is not None:
            return Response(last.jpeg, media_type="image/jpeg", headers={"cache-control": "no-store"})
        if screen is None or screen.closed:
            raise HTTPException(404, "there is no live picture; overfly serve --watch shows one")
        if watchers.locked():
            raise HTTPException(429, "too many watch already; try again later", {"retry-after": "10"})
        return StreamingResponse(_parts(screen, watchers), media_type="multipart/x-mixed-replace; boundary=frame")

    @routes.get("/stream/state", responses=problems(401, 403, 404))
    def state() -> Standing:
        """Whether the live picture goes on, how many frames it had, and how it ended."""
        if screen is None:
            raise HTTPException(404, "there is no live picture; overfly serve --watch shows one")
        return Standing(live=not screen.closed, frames=screen.number, ended=screen.ended)

    return routes


def _predict_routes(routes: APIRouter, desk: Desk) -> None:
    kinds = _binary("image/png", "image/tiff", "application/json")

    @routes.post("/predict", response_class=Response, responses=UPLOADED | kinds)
    async def predict(
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or GeoTIFF.")],
        network: Which = None,
        answer: Annotated[Kind, Form(description="A palette PNG, a GeoTIFF, or the classes' shares.")] = "png",
        max_value: Peak = None,
    ) -> Response:
        """Class ids of an image, 255 where it has no data: as PNG or GeoTIFF with colors and names, or as shares."""
        chosen = _network(desk, network)

        def task(deadline: float) -> Response:
            picture, answers = desk.upload(image.file, [chosen], deadline, max_value)
            found = answers[chosen.key]
            if answer == "json":
                body = prediction(chosen.key, found).model_dump_json()
                return Response(body, media_type="application/json")
            if answer == "tiff":
                return _file(geotiff(found.found.ids, found.classes, picture.place), "tiff")
            return _file(png(found.found.ids, found.classes, clear=True), "png")

        return await desk.work(task)

    @routes.post("/maps", status_code=201, responses=UPLOADED)
    async def make_map(
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or GeoTIFF.")],
        network: Which = None,
        other: Annotated[str | None, Form(max_length=64, description="Key of a second network to compare.")] = None,
        max_value: Peak = None,
    ) -> MapFacts:
        """Predict an image and keep the maps for a while, to be looked at and downloaded."""
        chosen = _both(desk, network, other)
        return await desk.work(
            lambda deadline: described(desk.keep(*desk.upload(image.file, chosen, deadline, max_value)))
        )

    @routes.post("/scenes/{number}", status_code=201, responses=UPLOADED)
    async def make_map_of_scene(
        number: Annotated[int, InPath(ge=0, le=10**6, description="Place in the server's own list of pictures.")],
        network: Annotated[str | None, Query(max_length=64)] = None,
        other: Annotated[str | None, Query(max_length=64)] = None,
        max_value: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
    ) -> MapFacts:
        """The same of one of the server's own pictures."""
        if number >= len(desk.scenes):
            raise HTTPException(404, "there is no such picture; /networks and the page list what there is")
        chosen = _both(desk, network, other)
        path = desk.scenes[number]
        return await desk.work(lambda deadline: described(desk.keep(*desk.ask(path, chosen, deadline, max_value))))


def _map_routes(routes: APIRouter, desk: Desk) -> None:
    @routes.get("/maps/{key}", responses=ASKED)
    def map_facts(key: Key) -> MapFacts:
        """A map that is still kept."""
        return described(_map(desk, key))

    @routes.get("/maps/{key}/file", response_class=Response, responses=ASKED | problems(400) | _binary("image/png"))
    def map_file(
        key: Key, network: Annotated[str, Query(max_length=64)], answer: Literal["png", "tiff"] = "tiff"
    ) -> Response:
        """A map as a file to keep."""
        found = _map(desk, key)
        one = _answer(found, network)
        if answer == "tiff":
            return _file(geotiff(one.found.ids, one.classes, found.place), "tiff")
        return _file(png(one.found.ids, one.classes, clear=True), "png")

    @routes.get(
        "/maps/{key}/tiles/{layer}/{zoom}/{column}/{row}",
        response_class=Response,
        responses=ASKED | _binary("image/png"),
    )
    def map_tile(
        *,
        key: Key,
        layer: Layers,
        zoom: Annotated[int, InPath(ge=0, le=30)],
        column: Annotated[int, InPath(ge=0, le=10**6)],
        row: Annotated[int, InPath(ge=0, le=10**6)],
        network: Annotated[str | None, Query(max_length=64)] = None,
        own: Annotated[bool, Query(description="The classes' own colors, instead of safe ones.")] = False,
    ) -> Response:
        """A square of 256 pixels of the image, its classes or the networks' doubt."""
        found = _map(desk, key)
        if layer == "image":
            chosen = Layer(found.picture)
        else:
            one = _answer(found, network or next(iter(found.answers)))
            colors = one.classes if own else safe(one.classes)
            chosen = Layer(one.found.ids, colors) if layer == "classes" else Layer(one.found.doubt)
        made = tile(chosen, zoom, column, row)
        if made is None:
            raise HTTPException(404, "the picture has no such tile")
        return Response(made, media_type="image/png", headers={"cache-control": "private, max-age=3600"})


def described(made: Map) -> MapFacts:
    """A map as JSON says it."""
    height, width = made.picture.shape[:2]
    return MapFacts(
        key=made.key,
        width=width,
        height=height,
        depth=depth(height, width),
        placed=made.place is not None,
        predictions=[prediction(key, answer) for key, answer in made.answers.items()],
    )


def prediction(key: str, answer: Answer) -> Prediction:
    """A network's answer as JSON says it."""
    return Prediction(network=key, title=answer.title, classes=shares(answer.classes, answer.found.shares))


def shares(classes: Classes, found: Sequence[float] = ()) -> list[ClassShare]:
    """Classes with both their colors and, where known, their shares."""
    seen: Sequence[float | None] = found or [None] * len(classes)
    return [
        ClassShare(name=name, color=_hex(own), safe_color=_hex(other), share=share)
        for name, own, other, share in zip(classes.names, classes.colors, safe(classes).colors, seen, strict=True)
    ]


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{value:02x}" for value in color)


async def _parts(screen: LatestFrame, watchers: asyncio.Semaphore) -> AsyncIterator[bytes]:
    """Frames as parts of one endless answer; no thread is held while there is none.

    The line that ends a frame follows it at once, since browsers show a frame when they see that line. A frame that
    stays the newest is sent again every second: so a watcher who has gone is noticed.
    """
    async with watchers:
        last, sent = 0, time.monotonic()
        yield b"--frame\r\n"
        while not screen.closed:
            again = time.monotonic() - sent > AGAIN
            frame = await asyncio.to_thread(screen.latest) if again or screen.number > last else None
            if frame is None:
                await asyncio.sleep(0.01)
                continue
            last, sent = frame.number, time.monotonic()
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(frame.jpeg)}\r\n\r\n"
            yield head.encode("ascii") + frame.jpeg + b"\r\n--frame\r\n"


def _network(desk: Desk, key: str | None) -> Network:
    if key in (None, ""):
        return next(iter(desk.networks.values()))
    if key not in desk.networks:
        raise HTTPException(404, "there is no such network here; /networks lists them")
    return desk.networks[key]


def _both(desk: Desk, network: str | None, other: str | None) -> list[Network]:
    chosen = [_network(desk, network)]
    if other not in (None, "") and _network(desk, other) is not chosen[0]:
        chosen.append(_network(desk, other))
    return chosen


def _map(desk: Desk, key: str) -> Map:
    found = desk.kept.get(key)
    if found is None:
        raise HTTPException(404, "there is no such map any more; send the image again")
    return found


def _answer(found: Map, network: str) -> Answer:
    if network not in found.answers:
        raise HTTPException(404, "this map was not made by that network")
    return found.answers[network]


def _file(data: bytes, kind: str) -> Response:
    name = {"png": "map.png", "tiff": "map.tif"}[kind]
    return Response(data, media_type=f"image/{kind}", headers={"content-disposition": f'attachment; filename="{name}"'})


def _binary(*kinds: str) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    if "application/json" in content:
        content["application/json"] = {
            "schema": Prediction.model_json_schema(ref_template="#/components/schemas/{model}")
        }
    return {200: {"content": content, "description": "The answer."}}


__all__ = ["router"]
