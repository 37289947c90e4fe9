"""What flows inside an exported file, layer by layer, so that it can be compared with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from overfly.core.spec import NonNegative, Spec
from overfly.exporting.formats import onnx
from overfly.exporting.graph import ExportModule
from overfly.exporting.metadata import ExportSettings
from overfly.exporting.predictor import Floats
from overfly.exporting.program import read_program
from overfly.exporting.runtimes import onnxruntime, openvino_core, openvino_settings, smooth

SCORES = "class scores"
"""What the last layer, which gives the class scores at the network's own stride, is called."""
Maps = dict[str, Floats]
"""Maps by the layer that gives them, in the order of computing."""


class Layer(Spec):
    """How far one layer of an exported file is from PyTorch's."""

    name: str
    """The module's name in the network, or ``class scores``."""
    error: NonNegative
    """Largest difference of a value, as a share of the map's largest value."""


def maps_of(module: ExportModule, image: Floats) -> Maps:
    """Every convolution's map in PyTorch, and the class scores.

    Args:
        module: the graph in float32, in evaluation mode.
        image: (1, C, H, W), float32, in the sensor's own range.
    """
    found: Maps = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):

            def keep(_part: nn.Module, _inputs: object, out: torch.Tensor, name: str = name) -> None:
                found[name] = out.float().numpy()

            hooks.append(part.register_forward_hook(keep))

    def last(_part: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[SCORES] = inputs[0].float().numpy()

    hooks.append(module.head.register_forward_pre_hook(last))
    with torch.inference_mode():
        module(torch.from_numpy(image))
    for hook in hooks:
        hook.remove()
    return found


def maps_in(path: Path, backend: str, image: Floats, settings: ExportSettings) -> Maps:
    """The same maps in an exported file.

    Args:
        path: the file.
        backend: the runtime that runs it.
        image: (1, C, H, W), float32, in the sensor's own range.
        settings: how the file was made.

    Returns:
        Those maps that can be found again; a runtime may have melted layers together.
    """
    if backend == "torch":
        return _in_program(path, image)
    return _in_onnx(path, image) if backend == "onnxruntime" else _in_openvino(path, image, settings)


def differences(wanted: Mapping[str, Floats], found: Mapping[str, Floats]) -> list[Layer]:
    """How far each layer that both have is from what it should be, in the order of computing."""
    layers = []
    for name, right in wanted.items():
        map_ = found.get(name)
        if map_ is None or map_.shape != right.shape:
            continue
        scale = max(float(np.abs(right).max()), 1e-12)
        layers.append(Layer(name=name, error=float(np.abs(map_ - right).max()) / scale))
    return layers


def module_name(scope: str) -> str:
    """A module's name from the scope of a traced node: ``/network/layer1/layer1.0/conv1/Conv``: network.layer1.0.conv1.

    A child of a list or a sequence is traced under its parent's name and its own, such as ``layer1.0``.
    """
    parts: list[str] = []
    for part in scope.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def _in_onnx(path: Path, image: Floats) -> Maps:
    package = onnx()
    model = package.load(path)
    graph = model.graph
    values: dict[str, str] = {module_name(node.name): node.output[0] for node in graph.node if node.op_type == "Conv"}
    head = next((node for node in graph.node if node.name.startswith("/head/") and node.op_type == "Resize"), None)
    if head is not None:
        values[SCORES] = head.input[0]
    there = {output.name for output in graph.output}
    for value in dict.fromkeys(values.values()):
        if value not in there:
            graph.output.append(package.helper.make_tensor_value_info(value, _type_of(model, value), None))
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = dict(zip(values, session.run(list(values.values()), {"image": image}), strict=True))
    return {name: np.asarray(map_, np.float32) for name, map_ in given.items()}


def _type_of(model: Any, value: str) -> int:
    """Number type of a value of an ONNX model: that of the weights of the convolution which gives it, else float32."""
    package = onnx()
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if value in node.output and node.op_type == "Conv":
            kind = kinds.get(node.input[1], package.TensorProto.FLOAT)
            return int(kind if kind == package.TensorProto.FLOAT16 else package.TensorProto.FLOAT)
    return int(package.TensorProto.FLOAT)


def _in_openvino(path: Path, image: Floats, settings: ExportSettings) -> Maps:
    core = openvino_core()
    model = core.read_model(path)
    smooth(model)
    values: dict[str, Any] = {}
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        if name.rsplit("/", 1)[-1] == "Conv" and operation.get_output_size() == 1:
            values[module_name(name)] = operation.output(0)
        if name.startswith("/head/") and operation.get_type_name() == "Interpolate" and SCORES not in values:
            values[SCORES] = operation.input_value(0)
    for value in values.values():
        model.add_outputs([value])
    compiled = core.compile_model(model, "CPU", openvino_settings(settings))
    given = list(compiled([image]).values())[-len(values) :]
    return {name: np.asarray(map_, np.float32) for name, map_ in zip(values, given, strict=True)}


def _in_program(path: Path, image: Floats) -> Maps:
    program, _ = read_program(path)
    module = program.module()
    found: Maps = {}

    class Listening(torch.fx.Interpreter):
        """Runs a graph and keeps what convolutions give."""

        def run_node(self, n: torch.fx.Node) -> Any:
            given = super().run_node(n)
            scope = [name for name, _ in (n.meta.get("nn_module_stack") or {}).values()]
            if n.op == "call_function" and "conv2d" in str(n.target):
                found[scope[-1]] = given.float().numpy()
            if n.op == "call_function" and "head" in scope and SCORES not in found:
                found[SCORES] = self.fetch_args_kwargs_from_env(n)[0][0].float().numpy()
            return given

    with torch.inference_mode():
        Listening(module).run(torch.from_numpy(image))
    return found


__all__ = ["SCORES", "Layer", "Maps", "differences", "maps_in", "maps_of", "module_name"]
