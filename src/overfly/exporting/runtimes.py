"""Exported files as predictors: .onnx by onnxruntime or openvino, .xml by openvino, .pt2 by PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overfly.core.errors import MissingExtraError, RecipeError, WeightsError
from overfly.exporting import agreement
from overfly.exporting.metadata import MADE, ExportSettings, read_metadata
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor
from overfly.exporting.program import read_program
from overfly.models.checkpoints import first_line

Graph = Callable[[Floats], Any]
"""Images (B, C, H, W), float32, to whatever the graph gives."""


def onnx_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """An ONNX file run by ONNX Runtime.

    Args:
        path: a file that `overfly export` wrote.
        device: cpu, or cuda where onnxruntime was built for it.
        threads: threads of the processor; None: as many as it has cores.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        WeightsError: the file is missing, damaged, not one of ours, or its graph is not what it says.
    """
    runtime = onnxruntime()
    _there(path)
    kind = torch.device(device).type
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider is None or provider not in runtime.get_available_providers():
        raise RecipeError(f"the onnxruntime installed here does not run on {device}; use --device cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # the library raises its own kinds for files that are not what they say
        raise WeightsError(f"{path} cannot be opened by onnxruntime ({first_line(error)}); export it again") from error
    metadata, settings = read_metadata(session.get_modelmeta().custom_metadata_map, path)
    agreement.check(path, agreement.of_session(session), metadata, settings)
    name = session.get_inputs()[0].name

    def graph(images: Floats) -> Any:
        return session.run(None, {name: images})[0]

    return Predictor(metadata, "onnxruntime", kind, probabilities(graph, metadata, settings, path), settings.kind)


def openvino_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """An OpenVINO or ONNX file run by OpenVINO.

    Args:
        path: the .xml (its .bin beside it) or .onnx file that `overfly export` wrote.
        device: cpu, or a device in OpenVINO's words, such as GPU.
        threads: threads of the processor; None: as many as it has cores.

    Raises:
        MissingExtraError: openvino is not installed.
        WeightsError: the file is missing, damaged, not one of ours, or its graph is not what it says.
    """
    core = openvino_core()
    _there(path)
    place = "CPU" if device == "cpu" else device.upper()
    if place.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise RecipeError(
            f"openvino runs on {', '.join(core.available_devices)} here, not on {device}; use --device cpu"
        )
    try:
        model = core.read_model(path)
    except Exception as error:  # as above
        raise WeightsError(f"{path} cannot be opened by openvino ({first_line(error)}); export it again") from error
    metadata, settings = read_metadata(openvino_metadata(model), path)
    agreement.check(path, agreement.of_model(model), metadata, settings)
    smooth(model)
    compiled = core.compile_model(model, place, openvino_settings(settings, threads))
    request = compiled.create_infer_request()

    def graph(images: Floats) -> Any:
        return np.array(request.infer([images])[0])

    return Predictor(metadata, "openvino", place.lower(), probabilities(graph, metadata, settings, path), settings.kind)


def torch_predictor(path: Path, device: torch.device | str = "cpu") -> Predictor:
    """A program of torch.export run by PyTorch.

    Args:
        path: the .pt2 file that `overfly export` wrote.
        device: where to run.

    Raises:
        WeightsError: the file is missing, damaged, not one of ours, would run code, or its graph is not what it says.
    """
    _there(path)
    place = torch.device(device)
    program, properties = read_program(path)
    metadata, settings = read_metadata(properties, path)
    agreement.check(path, agreement.of_graph(program), metadata, settings)
    if place.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, place)
    module = program.module()

    def graph(images: Floats) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(place)).cpu().numpy()

    return Predictor(metadata, "torch", str(place), probabilities(graph, metadata, settings, path), settings.kind)


def probabilities(
    graph: Graph, metadata: ModelMetadata, settings: ExportSettings, path: Path
) -> Callable[[Floats], Floats]:
    """Images to class probabilities (B, K, H, W), float32, whatever the graph itself gives."""

    def run(images: Floats) -> Floats:
        given = graph(images)
        agreement.check_given(path, given, metadata, settings)
        if settings.output == "classes":  # all that is known is which class is likeliest
            return np.ascontiguousarray(np.eye(len(metadata.classes), dtype=np.float32)[given].transpose(0, 3, 1, 2))
        if settings.output == "logits":
            odds = np.exp(given - given.max(1, keepdims=True))
            given = odds / odds.sum(1, keepdims=True)
        found: Floats = np.asarray(given, dtype=np.float32)
        return found

    return run


def smooth(model: Any) -> None:
    """Let a model of OpenVINO resize its images as PyTorch does, averaging over the pixels that are left out.

    OpenVINO reads ONNX's Resize and passes over its ``antialias``.
    """
    from openvino import opset13 as operators

    for operation in model.get_ops():
        if operation.get_type_name() == "Interpolate" and operation.get_friendly_name() == "/Resize":
            if operation.get_attributes()["mode"] == "bilinear_pillow":
                return
            side = operation.output(0).partial_shape[2].get_length()
            sizes, axes = (operators.constant(np.array(pair, np.int64)) for pair in ([side, side], [2, 3]))
            resized = operators.interpolate(operation.input_value(0), sizes, "bilinear_pillow", "sizes", axes=axes)
            resized.set_friendly_name("/Resize")
            operation.output(0).replace(resized.output(0))
            return


def openvino_metadata(model: Any) -> dict[str, str]:
    """The metadata of a model that OpenVINO has read: of an .xml file under our own keys, of ONNX under framework."""
    found: dict[str, str] = {}
    for section in ([], ["framework"]):
        for key in ("overfly", MADE):
            if model.has_rt_info([*section, key]):
                found[key] = str(model.get_rt_info([*section, key]).value)
    return found


def openvino_settings(settings: ExportSettings, threads: int | None = None) -> dict[str, Any]:
    """How OpenVINO compiles: for the latency of single images, with 16-bit arithmetic only where the file says so."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if (
        settings.precision != "16" or settings.format != "openvino"
    ):  # left alone, it takes bfloat16 where the processor has it
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def onnxruntime() -> Any:
    """The package onnxruntime.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime as package
    except ImportError:
        raise MissingExtraError("onnxruntime", "export", "running an ONNX file") from None
    return package


def openvino() -> Any:
    """The package openvino.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino as package
    except ImportError:
        raise MissingExtraError("openvino", "openvino", "running a network with OpenVINO") from None
    return package


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the process and never closed, so that its plug-ins are opened once.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    return openvino().Core()


def _there(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give one that `overfly export` wrote")


__all__ = [
    "onnx_predictor",
    "onnxruntime",
    "openvino",
    "openvino_core",
    "openvino_metadata",
    "openvino_predictor",
    "openvino_settings",
    "smooth",
    "torch_predictor",
]
