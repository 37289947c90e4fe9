"""`Predictor`, a network on any runtime, and the metadata of exported files."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from overfly import __version__
from overfly.core.choices import ExportFormat, ExportOutput, ExportPrecision
from overfly.core.classes import Classes
from overfly.core.errors import DataError, WeightsError
from overfly.core.spec import Meters, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Spec
from overfly.models.segmenter import Segmenter

Floats = NDArray[np.float32]
MODEL_KEY, EXPORT_KEY = "overfly", "overfly_export"
"""Keys of an exported file's metadata: `ModelMetadata` and `ExportSettings`, each as a JSON object."""
FORMAT_VERSION = 1
"""Version of the metadata's layout."""


class ModelMetadata(Spec):
    """Input and classes of a network; a file holds them as JSON in its metadata, key ``overfly``."""

    architecture: str
    """The network's name in the registry."""
    classes: Classes
    """Names and colors of the K classes."""
    bands: Annotated[PositiveInt, Field(le=4096)] = 3
    """Bands C of the image, in the order of the training images."""
    max_value: PositiveFloat = 255.0
    """Largest value of the sensor."""
    mean: tuple[float, ...]
    """Mean of each band in the sensor's own range, subtracted by the network."""
    std: tuple[float, ...]
    """Standard deviation of each band in the sensor's own range, divided by in the network."""
    window: Annotated[Pixels, Field(le=16384)] = 512
    """Side of sliding windows in pixels."""
    fixed: bool = False
    """Whether images must have exactly this side; otherwise any size is accepted."""
    gsd: Meters | None = None
    """Ground sampling distance of the training images, in meters a pixel; None where it is unknown."""
    title: str = ""
    """Name of the run that trained it."""


class ExportSettings(Spec):
    """Settings of an export; a file holds them as JSON in its metadata, key ``overfly_export``."""

    format_version: NonNegativeInt = FORMAT_VERSION
    """Version of the metadata's layout."""
    format: ExportFormat = "onnx"
    """onnx (.onnx), openvino (.xml and .bin) or torch (.pt2)."""
    precision: ExportPrecision = "32"
    """Arithmetic of the network."""
    output: ExportOutput = "probabilities"
    """Output of the graph."""
    resize: Pixels | None = None
    """Side of the square that the graph resizes images to; none: no resizing."""
    opset: NonNegativeInt = 0
    """ONNX operator set of the graph; 0 for other formats."""
    version: str = __version__
    """Version of overfly that wrote the file."""


def metadata_entries(metadata: ModelMetadata, settings: ExportSettings) -> dict[str, str]:
    """Return the key-value pairs of a file's metadata."""
    return {MODEL_KEY: metadata.model_dump_json(), EXPORT_KEY: settings.model_dump_json()}


def read_metadata(properties: Mapping[str, str], path: Path) -> tuple[ModelMetadata, ExportSettings]:
    """Parse `metadata_entries`; raise `WeightsError` if another program, or another format version, wrote the file."""
    if MODEL_KEY not in properties:
        raise WeightsError(
            f"{path} has no metadata key {MODEL_KEY!r} with classes and bands; give a file that `overfly export` wrote"
        )
    try:
        export = dict(json.loads(properties.get(EXPORT_KEY, "{}")))
    except (ValueError, TypeError):
        export = {}
    if export.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{path} was exported by overfly {export.get('version', 'of an unknown version')} in format "
            f"{export.get('format_version', 0)}, and this version reads format {FORMAT_VERSION}; export it again, or "
            "update overfly"
        )
    try:
        return ModelMetadata.model_validate_json(properties[MODEL_KEY]), ExportSettings.model_validate(export)
    except ValidationError:
        raise WeightsError(
            f"{path} has metadata (keys {MODEL_KEY}, {EXPORT_KEY}) that overfly {__version__} cannot read; export again"
        ) from None


@dataclass(frozen=True)
class Predictor:
    """A network on a runtime (torch, onnxruntime or openvino), and the name of its device there.

    Attributes:
        run: images (B, C, H, W), float32, in the sensor's own range, to class probabilities (B, K, H, W), float32.
            Several threads may call it, one at a time.
        export: format and precision of its file; None for a network that is not exported.
    """

    metadata: ModelMetadata
    backend: str
    device: str
    run: Callable[[Floats], Floats]
    export: tuple[str, str] | None = None

    def __call__(self, images: Floats) -> Floats:
        """Return class probabilities (B, K, H, W), float32, of images (B, C, H, W) in the sensor's own range.

        Raises `DataError`: the images do not have the bands, or the fixed size, that the network reads.
        """
        metadata, shape = self.metadata, images.shape
        if len(shape) != 4 or shape[1] != metadata.bands:
            raise DataError(f"images must have shape (B, {metadata.bands}, H, W), got {shape}")
        if metadata.fixed and shape[2:] != (metadata.window, metadata.window):
            raise DataError(f"the network reads windows of {metadata.window} pixels, got {shape[2]} × {shape[3]}")
        return self.run(np.ascontiguousarray(images, dtype=np.float32))


def model_metadata(
    segmenter: Segmenter, *, window: int = 512, gsd: float | None = None, title: str = ""
) -> ModelMetadata:
    """Return the metadata of a trained network; the arguments are fields of `ModelMetadata`."""
    return ModelMetadata(
        architecture=segmenter.architecture, classes=segmenter.classes, bands=segmenter.bands,
        max_value=segmenter.max_value, mean=tuple(segmenter.mean.flatten().tolist()),
        std=tuple(segmenter.std.flatten().tolist()), window=window, gsd=gsd, title=title,
    )  # fmt: skip


def segmenter_predictor(segmenter: Segmenter, metadata: ModelMetadata, device: torch.device | str = "cpu") -> Predictor:
    """Return the predictor of a copy of a trained network in PyTorch, without training heads."""
    device = torch.device(device)
    network = segmenter.without_training_heads().eval().to(device)

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            result = network.scores(torch.from_numpy(images).to(device)).float().softmax(1)
        return result.cpu().numpy()

    return Predictor(metadata, "torch", str(device), run)


def resizing_predictor(predictor: Predictor, side: int) -> Predictor:
    """Return a predictor that resizes images to a square of ``side`` pixels, and class scores back to their size."""

    def run(images: Floats) -> Floats:
        image = torch.from_numpy(images)
        square = F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)
        scores = torch.from_numpy(predictor.run(np.ascontiguousarray(square.numpy()))).clamp_min(1e-30).log()
        scores = F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)
        return scores.softmax(1).numpy()

    return replace(predictor, run=run)
