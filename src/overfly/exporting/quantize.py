"""8-bit quantization by the tools of the runtimes, calibrated on unlabeled images."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from overfly.core.errors import import_extra
from overfly.exporting.formats import onnx, save_openvino, set_properties
from overfly.exporting.predictor import Floats
from overfly.exporting.runtimes import antialias_resize, onnxruntime, openvino_core

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

    Args:
        source: the ONNX file in float32.
        path: file to write.
        images: each (1, C, H, W), float32, in the sensor's own range; all of one size.
        properties: metadata of the file.
        ranges: how value ranges are estimated.
    """
    onnxruntime()
    package = onnx()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path.parent.mkdir(exist_ok=True)
    averaging = {"CalibMovingAverage": True, "CalibMovingAverageConstant": 1 / max(2, len(images))}
    prepared = path.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        try:
            nodes = package.load(prepared).graph.node
            floats = [
                node.name for node in nodes if HEAD in node.name or node.name.startswith(("/Sub", "/Div", "/Pad"))
            ]
            floats += grouped_convolutions(prepared)
            quantize_static(
                str(prepared), str(path), _Images(images),
                quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=list(INTEGER_OPERATORS),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=floats,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=averaging if ranges == "means" else {},
            )  # fmt: skip
        finally:
            prepared.unlink(missing_ok=True)
    model = package.load(path)
    set_properties(model, properties)
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


class _Images:
    """Data reader for ONNX Runtime's calibration."""

    def __init__(self, images: Sequence[Floats]) -> None:
        self.images: Iterator[Floats] = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image}


def quantize_openvino(
    source: Path, path: Path, images: Sequence[Floats], properties: Mapping[str, str], ranges: Ranges = "extremes"
) -> Path:
    """Quantize for OpenVINO by NNCF, with bias correction.

    Args:
        source: the ONNX file in float32.
        path: the .xml file to write; its .bin is written beside it.
        images: each (1, C, H, W), float32, in the sensor's own range.
        properties: metadata of the file.
        ranges: how value ranges are estimated.

    Raises:
        MissingExtraError: nncf is not installed.
    """
    core = openvino_core()
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dependencies
        os.environ.setdefault("NNCF_CI", "1")  # disables NNCF's telemetry
        nncf = import_extra("nncf", "openvino", "export in 8-bit integers for OpenVINO")
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

        estimator = Estimators.MINMAX if ranges == "extremes" else Estimators.MEAN_MINMAX
        model = core.read_model(source)
        antialias_resize(model)
        with _quiet(), _restored_signal_stack():
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
    save_openvino(quantized, path, properties)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' progress and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


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
