"""Georeferenced and plain target images of a few tiles, with a recipe that adapts to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio import Affine

from overfly.data.synthetic import Synthetic
from overfly.recipe import Recipe, load
from rasters import GEOREFERENCE

SIDE, TILE = 96, 64
SOURCE = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2}
LIGHT: dict[str, Any] = {
    "source": SOURCE, "model": "small_network", "optim": {"name": "adamw", "lr": 0.003}, "batch": 4, "crop": 32,
}  # fmt: skip


def write_targets(folder: Path) -> Path:
    """Write georeferenced images of two tiles a side into ``geo``, and the same ones without georeference."""
    scenes = Synthetic(scene="rural", size=SIDE, train=3, val=1)
    for kind in ("geo", "plain"):
        (folder / kind).mkdir()
    for number, item in enumerate(scenes.items("train")):
        image = scenes.read_image(item)
        Image.fromarray(image).save(folder / "plain" / f"{number}.png")
        x, right, *rest = GEOREFERENCE["transform"].to_gdal()
        grid = Affine.from_gdal(x + number * SIDE * right, right, *rest)
        with rasterio.open(
            folder / "geo" / f"{number}.tif", "w", driver="GTiff", dtype="uint8", count=3, height=SIDE, width=SIDE,
            crs=GEOREFERENCE["crs"], transform=grid,
        ) as dataset:  # fmt: skip
            dataset.write(np.moveaxis(image, -1, 0))
    return folder


def recipe_for(world: Path, kind: str = "geo") -> Recipe:
    target = {"name": "folder", "root": str(world), "images": kind, "title": "Target"}
    light = {**LIGHT, "target": target}
    return load({**light, "method": "dacs", "steps": 3, "start": {**light, "steps": 8}})
