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
from overfly.exporting.graph import Answer, Deployed
from overfly.exporting.metadata import Made, entries
from overfly.exporting.predictor import Facts, facts_of
from overfly.exporting.program import read_program
from overfly.exporting.runtimes import of_onnx, of_openvino, of_program
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from sane_networks import sane

SIDE = 32


def known(segmenter: Segmenter) -> Facts:
    return facts_of(segmenter, window=SIDE).model_copy(update={"fixed": True})


def changed(facts: Facts, made: Made) -> list[tuple[dict[str, str], str]]:
    """Metadata that lie, and what is said of each."""
    names, colors = facts.classes.names, facts.classes.colors
    fewer = facts.classes.model_copy(update={"names": names[:3], "colors": colors[:3]})
    other: Answer = "logits" if made.answer == "probabilities" else "probabilities"
    return [
        (entries(facts.model_copy(update={"classes": fewer}), made), "7 classes, .* say 3"),
        (entries(facts.model_copy(update={"bands": 1}), made), "3 bands, .* say 1"),
        (entries(facts.model_copy(update={"window": 64}), made), "32 pixels a side, .* say 64"),
        (entries(facts, made.model_copy(update={"answer": "classes"})), "4 sides, .* say classes, of 3"),
        (entries(facts, made.model_copy(update={"answer": other})), f"gives {made.answer}, .* say {other}"),
    ]


@pytest.mark.parametrize("answer", ["probabilities", "logits"])
def test_metadata_that_are_not_the_graphs_are_refused(
    recipe: Recipe, tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = sane(recipe, "lraspp_mobilenet_v2")
    facts, made = known(segmenter), Made(answer=answer)
    deployed = Deployed(segmenter, answer=answer, fixed=(SIDE, SIDE)).eval()
    file = write_onnx(deployed, tmp_path / "it.onnx", 3, entries(facts, made))
    model = onnx.load(file)
    for metadata, said in changed(facts, made):
        describe(model, metadata)
        onnx.save(model, file)
        for opened in (of_onnx, of_openvino):
            with pytest.raises(WeightsError, match=f"it.onnx: its graph .*{said}"):
                opened(file)
    program = write_torch(deployed, tmp_path / "it.pt2", 3, entries(facts, made))
    graph, told = read_program(program)
    assert of_program(program).facts == facts
    monkeypatch.setattr(runtimes, "read_program", lambda _: (graph, told))  # reading it takes its time
    for metadata, said in changed(facts, made):
        told.update(metadata)
        with pytest.raises(WeightsError, match=f"it.pt2: its graph .*{said}"):
            of_program(program)


def test_a_class_that_the_metadata_do_not_have_is_refused(recipe: Recipe) -> None:
    facts = known(sane(recipe, "lraspp_mobilenet_v2"))
    made, ids = Made(answer="classes"), np.full((1, SIDE, SIDE), 6, np.uint8)
    check_given(Path("it.onnx"), ids, facts, made)
    with pytest.raises(WeightsError, match=r"it\.onnx: its graph gives class 7, .* say 7 classes, the last of them 6"):
        check_given(Path("it.onnx"), ids + 1, facts, made)
    with pytest.raises(WeightsError, match="7 classes"):
        check_given(Path("it.onnx"), np.zeros((1, 5, SIDE, SIDE)), facts, Made())
