"""The contract with QGIS' plug-in Deepness, which is not here: what its reader asks for, and how it feeds the graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from overfly.exporting.formats import write_onnx
from overfly.exporting.graph import ExportModule
from overfly.exporting.metadata import ExportSettings, metadata_entries
from overfly.exporting.onnx_metadata import deepness_properties
from overfly.exporting.predictor import model_metadata, segmenter_predictor
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from random_networks import random_network

SIDE = 64


@pytest.fixture
def segmenter(recipe: Recipe) -> Segmenter:
    return random_network(recipe, "lraspp_mobilenet_v2")


@pytest.fixture
def file(segmenter: Segmenter, tmp_path: Path) -> Path:
    metadata = model_metadata(segmenter, window=SIDE, gsd=0.3).model_copy(update={"fixed": True})
    module = ExportModule(segmenter, fixed=(SIDE, SIDE)).eval()
    return write_onnx(
        module, tmp_path / "it.onnx", 3, metadata_entries(metadata, ExportSettings()) | deepness_properties(metadata)
    )


def test_keys_and_types(file: Path, segmenter: Segmenter) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    values = {
        key: json.loads(value)
        for key, value in session.get_modelmeta().custom_metadata_map.items()
        if not key.startswith("overfly")
    }
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


def test_shapes_that_the_plug_in_accepts(file: Path, segmenter: Segmenter) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,), (answered,) = session.get_inputs(), session.get_outputs()
    assert given.type == answered.type == "tensor(float)"
    assert isinstance(given.shape[0], str)
    assert given.shape[1:] == [3, SIDE, SIDE]
    assert answered.shape[1:] == [len(segmenter.classes), SIDE, SIDE]


def test_what_the_plug_in_feeds_gives_what_we_give(file: Path, segmenter: Segmenter) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    tile = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = (
        np.array(json.loads(metadata[f"standardization_{name}"]), dtype=np.float32) for name in ("mean", "std")
    )
    fed = np.transpose((np.float32(tile * 1.0 / 255.0) - mean) / std, (0, 3, 1, 2))
    found = session.run(None, {session.get_inputs()[0].name: fed.astype(np.float32)})[0]
    images = np.ascontiguousarray(tile.transpose(0, 3, 1, 2), dtype=np.float32)
    metadata = model_metadata(segmenter, window=SIDE)
    wanted = segmenter_predictor(segmenter, metadata)(images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    swapped = segmenter_predictor(segmenter, metadata)(np.ascontiguousarray(images[:, ::-1]))
    assert np.abs(swapped - wanted).max() > 1e-3, "the order of the channels matters, and ours is red, green, blue"
    kept = found.copy()
    kept[kept < json.loads(metadata["seg_thresh"])] = 0
    assert (kept.argmax(1) == wanted.argmax(1)).mean() > 0.999


def test_the_file_is_valid(file: Path) -> None:
    onnx.checker.check_model(onnx.load(file), full_check=True)
