"""Suggested tiles, filled in, decide between candidates, and one more network learns from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from scipy import stats

from overfly import adapt
from overfly.adaptation import pipeline
from overfly.adaptation.labels import LEARNED, LabeledTiles, _folder, _jackknife, tile_scores
from overfly.adaptation.selection import BASELINE, Comparison, Selection
from overfly.commands.train import AdaptResult
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.evaluation.scores import Confusion
from overfly.recipe import load
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.setup import prepare_training
from tiles import recipe_for


@pytest.fixture(autouse=True)
def _short_recalibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RECALIBRATION", {"batch": 4, "steps": 4})


def fill(labels: Path, network: Any) -> None:
    """Fill the masks with the predictions of a network."""
    for mask in (labels / "masks").iterdir():
        with rasterio.open(labels / "images" / mask.name) as dataset:
            image = torch.from_numpy(dataset.read()[None].astype(np.float32))
        with torch.inference_mode(), rasterio.open(mask, "r+") as dataset:
            dataset.write(network.scores(image).argmax(1).numpy().astype(np.uint8))


def test_tiles_decide_and_a_network_learns_from_them(compared: AdaptResult, labels: Path, world: Path) -> None:
    comparison = Comparison(compared.path)
    fill(labels, comparison.run("recalibrated").segmenter())  # type: ignore[union-attr]
    found = adapt(recipe_for(world), labels=labels, out=world / "runs", device="cpu", quiet=True)
    selection = found.selection
    assert found.path != compared.path
    assert list(selection.candidates) == [*compared.selection.candidates, LEARNED]
    scores = selection.candidates["recalibrated"].tiles
    assert scores is not None
    assert scores.tiles == selection.labels_opened == 3
    assert scores.miou.value == pytest.approx(1, abs=0.01)  # predictions of half precision
    assert scores.difference is not None
    assert scores.difference.value > 0
    assert scores.better == 1.0
    assert selection.candidates[BASELINE].tiles.difference is None  # type: ignore[union-attr]
    assert selection.candidates[LEARNED].tiles is None
    assert selection.recommended in ("recalibrated", LEARNED)
    run = Comparison(found.path).run(LEARNED)
    assert run is not None
    assert run.recipe.labels is not None
    assert run.recipe.labels.domain.items("train")[0].label.parent == labels / "masks"  # type: ignore[union-attr]
    text = (found.path / "selection.md").read_text()
    assert "- recalibrated: mIoU " in text
    assert "opened: 3" in text
    runs = sorted(path.name for path in (world / "runs").iterdir())
    adapt(recipe_for(world), labels=labels, out=world / "runs", device="cpu", quiet=True)
    assert sorted(path.name for path in (world / "runs").iterdir()) == runs


def test_corrected_masks_are_another_recipe(compared: AdaptResult, labels: Path, world: Path) -> None:
    fill(labels, Comparison(compared.path).run(BASELINE).segmenter())  # type: ignore[union-attr]
    learned = LabeledTiles.open(labels, recipe_for(world)).extend(recipe_for(world))
    fabric = launch_fabric(learned, TrainerConfig("cpu", quiet=True))
    start = Comparison(compared.path).run(BASELINE).weights  # type: ignore[union-attr]
    setup = prepare_training(learned, fabric, TrainerConfig(quiet=True), start)
    names = setup.batches.names(0)
    tiles = {item.name for item in learned.labels.domain.items("train")}  # type: ignore[union-attr]
    assert [name in tiles for name in names[:4]] == [False, False, True, True]
    assert setup.batches.batch(0).source.image.shape == (4, 3, 32, 32)
    with rasterio.open(next((labels / "masks").iterdir()), "r+") as dataset:
        dataset.write(np.ones((1, *dataset.shape), np.uint8))
    with pytest.raises(RecipeError, match="changed"):
        prepare_training(learned, fabric, TrainerConfig(quiet=True), start)
    assert LabeledTiles.open(labels, recipe_for(world)).extend(recipe_for(world)) != learned


def test_empty_masks_are_left_out(labels: Path, world: Path) -> None:
    with pytest.raises(DataError, match=r"no mask in .* has a labeled pixel"):
        LabeledTiles.open(labels, recipe_for(world))
    mask = next((labels / "masks").iterdir())
    with rasterio.open(mask, "r+") as dataset:
        dataset.write(np.zeros((1, *dataset.shape), np.uint8))
    found = LabeledTiles.open(labels, recipe_for(world))
    assert [item.name for item in found.labels.domain.items("train")] == [mask.stem]
    (labels / "classes.yaml").write_text("[one, two]")
    with pytest.raises(OverflyError, match="other classes than the target"):
        LabeledTiles.open(labels, recipe_for(world))
    shutil.rmtree(labels / "masks")
    with pytest.raises(DataError, match="has no folder masks"):
        LabeledTiles.open(labels, recipe_for(world))


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.array([0.2, 0.5, 0.4, 0.9])
    without = [np.delete(values, index).mean() for index in range(4)]
    found = _jackknife(np.array([values.mean(), *without]))
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert _jackknife(np.array([0.3, np.nan])).low is None


def test_scores_of_tiles_say_when_they_do_not_decide() -> None:
    good, bad = (Confusion(torch.tensor(counts)) for counts in ([[9, 1], [1, 9]], [[5, 5], [5, 5]]))
    sure = tile_scores([good, good, good], [bad, bad, bad])
    assert sure.better == 1.0
    assert "includes zero" not in str(sure)
    unsure = tile_scores([good, bad, good], [bad, good, bad])
    assert "includes zero: not decided" in str(unsure)
    assert "one tile gives no interval" in str(tile_scores([good], [bad]))


@pytest.mark.parametrize(("better", "unsure"), [(0.1, False), (0.5, True), (0.9, False)])
def test_an_unsure_recommendation_names_the_command(compared: AdaptResult, better: float, unsure: bool) -> None:
    name = compared.selection.recommended
    name = "adapted" if name == BASELINE else name
    candidates = {
        key: report.model_copy(update={"better": better if key == name else None})
        for key, report in compared.selection.candidates.items()
    }
    selection: Selection = compared.selection.model_copy(update={"candidates": candidates, "recommended": name})
    assert bool(selection.unsure) is unsure
    assert ("unsure" in selection.markdown().lower()) is unsure


def test_labels_need_a_source_and_a_larger_batch(world: Path, compared: AdaptResult, labels: Path) -> None:
    fill(labels, Comparison(compared.path).run(BASELINE).segmenter())  # type: ignore[union-attr]
    recipe = recipe_for(world)
    tiles = LabeledTiles.open(labels, recipe)
    assert [tiles.labels.count(batch) for batch in (2, 3, 8)] == [1, 2, 4]
    with pytest.raises(RecipeError, match="batch above 1"):
        tiles.extend(recipe.model_copy(update={"batch": 1}))


def test_own_tiles_have_the_codes_of_a_raster_source(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    codes = {"classes": ["a", "b"], "ids": {"a": 1, "b": 2}, "bands": 4, "max_value": 10_000}
    source = {"name": "raster", "images": "a.tif", "labels": "b.tif", **codes}
    target = {"name": "raster", "images": "c.tif", "bands": 4, "max_value": 10_000}
    domain = _folder(tmp_path, load({"source": source, "target": target, "method": "dacs"}))
    assert domain.ids == {"a": (1,), "b": (2,)}
    assert (domain.bands, domain.max_value, domain.title) == (4, 10_000, "labels")
