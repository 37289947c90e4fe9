"""Requests and responses of the HTTP API: form fields, JSON, and errors."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Depends, File, Form, Query, UploadFile
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict

from overfly.raster.manifest import MapSettings
from overfly.reporting.figures import accessible_colors
from overfly.web.service import ServedNetwork

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

    Of a running one, `progress` is the finished share, and predictions are empty.
    """

    key: str
    name: str
    width: int
    height: int
    max_zoom: int
    georeferenced: bool
    meters_per_pixel: float | None
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
