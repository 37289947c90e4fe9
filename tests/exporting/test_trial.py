"""Exported files are opened in a child process first, which bounds their time and memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overfly.commands.load_predictor import load_predictor
from overfly.core.errors import WeightsError
from overfly.exporting import trial
from overfly.exporting.trial import check_resources, remember

onnx = pytest.importorskip("onnx")
SEED = Path(__file__).parents[1] / "seeds" / "onnx" / "net.onnx"


def with_nodes(path: Path, make: Callable[[Any, str, str], list[Any]]) -> Path:
    """A file whose image passes through more nodes first."""
    model = onnx.load(SEED)
    image = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["changed" if name == image else name for name in node.input]
    for node in reversed(make(onnx.helper, image, "changed")):
        model.graph.node.insert(0, node)
    onnx.save(model, path)
    return path


def expand(helper: Any, image: str, changed: str) -> list[Any]:
    """A trillion numbers of one pixel."""
    sides = onnx.numpy_helper.from_array(np.array([1_000_000, 1_000_000, 1, 1], np.int64))
    return [
        helper.make_node("ReduceMax", [image], ["pixel"], keepdims=1),
        helper.make_node("Constant", [], ["sides"], value=sides),
        helper.make_node("Expand", ["pixel", "sides"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["one"], keepdims=1),
        helper.make_node("Add", [image, "one"], [changed]),
    ]


def loop(helper: Any, image: str, changed: str) -> list[Any]:
    """A loop of a trillion steps."""
    kind = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Add", ["x", "x"], ["y"])],
        "body",
        [kind("i", 7, []), kind("go", 9, []), kind("x", 1, None)],
        [kind("again", 9, []), kind("y", 1, None)],
    )
    count = onnx.numpy_helper.from_array(np.array(10**12, np.int64))
    return [
        helper.make_node("Constant", [], ["count"], value=count),
        helper.make_node("Loop", ["count", "", image], [changed], body=body),
    ]


@pytest.mark.parametrize(("make", "message"), [(expand, "cannot be opened|does not read"), (loop, "Loop")])
def test_files_that_exhaust_time_or_memory_are_refused(
    make: Callable[[Any, str, str], list[Any]], message: str, tmp_path: Path
) -> None:
    file = with_nodes(tmp_path / "a.onnx", make)
    with pytest.raises(WeightsError, match=rf"a\.onnx.*({message})"):
        load_predictor(file, backend="onnxruntime")


def test_a_file_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_nodes(tmp_path / "a.onnx", lambda helper, image, changed: [helper.make_node("Abs", [image], [changed])])
    monkeypatch.setenv("OVERFLY_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(trial, "SECONDS", 0.01)
        with pytest.raises(WeightsError, match=r"a\.onnx cannot be opened by onnxruntime within 0\.01 s"):
            load_predictor(file)
    assert load_predictor(file)(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 7, 64, 64)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    check_resources(file, "onnxruntime")
    with pytest.raises(pytest.fail.Exception):
        check_resources(file, "openvino")
    remember(file, "openvino")
    check_resources(file, "openvino")


NOISY = """
import os

class SessionOptions: ...

def get_available_providers():
    return ["CPUExecutionProvider"]

def InferenceSession(*_, **__):
    os.write(1, b"a line of the runtime\\n")
    os.write(2, b"another\\n")
    raise RuntimeError("damaged")
"""


def test_lines_of_a_runtime_are_no_part_of_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnxruntime.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    file = tmp_path / "net.onnx"
    file.write_bytes(SEED.read_bytes())
    with pytest.raises(WeightsError) as caught:
        check_resources(file, "onnxruntime")
    assert str(caught.value) == f"{file} cannot be opened by onnxruntime (damaged); export it again"
    assert capfd.readouterr() == ("", "")


def test_damaged_onnx_files_give_one_sentence_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, file = SEED.read_bytes(), tmp_path / "net.onnx"
    for number, cut in enumerate((0, len(data) // 3, len(data) - 40)):
        file.write_bytes(data[:cut] if number else b"")
        with pytest.raises(WeightsError) as caught:
            check_resources(file, "onnxruntime")
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")
