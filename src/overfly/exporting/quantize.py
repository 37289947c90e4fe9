"""8-bit integers: the range of every map is measured on unlabeled images of the target, by the runtime's own tool."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from overfly.core.errors import MissingExtraError
from overfly.exporting.formats import describe, onnx, save_openvino
from overfly.exporting.predictor import Floats
from overfly.exporting.runtimes import onnxruntime, openvino_core, smooth
from overfly.exporting.signal_stack import signal_stack_kept

INTEGERS = ("Conv", "Add", "Concat", "Resize", "MaxPool", "Mul")
"""ONNX operators that compute in integers; others stay in float32 between them."""
Ranges = Literal["extremes", "means"]
"""How the range of a map is taken: from its extremes over all images, or from the means of each image's extremes, which
cuts rare values off and resolves the others finer. Which is better depends on the network."""
HEAD = "/head/"
"""Scope of the nodes from the class scores to the answer, which stay in float32."""


def quantize_onnx(
    source: Path, path: Path, images: Sequence[Floats], properties: Mapping[str, str], ranges: Ranges = "means"
) -> Path:
    """Static quantization for ONNX Runtime: weights by channel, maps by tensor, as pairs of (de)quantize nodes.

    Args:
        source: the ONNX file in float32.
        path: file to write.
        images: each (1, C, H, W), float32, in the sensor's own range; all of one size.
        properties: what the file says of itself.
        ranges: how the range of a map is taken.
    """
    onnxruntime()
    package = onnx()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path.parent.mkdir(exist_ok=True)
    moving = {"CalibMovingAverage": True, "CalibMovingAverageConstant": 1 / max(2, len(images))}
    prepared = path.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        try:
            nodes = package.load(prepared).graph.node
            kept = [node.name for node in nodes if HEAD in node.name or node.name.startswith(("/Sub", "/Div", "/Pad"))]
            kept += grouped(prepared)
            quantize_static(
                str(prepared), str(path), _Images(images),
                quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=list(INTEGERS),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=kept,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=moving if ranges == "means" else {},
            )  # fmt: skip
        finally:
            prepared.unlink(missing_ok=True)
    model = package.load(path)
    describe(model, properties)
    package.save(model, path)
    return path


def grouped(source: Path) -> list[str]:
    """Names of an ONNX file's convolutions in few groups of many planes, which OpenVINO 2026.4 gets wrong in integers.

    PIDNet's pyramid has one, on maps of a 64th of the size: in floats it costs nothing.
    """
    graph = onnx().load(source).graph
    planes = {tensor.name: tensor.dims[1] for tensor in graph.initializer if len(tensor.dims) == 4}
    found = []
    for node in graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type == "Conv" and groups > 1 and planes.get(node.input[1], 1) > 1:
            found.append(node.name)
    return found


class _Images:
    """Images as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: Sequence[Floats]) -> None:
        self.left: Iterator[Floats] = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        image = next(self.left, None)
        return None if image is None else {"image": image}


def quantize_openvino(
    source: Path, path: Path, images: Sequence[Floats], properties: Mapping[str, str], ranges: Ranges = "extremes"
) -> Path:
    """Quantization by NNCF for OpenVINO: what the processor computes in integers, biases corrected for it.

    Args:
        source: the ONNX file in float32.
        path: the .xml file to write; its .bin comes beside it.
        images: each (1, C, H, W), float32, in the sensor's own range.
        properties: what the file says of itself.
        ranges: how the range of a map is taken.

    Raises:
        MissingExtraError: nncf is not installed.
    """
    core = openvino_core()
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        os.environ.setdefault("NNCF_CI", "1")  # else it reports each use to its makers over the network
        try:
            import nncf
        except ImportError:
            raise MissingExtraError("nncf", "openvino", "export in 8-bit integers for OpenVINO") from None
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

        estimator = Estimators.MINMAX if ranges == "extremes" else Estimators.MEAN_MINMAX
        model = core.read_model(source)
        smooth(model)
        with _quiet(), signal_stack_kept():
            quantized = nncf.quantize(
                model,
                nncf.Dataset(list(images)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                fast_bias_correction=True,
                advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=estimator),
                # a pool that counts its padding would count 0 of the integers, which is not 0 of the map
                ignored_scope=nncf.IgnoredScope(
                    names=grouped(source), patterns=[f"{HEAD}.*"], types=["AvgPool"], validate=False
                ),
            )
    save_openvino(quantized, path, properties)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' progress off a person's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


__all__ = ["Ranges", "quantize_onnx", "quantize_openvino"]
