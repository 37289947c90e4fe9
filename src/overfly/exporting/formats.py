"""Write graphs as ONNX or OpenVINO files, and quantize them to 8 bits by the tools of the runtimes."""

import contextlib
import ctypes
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch

from overfly.core.errors import OverflyError, import_extra
from overfly.exporting.graph import MIN_SIDE, ExportModule
from overfly.exporting.predictor import Floats, ModelMetadata
from overfly.exporting.runtimes import antialias_resize, onnxruntime, openvino, openvino_core
from overfly.exporting.torch_program import quiet
from overfly.models.checkpoints import first_line

OPSET = 18
"""ONNX operator set: the first whose Resize has ``antialias``."""
TILE_OVERLAP = 25
"""Overlap of two tiles in QGIS, in percent."""


def write_onnx(module: ExportModule, path: Path, properties: Mapping[str, str]) -> Path:
    """Write a graph as one ONNX file.

    PyTorch's tracing exporter is used: it names values by their modules, and is faster than torch.export. Raises
    `MissingExtraError`: onnx is not installed, and `OverflyError`: ONNX has no operator for a part of the network, and
    `OSError`: the disk is full.
    """
    package = onnx()
    output: str = module.output
    batch = {0: "batch"}
    sides = {} if module.fixed else {2: "height", 3: "width"}
    output_sides = {key - (output == "classes"): name for key, name in sides.items()}
    side = MIN_SIDE if module.dtype == torch.float16 else 96  # float16 convolutions are slow on a CPU
    example = 255 * torch.rand(
        1, module.bands, *(module.fixed or (side, side)), generator=torch.Generator().manual_seed(0)
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # sizes traced as constants, and a deprecation
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
    shape = ["batch", *([] if output == "classes" else [module.classes]), *(module.fixed or ("height", "width"))]
    kind = model.graph.output[0].type.tensor_type.elem_type
    model.graph.output[0].CopyFrom(package.helper.make_tensor_value_info(output, kind, shape))
    for node in model.graph.node:
        if node.op_type == "Resize" and node.name == "/Resize":
            node.attribute.append(package.helper.make_attribute("antialias", 1))
    package.helper.set_model_props(model, dict(properties))
    package.checker.check_model(model)
    package.save(model, path)
    return path


def write_openvino(source: Any, path: Path, properties: Mapping[str, str], *, half: bool = False) -> Path:
    """Write a model of OpenVINO, or an ONNX file, as .xml with a .bin beside it; with ``half`` in float16."""
    model = source
    if isinstance(source, Path):
        model = openvino_core().read_model(source)
        antialias_resize(model)
    for key, value in properties.items():
        model.set_rt_info(value, key)
    openvino().save_model(model, str(path), compress_to_fp16=half)
    return path


def deepness_entries(metadata: ModelMetadata) -> dict[str, str]:
    """Return the metadata keys that QGIS' plug-in Deepness reads in an ONNX file, each value as JSON.

    Deepness feeds ``(tile / 255 - standardization_mean) / standardization_std`` of 8-bit tiles (B, C, S, S), and takes
    the class of largest output where that is above seg_thresh, class 0 elsewhere. Our graph takes the sensor's own
    range: a mean of 0 and a deviation of 1/255 undo the division, and a threshold of 0 changes no pixel.
    Source: the plug-in's documentation for creators of models, and its reader ``processing/models/model_base.py``.
    ``resolution`` is left out where the ground sampling distance is unknown.
    """
    values: dict[str, object] = {
        "model_type": "Segmentor", "class_names": dict(enumerate(metadata.classes.names)),
        "tiles_size": metadata.window,
        "tile_size": metadata.window,  # name in the plug-in's reader; the other is in its documentation
        "tiles_overlap": TILE_OVERLAP, "seg_thresh": 0.0, "seg_small_segment": 0,
        "standardization_mean": [0.0] * metadata.bands, "standardization_std": [1 / 255] * metadata.bands,
    }  # fmt: skip
    if metadata.gsd is not None:
        values["resolution"] = round(100 * metadata.gsd, 4)
    return {key: json.dumps(value) for key, value in values.items()}


onnx = partial(import_extra, "onnx", "export", "writing an ONNX file")
"""Import onnx, or raise a MissingExtraError."""
INTEGER_OPERATORS = ("Conv", "Add", "Concat", "Resize", "MaxPool", "Mul")
"""Quantized ONNX operators; others stay in float32."""
Ranges = Literal["extremes", "means"]
"""Value range of a feature map: extremes over all images, or means of the extremes of each image, which clip rare
values and resolve the others finer. The better choice depends on the network."""
RANGES: tuple[Ranges, ...] = get_args(Ranges)
HEAD = "/head/"
"""Scope of the output head, which stays in float32."""


def quantize_onnx(
    source: Path, path: Path, images: Sequence[Floats], properties: Mapping[str, str], ranges: Ranges = "means"
) -> Path:
    """Quantize statically for ONNX Runtime: weights per channel, feature maps per tensor, in QDQ format.

    ``source`` is the ONNX file in float32, ``path`` the file to write with the metadata ``properties``. The images are
    each (1, C, H, W), float32, in the sensor's own range, and all of one size.
    """
    onnxruntime()
    package = onnx()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path.parent.mkdir(exist_ok=True)
    averaging = {"CalibMovingAverage": True, "CalibMovingAverageConstant": 1 / max(2, len(images))}
    prepared, inputs = path.with_suffix(".prepared.onnx"), ({"image": image} for image in images)
    with quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        try:
            nodes = package.load(prepared).graph.node
            floats = [
                node.name for node in nodes if HEAD in node.name or node.name.startswith(("/Sub", "/Div", "/Pad"))
            ]
            floats += grouped_convolutions(prepared)
            quantize_static(
                str(prepared), str(path), SimpleNamespace(get_next=partial(next, inputs, None)),
                quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=list(INTEGER_OPERATORS),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=floats,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=averaging if ranges == "means" else {},
            )  # fmt: skip
        finally:
            prepared.unlink(missing_ok=True)
    model = package.load(path)
    package.helper.set_model_props(model, dict(properties))
    package.save(model, path)
    return path


def grouped_convolutions(source: Path) -> list[str]:
    """Return the names of grouped, not depthwise, convolutions, which OpenVINO 2026.4 computes wrongly."""
    graph = onnx().load(source).graph
    planes = {tensor.name: tensor.dims[1] for tensor in graph.initializer if len(tensor.dims) == 4}
    names = []
    for node in graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type == "Conv" and groups > 1 and planes.get(node.input[1], 1) > 1:
            names.append(node.name)
    return names


def quantize_openvino(
    source: Path, path: Path, images: Sequence[Floats], properties: Mapping[str, str], ranges: Ranges = "extremes"
) -> Path:
    """Quantize for OpenVINO by NNCF, with bias correction: an .xml file, and its .bin beside it.

    The arguments are those of `quantize_onnx`; raise `MissingExtraError` if nncf is not installed.
    """
    core = openvino_core()
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # of dependencies
        os.environ.setdefault("NNCF_CI", "1")  # disables NNCF's telemetry
        nncf = import_extra("nncf", "openvino", "export in 8-bit integers for OpenVINO")
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

        estimator = Estimators.MINMAX if ranges == "extremes" else Estimators.MEAN_MINMAX
        model = core.read_model(source)
        antialias_resize(model)
        with quiet(), _restored_signal_stack():
            quantized = nncf.quantize(
                model,
                nncf.Dataset(list(images)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                fast_bias_correction=True,
                advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=estimator),
                # average pooling that includes padding would average the integer 0, which is not the value 0
                ignored_scope=nncf.IgnoredScope(
                    names=grouped_convolutions(source), patterns=[f"{HEAD}.*"], types=["AvgPool"], validate=False
                ),
            )
    return write_openvino(quantized, path, properties)


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux (man 2 sigaltstack)."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def _restored_signal_stack() -> Iterator[None]:
    """Restore this thread's alternative signal stack at the end of the context (on Linux).

    OpenVINO's CPU plug-in replaces the stack, and restores the previous one when it is closed. Two plug-ins that are
    closed in the order of their opening, as in a quantization, leave an unmapped stack, and the next signal, such as
    Ctrl-C, causes a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    before = _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        gc.collect()  # closes plug-ins that would change it later
        library.sigaltstack(ctypes.byref(before), None)
