"""What an exported file says of itself: facts under the key ``overfly``, how it was made under ``overfly_export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from overfly.core.errors import WeightsError
from overfly.core.spec import Pixels, Spec, Whole
from overfly.exporting.graph import Output, Precision
from overfly.exporting.predictor import ModelMetadata

Format = Literal["onnx", "openvino", "torch"]
FACTS, MADE = "overfly", "overfly_export"
"""The two keys, each a JSON object."""


def _own_version() -> str:
    try:
        return version("overfly")
    except PackageNotFoundError:  # run from its sources without being installed
        return "unknown"


VERSION = _own_version()
"""Version of overfly that is running."""


class ExportSettings(Spec):
    """How an exported file was made, and what its graph gives."""

    format: Format = "onnx"
    """onnx (.onnx), openvino (.xml and .bin) or torch (.pt2)."""
    precision: Precision = "32"
    """Arithmetic of the network."""
    output: Output = "probabilities"
    """What the graph gives."""
    resize: Pixels | None = None
    """Side of the square that the graph resizes images to; none: as they come."""
    opset: Whole = 0
    """ONNX operator set that the graph was written in; 0 where there is none."""
    version: str = VERSION
    """Version of overfly that wrote the file."""

    @property
    def kind(self) -> tuple[str, str]:
        """Format and precision."""
        return self.format, self.precision


def metadata_entries(metadata: ModelMetadata, settings: ExportSettings) -> dict[str, str]:
    """Both values as they are written into a file's metadata."""
    return {FACTS: metadata.model_dump_json(), MADE: settings.model_dump_json()}


def read_metadata(metadata: Mapping[str, str], path: Path) -> tuple[ModelMetadata, ExportSettings]:
    """What `metadata_entries` wrote.

    Raises:
        WeightsError: the file was not written by overfly, or by a later version of it.
    """
    if FACTS not in metadata:
        raise WeightsError(
            f"{path} says nothing of its classes and bands (metadata key {FACTS}); give a file that `overfly export` "
            "wrote"
        )
    try:
        return ModelMetadata.model_validate_json(metadata[FACTS]), ExportSettings.model_validate_json(
            metadata.get(MADE, "{}")
        )
    except ValidationError:
        other = _version(metadata)
        raise WeightsError(
            f"{path} describes itself in words of overfly {other} that this version, {VERSION}, does not know; "
            "export it again, or use the version that wrote it"
        ) from None


def _version(metadata: Mapping[str, str]) -> str:
    try:
        return str(json.loads(metadata.get(MADE, "{}")).get("version", "of another version"))
    except (ValueError, AttributeError):
        return "of another version"


__all__ = ["FACTS", "MADE", "ExportSettings", "Format", "metadata_entries", "read_metadata"]
