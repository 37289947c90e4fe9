"""Metadata of an exported file: `ModelMetadata` under the key ``overfly``, `ExportSettings` under ``overfly_export``.

Also here: the check that a graph's input and output are those of its metadata, and the keys that QGIS reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from overfly.core.choices import ExportFormat, ExportOutput, ExportPrecision
from overfly.core.errors import WeightsError
from overfly.core.spec import Pixels, Spec, Whole
from overfly.exporting.predictor import ModelMetadata

MODEL_KEY, EXPORT_KEY = "overfly", "overfly_export"
"""Metadata keys; each value is a JSON object."""
FORMAT_VERSION = 1
"""Version of the layout of both values; raised when a reader of the previous version would misread them."""
OUTPUTS: tuple[str, ...] = get_args(ExportOutput)
TILE_OVERLAP = 25
"""Overlap of two tiles in QGIS, in percent."""


def _package_version() -> str:
    try:
        return version("overfly")
    except PackageNotFoundError:  # run from its sources without being installed
        return "unknown"


VERSION = _package_version()
"""Version of overfly that is running."""


class ExportSettings(Spec):
    """How a file was exported, and what its graph returns."""

    format_version: Whole = FORMAT_VERSION
    """Version of the metadata's layout."""
    format: ExportFormat = "onnx"
    """onnx (.onnx), openvino (.xml and .bin) or torch (.pt2)."""
    precision: ExportPrecision = "32"
    """Arithmetic of the network."""
    output: ExportOutput = "probabilities"
    """What the graph returns."""
    resize: Pixels | None = None
    """Side of the square that the graph resizes images to; none: no resizing."""
    opset: Whole = 0
    """ONNX operator set of the graph; 0 for other formats."""
    version: str = VERSION
    """Version of overfly that wrote the file."""


def metadata_entries(metadata: ModelMetadata, settings: ExportSettings) -> dict[str, str]:
    """Return both values as the key-value pairs of a file's metadata."""
    return {MODEL_KEY: metadata.model_dump_json(), EXPORT_KEY: settings.model_dump_json()}


def read_metadata(properties: Mapping[str, str], path: Path) -> tuple[ModelMetadata, ExportSettings]:
    """Parse the key-value pairs that `metadata_entries` made.

    Raises:
        WeightsError: the file was not exported by overfly, or by a version of another format.
    """
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
            f"{export.get('format_version', 0)}, and this version reads format {FORMAT_VERSION}; export it again"
        )
    try:
        return ModelMetadata.model_validate_json(properties[MODEL_KEY]), ExportSettings.model_validate(export)
    except ValidationError:
        raise WeightsError(
            f"{path} has metadata (keys {MODEL_KEY}, {EXPORT_KEY}) that overfly {VERSION} does not understand; "
            "export it again"
        ) from None


Shape = tuple[int | None, ...]
"""Sizes of a tensor's dimensions; None for a dimension of any size."""


@dataclass(frozen=True)
class GraphSignature:
    """Input and output of a graph, read from the graph itself.

    Attributes:
        image: shape of its input; None where the number of dimensions is unknown.
        output: shape of its output; None where the number of dimensions is unknown.
        is_integer: whether its output holds integers.
        name: name of its output, or of its last operator: one of `OUTPUTS` where that is known.
    """

    image: Shape | None
    output: Shape | None
    is_integer: bool
    name: str = ""


def onnx_signature(session: Any) -> GraphSignature:
    """Return the signature of a session of ONNX Runtime."""
    image, output = session.get_inputs()[0], session.get_outputs()[0]
    shapes = [tuple(side if isinstance(side, int) else None for side in end.shape) for end in (image, output)]
    return GraphSignature(shapes[0], shapes[1], "int" in output.type, output.name)


def openvino_signature(model: Any) -> GraphSignature:
    """Return the signature of a model of OpenVINO."""
    output = model.output(0)
    shapes = [
        None if shape.rank.is_dynamic else tuple(None if side.is_dynamic else int(side.get_length()) for side in shape)
        for shape in (model.input(0).get_partial_shape(), output.get_partial_shape())
    ]
    names = [name for name in sorted(output.get_names()) if name in OUTPUTS]
    return GraphSignature(shapes[0], shapes[1], bool(output.get_element_type().is_integral()), (names or [""])[0])


def torch_signature(program: Any) -> GraphSignature:
    """Return the signature of an exported program: probabilities if softmax is its last operator, else logits."""
    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    ends = [nodes[names[0]] for names in (signature.user_inputs, signature.user_outputs)]
    values = [end.meta["val"] for end in ends]
    shapes = [tuple(side if isinstance(side, int) else None for side in value.shape) for value in values]
    is_integer = not values[1].dtype.is_floating_point
    name = "" if is_integer else "probabilities" if "softmax" in str(ends[1].target) else "logits"
    return GraphSignature(shapes[0], shapes[1], is_integer, name)


def check_signature(path: Path, graph: GraphSignature, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """Check that a graph's input and output are those of the file's metadata.

    Raises:
        WeightsError: they differ.
    """
    classes = settings.output == "classes"
    if graph.image is not None:
        _check_equal(path, "input dimensions", len(graph.image), 4)
        _check_equal(path, "input bands", graph.image[1], metadata.bands)
        for side in graph.image[2:]:
            if side is not None and not metadata.fixed:
                raise _mismatch(path, "input side", side, "any")
            _check_equal(path, "input side", side, metadata.window)
    if graph.output is not None:
        _check_equal(path, "output dimensions", len(graph.output), 3 if classes else 4, EXPORT_KEY)
    if graph.is_integer != classes:
        raise _mismatch(path, "output type", "integer" if graph.is_integer else "float", settings.output, EXPORT_KEY)
    if graph.output is not None and not classes:
        _check_equal(path, "classes", graph.output[1], len(metadata.classes))
    if graph.name in OUTPUTS and graph.name != settings.output:
        raise _mismatch(path, "output", graph.name, settings.output, EXPORT_KEY)


def check_output(path: Path, output: Any, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """Check that an output has the metadata's classes; for class ids and open shapes no signature shows it.

    Raises:
        WeightsError: it has others.
    """
    count = len(metadata.classes)
    if settings.output == "classes":
        if int(np.max(output, initial=0)) >= count:
            raise _mismatch(path, "largest class id", int(np.max(output)), f"at most {count - 1}")
    elif output.ndim != 4 or output.shape[1] != count:
        raise _mismatch(path, "output shape", output.shape, f"{count} classes")


def _check_equal(path: Path, quantity: str, value: int | None, wanted: int, key: str = MODEL_KEY) -> None:
    if value is not None and value != wanted:
        raise _mismatch(path, quantity, value, wanted, key)


def _mismatch(path: Path, quantity: str, value: object, wanted: object, key: str = MODEL_KEY) -> WeightsError:
    return WeightsError(
        f"{path}: {quantity} of the graph: {value}, of its metadata (key {key}): {wanted}; export it again"
    )


def deepness_entries(metadata: ModelMetadata) -> dict[str, str]:
    """Return the metadata keys that QGIS' plug-in Deepness reads in an ONNX file, each value as JSON.

    Deepness feeds ``(tile / 255 - standardization_mean) / standardization_std`` of 8-bit tiles (B, C, S, S), and takes
    the class of largest output where that is above seg_thresh, class 0 elsewhere. Our graph takes the sensor's own
    range: a mean of 0 and a deviation of 1/255 undo the division, and a threshold of 0 changes no pixel.
    Source: the plug-in's documentation for creators of models, and its reader ``processing/models/model_base.py``.

    Args:
        metadata: of the network; ``resolution`` is left out where the ground sampling distance is unknown.
    """
    values: dict[str, object] = {
        "model_type": "Segmentor",
        "class_names": dict(enumerate(metadata.classes.names)),
        "tiles_size": metadata.window,
        "tile_size": metadata.window,  # the plug-in's reader takes this spelling, its documentation the other
        "tiles_overlap": TILE_OVERLAP,
        "standardization_mean": [0.0] * metadata.bands,
        "standardization_std": [1 / 255] * metadata.bands,
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    if metadata.gsd is not None:
        values["resolution"] = round(100 * metadata.gsd, 4)
    return {key: json.dumps(value) for key, value in values.items()}


__all__ = [
    "EXPORT_KEY",
    "FORMAT_VERSION",
    "MODEL_KEY",
    "ExportSettings",
    "GraphSignature",
    "check_output",
    "check_signature",
    "deepness_entries",
    "metadata_entries",
    "onnx_signature",
    "openvino_signature",
    "read_metadata",
    "torch_signature",
]
