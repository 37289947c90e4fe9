"""Open exported files as predictors: .onnx with ONNX Runtime or OpenVINO, .xml with OpenVINO, .pt2 with PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from overfly.core.atomic_files import file_sha256, read_json
from overfly.core.choices import ExportOutput
from overfly.core.errors import RecipeError, WeightsError, import_extra
from overfly.exporting.predictor import (
    EXPORT_KEY,
    MODEL_KEY,
    ExportSettings,
    Floats,
    ModelMetadata,
    Predictor,
    read_metadata,
)
from overfly.exporting.torch_program import read_program
from overfly.models.checkpoints import first_line

OUTPUTS: tuple[str, ...] = get_args(ExportOutput)
Graph = Callable[[Floats], Any]
"""Computes the graph's output from images (B, C, H, W), float32."""
DynamicShape = tuple[int | None, ...]
"""Sizes of a tensor's dimensions; None for a dimension of any size."""


def onnx_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an ONNX file with ONNX Runtime.

    Args:
        path: a file that `overfly export` wrote.
        device: cpu, or cuda where onnxruntime was built for it.
        threads: CPU threads; None: one per core.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        WeightsError: the file is missing, damaged, not exported by overfly, or its graph differs from its metadata.
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
    except Exception as error:  # the library has no common error class
        raise WeightsError(f"{path} cannot be opened by onnxruntime ({first_line(error)}); export it again") from error
    name = session.get_inputs()[0].name

    def graph(images: Floats) -> Any:
        return session.run(None, {name: images})[0]

    properties = session.get_modelmeta().custom_metadata_map
    return _predictor(path, ("onnxruntime", kind), graph, onnx_signature(session), properties)


def openvino_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an OpenVINO file (.xml, its .bin beside it) or ONNX file with OpenVINO; errors as in `onnx_predictor`.

    Args:
        path: a file that `overfly export` wrote.
        device: cpu, or a device as OpenVINO names it, such as GPU.
        threads: CPU threads; None: one per core.
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
    except Exception as error:
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
        device: device of the program.

    Raises:
        WeightsError: the file is missing, damaged, not exported by overfly, could run code, or its graph differs from
            its metadata.
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
    """Return a predictor of class probabilities for any output of the graph; ``name`` is backend and device."""
    metadata, settings = read_metadata(properties, path)
    check_signature(path, signature, metadata, settings)

    def run(images: Floats) -> Floats:
        output = graph(images)
        check_output(path, output, metadata, settings)
        if settings.output == "classes":  # one-hot, without probabilities
            return np.ascontiguousarray(np.eye(len(metadata.classes), dtype=np.float32)[output].transpose(0, 3, 1, 2))
        if settings.output == "logits":
            odds = np.exp(output - output.max(1, keepdims=True))
            output = odds / odds.sum(1, keepdims=True)
        probabilities: Floats = np.asarray(output, dtype=np.float32)
        return probabilities

    return Predictor(metadata, *name, run, (settings.format, settings.precision))


@dataclass(frozen=True)
class GraphSignature:
    """Input and output of a graph, read from the graph itself.

    Attributes:
        image: shape of its input; None where the number of dimensions is unknown.
        output: shape of its output; None where the number of dimensions is unknown.
        is_integer: whether its output holds integers.
        name: name of its output, or of its last operator: one of `OUTPUTS` where that is known.
    """

    image: DynamicShape | None
    output: DynamicShape | None
    is_integer: bool
    name: str = ""


def onnx_signature(session: Any) -> GraphSignature:
    """Return the signature of a session of ONNX Runtime."""
    image, output = session.get_inputs()[0], session.get_outputs()[0]
    shapes = [tuple(side if isinstance(side, int) else None for side in node.shape) for node in (image, output)]
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
    image, output = (nodes[names[0]] for names in (signature.user_inputs, signature.user_outputs))
    values = [image.meta["val"], output.meta["val"]]
    shapes = [tuple(side if isinstance(side, int) else None for side in value.shape) for value in values]
    is_integer = not values[1].dtype.is_floating_point
    name = "" if is_integer else "probabilities" if "softmax" in str(output.target) else "logits"
    return GraphSignature(shapes[0], shapes[1], is_integer, name)


def check_signature(path: Path, graph: GraphSignature, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """Raise `WeightsError` unless a graph's input and output are those of the file's metadata."""
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
    """Raise `WeightsError` if an output has other classes, which a signature of class ids does not contain."""
    count = len(metadata.classes)
    if settings.output == "classes":
        if int(np.max(output, initial=0)) >= count:
            raise _mismatch(path, "largest class id", int(np.max(output)), f"at most {count - 1}")
    elif output.ndim != 4 or output.shape[1] != count:
        raise _mismatch(path, "output shape", output.shape, f"{count} classes")


def _check_equal(path: Path, quantity: str, value: int | None, expected: int, key: str = MODEL_KEY) -> None:
    if value is not None and value != expected:
        raise _mismatch(path, quantity, value, expected, key)


def _mismatch(path: Path, quantity: str, value: object, expected: object, key: str = MODEL_KEY) -> WeightsError:
    return WeightsError(
        f"{path}: {quantity} of the graph: {value}, of its metadata (key {key}): {expected}; export it again"
    )


def antialias_resize(model: Any) -> None:
    """Enable antialiasing in the resizing of an OpenVINO model, which ignores ``antialias`` of ONNX's Resize."""
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
    paths = [[*section, key] for section in ([], ["framework"]) for key in (MODEL_KEY, EXPORT_KEY)]
    return {path[-1]: str(model.get_rt_info(path).value) for path in paths if model.has_rt_info(path)}


def openvino_options(settings: ExportSettings, threads: int | None = None) -> dict[str, Any]:
    """Return OpenVINO's compiler options: low latency; 16-bit arithmetic only for OpenVINO files of that precision."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if settings.precision != "16" or settings.format != "openvino":  # its default is bfloat16 where the CPU has it
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


def onnxruntime() -> Any:
    """Import onnxruntime, or raise a MissingExtraError."""
    return import_extra("onnxruntime", "export", "running an ONNX file")


def openvino() -> Any:
    """Import openvino, or raise a MissingExtraError."""
    return import_extra("openvino", "openvino", "running a network with OpenVINO")


@functools.cache
def openvino_core() -> Any:
    """Return the OpenVINO `Core` of this process, which is never closed."""
    return openvino().Core()


def export_parts(export: Path) -> list[Path]:
    """Return the files of an export that exist: the one to open, and the .bin of an .xml."""
    parts = [export, export.with_suffix(".bin")] if export.suffix.lower() == ".xml" else [export]
    return [part for part in parts if part.is_file()]


def check_export(export: Path) -> bool:
    """Compare an export with the digest in the .json beside it; return False if there is none.

    Raises:
        WeightsError: the export or its .json is damaged.
    """
    file = export.with_suffix(".json")
    try:
        report = read_json(file)
        name, digest = str(report["file"]), report["sha256"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{file}, with the digest of {export.name}, is damaged ({first_line(error)}); export or load it again"
        ) from None
    if Path(name).suffix != export.suffix:  # of another export of the same name
        return False
    parts = export_parts(export)
    if file_sha256(*parts) != digest:
        raise WeightsError(
            f"{' or '.join(map(str, parts))} is damaged or changed, by the digest in {file.name}; export it again"
        )
    return True


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give a file that `overfly export` wrote")
