"""Faults of rasters, labels and settings are errors of one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overfly.core.errors import DataError
from overfly.core.records import UInt8
from overfly.data.check import check
from overfly.data.domain import SplitError, check_masks
from overfly.data.raster import Raster
from polygons import colors, moved, outline, raster, scene, squares, write_polygons, write_raster


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"splits": {"train": 0.8, "val": 0.2}, "block": 1000}, "and block is 1000: 1 block cannot .* 2 splits"),
        ({"attribute": "kind"}, "has no attribute kind; its attributes: use"),
        ({"attribute": None}, "set attribute to one of: use"),
        ({"classes": ["water", "land"]}, r"not a class in \d+.\d% of its polygons: built .* mapping: {built: null}"),
        ({"layer": "roads"}, "has the layers a; set layer"),
        ({"labels": "missing.gpkg"}, "missing.gpkg"),
        ({"images": "missing*.tif"}, "missing.* correct images"),
    ],
)  # fmt: skip
def test_faults_of_settings_are_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    scene(tmp_path)

    def read(domain: Raster) -> UInt8:
        return domain.read_label(domain.items("train")[0])

    with pytest.raises(DataError, match=words):
        read(raster(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gap": 101}, "gap is 101"),
        ({"splits": {"train": 0.8, "val": 0.3}}, "add up to 1.1"),
        ({"background": "sea"}, "background is sea"),
        ({"labels": ["a.gpkg", "b.tif"]}, "one vector file"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        raster(tmp_path, **settings)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    scene(tmp_path)
    with pytest.raises(SplitError, match="no split val"):
        raster(tmp_path).items("val")


def test_rasters_of_other_bands_are_named(tmp_path: Path) -> None:
    scene(tmp_path)
    write_raster(tmp_path / "b.tif", np.ones((5, 64, 64), np.uint8))
    with pytest.raises(DataError, match=r"differ in their number of bands: .*a\.tif has 3, .*b\.tif has 5"):
        raster(tmp_path, images=str(tmp_path / "*.tif")).items("train")


def test_a_resolution_needs_a_coordinate_reference_system(tmp_path: Path) -> None:
    scene(tmp_path)
    write_raster(tmp_path / "a.tif", colors(squares(64, 64)), crs=None, grid=None)
    with pytest.raises(DataError, match=r"no coordinate reference system.*remove resolution"):
        raster(tmp_path, resolution=1.0, labels=None).items("train")


def test_labels_of_another_place_are_named_with_both_bounds(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    write_polygons(tmp_path / "a.gpkg", *outline(ids, moved(90_000)))
    words = r"covers 545000, 4\.99985e\+06, .* the raster 500000, .*left, bottom, right, top"
    with pytest.raises(DataError, match=words):
        check_masks(raster(tmp_path), ["train"])


@pytest.mark.parametrize("missing", ["raster", "labels"])
def test_a_coordinate_reference_system_on_one_side_only_is_named(tmp_path: Path, missing: str) -> None:
    ids = scene(tmp_path)
    if missing == "raster":
        write_raster(tmp_path / "a.tif", colors(ids), crs=None)
    else:
        write_polygons(tmp_path / "a.gpkg", *outline(ids), crs=None)
    name = "a.tif" if missing == "raster" else "a.gpkg"
    with pytest.raises(
        DataError, match=re.escape(name) + " has no coordinate reference system, and .* has one; assign"
    ):
        check_masks(raster(tmp_path), ["train"])


def test_an_area_without_polygons_or_elsewhere_is_named(tmp_path: Path) -> None:
    import shapely

    scene(tmp_path)
    for name, box, words in (
        ("far.gpkg", shapely.box(0, 0, 1, 1), "far.gpkg does not overlap"),
        ("near.gpkg", shapely.box(500_000, 4_999_850, 500_001, 4_999_851), "no pixel with data in the polygons"),
    ):
        write_polygons(tmp_path / name, [box], ["x"])
        pixels = colors(squares(300, 400))
        pixels[:, 250:, :60] = 0
        write_raster(tmp_path / "a.tif", pixels, nodata=0)
        with pytest.raises(DataError, match=words):
            raster(tmp_path, area=str(tmp_path / name)).items("train")


def test_a_raster_of_one_value_is_a_problem_with_its_setting(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    pixels = colors(ids)
    pixels[:, :100, :100] = 0
    write_raster(tmp_path / "a.tif", pixels)
    report = check(raster(tmp_path))
    assert [problem.message for problem in report.problems] == [
        "0_a_0_0 has one value in all pixels, 0; if it means no data, set nodata"
    ]
