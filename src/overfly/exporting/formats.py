"""Write graphs as ONNX or OpenVINO files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overfly.core.errors import OverflyError, import_extra
from overfly.exporting.graph import MIN_SIDE, ExportModule
from overfly.exporting.predictor import ModelMetadata
from overfly.exporting.runtimes import antialias_resize, openvino, openvino_core
from overfly.models.checkpoints import first_line

OPSET = 18
"""ONNX operator set: the first whose Resize has ``antialias``."""
TILE_OVERLAP = 25
"""Overlap of two tiles in QGIS, in percent."""


def write_onnx(module: ExportModule, path: Path, properties: Mapping[str, str]) -> Path:
    """Write a graph as one ONNX file.

    PyTorch's tracing exporter is used: it names values by their modules, and is faster than torch.export.

    Raises:
        MissingExtraError: onnx is not installed.
        OverflyError: ONNX has no operator for a part of the network.
        OSError: the disk is full.
    """
    package = onnx()
    output: str = module.output
    batch = {0: "batch"}
    sides = {} if module.fixed else {2: "height", 3: "width"}
    output_sides = {key - (output == "classes"): name for key, name in sides.items()}
    example = _example_image(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes traced as constants, and a deprecation
            torch.onnx.export(
                module, (example,), path, dynamo=False, opset_version=OPSET, do_constant_folding=True,
                input_names=["image"], output_names=[output],
                dynamic_axes={"image": batch | sides, output: batch | output_sides},
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # the exporter raises many kinds
        raise OverflyError(
            f"the network cannot be written as ONNX ({first_line(error)}); export it with --format torch"
        ) from error
    model = package.load(path)
    _write_output_shape(model, module)
    _set_antialias(model)
    set_properties(model, properties)
    package.checker.check_model(model)
    package.save(model, path)
    return path


def set_properties(model: Any, properties: Mapping[str, str]) -> None:
    """Replace the metadata of an ONNX model."""
    del model.metadata_props[:]
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def _write_output_shape(model: Any, module: ExportModule) -> None:
    """Write all dimensions of an ONNX model's output: classes, and fixed or named sides."""
    shape = model.graph.output[0].type.tensor_type.shape.dim
    for index, side in zip((-2, -1), module.fixed or ("height", "width"), strict=True):
        shape[index].Clear()
        if isinstance(side, int):
            shape[index].dim_value = side
        else:
            shape[index].dim_param = side
    if module.output != "classes":
        shape[1].Clear()
        shape[1].dim_value = module.classes


def _set_antialias(model: Any) -> None:
    """Set antialiasing in the node that resizes the image."""
    for node in model.graph.node:
        if node.op_type == "Resize" and node.name == "/Resize":
            node.attribute.append(onnx().helper.make_attribute("antialias", 1))


def write_openvino(source: Path, path: Path, properties: Mapping[str, str], *, half: bool = False) -> Path:
    """Convert an ONNX file to OpenVINO's .xml, and the .bin beside it; with ``half`` the weights are float16."""
    model = openvino_core().read_model(source)
    antialias_resize(model)
    save_openvino(model, path, properties, half=half)
    return path


def save_openvino(model: Any, path: Path, properties: Mapping[str, str], *, half: bool = False) -> None:
    """Save a model of OpenVINO with metadata."""
    for key, value in properties.items():
        model.set_rt_info(value, key)
    openvino().save_model(model, str(path), compress_to_fp16=half)


def _example_image(module: ExportModule) -> Tensor:
    """Return an image for tracing."""
    generator = torch.Generator().manual_seed(0)
    side = MIN_SIDE if module.dtype == torch.float16 else 96  # float16 convolutions are slow on a CPU
    return torch.rand(1, module.bands, *(module.fixed or (side, side)), generator=generator) * 255


def deepness_entries(metadata: ModelMetadata) -> dict[str, str]:
    """Return the metadata keys that QGIS' plug-in Deepness reads in an ONNX file, each value as JSON.

    Deepness feeds ``(tile / 255 - standardization_mean) / standardization_std`` of 8-bit tiles (B, C, S, S), and takes
    the class of largest output where that is above seg_thresh, class 0 elsewhere. Our graph takes the sensor's own
    range: a mean of 0 and a deviation of 1/255 undo the division, and a threshold of 0 changes no pixel.
    Source: the plug-in's documentation for creators of models, and its reader ``processing/models/model_base.py``.
    ``resolution`` is left out where the ground sampling distance is unknown.
    """
    values: dict[str, object] = {
        "model_type": "Segmentor",
        "class_names": dict(enumerate(metadata.classes.names)),
        "tiles_size": metadata.window,
        "tile_size": metadata.window,  # name in the plug-in's reader; the other is in its documentation
        "tiles_overlap": TILE_OVERLAP,
        "standardization_mean": [0.0] * metadata.bands,
        "standardization_std": [1 / 255] * metadata.bands,
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    if metadata.gsd is not None:
        values["resolution"] = round(100 * metadata.gsd, 4)
    return {key: json.dumps(value) for key, value in values.items()}


def onnx() -> Any:
    """Import onnx, or raise a MissingExtraError."""
    return import_extra("onnx", "export", "writing an ONNX file")
