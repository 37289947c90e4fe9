from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Logits, UInt8
from overfly.data.check import check, statistics
from overfly.data.domain import SPLITS, Split, check_masks, without_labels
from overfly.data.loading import BatchStream
from overfly.data.raster import Block, Raster
from overfly.data.raster_grid import open_grid, split_pixels
from overfly.data.sampling import Rare, Uniform
from overfly.evaluation.score import score
from overfly.exporting.predictor import ModelMetadata
from overfly.raster.raster_source import inspect_raster, resampling_factors
from overfly.raster.tiling import WindowBatch, plan_windows, read_windows
from overfly.recipe import Recipe
from polygons import NAMES, colors, moved, outline, raster, scene, squares, write_polygons, write_raster

SHARES: dict[Split, float] = {"train": 0.6, "val": 0.2, "test": 0.2}


def whole(domain: Raster, split: Split) -> UInt8:
    """The labels of all items of a split in one array, 255 elsewhere; fails where two items label a pixel."""
    grid = domain.grids()[0]
    result: UInt8 = np.full((grid.height, grid.width), IGNORE, np.uint8)
    for item in domain.items(split):
        assert isinstance(item.image, Block)
        window = item.image.window
        label = domain.read_label(item)
        assert label.shape == domain.read_image(item).shape[:2] == (window.height, window.width)
        part = result[window.rows, window.columns]
        assert not ((part != IGNORE) & (label != IGNORE)).any()
        part[label != IGNORE] = label[label != IGNORE]
    return result


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb"])
def test_blocks_hold_every_pixel_once_with_its_label(tmp_path: Path, suffix: str) -> None:
    ids = squares(300, 400)
    write_raster(tmp_path / "a.tif", colors(ids))
    crs = "EPSG:32633"
    write_polygons(tmp_path / f"a{suffix}", *outline(ids), crs=crs)
    domain = raster(tmp_path, labels=str(tmp_path / f"a{suffix}"))
    assert np.array_equal(whole(domain, "train"), ids)
    first = domain.items("train")[0]
    assert np.array_equal(domain.read_image(first)[:, :, 0] // 80, ids[:100, :100])


def test_splits_share_no_pixel_and_keep_a_gap(tmp_path: Path) -> None:
    ids = scene(tmp_path, 600, 500)
    domain = raster(tmp_path, splits=SHARES, seed=3)
    counts = [len(domain.items(split)) for split in SPLITS]
    assert counts == [18, 6, 6]
    labels = [whole(domain, split) for split in SPLITS]
    owned = [label != IGNORE for label in labels]
    assert sum(mask.astype(int) for mask in owned).max() == 1
    for label, mask in zip(labels, owned, strict=True):
        assert np.array_equal(label[mask], ids[mask])
    for earlier, later in ((0, 1), (0, 2), (1, 2)):
        rows, columns = np.nonzero(owned[later])
        for shift in ((10, 0), (-10, 0), (0, 10), (10, 10), (-10, 10)):
            near = np.clip(rows + shift[0], 0, 599), np.clip(columns + shift[1], 0, 499)
            assert not owned[earlier][near].any()
    assert owned[2].sum() == 6 * 100 * 100
    assert [item.name for item in domain.items("val")] == [item.name for item in domain.items("val")]
    assert raster(tmp_path, splits=SHARES, seed=4).items("val") != domain.items("val")


def test_training_crops_lie_anywhere_and_show_nothing_of_other_splits(tmp_path: Path) -> None:
    ids = scene(tmp_path, 600, 500)
    domain = raster(tmp_path, splits={"train": 0.8, "val": 0.2}, gap=20)
    held, seen = whole(domain, "val") != IGNORE, np.zeros((600, 500), np.bool_)
    with rasterio.open(tmp_path / "a.tif") as file:
        image = np.moveaxis(file.read(), 0, -1)
    image[held] = 0
    places = set()
    for step, item in enumerate([*domain.items("train")] * 4):
        part = domain.read_crop(item, 96, np.random.default_rng(step), lambda _: True)
        assert part is not None
        pixels, label = part
        assert pixels.shape == (96, 96, 3)
        place = find(image, pixels, label, ids)
        places.add(place)
        seen[place[0] : place[0] + 96, place[1] : place[1] + 96] |= label != IGNORE
    assert len(places) > 80
    assert not (seen & held).any()
    assert seen.sum() > 0.9 * (whole(domain, "train") != IGNORE).sum()


def find(image: Any, pixels: Any, label: UInt8, ids: UInt8) -> tuple[int, int]:
    """Find the place of a crop by its brightest labeled pixel, and check its pixels and labels."""
    owned = np.argwhere(label != IGNORE)
    row, column = owned[len(owned) // 2]
    same = np.argwhere((image == pixels[row, column]).all(-1))
    for top, left in same - (row, column):
        if top < 0 or left < 0 or top > image.shape[0] - 96 or left > image.shape[1] - 96:
            continue
        area = np.s_[top : top + 96, left : left + 96]
        mask = label != IGNORE
        if np.array_equal(image[area][mask], pixels[mask]):
            assert np.array_equal(ids[area][mask], label[mask])
            assert not pixels[~mask].any() or np.array_equal(
                image[area][~mask & pixels.any(-1)], pixels[~mask & pixels.any(-1)]
            )
            return int(top), int(left)
    raise AssertionError("the crop is nowhere in the raster")


def test_a_batch_is_a_function_of_seed_and_step_and_blocks_can_be_pickled(tmp_path: Path) -> None:
    scene(tmp_path)
    domain = raster(tmp_path, splits={"train": 0.8, "val": 0.2})

    def stream() -> BatchStream:
        items = pickle.loads(pickle.dumps(domain.items("train")))
        return BatchStream(domain, items, Rare(), 4, 64, None, seed=1, key=0, cache="memory", labeled=True)

    first, second = stream(), stream()
    for step in (5, 0):
        one, two = first.read(step, range(4)), second.read(step, range(4))
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.label, two.label)
    assert not torch.equal(first.read(0, range(4)).image, first.read(1, range(4)).image)
    assert not first._memory


def test_a_raster_smaller_than_the_crop_is_mirrored(tmp_path: Path) -> None:
    scene(tmp_path, 40, 60)
    domain = raster(tmp_path, block=32, gap=0)
    stream = BatchStream(domain, domain.items("train"), Uniform(), 2, 64, None, seed=0, key=0, labeled=True)
    batch = stream.read(0, range(2))
    assert batch.image.shape == (2, 3, 64, 64)
    assert (batch.label[:, 40:] == IGNORE).all()


def test_rare_classes_are_found_by_the_index_of_the_blocks(tmp_path: Path) -> None:
    ids = np.ones((400, 400), np.uint8)
    ids[310:330, 350:370] = 2
    ids[:200] = 0
    write_raster(tmp_path / "a.tif", colors(ids))
    write_polygons(tmp_path / "a.gpkg", *outline(ids))
    domain = raster(tmp_path, gap=0)
    counts = domain.known_counts(domain.items("train"))
    assert counts is not None
    assert counts.sum(0).tolist() == np.bincount(ids.ravel()).tolist()
    stream = BatchStream(domain, domain.items("train"), Rare(), 8, 64, None, seed=0, key=0, labeled=True)
    with_class = sum(bool((stream.read(step, range(8)).label == 2).any(-1).any(-1).sum() >= 4) for step in range(4))
    assert with_class == 4


def test_blocks_without_labels_are_left_out_of_training_but_not_of_a_target(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    polygons, values = outline(ids)
    left = [(polygon, value) for polygon, value in zip(polygons, values, strict=True) if polygon.bounds[2] <= 500_050]
    write_polygons(tmp_path / "a.gpkg", *map(list, zip(*left, strict=True)))
    domain = raster(tmp_path)
    assert len(domain.items("train")) == 12
    stream = BatchStream(domain, domain.items("train"), Uniform(), 2, 64, None, seed=0, key=0, labeled=True)
    assert {item.image.column for item in stream.items if isinstance(item.image, Block)} == {0}
    target = BatchStream(domain, without_labels(domain.items("train")), Uniform(), 2, 64, None, seed=0, key=1)
    assert len(target.items) == 12


def test_a_target_is_read_without_its_labels(tmp_path: Path) -> None:
    scene(tmp_path)
    (tmp_path / "a.gpkg").write_bytes(b"not a GeoPackage")
    domain = raster(tmp_path)
    stream = BatchStream(domain, without_labels(domain.items("train")), Uniform(), 2, 64, None, seed=0, key=0)
    images, missing = stream.read_unlabeled(0, range(2))
    assert images.shape == (2, 3, 64, 64)
    assert not missing.any()
    with pytest.raises(DataError, match=r"a\.gpkg"):
        domain.read_label(domain.items("train")[0])


class Perfect(torch.nn.Module):
    """A network that knows the class by the brightness of the first band, but not in the outer 5 pixels of an image."""

    def forward(self, images: torch.Tensor) -> Logits:
        ids = (images[:, 0] / 80).long().clamp(0, 2)
        inner = torch.zeros_like(ids)
        inner[:, 5:-5, 5:-5] = 1
        ids = torch.where(inner == 1, ids, (ids + 1) % 3)
        return Logits(torch.nn.functional.one_hot(ids, 3).permute(0, 3, 1, 2).float() * 9)


def test_a_raster_is_scored_pixel_by_pixel(tmp_path: Path) -> None:
    ids = scene(tmp_path, 320, 480)
    domain = raster(tmp_path, block=160)
    scores = score(Perfect(), domain, "train", batch=2, workers=2)
    pixels = torch.tensor(scores.confusion)
    assert int(pixels.sum()) == ids.size
    assert int(pixels.diagonal().sum()) == 6 * 150 * 150  # it is wrong at the border of each image


def test_no_data_is_black_ignored_and_in_no_block(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    pixels = colors(ids)
    pixels[:, :, :130] = 0
    write_raster(tmp_path / "a.tif", pixels, nodata=0)
    domain = raster(tmp_path)
    blocks = [item.image for item in domain.items("train") if isinstance(item.image, Block)]
    assert {block.column for block in blocks} == {1, 2, 3}
    label = whole(domain, "train")
    assert (label[:, :130] == IGNORE).all()
    assert np.array_equal(label[:, 130:], ids[:, 130:])
    stream = BatchStream(domain, without_labels(domain.items("train")), Uniform(), 8, 64, None, seed=0, key=0)
    images, missing = stream.read_unlabeled(0, range(8))
    assert torch.equal(missing, (images == 0).all(1))
    assert missing.float().mean() < 0.1  # a place with data is drawn again
    held = pixels[:, :, 130:].reshape(len(pixels), -1)
    assert statistics(domain, "train").mean == pytest.approx(tuple(held.mean(1)))


def test_only_the_area_is_used(tmp_path: Path) -> None:
    import shapely

    ids = scene(tmp_path)
    write_polygons(
        tmp_path / "area.geojson", [shapely.box(500_060, 4_999_900, 500_140, 5_000_000)], ["x"], crs="EPSG:32633"
    )
    domain = raster(tmp_path, area=str(tmp_path / "area.geojson"))
    label = whole(domain, "train")
    inside = np.zeros(ids.shape, np.bool_)
    inside[:200, 120:280] = True
    assert np.array_equal(label != IGNORE, inside)
    blocks = [item.image for item in domain.items("train") if isinstance(item.image, Block)]
    assert {(block.row, block.column) for block in blocks} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    stream = BatchStream(domain, without_labels(domain.items("train")), Uniform(), 4, 64, None, seed=0, key=0)
    _, missing = stream.read_unlabeled(0, range(4))
    assert not missing.any()  # crops fit into the area


@pytest.mark.parametrize("resolution", [1.0, 0.25])
def test_a_raster_is_resampled_to_a_resolution(tmp_path: Path, resolution: float) -> None:
    ids = scene(tmp_path, 256, 320)
    domain = raster(tmp_path, resolution=resolution)
    assert domain.gsd == resolution
    label = whole(domain, "train")
    expected = ids[::2, ::2] if resolution == 1 else ids.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(label, expected)
    first = domain.items("train")[0]
    image = domain.read_image(first)
    plain = colors(ids)[:, : image.shape[0] * 2, : image.shape[1] * 2]
    if resolution == 1:
        means = plain.reshape(3, image.shape[0], 2, image.shape[1], 2).mean((2, 4))
        assert np.abs(np.moveaxis(image, -1, 0) - means).max() <= 1


def test_several_rasters_are_one_domain(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 400)):
        ids = squares(200, 200, seed=shift)
        write_raster(tmp_path / f"{name}.tif", colors(ids), grid=moved(shift))
    polygons, values = outline(squares(200, 200, seed=0))
    other = outline(squares(200, 200, seed=400), moved(400))
    write_polygons(tmp_path / "a.gpkg", [*polygons, *other[0]], [*values, *other[1]])
    domain = raster(tmp_path, images=[str(tmp_path / "*.tif")], splits={"train": 0.5, "val": 0.5}, gap=0)
    assert {len(domain.items("train")), len(domain.items("val"))} == {4}
    items = [*domain.items("train"), *domain.items("val")]
    assert len({item.name for item in items}) == 8
    counts = domain.known_counts(items)
    assert counts is not None
    assert counts.sum() == 2 * 200 * 200
    shown = check(domain)
    assert shown.problems == ()
    assert sum(split.ignored for split in shown.splits) == 0


def test_recipes_hold_rasters(tmp_path: Path) -> None:
    scene(tmp_path)
    source = raster(tmp_path, splits={"train": 0.8, "val": 0.2}).model_dump(mode="json")
    target = {"name": "raster", "images": str(tmp_path / "a.tif")}
    recipe = Recipe.model_validate({"source": source, "target": target, "method": "dacs"})
    assert recipe.target is not None
    assert recipe.target.classes.names == tuple(NAMES)


def test_converted_labels_are_reused_until_something_changes(tmp_path: Path) -> None:
    scene(tmp_path)
    domain = raster(tmp_path)
    block = domain.items("train")[0].image
    assert isinstance(block, Block)
    path, counts = block.labels
    state = path.stat()
    raster(tmp_path, splits={"train": 0.5, "val": 0.5}).known_counts(domain.items("train"))
    assert path.stat().st_mtime_ns == state.st_mtime_ns
    write_polygons(tmp_path / "a.gpkg", *outline(squares(300, 400, seed=9)))
    changed = raster(tmp_path).items("train")[0].image
    assert isinstance(changed, Block)
    assert changed.labels[0] != path
    assert not np.array_equal(changed.labels[1], counts)


def test_a_single_class_is_reported_before_training(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    write_polygons(tmp_path / "a.gpkg", *outline(np.zeros_like(ids)))
    with pytest.raises(DataError, match="no mask contains land, built"):
        check_masks(raster(tmp_path), ["train"])


def test_values_above_the_sensors_range_are_an_error(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    write_raster(tmp_path / "a.tif", colors(ids).astype(np.uint16) * 10)
    domain = raster(tmp_path)
    stream = BatchStream(domain, domain.items("train"), Uniform(), 4, 64, None, seed=0, key=0, labeled=True)
    with pytest.raises(DataError, match="above the domain's max_value 255"):
        stream.read(0, range(4))


def test_split_of_each_pixel(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", colors(squares(90, 60)))
    grid = open_grid(str(path), (0, 0), 30, None)
    assigned = np.array([[0, 0], [0, 1], [-1, 2]], np.int8)
    places = np.arange(90), np.arange(60)
    train, val, test = (split_pixels(grid, assigned, number, places, 5) for number in range(3))
    assert train[:25].all()
    assert not train[25:30, 25:].any()
    assert train[25:55, :25].all()
    assert not train[55:60, 25:30].any()
    assert val[30:55, 30:].all()
    assert not val[55:].any()
    assert test[60:, 30:].all()
    assert train.sum() + val.sum() + test.sum() < 90 * 60


def test_domains_of_rasters_are_values(tmp_path: Path) -> None:
    scene(tmp_path)
    domain = raster(tmp_path, mapping={1: "built", "land": None})
    assert domain.mapping == {"1": "built", "land": None}
    blocks = [item.image for item in domain.items("train")]
    assert blocks == [item.image for item in raster(tmp_path, mapping={1: "built", "land": None}).items("train")]
    assert len(set(blocks)) == 12


def test_training_and_maps_resample_alike_beside_no_data(tmp_path: Path) -> None:
    pixels = colors(squares(240, 320)).astype(np.int16)
    pixels[:, 50:90, 100:] = -9999
    write_raster(tmp_path / "a.tif", pixels)
    domain = raster(tmp_path, labels=None, resolution=1.25, nodata=-9999, block=400)
    (item,) = domain.items("train")
    image, missing = domain.read_image(item), domain.nodata_mask(item)
    metadata = ModelMetadata(
        architecture="none", classes=domain.classes, bands=3, mean=(0.0,) * 3, std=(1.0,) * 3, window=256, max_value=255
    )
    source = inspect_raster(str(tmp_path / "a.tif"), metadata, bands=None, nodata=-9999, max_value=255)
    scale = resampling_factors(source, 1.25)
    plan = plan_windows(source.height, source.width, classes=3, size=256, overlap=0.25, scale=scale)
    batch = next(each for each in read_windows(source, plan, 1) if isinstance(each, WindowBatch))
    assert np.array_equal(image, np.moveaxis(batch.images[0], 0, -1)[: image.shape[0], : image.shape[1]])
    assert missing is not None
    assert np.array_equal(missing, (image == 0).all(-1))
    assert image[20:36, 41:].max() == 0
    assert image[~missing].min() > 0
