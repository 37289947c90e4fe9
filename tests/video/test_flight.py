from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from overfly.core.errors import DataError, MissingExtraError
from overfly.video import flight
from overfly.video.flight import Ground, View, fly, of_picture, over, path_over, seen


def coordinates(width: int = 900, height: int = 700) -> NDArray[np.uint8]:
    """A picture whose colors tell where one is: red and green are a quarter of x and y, blue is full."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x // 4, y // 4, np.full_like(x, 255)], -1).astype(np.uint8)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [(900, 700), (4000, 300), (200, 20_000)])
def test_a_flight_is_smooth_stays_over_the_raster_and_climbs(size: tuple[int, int], seed: int, rotate: bool) -> None:
    ground, frame = Ground(*size, of_picture(coordinates()).read), (160, 90)
    path = path_over(ground, frame, rotate=rotate, seed=seed)
    views = [path.at(index / 25) for index in range(1000)]
    scales = np.array([view.scale for view in views])
    assert scales.max() / scales.min() > 1.5
    for view in views:
        for x, y in ((-80, -45), (80, -45), (-80, 45), (80, 45)):
            over_x = view.x + view.scale * (x * math.cos(view.turn) - y * math.sin(view.turn))
            over_y = view.y + view.scale * (x * math.sin(view.turn) + y * math.cos(view.turn))
            assert -1e-6 <= over_x <= size[0] + 1e-6
            assert -1e-6 <= over_y <= size[1] + 1e-6
    steps = np.abs(np.diff([(view.x, view.y) for view in views], axis=0))
    assert steps.max() < 160 * 1.25 * flight.SPEED / 25 * 1.01
    assert steps.sum() > 100
    assert np.abs(np.diff(scales)).max() < 0.02
    turns = np.array([view.turn for view in views])
    assert np.abs(np.diff(turns)).max() < 0.08
    assert (np.ptp(turns) > 1) == rotate
    heading = np.diff([view.x for view in views])
    assert (heading > 0).any()
    assert (heading < 0).any()


def test_seeds_are_flights() -> None:
    ground = of_picture(coordinates())
    views = [path_over(ground, (160, 90), rotate=True, seed=seed).at(1.0) for seed in (0, 0, 1)]
    assert views[0] == views[1]
    assert views[0] != views[2]


@pytest.mark.parametrize("turn", [0.0, 0.4, -2.0, math.pi / 2])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25])
def test_the_camera_sees_what_is_below_it(turn: float, scale: float) -> None:
    y, x = np.mgrid[:255, :255]
    ground = of_picture(np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8))
    picture = seen(ground, View(120.3, 130.8, scale, turn), (160, 90))
    assert picture.shape == (90, 160, 3)
    assert (picture[..., 2] == 255).all(), "it looks over the edge"
    rows, columns = np.mgrid[2:88, 2:158]
    right, down = columns + 0.5 - 80, rows + 0.5 - 45
    over_x = 120.3 + scale * (right * math.cos(turn) - down * math.sin(turn))
    over_y = 130.8 + scale * (right * math.sin(turn) + down * math.cos(turn))
    np.testing.assert_allclose(picture[2:88, 2:158, 0], over_x - 0.5, atol=1.0)
    np.testing.assert_allclose(picture[2:88, 2:158, 1], over_y - 0.5, atol=1.0)


def test_only_what_is_below_is_read() -> None:
    read: list[int] = []
    picture = coordinates()

    def counted(left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        read.append(width * height)
        return picture[top : top + height, left : left + width]

    ground = Ground(900, 700, counted)
    path = path_over(ground, (160, 90), rotate=True, seed=0)
    frames = list(fly(ground, path, seconds=2, fps=10, frame=(160, 90)))
    assert len(frames) == len(read) == 20
    assert [at for _, at in frames] == pytest.approx([index / 10 for index in range(20)])
    assert max(read) <= (184 * 1.25 + 6) ** 2


def test_a_raster_that_is_too_small_is_told() -> None:
    with pytest.raises(DataError, match=r"x\.tif is 40×40 pixels, too small"):
        path_over(of_picture(coordinates(40, 40)), (960, 540), rotate=True, seed=0, name="x.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_files_show_what_they_hold(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(coordinates()).save(tmp_path / f"a.{suffix}")
    with over(tmp_path / f"a.{suffix}") as ground:
        assert (ground.width, ground.height) == (900, 700)
        np.testing.assert_array_equal(ground.read(100, 200, 50, 30), coordinates()[200:230, 100:150])
    Image.fromarray(coordinates()[..., 0]).save(tmp_path / f"gray.{suffix}")
    with over(tmp_path / f"gray.{suffix}") as ground:
        gray = ground.read(100, 200, 50, 30)
        np.testing.assert_array_equal(gray, np.repeat(coordinates()[200:230, 100:150, :1], 3, -1))


def test_rasters_of_16_bits_and_more_bands_are_stretched_and_no_data_is_black(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = np.random.default_rng(0).integers(200, 3000, (5, 600, 800)).astype(np.uint16)
    values[:, :100, :100] = 0
    settings = {"driver": "GTiff", "width": 800, "height": 600, "count": 5, "dtype": "uint16", "nodata": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "a.tif", "w", tiled=True, **settings) as file:
            file.write(values)
    with over(tmp_path / "a.tif") as ground:
        picture = ground.read(0, 0, 300, 200)
    assert (picture[:100, :100] == 0).all()
    low, high = (np.percentile(values[:3][:, 100:, 100:], share) for share in (2, 98))
    wanted = np.clip((values[:3, :200, 100:300] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(picture[:, 100:], np.moveaxis(wanted, 0, -1), atol=4)


def test_what_cannot_be_flown_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(coordinates()).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(coordinates()).convert("P").save(tmp_path / "palette.tif")
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08\0\0\0")
    for name, words in {
        "palette.png": "palette",
        "palette.tif": "palette",
        "text.tif": "text, not a PNG",
        "cut.tif": "truncated or damaged",
        "none.tif": "does not exist",
        ".": "a folder",
    }.items():
        with pytest.raises((DataError, MissingExtraError), match=words), over(tmp_path / name):
            pass
    monkeypatch.setattr("overfly.video.flight.MAX_PIXELS", 1000)
    Image.fromarray(coordinates()).save(tmp_path / "large.png")
    with pytest.raises(DataError, match="save it as GeoTIFF"), over(tmp_path / "large.png"):
        pass
