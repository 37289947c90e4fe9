"""Open exported files as predictors: .onnx with ONNX Runtime or OpenVINO, .xml with OpenVINO, .pt2 with PyTorch."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overfly.core.atomic_files import file_sha256, read_json
from overfly.core.errors import RecipeError, WeightsError, import_extra
from overfly.exporting import predictor as predictors
from overfly.exporting.graph import MIN_SIDE
from overfly.exporting.predictor import EXPORT_KEY, MODEL_KEY, ExportSettings, Floats, ModelMetadata, Predictor
from overfly.exporting.torch_program import read_program
from overfly.models.checkpoints import first_line

Graph = Callable[[Floats], Any]
"""Computes the graph's output from images (B, C, H, W), float32."""


def onnx_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an ONNX file that `overfly export` wrote with ONNX Runtime.

    ``device`` is cpu, or cuda where onnxruntime was built for it, ``threads`` the CPU threads; None: one per core.
    Raises `MissingExtraError`: onnxruntime is not installed, and `WeightsError`: the file is missing, damaged, not
    exported by overfly, or its graph differs from its metadata.
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
        session = runtime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
        properties = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # the library has no common error class
        raise WeightsError(f"{path} cannot be opened by onnxruntime ({first_line(error)}); export it again") from error
    name = session.get_inputs()[0].name

    def graph(images: Floats) -> Any:
        return session.run(None, {name: images})[0]

    return _predictor(path, ("onnxruntime", kind), graph, properties)


def openvino_predictor(path: Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Open an OpenVINO file (.xml, its .bin beside it) or ONNX file with OpenVINO, as `onnx_predictor`.

    ``device`` is cpu, or a device as OpenVINO names it, such as GPU.
    """
    core = openvino_core()
    _check_exists(path)
    kind = "CPU" if device == "cpu" else device.upper()
    if kind.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise RecipeError(f"openvino runs on {', '.join(core.available_devices)} here, not {device}; use --device cpu")
    try:
        model = core.read_model(path)
    except Exception as error:
        raise WeightsError(f"{path} cannot be opened by openvino ({first_line(error)}); export it again") from error
    # at the top level of an .xml file, under ``framework`` of ONNX
    keys = [[*section, key] for section in ([], ["framework"]) for key in (MODEL_KEY, EXPORT_KEY)]
    properties = {key[-1]: str(model.get_rt_info(key).value) for key in keys if model.has_rt_info(key)}
    settings = predictors.read_metadata(properties, path)[1]
    antialias_resize(model)
    request = core.compile_model(model, kind, openvino_options(settings, threads)).create_infer_request()

    def graph(images: Floats) -> Any:
        return np.array(request.infer([images])[0])

    return _predictor(path, ("openvino", kind.lower()), graph, properties)


def torch_predictor(path: Path, device: torch.device | str = "cpu") -> Predictor:
    """Open a program of torch.export, the .pt2 file that `overfly export` wrote, with PyTorch.

    Raises `WeightsError`: it is missing, damaged, not exported by overfly, could run code, or differs from its
    metadata.
    """
    _check_exists(path)
    device = torch.device(device)
    program, properties = read_program(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def graph(images: Floats) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(device)).cpu().numpy()

    return _predictor(path, ("torch", str(device)), graph, properties)


def _predictor(path: Path, name: tuple[str, str], graph: Graph, properties: Mapping[str, str]) -> Predictor:
    """Return a predictor of class probabilities for any output of the graph; ``name`` is backend and device."""
    metadata, settings = predictors.read_metadata(properties, path)
    check_graph(path, graph, metadata, settings)

    def run(images: Floats) -> Floats:
        output = graph(images)
        check_output(path, output, metadata, settings)
        if settings.output == "classes":  # one-hot, without probabilities
            return np.ascontiguousarray(np.eye(len(metadata.classes), dtype=np.float32)[output].transpose(0, 3, 1, 2))
        if settings.output == "logits":
            odds = np.exp(output - output.max(1, keepdims=True))
            output = odds / odds.sum(1, keepdims=True)
        return np.asarray(output, dtype=np.float32)

    return Predictor(metadata, *name, run, (settings.format, settings.precision))


def check_graph(path: Path, graph: Graph, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """Run a graph on an empty image; raise `WeightsError` unless input and output are those of the file's metadata."""
    sides = (metadata.window, metadata.window) if metadata.fixed else (MIN_SIDE, MIN_SIDE + 8)
    shape = (1, metadata.bands, *sides)
    try:
        output = graph(np.zeros(shape, np.float32))
    except Exception as error:  # the libraries have no common error class
        raise WeightsError(
            f"{path} does not read images {shape}, as its metadata (key {MODEL_KEY}) say ({first_line(error)}); export "
            "it again"
        ) from error
    check_output(path, output, metadata, settings)
    if settings.output != "classes" and (settings.output == "probabilities") == (abs(output.sum(1) - 1) > 0.1).any():
        raise WeightsError(f"{path} has no {settings.output}, as its metadata (key {EXPORT_KEY}) say; export it again")


def check_output(path: Path, output: Any, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """Raise `WeightsError` unless an output has the type, dimensions and classes of the file's metadata."""
    count, ids = len(metadata.classes), settings.output == "classes"
    if ids:
        fits = output.ndim == 3 and output.dtype.kind in "iu" and np.max(output, initial=0) < count
    else:
        fits = output.ndim == 4 and output.dtype.kind == "f" and output.shape[1] == count
    if not fits:
        highest = f" up to {np.max(output)}" if ids else ""
        raise WeightsError(
            f"{path}: its graph returns {output.dtype} {output.shape}{highest}, and its metadata (keys {MODEL_KEY}, "
            f"{EXPORT_KEY}) describe {settings.output} of {count} classes; export it again"
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


def openvino_options(settings: ExportSettings, threads: int | None = None) -> dict[str, Any]:
    """Return OpenVINO's compiler options: low latency; 16-bit arithmetic only for OpenVINO files of that precision."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if settings.precision != "16" or settings.format != "openvino":  # its default is bfloat16 where the CPU has it
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


onnxruntime = functools.partial(import_extra, "onnxruntime", "export", "running an ONNX file")
"""Import onnxruntime, or raise a MissingExtraError."""
openvino = functools.partial(import_extra, "openvino", "openvino", "running a network with OpenVINO")
"""Import openvino, or raise a MissingExtraError."""


@functools.cache
def openvino_core() -> Any:
    """Return the OpenVINO `Core` of this process, which is never closed."""
    return openvino().Core()


def export_parts(export: Path) -> list[Path]:
    """Return the files of an export that exist: the one to open, and the .bin of an .xml."""
    parts = [export, export.with_suffix(".bin")] if export.suffix.lower() == ".xml" else [export]
    return [part for part in parts if part.is_file()]


def check_export(export: Path) -> bool:
    """Compare an export with the digest in its .json, False if there is none; raise `WeightsError` if it is damaged."""
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
        raise WeightsError(f"{' or '.join(map(str, parts))} differs from the digest in {file.name}; export it again")
    return True


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give a file that `overfly export` wrote")
