"""The networks and limits of a server, the threads of its requests, and what requests and responses hold."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from fastapi import Depends, File, Form, HTTPException, Query, UploadFile
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict

from overfly.core.errors import OverflyError
from overfly.core.prefetch import use_one_thread
from overfly.core.spec import PositiveFloat, PositiveInt, Spec
from overfly.exporting.predictor import Floats, Predictor
from overfly.raster.manifest import MapSettings
from overfly.reporting.figures import accessible_colors
from overfly.training.run import Run

T = TypeVar("T")
GRACE = 10.0
"""Seconds in which the first line and headers of a request must arrive, and after which a body must not be slow."""
WORKERS = 2
"""Threads that process images: one decodes while another predicts. Their number bounds the memory."""


class RequestTimeoutError(OverflyError):
    """A request that exceeded the time limit of the server."""

    def __init__(self) -> None:
        super().__init__("the request exceeded the time limit; send a smaller image, or try again later")


class Limits(Spec):
    """Limits of a server. Requests that exceed a limit are refused with a status and a message."""

    upload: PositiveInt = 64_000_000
    """Bytes of a request body; 413 above it."""
    pixels: PositiveInt = 9_000_000
    """Pixels of an image, read from its header before it is decoded; 400 above it."""
    seconds: PositiveFloat = 60.0
    """Time to receive a body (then 408), and time to predict an image (then 503); maps of the page take any time."""
    rate: PositiveInt = 10_000
    """Bytes per second at which a body must arrive on average after its first `GRACE` seconds; 408 below it."""
    queue: PositiveInt = 16
    """Images that are processed or wait at the same time, and maps; 429 above it."""
    connections: PositiveInt = 256
    """Open connections, including those of the live page; 503 above it, and closed at once above four times as many."""
    connections_per_address: PositiveInt = 64
    """Open connections of one address; 429 above it, and closed at once above twice as many."""
    cache: PositiveInt = 60_000_000
    """Pixels of all uploads and their maps on disk; the least recently used map is deleted first."""
    viewers: PositiveInt = 8
    """Viewers of the live stream at the same time; 429 above it."""


@dataclass(eq=False)
class ServedNetwork:
    """A network of a server, loaded at its first request: ``key`` in addresses, ``title`` and ``about`` on pages.

    ``digest`` returns that of its file, by which its finished maps are found again.
    """

    key: str
    title: str
    load: Callable[[], Predictor]
    run: Run | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    digest: Callable[[], str] = str
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "network", torch.set_num_threads, (torch.get_num_threads(),))
    )
    loaded: Predictor | None = None

    def predictor(self) -> Predictor:
        """Load the network once; raise `OverflyError` if it cannot be loaded."""
        if self.loaded is None:
            with self._lock:
                self.loaded = self.loaded or self.load()
        return self.loaded

    def limited(self, deadline: float | None = None, stop: threading.Event | None = None) -> Predictor:
        """Return the network with `probabilities` before a time; without one, after waiting requests, until ``stop``.

        It raises `RequestTimeoutError` after ``deadline``, and `CancelledError` when ``stop`` is set.
        """

        def run(images: Floats) -> Floats:
            if stop is not None and stop.wait(0.001):  # a waiting request has the network first
                raise CancelledError
            return self.probabilities(images, time.monotonic() + 1e6 if deadline is None else deadline)

        return replace(self.predictor(), run=run)

    def probabilities(self, images: Floats, deadline: float) -> Floats:
        """Return class probabilities (N, K, H, W) of images (N, C, H, W), float32, one call at a time.

        After the time ``deadline`` of `time.monotonic` the network is not called; raises `RequestTimeoutError` then.
        """

        def call() -> Floats:
            if time.monotonic() > deadline:
                raise RequestTimeoutError
            return self.predictor()(images)

        return self._thread.submit(call).result()


class InferenceService:
    """The networks (by key), limits and scenes (images on the server's machine, by number) of a server."""

    def __init__(self, networks: Sequence[ServedNetwork], limits: Limits, scenes: Sequence[Path] = ()) -> None:
        self.networks = {network.key: network for network in networks}
        self.limits = limits
        self.scenes = list(scenes)
        self._active = 0
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, task: Callable[[float], T]) -> T:
        """Run a task in a thread; its argument is its deadline as a time of `time.monotonic`.

        Raises:
            HTTPException: too many tasks run or wait (429).
            RequestTimeoutError: the task exceeded the time limit; its thread continues until it ends.
        """
        if self._active >= self.limits.queue:
            raise HTTPException(429, "the server is busy; try again in a few seconds", {"retry-after": "2"})
        self._pool = self._pool or ThreadPoolExecutor(WORKERS, "requests", use_one_thread)
        deadline = time.monotonic() + self.limits.seconds
        future = asyncio.get_running_loop().run_in_executor(self._pool, task, deadline)
        self._active += 1
        future.add_done_callback(self._finish)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self.limits.seconds)
        except TimeoutError:
            raise RequestTimeoutError from None

    def _finish(self, future: asyncio.Future[Any]) -> None:
        self._active -= 1
        if not future.cancelled():
            future.exception()  # after a timeout, no request retrieves it

    def close(self) -> None:
        """Unload all networks and end the threads; a later request loads and starts them again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for network in self.networks.values():
            network.loaded = None


Upload = Annotated[UploadFile, File(description="PNG, JPEG, TIFF or GeoTIFF.")]
Output = Annotated[
    Literal["png", "tiff", "json"], Form(description="A palette PNG, a GeoTIFF, or the classes' shares.")
]
NetworkQuery = Annotated[str | None, Query(max_length=64)]
MapKey = Annotated[str, InPath(max_length=64, description="Key from the response of `POST /maps`.")]
NetworkKey = Annotated[str | None, Form(max_length=64, description="Key of a network; default: the first.")]
OtherKey = Annotated[str | None, Form(max_length=64, description="Key of a second network to compare.")]
TileIndex = Annotated[int, InPath(ge=0, le=10**6)]
PixelIndex = Annotated[int, InPath(ge=0, le=10**7)]
LayerName = Literal["image", "classes", "uncertainty"]
Number = Annotated[int, InPath(ge=0, le=10**6, description="Number in the server's list of scenes, from 0.")]


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

    model_config = ConfigDict(from_attributes=True)

    key: str
    title: str
    about: Mapping[str, Any]


class ImageSummary(BaseModel):
    """An image, and values of the form fields bands, max_value and nodata by which a network may read it.

    `problem` says why it cannot be read without them; empty if it can.
    """

    width: int
    height: int
    image_bands: int
    dtype: str
    network_bands: int
    network_max_value: float
    bands: str
    max_value: str
    nodata: str
    problem: str


class PredictionSummary(BaseModel):
    """The prediction of a network: its classes with their shares of the image."""

    network: str
    title: str
    classes: list[ClassShare]


class MapSummary(BaseModel):
    """A map; tiles at `max_zoom` have full resolution. Without an error, `detail` is empty.

    Of a running one, `progress` is the finished share, and predictions are empty. `mercator` has the coordinates in Web
    Mercator of a grid of 9 × 9 points, row by row, from corner to corner; null if they are unknown.
    """

    key: str
    name: str
    width: int
    height: int
    max_zoom: int
    georeferenced: bool
    meters_per_pixel: float | None
    mercator: list[tuple[float, float]] | None = None
    state: Literal["running", "finished", "failed"] = "running"
    detail: str = ""
    progress: float = 0.0
    predictions: list[PredictionSummary] = []


class PixelPrediction(BaseModel):
    """Class of a pixel, its probability and its uncertainty in percent; null without data."""

    network: str
    name: str | None
    probability: int | None
    uncertainty: int | None


class PixelSummary(BaseModel):
    """Coordinates (x, y) of a pixel in the image's system, longitude and latitude, and predictions; null if unknown."""

    coordinates: tuple[float, float] | None
    degrees: tuple[float, float] | None
    predictions: list[PixelPrediction]


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route for the API description."""
    return {code: {"model": Problem, "description": "What is wrong, and what to do."} for code in codes}


def binary(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return the file response of a route for the API description."""
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    if "application/json" in content:
        schema = PredictionSummary.model_json_schema(ref_template="#/components/schemas/{model}")
        content["application/json"] = {"schema": schema}
    return {200: {"content": content, "description": "The result."}}


UPLOAD_PROBLEMS = problems(400, 401, 403, 404, 408, 413, 422, 429, 503)
MAP_PROBLEMS = problems(400, 401, 403, 404, 422)


def map_settings(
    bands: Annotated[str | None, Form(max_length=200, description="Numbers of the bands, such as 4,3,2.")] = None,
    max_value: Annotated[
        float | None, Form(gt=0, allow_inf_nan=False, description="Value of full brightness; default: the network's.")
    ] = None,
    nodata: Annotated[float | None, Form(description="Value of no data, if the file does not declare it.")] = None,
    alpha_band: Annotated[bool | None, Form(description="Whether the last band is an alpha band.")] = None,
) -> MapSettings:
    """Return the settings of a map from form fields."""
    return MapSettings(bands=bands, max_value=max_value, nodata=nodata, alpha_band=alpha_band)


Settings = Annotated[MapSettings, Depends(map_settings)]
to_hex = "#{:02x}{:02x}{:02x}".format


def summarize_prediction(network: ServedNetwork, shares: Mapping[str, float]) -> PredictionSummary:
    """Describe a network's prediction with the ``shares`` of its classes, by name."""
    own = network.predictor().metadata.classes
    colors = zip(own.names, own.colors, accessible_colors(own).colors, strict=True)
    classes = [
        ClassShare(name=name, color=to_hex(*color), safe_color=to_hex(*safe), share=shares[name])
        for name, color, safe in colors
    ]
    return PredictionSummary(network=network.key, title=network.title, classes=classes)
