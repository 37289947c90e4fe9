"""8-bit integers: the range of every map is measured on unlabelled images of the target, by the runtime's own tool."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from overfly.core.errors import MissingExtraError
from overfly.deploy.backends import Floats
from overfly.deploy.formats import describe, onnx, save_openvino
from overfly.deploy.runtimes import onnxruntime, openvino, smooth

INTEGERS = ("Conv", "Add", "Concat", "Resize", "MaxPool", "Mul")
"""ONNX operators that compute in integers; others stay in float32 between them."""
HEAD = "/head/"
"""Scope of the nodes from the class scores to the answer, which stay in float32."""


def quantise_onnx(source: Path, path: Path, images: Sequence[Floats], metadata: Mapping[str, str]) -> Path:
    """Static quantisation for ONNX Runtime: weights by channel, maps by tensor, as pairs of (de)quantise nodes.

    Args:
        source: the ONNX file in float32.
        path: file to write.
        images: each (1, C, H, W), float32, in the sensor's own range; all of one size.
        metadata: what the file says of itself.
    """
    onnxruntime()
    package = onnx()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        try:
            nodes = package.load(prepared).graph.node
            kept = [node.name for node in nodes if HEAD in node.name or node.name.startswith(("/Sub", "/Div", "/Pad"))]
            quantize_static(
                str(prepared), str(path), _Images(images),
                quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=list(INTEGERS),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=kept,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"CalibMovingAverage": True, "CalibMovingAverageConstant": 1 / max(2, len(images))},
            )  # fmt: skip
        finally:
            prepared.unlink(missing_ok=True)
    model = package.load(path)
    describe(model, metadata)
    package.save(model, path)
    return path


class _Images:
    """Images as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: Sequence[Floats]) -> None:
        self.left: Iterator[Floats] = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        image = next(self.left, None)
        return None if image is None else {"image": image}


def quantise_openvino(source: Path, path: Path, images: Sequence[Floats], metadata: Mapping[str, str]) -> Path:
    """Quantisation by NNCF for OpenVINO: what the processor computes in integers, biases corrected for it.

    Args:
        source: the ONNX file in float32.
        path: the .xml file to write; its .bin comes beside it.
        images: each (1, C, H, W), float32, in the sensor's own range.
        metadata: what the file says of itself.

    Raises:
        MissingExtraError: nncf is not installed.
    """
    runtime = openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        os.environ.setdefault("NNCF_CI", "1")  # else it reports each use to its makers over the network
        try:
            import nncf
        except ImportError:
            raise MissingExtraError("nncf", "openvino", "export in 8-bit integers for OpenVINO") from None
        model = runtime.Core().read_model(source)
        smooth(model)
        with _quiet():
            quantised = nncf.quantize(
                model,
                nncf.Dataset(list(images)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                fast_bias_correction=True,
                # a pool that counts its padding would count 0 of the integers, which is not 0 of the map
                ignored_scope=nncf.IgnoredScope(patterns=[f"{HEAD}.*"], types=["AvgPool"], validate=False),
            )
    save_openvino(quantised, path, metadata)
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


__all__ = ["quantise_onnx", "quantise_openvino"]
