"""Metadata of exported files: format version, agreement with the graph, and what QGIS' plug-in Deepness reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from overfly.core.choices import ExportOutput
from overfly.core.errors import WeightsError
from overfly.exporting import runtimes
from overfly.exporting.formats import deepness_entries, write_onnx
from overfly.exporting.graph import ExportModule
from overfly.exporting.predictor import (
    EXPORT_KEY,
    FORMAT_VERSION,
    MODEL_KEY,
    ExportSettings,
    ModelMetadata,
    metadata_entries,
    model_metadata,
    read_metadata,
    segmenter_predictor,
)
from overfly.exporting.runtimes import check_output, onnx_predictor, openvino_predictor, torch_predictor
from overfly.exporting.torch_program import read_program, write_torch
from overfly.models.segmenter import Segmenter
from random_networks import random_network

SIDE = 64


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return random_network("small_network")


@pytest.fixture(scope="module")
def metadata(segmenter: Segmenter) -> ModelMetadata:
    return model_metadata(segmenter, window=SIDE, gsd=0.3).model_copy(update={"fixed": True})


def wrong(metadata: ModelMetadata, settings: ExportSettings) -> list[dict[str, str]]:
    """Metadata that differ from the graph."""
    names, colors = metadata.classes.names, metadata.classes.colors
    fewer = metadata.classes.model_copy(update={"names": names[:3], "colors": colors[:3]})
    other: ExportOutput = "logits" if settings.output == "probabilities" else "probabilities"
    return [
        metadata_entries(metadata.model_copy(update={"classes": fewer}), settings),
        metadata_entries(metadata.model_copy(update={"bands": 1}), settings),
        metadata_entries(metadata.model_copy(update={"window": 32}), settings),
        metadata_entries(metadata, settings.model_copy(update={"output": "classes"})),
        metadata_entries(metadata, settings.model_copy(update={"output": other})),
    ]


@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_metadata_that_differ_from_the_graph_are_refused(
    segmenter: Segmenter, metadata: ModelMetadata, tmp_path: Path, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(output=output)
    module = ExportModule(segmenter, output=output, fixed=(SIDE, SIDE)).eval()
    file = write_onnx(module, tmp_path / "it.onnx", metadata_entries(metadata, settings))
    model = onnx.load(file)
    for entries in wrong(metadata, settings):
        onnx.helper.set_model_props(model, entries)
        onnx.save(model, file)
        for opened in (onnx_predictor, openvino_predictor):
            with pytest.raises(WeightsError, match=r"it\.onnx"):
                opened(file)
    program = write_torch(module, tmp_path / "it.pt2", metadata_entries(metadata, settings))
    graph, properties = read_program(program)
    assert torch_predictor(program).metadata == metadata
    monkeypatch.setattr(runtimes, "read_program", lambda _: (graph, properties))  # reading it takes its time
    for entries in wrong(metadata, settings):
        properties.update(entries)
        with pytest.raises(WeightsError, match=r"it\.pt2"):
            torch_predictor(program)


def test_metadata_that_are_not_text_are_refused(segmenter: Segmenter, metadata: ModelMetadata, tmp_path: Path) -> None:
    entries = metadata_entries(metadata, ExportSettings())
    file = write_onnx(ExportModule(segmenter, fixed=(SIDE, SIDE)).eval(), tmp_path / "it.onnx", entries)
    content = file.read_bytes()
    place = content.index(b"format_version")
    file.write_bytes(content[:place] + b"\xf4" + content[place + 1 :])
    with pytest.raises(WeightsError, match=r"it\.onnx cannot be opened"):
        onnx_predictor(file)


def test_class_ids_beyond_the_metadata_are_refused(metadata: ModelMetadata) -> None:
    settings, ids = ExportSettings(output="classes"), np.full((1, SIDE, SIDE), 6, np.uint8)
    check_output(Path("it.onnx"), ids, metadata, settings)
    with pytest.raises(WeightsError, match=r"it\.onnx: .* 7"):
        check_output(Path("it.onnx"), ids + 1, metadata, settings)
    with pytest.raises(WeightsError, match="7 classes"):
        check_output(Path("it.onnx"), np.zeros((1, 5, SIDE, SIDE)), metadata, ExportSettings())


def test_other_format_versions_are_refused(metadata: ModelMetadata) -> None:
    entries = metadata_entries(metadata, ExportSettings())
    assert read_metadata(entries, Path("it.onnx")) == (metadata, ExportSettings())
    before = {"format": "onnx", "precision": "32", "answer": "probabilities", "version": "0.9"}
    newer = json.loads(entries[EXPORT_KEY]) | {"format_version": FORMAT_VERSION + 1, "more": 1}
    for value in (json.dumps(before), json.dumps(newer), "", "[]"):
        with pytest.raises(WeightsError, match=r"it\.onnx .*format"):
            read_metadata(entries | {EXPORT_KEY: value}, Path("it.onnx"))
    with pytest.raises(WeightsError, match=MODEL_KEY):
        read_metadata({}, Path("it.onnx"))
    with pytest.raises(WeightsError, match=r"it\.onnx"):
        read_metadata(entries | {MODEL_KEY: "{}"}, Path("it.onnx"))


@pytest.fixture(scope="module")
def session(segmenter: Segmenter, metadata: ModelMetadata, tmp_path_factory: pytest.TempPathFactory) -> Any:
    module = ExportModule(segmenter, fixed=(SIDE, SIDE)).eval()
    entries = metadata_entries(metadata, ExportSettings()) | deepness_entries(metadata)
    file = write_onnx(module, tmp_path_factory.mktemp("export") / "it.onnx", entries)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_deepness_keys_and_types(session: Any, segmenter: Segmenter) -> None:
    properties = session.get_modelmeta().custom_metadata_map
    values = {key: json.loads(value) for key, value in properties.items() if not key.startswith("overfly")}
    assert values["model_type"].capitalize() == "Segmentor"
    names = sorted(values["class_names"].items(), key=lambda entry: int(entry[0]))
    assert [int(number) for number, _ in names] == list(range(len(segmenter.classes)))
    assert tuple(name for _, name in names) == segmenter.classes.names
    assert values["resolution"] == 30.0
    assert values["tile_size"] == values["tiles_size"] == SIDE
    assert isinstance(values["tiles_overlap"], int)
    assert 0 <= values["tiles_overlap"] < 100
    assert len(values["standardization_mean"]) == len(values["standardization_std"]) == 3
    assert values["seg_thresh"] == 0
    assert isinstance(values["seg_small_segment"], int)


def test_shapes_that_deepness_accepts(session: Any, segmenter: Segmenter) -> None:
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert image.type == output.type == "tensor(float)"
    assert isinstance(image.shape[0], str)
    assert image.shape[1:] == [3, SIDE, SIDE]
    assert output.shape[1:] == [len(segmenter.classes), SIDE, SIDE]


def test_deepness_predicts_as_pytorch(session: Any, segmenter: Segmenter, metadata: ModelMetadata) -> None:
    properties = session.get_modelmeta().custom_metadata_map
    tile = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = (np.array(json.loads(properties[f"standardization_{name}"]), np.float32) for name in ("mean", "std"))
    inputs = np.transpose((np.float32(tile * 1.0 / 255.0) - mean) / std, (0, 3, 1, 2))
    result = session.run(None, {session.get_inputs()[0].name: inputs.astype(np.float32)})[0]
    images = np.ascontiguousarray(tile.transpose(0, 3, 1, 2), dtype=np.float32)
    expected = segmenter_predictor(segmenter, metadata)(images)
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert result.min() >= 0
    np.testing.assert_allclose(result.sum(1), 1, atol=1e-5)
    swapped = segmenter_predictor(segmenter, metadata)(np.ascontiguousarray(images[:, ::-1]))
    assert np.abs(swapped - expected).max() > 1e-3, "the order of the channels matters; it is red, green, blue"
    result[result < json.loads(properties["seg_thresh"])] = 0
    assert (result.argmax(1) == expected.argmax(1)).mean() > 0.999
