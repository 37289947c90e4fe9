"""Files whose metadata were changed by hand, so that they are no longer what the graph is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from overfly.core.errors import WeightsError
from overfly.exporting import runtimes
from overfly.exporting.agreement import check_given
from overfly.exporting.formats import describe, write_onnx, write_torch
from overfly.exporting.graph import ExportModule, Output
from overfly.exporting.metadata import ExportSettings, metadata_entries
from overfly.exporting.predictor import ModelMetadata, model_metadata
from overfly.exporting.program import read_program
from overfly.exporting.runtimes import onnx_predictor, openvino_predictor, torch_predictor
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from random_networks import random_network

SIDE = 32


def known(segmenter: Segmenter) -> ModelMetadata:
    return model_metadata(segmenter, window=SIDE).model_copy(update={"fixed": True})


def changed(metadata: ModelMetadata, settings: ExportSettings) -> list[tuple[dict[str, str], str]]:
    """Metadata that lie, and what is said of each."""
    names, colors = metadata.classes.names, metadata.classes.colors
    fewer = metadata.classes.model_copy(update={"names": names[:3], "colors": colors[:3]})
    other: Output = "logits" if settings.output == "probabilities" else "probabilities"
    return [
        (metadata_entries(metadata.model_copy(update={"classes": fewer}), settings), "7 classes, .* say 3"),
        (metadata_entries(metadata.model_copy(update={"bands": 1}), settings), "3 bands, .* say 1"),
        (metadata_entries(metadata.model_copy(update={"window": 64}), settings), "32 pixels a side, .* say 64"),
        (
            metadata_entries(metadata, settings.model_copy(update={"output": "classes"})),
            "4 sides, .* say classes, of 3",
        ),
        (
            metadata_entries(metadata, settings.model_copy(update={"output": other})),
            f"gives {settings.output}, .* say {other}",
        ),
    ]


@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_metadata_that_are_not_the_graphs_are_refused(
    recipe: Recipe, tmp_path: Path, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = random_network(recipe, "lraspp_mobilenet_v2")
    metadata, settings = known(segmenter), ExportSettings(output=output)
    module = ExportModule(segmenter, output=output, fixed=(SIDE, SIDE)).eval()
    file = write_onnx(module, tmp_path / "it.onnx", 3, metadata_entries(metadata, settings))
    model = onnx.load(file)
    for properties, said in changed(metadata, settings):
        describe(model, properties)
        onnx.save(model, file)
        for opened in (onnx_predictor, openvino_predictor):
            with pytest.raises(WeightsError, match=f"it.onnx: its graph .*{said}"):
                opened(file)
    program = write_torch(module, tmp_path / "it.pt2", 3, metadata_entries(metadata, settings))
    graph, told = read_program(program)
    assert torch_predictor(program).metadata == metadata
    monkeypatch.setattr(runtimes, "read_program", lambda _: (graph, told))  # reading it takes its time
    for properties, said in changed(metadata, settings):
        told.update(properties)
        with pytest.raises(WeightsError, match=f"it.pt2: its graph .*{said}"):
            torch_predictor(program)


def test_a_class_that_the_metadata_do_not_have_is_refused(recipe: Recipe) -> None:
    metadata = known(random_network(recipe, "lraspp_mobilenet_v2"))
    settings, ids = ExportSettings(output="classes"), np.full((1, SIDE, SIDE), 6, np.uint8)
    check_given(Path("it.onnx"), ids, metadata, settings)
    with pytest.raises(WeightsError, match=r"it\.onnx: its graph gives class 7, .* say 7 classes, the last of them 6"):
        check_given(Path("it.onnx"), ids + 1, metadata, settings)
    with pytest.raises(WeightsError, match="7 classes"):
        check_given(Path("it.onnx"), np.zeros((1, 5, SIDE, SIDE)), metadata, ExportSettings())
