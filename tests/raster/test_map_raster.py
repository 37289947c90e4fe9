from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rio_cogeo.cogeo import cog_validate

from overfly.core.errors import DataError, NotFiniteError
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from rasters import CLASSES, brightness_classes, ids, metadata, noise, pointwise, write

SETTINGS = MapSettings(window=64, batch=3)


def make_map(
    source: Path, out: Path, predictor: Any = None, settings: MapSettings = SETTINGS, **more: Any
) -> MapResult:
    return map_raster(predictor or pointwise(), str(source), out, settings, network="none", **more)


def expected_ids(pixels: np.ndarray) -> np.ndarray:
    result: np.ndarray = brightness_classes(pixels[None].astype(np.float32))[0].argmax(0)
    return result


def test_map_is_a_cog_on_the_grid_of_its_raster(tmp_path: Path) -> None:
    pixels = noise(700, 1100)
    source = write(tmp_path / "scene.tif", pixels)
    result = make_map(source, tmp_path / "map.tif", settings=replace(SETTINGS, probabilities=True, uncertainty=True))
    assert [file.name for file in result.files] == ["map.tif", "map_probabilities.tif", "map_uncertainty.tif"]
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), expected_ids(pixels))
    for file in result.files:
        assert cog_validate(file, quiet=True) == (True, [], [])
        with rasterio.open(source) as image, rasterio.open(file) as actual:
            assert (actual.crs, actual.transform, actual.shape) == (image.crs, image.transform, image.shape)
            assert actual.nodata == 255
            assert actual.compression.name == "deflate"
            assert actual.overviews(1)
    with rasterio.open(tmp_path / "map.tif") as actual:
        colors = actual.colormap(1)
        assert [colors[index][:3] for index in range(3)] == list(CLASSES.colors)
        assert actual.tags(1) == {"CLASS_0": "dark", "CLASS_1": "middle", "CLASS_2": "bright"}
        assert json.loads(actual.tags()["CLASS_NAMES"]) == {"0": "dark", "1": "middle", "2": "bright"}
    assert "<Category>middle</Category>" in (tmp_path / "map.tif.aux.xml").read_text()  # where GIS look for names
    with rasterio.open(tmp_path / "map_probabilities.tif") as actual:
        assert actual.descriptions == ("dark: probability", "middle: probability", "bright: probability")
        truth = 100 * brightness_classes(pixels[None].astype(np.float32))[0]
        np.testing.assert_allclose(actual.read(), truth, atol=0.51)
    share = truth / 100
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(0) / np.log(3) * 100
    np.testing.assert_allclose(ids(tmp_path / "map_uncertainty.tif"), entropy, atol=0.51)
    assert result.shares["dark"] == pytest.approx((expected_ids(pixels) == 0).mean())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("dtype", "max_value", "given"), [("uint16", 65535, None), ("uint16", 255, 65535.0), ("float32", 1, None)]
)
def test_data_types_and_value_ranges(tmp_path: Path, dtype: str, max_value: float, given: float | None) -> None:
    pixels = noise(90, 150)
    stored = pixels.astype(dtype) * (257 if dtype == "uint16" else 1 / 255)
    source = write(tmp_path / "scene.tif", stored.astype(dtype))
    predictor = replace(pointwise(max_value=max_value), run=lambda images: brightness_classes(images * 255 / max_value))
    make_map(source, tmp_path / "map.tif", predictor, replace(SETTINGS, max_value=given))
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), expected_ids(pixels))


def test_bands_are_read_in_the_given_order(tmp_path: Path) -> None:
    pixels = np.concatenate([noise(80, 100, 1, seed) for seed in range(5)])
    source = write(tmp_path / "scene.tif", pixels)

    def second(images: np.ndarray) -> np.ndarray:
        return brightness_classes(images[:, 1:2])

    predictor = replace(pointwise(), run=second)
    make_map(source, tmp_path / "map.tif", predictor, replace(SETTINGS, bands="5,4,1"))
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), expected_ids(pixels[3:4]))
    with pytest.raises(DataError, match="--bands 1,2,3"):
        make_map(source, tmp_path / "other.tif")


@pytest.mark.parametrize("how", ["nodata", "given", "mask", "alpha", "nan"])
def test_no_data_stays_no_data(tmp_path: Path, how: str) -> None:
    pixels = np.maximum(noise(150, 200), 1)
    hidden = np.zeros((150, 200), bool)
    hidden[:100, :90] = True  # whole windows, and parts of others
    hidden[120, 130] = True
    truth = np.where(hidden, 255, expected_ids(pixels))
    settings, predictor = SETTINGS, pointwise()
    path = tmp_path / "scene.tif"
    if how == "nan":
        predictor = pointwise(max_value=1000)
        write(path, np.where(hidden, np.nan, pixels).astype(np.float32))
    elif how == "alpha":
        stacked = np.concatenate([pixels, np.where(hidden, 0, 255).astype(np.uint8)[None]])
        write(path, stacked, photometric="RGB")
        with rasterio.open(path, "r+") as dataset:
            dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    elif how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write(path, pixels)
            with rasterio.open(path, "r+") as dataset:
                dataset.write_mask(~hidden)
    else:
        write(path, np.where(hidden, 0, pixels), nodata=0 if how == "nodata" else None)
        settings = replace(SETTINGS, nodata=0.0) if how == "given" else SETTINGS
    seen: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return brightness_classes(images)

    result = make_map(path, tmp_path / "map.tif", replace(predictor, run=run), settings)
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), truth)
    assert result.windows == sum(seen) < 12  # windows without data are skipped


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # some are not, on purpose
def test_georeferences_of_every_kind_are_preserved(tmp_path: Path) -> None:
    pixels = noise(70, 90)
    turned = Affine.translation(500_000, 10_000) @ Affine.rotation(12) @ Affine.scale(0.2, -0.3)
    points = [
        GroundControlPoint(row, column, 10 + column / 100, 50 - row / 100, 0.0)
        for row, column in ((0, 0), (0, 90), (70, 0), (70, 90))
    ]
    kinds: dict[str, dict[str, Any]] = {
        "turned": {"transform": turned},
        "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 11.123456789, 0, -1e-5, 48.987654321)},
        "nowhere": {"crs": None, "transform": None},
        "no_crs": {"crs": None},
        "points": {"crs": "EPSG:4326", "transform": None, "gcps": points},
        "centers": {"crs": "EPSG:4326", "transform": None, "gcps": points},
        "own": {"crs": "+proj=laea +lat_0=31 +lon_0=12 +x_0=5 +y_0=6 +ellps=GRS80 +units=m"},
        "grid_of_centers": {},
        "rational": {"crs": None, "transform": None},
    }
    parts = [f"{axis}_{what}" for axis in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT") for what in ("OFF", "SCALE")]
    rational = dict.fromkeys(parts, "10")
    rational |= {f"{way}_{part}_COEFF": " ".join("1" * 20) for way in ("LINE", "SAMP") for part in ("NUM", "DEN")}
    for name, georeference in kinds.items():
        source = write(tmp_path / f"{name}.tif", pixels, **georeference)
        with rasterio.open(source, "r+") as dataset:
            if "centers" in name:
                dataset.update_tags(AREA_OR_POINT="Point")
            if name == "rational":
                dataset.update_tags(ns="RPC", **rational)
        make_map(source, tmp_path / f"{name}_map.tif")
        with rasterio.open(source) as image, rasterio.open(tmp_path / f"{name}_map.tif") as result:
            assert (result.crs, result.transform) == (image.crs, image.transform), name
            assert [p.asdict() for p in result.gcps[0]] == [p.asdict() for p in image.gcps[0]], name
            assert result.gcps[1] == image.gcps[1]
            assert (result.tags().get("AREA_OR_POINT") == "Point") == ("centers" in name)
            assert result.tags(ns="RPC") == image.tags(ns="RPC"), name
            assert bool(image.tags(ns="RPC")) == (name == "rational")


def test_png_jpeg_and_world_file(tmp_path: Path) -> None:
    pixels = noise(100, 140)
    for driver, ending in (("PNG", "png"), ("JPEG", "jpg")):
        write(tmp_path / f"a.{ending}", pixels, driver=driver, crs=None, transform=None)
        make_map(tmp_path / f"a.{ending}", tmp_path / f"{ending}.tif")
    np.testing.assert_array_equal(ids(tmp_path / "png.tif"), expected_ids(pixels))
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n1000.25\n1999.75\n")
    make_map(tmp_path / "a.png", tmp_path / "world.tif")
    with rasterio.open(tmp_path / "world.tif") as result:
        assert result.transform == Affine(0.5, 0, 1000, 0, -0.5, 2000)


def test_resampled_input_keeps_the_grid_of_the_map(tmp_path: Path) -> None:
    blocks = np.random.default_rng(1).choice(np.array([20, 128, 240], np.uint8), (16, 24))
    pixels = np.repeat(np.repeat(blocks, 12, 0), 12, 1)[None].repeat(3, 0)
    pixels[:, :40, :40] = 0
    source = write(tmp_path / "scene.tif", pixels, nodata=0)
    for name, meters, share in (("coarse", 0.6, 0.97), ("coarser", 1.15, 0.9), ("fine", 0.17, 0.97)):
        settings = replace(SETTINGS, resolution=meters)
        result = make_map(source, tmp_path / f"{name}.tif", settings=settings, memory=1)
        actual = ids(tmp_path / f"{name}.tif")
        truth = np.where(pixels[0] == 0, 255, expected_ids(pixels))
        assert actual.shape == truth.shape
        assert ((actual == 255) == (truth == 255)).all()
        assert (actual == truth).mean() > share, name
        inside = np.kron(np.ones((16, 24)), np.pad(np.ones((4, 4)), 4)) > 0  # away from the blocks' borders
        assert (actual == truth)[inside].all(), name
        assert result.windows > 0
    write(tmp_path / "plain.tif", pixels, crs=None)
    with pytest.raises(DataError, match="--resolution"):
        make_map(tmp_path / "plain.tif", tmp_path / "map.tif", settings=replace(SETTINGS, resolution=0.6))


def test_differing_gsd_is_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "scene.tif", noise(70, 70))
    result = make_map(source, tmp_path / "map.tif", pointwise(gsd=3.0))
    assert "--match-gsd" in result.notes[0]
    assert not make_map(source, tmp_path / "alike.tif", pointwise(gsd=0.25)).notes


def test_existing_map_is_skipped_or_replaced_by_option(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(100, 100)), tmp_path / "map.tif"
    assert make_map(source, out).created
    before = out.stat().st_mtime_ns
    assert not make_map(source, out).created
    assert out.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"overlap 0\.25 .*0\.5.*--overwrite"):
        make_map(source, out, settings=replace(SETTINGS, overlap=0.5))
    assert make_map(source, out, settings=replace(SETTINGS, overlap=0.5, overwrite=True)).created
    write(source, noise(100, 100, seed=4))
    with pytest.raises(DataError, match="--overwrite"):
        make_map(source, out, settings=replace(SETTINGS, overlap=0.5))
    write(tmp_path / "foreign.tif", noise(10, 10))
    with pytest.raises(DataError, match=r"foreign\.tif"):
        make_map(source, tmp_path / "foreign.tif")


def test_bad_rasters_leave_no_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "scene.tif", noise(300, 300))
    out = tmp_path / "maps" / "map.tif"
    cut = tmp_path / "cut.tif"
    cut.write_bytes(whole.read_bytes()[:-4000])
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    (tmp_path / "empty.tif").touch()
    cases = {
        cut: "truncated", text: "text.tif", tmp_path / "empty.tif": "empty",
        tmp_path / "none.tif": "none.tif", tmp_path: ".",
        write(tmp_path / "one.tif", noise(50, 50, 1)): "--bands",
        write(tmp_path / "deep.tif", noise(50, 50).astype(np.uint16)): "uint16.*--max-value",
    }  # fmt: skip
    for source, match in cases.items():
        with pytest.raises(DataError, match=match):
            make_map(source, out)
        assert not out.parent.exists(), source
    # damage that only reading shows
    middle = bytearray(whole.read_bytes())
    middle[len(middle) // 2 : len(middle) // 2 + 3000] = b"\0" * 3000
    cut.write_bytes(middle)
    with pytest.raises(DataError, match=r"cut\.tif"):
        make_map(cut, out)
    assert not list(out.parent.iterdir())


def test_bad_output_paths_are_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "scene.tif", noise(50, 50))
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "file").touch()
    cases = {
        source: "scene.tif", tmp_path / "folder.tif": "folder.tif", tmp_path / "map.png": "--out",
        tmp_path / "file" / "map.tif": "--out",
    }  # fmt: skip
    before = source.read_bytes()
    for out, match in cases.items():
        with pytest.raises(DataError, match=match):
            make_map(source, out)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["map.tif", "map_uncertainty.tif"])
def test_broken_link_is_not_replaced(tmp_path: Path, name: str) -> None:
    source, out = write(tmp_path / "scene.tif", noise(50, 50)), tmp_path / "map.tif"
    (tmp_path / name).symlink_to(tmp_path / "archive" / "old.tif")
    for overwrite in (False, True):
        settings = replace(SETTINGS, uncertainty=True, overwrite=overwrite)
        with pytest.raises(DataError, match=rf"{name} .*old\.tif"):
            make_map(source, out, settings=settings)
    assert (tmp_path / name).is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "scene.tif"])


def test_job_resumes_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overfly.raster.writer import UnfinishedMap

    source, out = write(tmp_path / "scene.tif", noise(300, 100)), tmp_path / "map.tif"
    write_rows, count = UnfinishedMap.write, 0

    def full(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(28, "No space left on device")
        write_rows(*arguments)

    monkeypatch.setattr(UnfinishedMap, "write", full)
    with pytest.raises(DataError, match="No space left on device"):
        make_map(source, out)
    assert not out.exists()
    monkeypatch.setattr(UnfinishedMap, "write", write_rows)
    assert make_map(source, out).resumed == 2


def test_infinite_probabilities_are_an_error(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(100, 100)), tmp_path / "map.tif"
    broken = replace(pointwise(), run=lambda images: brightness_classes(images) * np.float32("nan"))
    with pytest.raises(NotFiniteError, match=r"scene\.tif"):
        make_map(source, out, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_fixed_window_is_used(tmp_path: Path) -> None:
    source = write(tmp_path / "scene.tif", noise(40, 50))
    fixed = replace(pointwise(), metadata=metadata(64, fixed=True))
    make_map(source, tmp_path / "map.tif", fixed, MapSettings())
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), expected_ids(noise(40, 50)))
