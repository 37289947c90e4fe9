"""A graph as an ONNX or OpenVINO file; as a .pt2 file it is written by `torch_program`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overfly.core.errors import MissingExtraError, OverflyError
from overfly.exporting.graph import LEAST_SIDE, ExportModule
from overfly.exporting.runtimes import antialias_resize, openvino, openvino_core
from overfly.models.checkpoints import first_line

OPSET = 18
"""ONNX operator set: the first whose Resize has ``antialias``; every runtime of the last three years reads it."""


def write_onnx(module: ExportModule, path: Path, bands: int, properties: Mapping[str, str]) -> Path:
    """Write a graph as one ONNX file.

    PyTorch's exporter by tracing is used: it names every value by the module that made it, and takes 3 seconds where
    the exporter by torch.export takes 30.

    Args:
        module: the graph, in evaluation mode.
        path: file to write.
        bands: bands of its images.
        properties: metadata of the file.

    Raises:
        MissingExtraError: onnx is not installed.
        OverflyError: ONNX has no operator for a part of the network.
        OSError: the disk is full.
    """
    package = onnx()
    output: str = module.output
    batch = {0: "batch"}
    sides = {} if module.fixed else {2: "height", 3: "width"}
    output_sides = {key - (module.output == "classes"): name for key, name in sides.items()}
    example = _example_image(module, bands)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants that tracing makes of sizes, and of the exporter's age
            torch.onnx.export(
                module, (example,), path, dynamo=False, opset_version=OPSET, do_constant_folding=True,
                input_names=["image"], output_names=[output],
                dynamic_axes={"image": batch | sides, output: batch | output_sides},
            )  # fmt: skip
    except OSError:  # of the disk
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
    """Write the output shape of an ONNX model in full: K, and the sides where they are fixed, else their names."""
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
    """Let the node that resizes the image use antialiasing, as in training."""
    helper = onnx().helper
    for node in model.graph.node:
        if node.op_type == "Resize" and node.name == "/Resize":
            node.attribute.append(helper.make_attribute("antialias", 1))


def write_openvino(source: Path, path: Path, properties: Mapping[str, str], *, half: bool = False) -> Path:
    """Convert an ONNX file to OpenVINO's pair of .xml and .bin.

    Args:
        source: the ONNX file.
        path: the .xml file to write; its .bin is written beside it.
        properties: metadata of the file.
        half: keep weights in float16.
    """
    model = openvino_core().read_model(source)
    antialias_resize(model)
    save_openvino(model, path, properties, half=half)
    return path


def save_openvino(model: Any, path: Path, properties: Mapping[str, str], *, half: bool = False) -> None:
    """Save a model of OpenVINO with metadata."""
    for key, value in properties.items():
        model.set_rt_info(value, key)
    openvino().save_model(model, str(path), compress_to_fp16=half)


def _example_image(module: ExportModule, bands: int) -> Tensor:
    """Return an image to trace a graph with."""
    generator = torch.Generator().manual_seed(0)
    side = LEAST_SIDE if module.dtype == torch.float16 else 96  # float16 convolutions are slow on a CPU
    return torch.rand(1, bands, *(module.fixed or (side, side)), generator=generator) * 255


def onnx() -> Any:
    """Import onnx.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx as package
    except ImportError:
        raise MissingExtraError("onnx", "export", "writing an ONNX file") from None
    return package


__all__ = ["OPSET", "onnx", "save_openvino", "set_properties", "write_onnx", "write_openvino"]
