"""Rasters on the command line of `adapt`, and their splits in `data check`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from overfly import data_check
from overfly.adaptation.auto_recipe import folder_recipes
from overfly.adaptation.inputs import ImageInputs, input_domain
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.data.raster import Raster
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig
from polygons import NAMES, colors, moved, outline, squares, write_polygons, write_raster


@pytest.fixture
def two(tmp_path: Path) -> ImageInputs:
    """A raster with polygons, and a raster without."""
    ids = squares(700, 600)
    write_raster(tmp_path / "a.tif", colors(ids))
    write_polygons(tmp_path / "a.gpkg", *outline(ids))
    write_raster(tmp_path / "b.tif", colors(squares(500, 400, seed=2)), grid=moved(9_000))
    images = (str(tmp_path / "a.tif"), None, str(tmp_path / "b.tif"))
    return ImageInputs(*images, source_labels=str(tmp_path / "a.gpkg"), attribute="use")


def test_rasters_and_polygons_become_domains(two: ImageInputs) -> None:
    source = input_domain("source", two, {})
    assert isinstance(source, Raster)
    assert source.classes.names == tuple(sorted(NAMES))
    assert (source.bands, source.block, source.gap) == (3, 96, 12)
    assert source.splits == {"train": 0.85, "val": 0.15}
    assert source.mean is not None
    counts = [source.known_counts(source.items(split)) for split in ("train", "val")]
    shares = [count.sum(0) / count.sum() for count in counts if count is not None]
    assert abs(shares[0] - shares[1]).max() < 0.05
    target = input_domain("target", two, {"classes": source.classes})
    assert isinstance(target, Raster)
    assert target.labels is None
    assert target.splits == {}


def test_recipes_of_rasters_are_trained(two: ImageInputs, tmp_path: Path) -> None:
    settings = ["model=small_network", "steps=2", "start.steps=2", "crop=64", "window=64", "batch=2"]
    recipe, *_ = folder_recipes(two, "10m", TrainerConfig("cpu", quiet=True), settings, tmp_path)
    assert isinstance(recipe.source, Raster)
    assert isinstance(recipe.target, Raster)
    assert isinstance(recipe.start, Recipe)
    assert Path(recipe.target.images).is_absolute()  # type: ignore[arg-type]


def test_classes_of_rasters_may_be_mapped(two: ImageInputs, tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(
        yaml.safe_dump({"classes": ["wet", "dry"], "mapping": {"water": "wet", "land": "dry", "built": None}})
    )
    recipe, *_ = folder_recipes(
        ImageInputs(**{**two.__dict__, "classes": file}), "10m", TrainerConfig("cpu", quiet=True),
        ["model=small_network", "steps=2", "start.steps=2"], tmp_path,
    )  # fmt: skip
    assert recipe.target is not None
    assert recipe.target.classes.names == ("wet", "dry")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_labels": None, "attribute": None}, "--source-labels missing"),
        ({"attribute": None}, "--classes missing.*--attribute"),
        ({"attribute": "kind"}, "no attribute kind; its attributes: use"),
        ({"source_masks": Path("masks")}, "--source-masks is for folders"),
        ({"target_images": "nowhere/b.tif"}, "b.tif does not exist.*correct images"),
    ],
)
def test_faults_of_options_are_named(two: ImageInputs, change: dict[str, object], words: str) -> None:
    with pytest.raises(OverflyError, match=words):
        folder_recipes(ImageInputs(**{**two.__dict__, **change}), "10m", TrainerConfig("cpu", quiet=True))


def test_an_attribute_of_many_values_needs_classes(two: ImageInputs, tmp_path: Path) -> None:
    polygons, _ = outline(squares(700, 600))
    write_polygons(tmp_path / "a.gpkg", polygons, [f"owner {index}" for index in range(len(polygons))])
    with pytest.raises(RecipeError, match=r"values of use in the rasters, such as owner 0, .*--classes"):
        input_domain("source", two, {})


def test_data_check_draws_the_splits(two: ImageInputs, tmp_path: Path) -> None:
    source = input_domain("source", two, {})
    file = tmp_path / "domain.yaml"
    file.write_text(yaml.safe_dump(source.model_dump(mode="json")))
    result = data_check(file, out=tmp_path / "figures")
    assert result.exit_status == 0
    (figure,) = result.figures
    assert figure == tmp_path / "figures" / "splits-source.png"
    with Image.open(figure) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((0, 80, 255), (255, 0, 190)):
        assert (abs(pixels.astype(int) - color).sum(1) < 6).sum() > 1000
    shutil.rmtree(tmp_path / "figures")
    (tmp_path / "b.tif").unlink()
    with pytest.raises(DataError, match="correct images"):
        data_check(file, f"images={tmp_path / 'b.tif'}", out=tmp_path / "figures")
