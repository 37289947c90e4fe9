"""Exported files as predictors: .onnx by ONNX Runtime or OpenVINO, .xml by OpenVINO, .pt2 by PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overfly.core.errors import MissingExtraError, RecipeError, WeightsError
from overfly.exporting.metadata import (
    EXPORT_KEY,
    MODEL_KEY,
    ExportSettings,
    GraphSignature,
    check_output,
    check_signature,
    onnx_signature,
    openvino_signature,
    read_metadata,
    torch_signature,
)
from overfly.exporting.predictor import Floats, Predictor
from overfly.exporting.torch_program import read_program
from overfly.models.checkpoints import first_line

Graph = Callable[[Floats], Any]
"""Images (B, C, H, W), float32, to the output of the file's graph."""


def onnx_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an ONNX file with ONNX Runtime.

    Args:
        path: a file that `overfly export` wrote.
        device: cpu, or cuda where onnxruntime was built for it.
        threads: CPU threads; None: one a core.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        WeightsError: the file is missing or damaged, not exported by overfly, or its graph is not that of its metadata.
    """
    runtime = onnxruntime()
    _check_exists(path)
    kind = torch.device(device).type
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider is None or provider not in runtime.get_available_providers():
        raise RecipeError(f"the installed onnxruntime does not run on {device}; use --device cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # the library raises many kinds for damaged files
        raise WeightsError(f"{path} cannot be opened by onnxruntime ({first_line(error)}); export it again") from error
    name = session.get_inputs()[0].name

    def graph(images: Floats) -> Any:
        return session.run(None, {name: images})[0]

    properties = session.get_modelmeta().custom_metadata_map
    return _predictor(path, ("onnxruntime", kind), graph, onnx_signature(session), properties)


def openvino_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an OpenVINO or ONNX file with OpenVINO.

    Args:
        path: the .xml (its .bin beside it) or .onnx file that `overfly export` wrote.
        device: cpu, or a device as OpenVINO names it, such as GPU.
        threads: CPU threads; None: one a core.

    Raises:
        MissingExtraError: openvino is not installed.
        WeightsError: the file is missing or damaged, not exported by overfly, or its graph is not that of its metadata.
    """
    core = openvino_core()
    _check_exists(path)
    kind = "CPU" if device == "cpu" else device.upper()
    if kind.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise RecipeError(
            f"openvino runs on {', '.join(core.available_devices)} here, not on {device}; use --device cpu"
        )
    try:
        model = core.read_model(path)
    except Exception as error:  # as above
        raise WeightsError(f"{path} cannot be opened by openvino ({first_line(error)}); export it again") from error
    properties = openvino_properties(model)
    settings = read_metadata(properties, path)[1]
    signature = openvino_signature(model)
    antialias_resize(model)
    request = core.compile_model(model, kind, openvino_options(settings, threads)).create_infer_request()

    def graph(images: Floats) -> Any:
        return np.array(request.infer([images])[0])

    return _predictor(path, ("openvino", kind.lower()), graph, signature, properties)


def torch_predictor(path: Path, device: torch.device | str = "cpu") -> Predictor:
    """Open a program of torch.export with PyTorch.

    Args:
        path: the .pt2 file that `overfly export` wrote.
        device: where to run.

    Raises:
        WeightsError: the file is missing or damaged, not exported by overfly, could run code, or its graph is not that
            of its metadata.
    """
    _check_exists(path)
    device = torch.device(device)
    program, properties = read_program(path)
    signature = torch_signature(program)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def graph(images: Floats) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(device)).cpu().numpy()

    return _predictor(path, ("torch", str(device)), graph, signature, properties)


def _predictor(
    path: Path, name: tuple[str, str], graph: Graph, signature: GraphSignature, properties: Mapping[str, str]
) -> Predictor:
    """Return a predictor of class probabilities, whatever the graph's output is; ``name`` is backend and device."""
    metadata, settings = read_metadata(properties, path)
    check_signature(path, signature, metadata, settings)

    def run(images: Floats) -> Floats:
        output = graph(images)
        check_output(path, output, metadata, settings)
        if settings.output == "classes":  # one-hot: probabilities are not known
            return np.ascontiguousarray(np.eye(len(metadata.classes), dtype=np.float32)[output].transpose(0, 3, 1, 2))
        if settings.output == "logits":
            odds = np.exp(output - output.max(1, keepdims=True))
            output = odds / odds.sum(1, keepdims=True)
        probabilities: Floats = np.asarray(output, dtype=np.float32)
        return probabilities

    return Predictor(metadata, *name, run, (settings.format, settings.precision))


def antialias_resize(model: Any) -> None:
    """Let a model of OpenVINO resize its images as PyTorch does, with antialiasing.

    OpenVINO ignores the ``antialias`` of ONNX's Resize.
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


def openvino_properties(model: Any) -> dict[str, str]:
    """Return the metadata of a model of OpenVINO: at the top level of an .xml file, under ``framework`` of ONNX."""
    properties: dict[str, str] = {}
    for section in ([], ["framework"]):
        for key in (MODEL_KEY, EXPORT_KEY):
            if model.has_rt_info([*section, key]):
                properties[key] = str(model.get_rt_info([*section, key]).value)
    return properties


def openvino_options(settings: ExportSettings, threads: int | None = None) -> dict[str, Any]:
    """Return how OpenVINO compiles: for latency, with 16-bit arithmetic only in OpenVINO files of that precision."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if settings.precision != "16" or settings.format != "openvino":  # its default is bfloat16 where the CPU has it
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


def onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime as package
    except ImportError:
        raise MissingExtraError("onnxruntime", "export", "running an ONNX file") from None
    return package


def openvino() -> Any:
    """Import openvino.

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
    """Return OpenVINO's `Core`, one a process and never closed, so that its plug-ins are opened once.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    return openvino().Core()


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give a file that `overfly export` wrote")


__all__ = [
    "antialias_resize",
    "onnx_predictor",
    "onnxruntime",
    "openvino",
    "openvino_core",
    "openvino_predictor",
    "torch_predictor",
]
