from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio.raw
import pytest
import rasterio
import shapely
from rasterio import CRS, Affine
from rasterio.features import rasterize
from rasterio.warp import Resampling, reproject, transform

from overfly.core.errors import DataError
from overfly.core.records import IGNORE, UInt8
from overfly.data.headers import file_stamp, keep_raster, read_header
from overfly.data.raster_grid import open_grid
from overfly.data.reading import nodata_mask, read_image
from overfly.ops.windows import Window
from polygons import GRID, NAMES, colors, moved, outline, raster, scene, squares, write_polygons, write_raster

SIDE = 200


def labels(folder: Path, **settings: Any) -> UInt8:
    """The class ids of ``a.tif``, read from one block."""
    domain = raster(folder, **{"block": 400, "gap": 0, **settings})
    (item,) = domain.items("train")
    return domain.read_label(item)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The folder of ``a.tif``, 200 pixels a side, without labels."""
    write_raster(tmp_path / "a.tif", colors(squares(SIDE, SIDE)))
    return tmp_path


def box(left: float, top: float, right: float, bottom: float) -> Any:
    """A polygon in pixels of the raster."""
    x, y = GRID.c, GRID.f
    return shapely.box(x + left / 2, y - bottom / 2, x + right / 2, y - top / 2)


def test_the_last_or_the_smallest_of_overlapping_polygons_counts(image: Path) -> None:
    write_polygons(image / "a.gpkg", [box(20, 20, 40, 40), box(0, 0, 100, 100)], ["built", "land"])
    last, smallest = labels(image), labels(image, overlap="smallest")
    assert (last[:100, :100] == 1).all()
    assert (smallest[20:40, 20:40] == 2).all()
    assert (smallest[:100, :100] == 1).sum() == 100 * 100 - 20 * 20
    assert (last[100:] == IGNORE).all()


def test_a_background_and_polygons_of_one_class_need_no_attribute(image: Path) -> None:
    write_polygons(image / "a.gpkg", [box(20, 20, 40, 40)], ["x"])
    label = labels(image, classes=["rest", "built"], background="rest", attribute=None)
    assert (label == 1).sum() == 400
    assert (label == 0).sum() == SIDE * SIDE - 400


def test_all_touched_pixels_are_burned(image: Path) -> None:
    write_polygons(image / "a.gpkg", [box(20.6, 20.6, 39.4, 39.4)], ["built"])
    assert (labels(image) == 2).sum() == 18 * 18
    assert (labels(image, all_touched=True) == 2).sum() == 20 * 20


@pytest.mark.parametrize("kind", [np.int32, np.float64])
def test_numbers_are_classes_by_ids_or_mapping(image: Path, kind: Any) -> None:
    values = [kind(7), kind(3), kind(9)]
    write_polygons(image / "a.gpkg", [box(0, 0, 50, 50), box(50, 0, 100, 50), box(100, 0, 150, 50)], values)
    by_ids = labels(image, ids={"built": [7, 8], "water": 3}, ignore=[9])
    by_mapping = labels(image, mapping={7: "built", 3: "water", 9: None})
    assert np.array_equal(by_ids, by_mapping)
    assert [int(by_ids[10, column]) for column in (10, 60, 110)] == [2, 0, IGNORE]
    with pytest.raises(DataError, match=r"33.3% of its polygons: 9 \(33.3%\); .* mapping: {9: null}"):
        labels(image, ids={"built": 7, "water": 3})
    assert labels(image, ids={"built": 7, "water": 3}, unknown="ignore")[10, 110] == IGNORE


def test_polygons_without_a_value_are_ignored(image: Path) -> None:
    write_polygons(image / "a.gpkg", [box(0, 0, 50, 50), box(50, 0, 100, 50)], ["built", None])
    label = labels(image)
    assert (label == 2).sum() == 2500
    assert (label != IGNORE).sum() == 2500


def test_polygons_in_another_coordinate_reference_system_are_projected(image: Path) -> None:
    ids = squares(SIDE, SIDE, 20)
    polygons, values = outline(ids)

    def to_degrees(points: Any) -> Any:
        return np.stack(transform("EPSG:32633", "EPSG:4326", *points.T.tolist()), axis=1)

    write_polygons(image / "a.gpkg", shapely.transform(polygons, to_degrees), values, crs="EPSG:4326")
    label = labels(image)
    assert (label != ids).mean() < 0.002
    assert (label != IGNORE).mean() > 0.99


def test_files_without_a_coordinate_reference_system_are_in_one_plane(tmp_path: Path) -> None:
    ids = squares(SIDE, SIDE)
    write_raster(tmp_path / "a.tif", colors(ids), crs=None)
    write_polygons(tmp_path / "a.gpkg", *outline(ids), crs=None)
    assert np.array_equal(labels(tmp_path), ids)


def test_a_turned_raster_takes_polygons_in_place(tmp_path: Path) -> None:
    grid = Affine(0.4, 0.3, 500_000, 0.3, -0.4, 5_000_000)
    ids = squares(SIDE, SIDE)
    write_raster(tmp_path / "a.tif", colors(ids), grid=grid)
    write_polygons(tmp_path / "a.gpkg", *outline(ids, grid))
    assert np.array_equal(labels(tmp_path), ids)


def test_layers_are_named(image: Path) -> None:
    write_polygons(image / "a.gpkg", [box(0, 0, 50, 50)], ["built"], layer="houses")
    write_polygons(image / "a.gpkg", [box(0, 0, 50, 50)], ["land"], layer="fields", append=True)
    with pytest.raises(DataError, match="has the layers houses, fields; set layer"):
        labels(image)
    assert (labels(image, layer="fields") == 1).sum() == 2500


def test_only_files_of_polygons_are_read(image: Path) -> None:
    write_polygons(image / "a.gpkg", [shapely.LineString([(500_000, 5_000_000), (500_050, 4_999_950)])], ["built"])
    with pytest.raises(DataError, match="holds LineString; give a file of polygons"):
        labels(image)
    (image / "a.geojson").write_text("<OGRVRTDataSource></OGRVRTDataSource>")
    with pytest.raises(DataError, match=r"a\.geojson is not a .* of that suffix"):
        labels(image, labels=str(image / "a.geojson"))
    (image / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(DataError, match="holds no polygons"):
        labels(image, labels=str(image / "a.geojson"))
    (image / "a.geojson").write_text('{"type": "FeatureColl')
    with pytest.raises(DataError, match=r"a\.geojson is truncated or damaged \("):
        labels(image, labels=str(image / "a.geojson"))


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
def test_a_raster_of_labels_may_have_another_grid(image: Path, crs: str) -> None:
    ids = squares(100, 100, 10, seed=5)
    place = Affine(0.75, 0, 499_990, 0, -0.75, 5_000_010)
    if crs == "EPSG:4326":
        (west, east), (north, south) = transform("EPSG:32633", crs, [499_990, 500_065], [5_000_010, 4_999_935])
        place = Affine((east - west) / 100, 0, west, 0, (south - north) / 100, north)
    write_raster(image / "b.tif", ids, crs=crs, grid=place)
    expected = np.full((SIDE, SIDE), IGNORE, np.uint8)
    reproject(
        ids, expected, src_transform=place, src_crs=crs, dst_transform=GRID, dst_crs="EPSG:32633",
        resampling=Resampling.nearest, init_dest_nodata=False,
    )  # fmt: skip
    label = labels(image, labels=str(image / "b.tif"), attribute=None)
    assert (label != expected).mean() < 0.005
    assert 0.4 < (label != IGNORE).mean() < 0.5


def test_rasters_of_colors_are_labels_too_and_the_first_counts(image: Path) -> None:
    ids = squares(SIDE, SIDE)
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    painted = np.moveaxis(table[ids], -1, 0)
    write_raster(image / "x.tif", painted[:, :, :100])
    write_raster(image / "y.tif", np.moveaxis(table[(ids[:, 60:] + 1) % 3], -1, 0), grid=moved(60))
    classes = {name: color.tolist() for name, color in zip(NAMES, table, strict=True)}
    label = labels(image, labels=[str(image / "x.tif"), str(image / "y.tif")], attribute=None, classes=classes)
    assert np.array_equal(label[:, :100], ids[:, :100])
    assert np.array_equal(label[:, 100:], (ids[:, 100:] + 1) % 3)


def test_numbers_of_no_class_are_counted_over_the_whole_raster(image: Path) -> None:
    ids = squares(SIDE, SIDE)
    ids[:20, :20], ids[150:, 150:] = 9, 77
    write_raster(image / "b.tif", ids)
    words = r"no class in 7\.2% of its pixels: 77 \(2500 pixels\), 9 \(400 pixels\); .*ignore: \[77, 9\]"
    with pytest.raises(DataError, match=words):
        labels(image, labels=str(image / "b.tif"), attribute=None)
    label = labels(image, labels=str(image / "b.tif"), attribute=None, ignore=[77, 9])
    assert (label == IGNORE).sum() == 2900


def test_labels_without_a_georeference_need_the_size_of_the_image(tmp_path: Path) -> None:
    ids = squares(SIDE, SIDE)
    write_raster(tmp_path / "a.tif", colors(ids), crs=None, grid=None)
    write_raster(tmp_path / "b.tif", ids, crs=None, grid=None)
    assert np.array_equal(labels(tmp_path, labels=str(tmp_path / "b.tif"), attribute=None), ids)
    write_raster(tmp_path / "b.tif", ids[:100], crs=None, grid=None)
    with pytest.raises(DataError, match=r"200×100 pixels, its raster .* 200×200, one without a georeference"):
        labels(tmp_path, labels=str(tmp_path / "b.tif"), attribute=None)


def test_labels_equal_one_burn_of_the_whole_raster(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_raster(tmp_path / "a.tif", np.ones((3, 700, 900), np.uint8))
    centers = random.uniform((500_000, 4_999_650), (500_450, 5_000_000), (300, 2))
    polygons = [shapely.Point(center).buffer(random.uniform(1, 40), 5) for center in centers]
    values = random.choice(NAMES, 300).tolist()
    write_polygons(tmp_path / "a.gpkg", polygons, values)
    burned = rasterize(
        [(polygon, NAMES.index(value)) for polygon, value in zip(polygons, values, strict=True)],
        (700, 900), fill=IGNORE, transform=GRID, dtype="uint8",
    )  # fmt: skip
    domain = raster(tmp_path, block=300)
    found = np.full((700, 900), IGNORE, np.uint8)
    for item in domain.items("train"):
        window = item.image.window  # type: ignore[union-attr]
        found[window.rows, window.columns] = domain.read_label(item)
    assert np.array_equal(found, burned)


def test_a_window_equals_the_part_of_the_image(tmp_path: Path) -> None:
    pixels = colors(squares(150, 130))
    pixels[:, 40:70] = 9
    cases: dict[str, dict[str, Any]] = {"plain": {}, "nodata": {"nodata": 9}, "alpha": {"alpha": "yes"}, "mask": {}}
    for name, options in cases.items():
        bands = (
            np.concatenate([pixels, np.where(pixels[:1] == 9, 0, 255)]).astype(np.uint8) if name == "alpha" else pixels
        )
        path = write_raster(tmp_path / f"{name}.tif", bands, photometric="rgb", **options)
        if name == "mask":
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as out:
                out.write_mask(np.where(pixels[0] == 9, 0, 255).astype(np.uint8))
        image, missing = read_image(path, bands=3), nodata_mask(path, bands=3)
        grid = open_grid(str(path), (0, 0), 64, None)
        for window in (Window(0, 0, 150, 130), Window(17, 35, 30, 64), Window(100, 100, 50, 30)):
            part, mask = grid.read(window, 3, None)
            area = window.rows, window.columns
            assert np.array_equal(part, image[area])
            empty = np.zeros((window.height, window.width), np.bool_)
            assert np.array_equal(empty if mask is None else mask, empty if missing is None else missing[area])


def first_pixels(path: Path) -> Any:
    return open_grid(str(path), file_stamp(path), 64, None).read(Window(0, 0, 8, 8), 3, None)[0]


def test_a_kept_file_is_opened_again_when_it_changes_and_by_each_thread(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", np.full((3, 64, 64), 5, np.uint8))
    with keep_raster(path) as first, keep_raster(path) as second:
        assert first is second
    with ThreadPoolExecutor(1) as pool:
        part = pool.submit(first_pixels, path)
        assert (part.result() == 5).all()
    write_raster(path, np.full((3, 64, 64), 6, np.uint8), compress="lzw")
    assert (first_pixels(path) == 6).all()


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address of a server of the temporary folder, and the file in which it lists requests."""
    monkeypatch.setenv("no_proxy", "*")
    log = tmp_path / "requests.txt"
    script = Path(__file__).parents[1] / "range_server.py"
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=out)
    while not log.read_text().endswith("\n"):
        time.sleep(0.05)
    yield f"http://127.0.0.1:{log.read_text().strip()}", log
    server.terminate()
    server.wait()


def test_an_address_is_read_when_given_and_never_from_a_file(tmp_path: Path, requests: tuple[str, Path]) -> None:
    address, log = requests
    ids = scene(tmp_path)
    domain = raster(tmp_path, images=f"{address}/a.tif", block=400)
    (item,) = domain.items("train")
    assert np.array_equal(domain.read_label(item), ids)
    assert (domain.read_image(item)[..., 0] // 80 == ids).all()
    asked = log.read_text()
    assert "/a.tif" in asked
    source = "<SimpleSource><SourceFilename{0}>{1}</SourceFilename></SimpleSource>"
    band = f"<VRTRasterBand dataType='Byte' band='1'>{source}</VRTRasterBand>"
    inner = tmp_path / "inner.vrt"
    for file, name in (
        (tmp_path / "a.vrt", f"/vsicurl/{address}/a.tif"),
        (tmp_path / "a.vrt", f"{address}/a.tif"),
        (inner, f"/vsicurl/{address}/a.tif"),
    ):
        text = f"<VRTDataset rasterXSize='400' rasterYSize='300'>{band.format('', name)}</VRTDataset>"
        file.write_text(text)
        if file == inner:
            relative = band.format(" relativeToVRT='1'", "inner.vrt")
            (tmp_path / "a.vrt").write_text(f"<VRTDataset rasterXSize='400' rasterYSize='300'>{relative}</VRTDataset>")
        with pytest.raises(DataError, match="a VRT may name image files only"):
            read_header(tmp_path / "a.vrt")
    (tmp_path / "a.vrt").write_text(
        f"<VRTDataset rasterXSize='9' rasterYSize='9'>{band.format('', '/etc/hostname')}</VRTDataset>"
    )
    with pytest.raises(DataError, match="/etc/hostname is"):
        read_header(tmp_path / "a.vrt")
    assert log.read_text() == asked


def test_a_mosaic_of_files_is_one_raster(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    names = []
    for index, columns in enumerate((slice(0, 150), slice(150, 400))):
        names.append(f"part{index}.tif")
        write_raster(tmp_path / names[-1], colors(ids)[:, :, columns], grid=moved(columns.start))
    parts = "".join(
        f"<SimpleSource><SourceFilename relativeToVRT='1'>{name}</SourceFilename><SourceBand>{{0}}</SourceBand>"
        f"<SrcRect xOff='0' yOff='0' xSize='{width}' ySize='300'/>"
        f"<DstRect xOff='{left}' yOff='0' xSize='{width}' ySize='300'/></SimpleSource>"
        for name, left, width in zip(names, (0, 150), (150, 250), strict=True)
    )
    bands = "".join(
        f"<VRTRasterBand dataType='Byte' band='{band}'>{parts.format(band)}</VRTRasterBand>" for band in (1, 2, 3)
    )
    head = f"<SRS>{CRS.from_epsg(32633).to_wkt()}</SRS><GeoTransform>500000,0.5,0,5000000,0,-0.5</GeoTransform>"
    (tmp_path / "a.vrt").write_text(f"<VRTDataset rasterXSize='400' rasterYSize='300'>{head}{bands}</VRTDataset>")
    domain = raster(tmp_path, images=str(tmp_path / "a.vrt"))
    whole = raster(tmp_path)
    for one, other in zip(domain.items("train"), whole.items("train"), strict=True):
        assert np.array_equal(domain.read_image(one), whole.read_image(other))
        assert np.array_equal(domain.read_label(one), whole.read_label(other))


def test_a_read_only_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene(tmp_path)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("OVERFLY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"the cache .* cannot be written"):
        labels(tmp_path)


def test_a_damaged_entry_of_the_cache_is_made_again(tmp_path: Path) -> None:
    ids = scene(tmp_path)
    domain = raster(tmp_path)
    block = domain.items("train")[0].image
    path = block.labels[0]  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 50)
    from overfly.data import raster_labels

    raster_labels._CONVERTED.clear()
    item = domain.items("train")[0]
    assert np.array_equal(domain.read_label(item), ids[:100, :100])


def test_fields_of_geometry_are_not_needed_by_the_reader(image: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyogrio.raw.write(
            str(image / "a.gpkg"), shapely.to_wkb(np.array([box(0, 0, 50, 50), None], object)),
            [np.array(["built", "land"], object)], ["use"], crs="EPSG:32633", geometry_type="Polygon", driver="GPKG",
        )  # fmt: skip
    assert (labels(image) == 2).sum() == 2500


def test_images_without_a_georeference_have_their_own_labels(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(3):
        ids = squares(128, 128, seed=number)
        write_raster(tmp_path / "images" / f"{number}.tif", colors(ids), crs=None, grid=None)
        write_raster(tmp_path / "labels" / f"{number}.tif", ids, crs=None, grid=None)
    paths = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    domain = raster(tmp_path, **paths, attribute=None, block=128, gap=0)
    for item in domain.items("train"):
        number = int(Path(str(item.name)).name[0])
        np.testing.assert_array_equal(domain.read_label(item), squares(128, 128, seed=number))
    (tmp_path / "labels" / "2.tif").rename(tmp_path / "labels" / "2_mask.tif")
    with pytest.raises(DataError, match=r"2\.tif has no georeference, and 0 of 3 label files have its name"):
        [domain.read_label(item) for item in raster(tmp_path, **paths, attribute=None, block=128).items("train")]


def test_polygons_do_not_lie_in_several_images_without_a_georeference(tmp_path: Path) -> None:
    for number in range(2):
        write_raster(tmp_path / f"{number}.tif", colors(squares(64, 64)), crs=None, grid=None)
    write_polygons(tmp_path / "a.gpkg", [box(0, 0, 30, 30)], ["built"], crs=None)
    domain = raster(tmp_path, images=str(tmp_path / "*.tif"), block=64)
    with pytest.raises(DataError, match="no georeference to place polygons by"):
        domain.known_counts(domain.items("train"))


def test_a_table_of_styles_is_not_a_layer(image: Path) -> None:
    path = write_polygons(image / "a.gpkg", [box(0, 0, 100, 100)], ["built"])
    fields = [np.array(["style"], object)]
    pyogrio.raw.write(str(path), None, fields, ["name"], layer="layer_styles", geometry_type=None, append=True)
    assert (labels(image)[:100, :100] == 2).all()
