"""Suggested tiles: which are picked, and what is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch

from overfly import cli, suggest, train
from overfly.adaptation.selection import Comparison
from overfly.adaptation.suggestion import disagreement, facility_location, similarity
from overfly.commands.train import AdaptResult
from overfly.core.errors import DataError, RecipeError
from overfly.core.records import UInt8
from overfly.data.reading import read_label_pixels
from overfly.recipe import load
from polygons import raster, scene
from rasters import GEOREFERENCE
from tiles import LIGHT, SIDE, TILE, recipe_for


def read(path: Path) -> UInt8:
    return read_label_pixels(path).values.astype(np.uint8)


def test_tiles_are_picked_by_disagreement_similar_area_and_spread() -> None:
    similar = np.array([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    even, area = np.ones(4), np.full(4, 0.25)
    assert facility_location(area, even, similar, 3) == [0, 2, 3]  # not 1, which is like 0
    assert facility_location(area, np.array([0.1, 0.1, 0.1, 0.9]), similar, 2) == [3, 0]
    assert facility_location(np.array([0.1, 0.1, 0.7, 0.1]), even, similar, 1) == [2]
    assert facility_location(area, np.zeros(4), similar, 2) == [0, 2]  # all agree: the largest area
    assert similarity(torch.tensor([[0.0, 5.0], [0.0, 5.0], [1.0, 5.0]]))[0].round(3).tolist() == [1.0, 1.0, 0.135]
    assert similarity(torch.zeros(1, 3)).tolist() == [[1.0]]


def test_disagreement_is_the_share_of_pairs_that_differ() -> None:
    labels = torch.tensor([[[0, 0, 0]], [[0, 0, 1]], [[0, 1, 2]]])
    votes = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert disagreement(votes).flatten().tolist() == pytest.approx([0, 2 / 3, 1])
    alone = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])
    assert disagreement(alone).flatten().tolist() == [0.0, 0.5]


def test_suggestions_lie_on_the_grid_of_their_images(compared: AdaptResult, labels: Path) -> None:
    rows = json.loads((labels / "suggestion.json").read_text())["tiles"]
    names = [row["tile"] for row in rows]
    assert len(set(names)) == 3
    frame = pyogrio.read_info(labels / "tiles.gpkg")
    assert frame["crs"] == GEOREFERENCE["crs"]
    meta, _, outlines, columns = pyogrio.raw.read(labels / "tiles.gpkg")
    fields = dict(zip(meta["fields"], columns, strict=True))
    assert fields["rank"].tolist() == [1, 2, 3]
    assert all("disagree on" in reason for reason in fields["reason"])
    for row, outline in zip(rows, shapely.from_wkb(outlines), strict=True):
        top, left, height, width = row["window"]
        with rasterio.open(row["image"]) as whole, rasterio.open(labels / "masks" / f"{row['tile']}.tif") as mask:
            assert mask.transform.to_gdal() == pytest.approx(
                (
                    *whole.xy(top, left, offset="ul")[:1],
                    *whole.transform.to_gdal()[1:3],
                    *whole.xy(top, left, offset="ul")[1:],
                    *whole.transform.to_gdal()[4:],
                )
            )
            assert (mask.crs, mask.shape, mask.nodata) == (whole.crs, (height, width), 255)
            assert outline.bounds == pytest.approx(tuple(mask.bounds))
            image = whole.read()[:, top : top + height, left : left + width]
        with rasterio.open(labels / "images" / f"{row['tile']}.tif") as tile:
            assert np.array_equal(tile.read(), image)
        assert (read(labels / "masks" / f"{row['tile']}.tif") == 255).all()
        network = Comparison(compared.path).recommended_run().segmenter()  # type: ignore[union-attr]
        with torch.inference_mode():
            ids = network.scores(torch.from_numpy(image[None].astype(np.float32))).argmax(1)[0]
        draft = read_label_pixels(labels / "drafts" / f"{row['tile']}.tif")
        assert np.array_equal(draft.values, ids.numpy())
        assert draft.palette is not None
        assert tuple(draft.palette[1]) == network.classes.colors[1]
    text = (labels / "README.txt").read_text()
    assert f"--labels {labels}" in text
    assert "1  building" in text


def test_the_same_command_gives_the_same_folder_and_keeps_corrected_masks(compared: AdaptResult, labels: Path) -> None:
    again = partial(suggest, [compared.path], count=3, tile=TILE, device="cpu", quiet=True)
    files = {file: file.read_bytes() for file in labels.rglob("*") if file.is_file() and file.suffix != ".gpkg"}
    again(out=labels)
    assert {file: file.read_bytes() for file in files} == files
    mask = next((labels / "masks").iterdir())
    with rasterio.open(mask, "r+") as dataset:
        dataset.write(np.zeros((1, *dataset.shape), np.uint8))
    with pytest.raises(RecipeError, match="was changed"):
        again(out=labels)
    assert (read(mask) == 0).all()
    with pytest.raises(RecipeError, match="not written by overfly suggest"):
        again(out=labels / "masks")
    with pytest.raises(DataError, match="has 12 tiles"):
        again(out=labels.parent / "more", count=13)


def test_plain_images_of_one_run_are_suggested_whole(world: Path, tmp_path: Path) -> None:
    run = train(load(recipe_for(world, "plain").start, "steps=2"), out=tmp_path, device="cpu", quiet=True).run  # type: ignore[arg-type]
    out = tmp_path / "labels"
    found = suggest([run.path], count=2, tile=SIDE, out=out, device="cpu", quiet=True)
    for pick in found.picks:
        assert (out / "images" / f"{pick.tile.name}.png").read_bytes() == pick.tile.item.image.read_bytes()  # type: ignore[union-attr]
        assert read_label_pixels(out / "drafts" / f"{pick.tile.name}.png").palette is not None
    assert pyogrio.read_info(out / "tiles.gpkg")["crs"] is None
    assert pyogrio.read_bounds(out / "tiles.gpkg")[1][:, 0].tolist() == [0, -SIDE, SIDE, 0]


def test_a_count_out_of_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["suggest", str(tmp_path), "--count", "0"])
    assert left.value.code == 2


def test_tiles_of_a_raster_lie_on_its_grid(tmp_path: Path) -> None:
    scene(tmp_path, 200, 300)
    target = {"name": "raster", "images": str(tmp_path / "a.tif"), "block": 100, "title": "Target"}
    source = raster(tmp_path).model_dump(mode="json")
    recipe = load({**LIGHT, "source": source, "target": target, "steps": 2})
    run = train(recipe, out=tmp_path / "runs", device="cpu", quiet=True).run
    out = tmp_path / "labels"
    for pick in suggest([run.path], count=2, tile=64, out=out, device="cpu", quiet=True).picks:
        with (
            rasterio.open(tmp_path / "a.tif") as whole,
            rasterio.open(out / "images" / f"{pick.tile.name}.tif") as tile,
        ):
            assert np.array_equal(tile.read(), whole.read(window=whole.window(*tile.bounds)))
            with rasterio.open(out / "drafts" / f"{pick.tile.name}.tif") as draft:
                assert (draft.crs, draft.transform, draft.shape) == (whole.crs, tile.transform, (64, 64))
    assert pyogrio.read_info(out / "tiles.gpkg")["crs"] == "EPSG:32633"
    rows = json.loads((out / "suggestion.json").read_text())["tiles"]
    assert [row["image"] for row in rows] == [row["tile"].partition("_r")[0] for row in rows]
