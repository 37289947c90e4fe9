"""A graph as a file: ONNX, OpenVINO, a program of torch.export."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overfly.core.errors import MissingExtraError, OverflyError
from overfly.exporting.graph import ExportModule
from overfly.exporting.program import write_program
from overfly.exporting.runtimes import openvino, openvino_core
from overfly.exporting.runtimes import smooth as smooth_resize

OPSET = 18
"""ONNX operator set; the first whose Resize can smooth, and every runtime of the last three years reads it."""
LEAST_SIDE = 32
"""Least side of an image that a program of any size takes, in pixels."""
TRACED = (1280, 1408)
"""Size that programs of any size are traced with: large enough that no map on the way has one pixel."""


def write_onnx(module: ExportModule, path: Path, bands: int, properties: Mapping[str, str]) -> Path:
    """Write a graph as one ONNX file.

    PyTorch's exporter by tracing is used: it names every value by the module that made it, which is what a person
    wants to read where two runtimes differ, and it needs 3 seconds where the exporter by torch.export needs 30.

    Args:
        module: the graph, in evaluation mode.
        path: file to write.
        bands: bands of its images.
        properties: what the file says of itself.

    Raises:
        MissingExtraError: onnx is not installed.
        OverflyError: the network holds what ONNX has no operator for.
        OSError: the disk is full.
    """
    package = onnx()
    output: str = module.output
    batch = {0: "batch"}
    sides = {} if module.fixed else {2: "height", 3: "width"}
    answered = {key - (module.output == "classes"): name for key, name in sides.items()}
    example = example_image(module, bands)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants that tracing makes of sizes, and of the exporter's age
            torch.onnx.export(
                module, (example,), path, dynamo=False, opset_version=OPSET, do_constant_folding=True,
                input_names=["image"], output_names=[output],
                dynamic_axes={"image": batch | sides, output: batch | answered},
            )  # fmt: skip
    except OSError:  # of the disk, which another format does not mend
        raise
    except Exception as error:  # the exporter raises many kinds for what it cannot write
        raise OverflyError(
            f"the network cannot be written as ONNX ({_line(error)}); export it with --format torch"
        ) from (error)
    model = package.load(path)
    name_answer(model, module)
    smooth(model)
    describe(model, properties)
    package.checker.check_model(model)
    package.save(model, path)
    return path


def describe(model: Any, properties: Mapping[str, str]) -> None:
    """Put metadata into an ONNX model, in place of any that it has."""
    del model.metadata_props[:]
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def name_answer(model: Any, module: ExportModule) -> None:
    """Write the shape of an ONNX model's answer in full: K, and the sides where they are fixed, else their names."""
    shape = model.graph.output[0].type.tensor_type.shape.dim
    for place, side in zip((-2, -1), module.fixed or ("height", "width"), strict=True):
        shape[place].Clear()
        if isinstance(side, int):
            shape[place].dim_value = side
        else:
            shape[place].dim_param = side
    if module.output != "classes":
        shape[1].Clear()
        shape[1].dim_value = module.classes


def smooth(model: Any) -> None:
    """Let the node that resizes the image average over the pixels that it leaves out, as in training."""
    helper = onnx().helper
    for node in model.graph.node:
        if node.op_type == "Resize" and node.name == "/Resize":
            node.attribute.append(helper.make_attribute("antialias", 1))


def write_openvino(source: Path, path: Path, properties: Mapping[str, str], *, half: bool = False) -> Path:
    """Write an ONNX file as OpenVINO's own pair, .xml and .bin.

    Args:
        source: the ONNX file.
        path: the .xml file to write; its .bin comes beside it.
        properties: what the file says of itself.
        half: keep weights in float16.
    """
    model = openvino_core().read_model(source)
    smooth_resize(model)
    save_openvino(model, path, properties, half=half)
    return path


def save_openvino(model: Any, path: Path, properties: Mapping[str, str], *, half: bool = False) -> None:
    """Save a model of OpenVINO with metadata."""
    for key, value in properties.items():
        model.set_rt_info(value, key)
    openvino().save_model(model, str(path), compress_to_fp16=half)


def write_torch(module: ExportModule, path: Path, bands: int, properties: Mapping[str, str]) -> Path:
    """Write a graph as a program of torch.export (.pt2).

    Args:
        module: the graph, in evaluation mode.
        path: file to write.
        bands: bands of its images.
        properties: what the file says of itself.

    Raises:
        OverflyError: the network cannot be traced.
    """
    program = trace(module, bands)
    write_program(program, path, properties)
    return path


def trace(module: ExportModule, bands: int) -> Any:
    """A graph as a program of torch.export.

    Raises:
        OverflyError: it cannot be traced.
    """
    import torch.fx.experimental._config as shapes

    image, sizes = example_image(module, bands), None
    if module.fixed is None:
        image = torch.zeros(2, bands, *TRACED)
        dim = torch.export.Dim
        sides = {2: dim("height", min=LEAST_SIDE), 3: dim("width", min=LEAST_SIDE)}
        sizes = ({0: dim("batch", min=1), **sides},)
    else:
        image = torch.zeros(2, bands, *module.fixed)
        sizes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        # a side of one pixel on some map is no special case: bilinear resizing takes it as any other
        with warnings.catch_warnings(), shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # of the library's own workings
            return torch.export.export(module, (image,), dynamic_shapes=sizes, strict=False)
    except Exception as error:  # the library raises many kinds for what it cannot trace
        raise OverflyError(
            f"the network cannot be traced by torch.export ({_line(error)}); export it with --size, for fixed tiles"
        ) from error


def example_image(module: ExportModule, bands: int) -> Tensor:
    """An image that a graph can be traced with."""
    generator = torch.Generator().manual_seed(0)
    side = LEAST_SIDE if module.dtype == torch.float16 else 96  # processors convolve float16 at a crawl
    return torch.rand(1, bands, *(module.fixed or (side, side)), generator=generator) * 255


def onnx() -> Any:
    """The package onnx.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx as package
    except ImportError:
        raise MissingExtraError("onnx", "export", "writing an ONNX file") from None
    return package


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


__all__ = ["OPSET", "describe", "onnx", "save_openvino", "trace", "write_onnx", "write_openvino", "write_torch"]
