"""Make a test video by flying over a raster, or over a synthetic scene: input for `overfly watch` without a drone.

python benchmarks/fly.py flight.mp4 [--raster scene.tif] [--seconds 8] [--fps 25] [--size 640 360] [--seed 0]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from overfly.core.errors import DataError
from overfly.core.records import Array, UInt8
from overfly.data.headers import MAX_PIXELS, image_format, open_pillow, open_raster
from overfly.data.reading import read_image
from overfly.data.synthetic import synthesize
from overfly.video.capture import write_video

LOW, HIGH = 0.6, 1.25
"""Raster pixels per video pixel at the lowest and highest altitude, for a large raster."""
SPEED = 0.3
"""Maximum speed, in widths of the view per second."""
SAMPLE = 512
"""Longest side of the reduced raster whose brightness sets the stretch of 16 bits and floats, in pixels."""
SMALLEST = 0.2
"""Minimum raster pixels per video pixel; below it frames show no detail."""


class View(NamedTuple):
    """Camera pose: center in raster pixels, raster pixels per video pixel, and rotation in radians."""

    x: float
    y: float
    scale: float
    turn: float


@dataclass(frozen=True)
class Ground:
    """A raster to fly over.

    Attributes:
        width, height: in pixels.
        read: a part of it, by left, top, width and height within it, as (h, w, 3), 0 to 255.
    """

    width: int
    height: int
    read: Callable[[int, int, int, int], UInt8]


@dataclass(frozen=True)
class FlightPath:
    """A smooth flight within the raster: position, altitude and rotation are sums of sines."""

    width: int
    height: int
    frame: tuple[int, int]
    rotate: bool
    scales: tuple[float, float]
    waves: NDArray[np.float64]

    def at(self, seconds: float) -> View:
        """Camera pose at a time in seconds."""
        rate, phase = self.waves[:, 0], self.waves[:, 1]
        wave = np.sin(rate * seconds + phase)
        low, high = self.scales
        scale = low * (high / low) ** (0.5 + 0.5 * wave[0])
        turn = math.pi * (0.7 * wave[1] + 0.3 * wave[2]) if self.rotate else 0.0
        sides = np.array([self.width, self.height], np.float64)
        margin = np.maximum(0.0, sides / 2 - _reach(self.frame, high, self.rotate))
        longest = SPEED * self.frame[0] * low / (0.65 * rate[3:5] + 0.35 * rate[5:7])
        swing = np.minimum(margin, longest)
        middle = sides / 2 + (margin - swing) * self.waves[3:5, 2]
        x, y = middle + swing * (0.65 * wave[3:5] + 0.35 * wave[5:7])
        return View(float(x), float(y), float(scale), turn)


def _reach(frame: tuple[int, int], scale: float, rotate: bool) -> NDArray[np.float64]:
    """Half the extent of a view along each axis of the raster, in raster pixels."""
    half = np.array(frame, np.float64) / 2 * scale
    return np.full(2, np.hypot(*half)) if rotate else half


def plan_flight(
    ground: Ground, frame: tuple[int, int], *, rotate: bool, seed: int, name: str = "the raster"
) -> FlightPath:
    """A random flight over a raster.

    Args:
        ground: the raster.
        frame: width and height of the video in pixels.
        rotate: whether the camera turns.
        seed: of the random numbers.
        name: of the raster, for errors.

    Raises:
        DataError: the raster is too small.
    """
    fit = float((np.array([ground.width, ground.height]) / 2 / _reach(frame, 1.0, rotate)).min())
    high = min(HIGH, 0.85 * fit)
    if high < SMALLEST:
        raise DataError(
            f"{name} is {ground.width}×{ground.height} pixels, too small to fly over with frames of "
            f"{frame[0]}×{frame[1]}; use a larger one, or a smaller --size"
        )
    rng = np.random.default_rng((seed, 47))
    periods = np.array([17.0, 29.0, 11.0, 23.0, 19.0, 9.0, 8.0]) * rng.uniform(0.85, 1.15, 7)
    phases, offsets = rng.uniform(0, 2 * math.pi, 7), rng.uniform(-1, 1, 7)
    waves = np.stack([2 * math.pi / periods, phases, offsets], 1)
    return FlightPath(ground.width, ground.height, frame, rotate, (high * LOW / HIGH, high), waves)


def render_view(ground: Ground, view: View, frame: tuple[int, int]) -> UInt8:
    """Render the frame of a view, (H, W, 3), 0 to 255; reads only the part of the raster that it shows."""
    width, height = frame
    cos, sin = view.scale * math.cos(view.turn), view.scale * math.sin(view.turn)
    half_x = (abs(cos) * width + abs(sin) * height) / 2 + 2
    half_y = (abs(sin) * width + abs(cos) * height) / 2 + 2
    left, top = max(0, math.floor(view.x - half_x)), max(0, math.floor(view.y - half_y))
    right = min(ground.width, math.ceil(view.x + half_x))
    bottom = min(ground.height, math.ceil(view.y + half_y))
    patch = Image.fromarray(ground.read(left, top, right - left, bottom - top))
    x, y = view.x - left, view.y - top
    affine = (
        cos, -sin, x - cos * width / 2 + sin * height / 2,
        sin, cos, y - sin * width / 2 - cos * height / 2,
    )  # fmt: skip
    image: UInt8 = np.asarray(patch.transform(frame, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    return image


def fly(
    ground: Ground, path: FlightPath, *, seconds: float, fps: float, frame: tuple[int, int]
) -> Iterator[tuple[UInt8, float]]:
    """The frames of a flight and their times in seconds."""
    for index in range(max(1, round(seconds * fps))):
        yield render_view(ground, path.at(index / fps), frame), index / fps


def ground_from_array(image: UInt8) -> Ground:
    """Ground of an image (H, W, 3) in memory."""

    def read(left: int, top: int, width: int, height: int) -> UInt8:
        return image[top : top + height, left : left + width]

    return Ground(image.shape[1], image.shape[0], read)


@contextmanager
def over(path: Path) -> Iterator[Ground]:
    """Open a raster to fly over; a TIFF or JPEG 2000 of any size is read window by window.

    The first three bands are red, green and blue; a single band is shown in gray. 16 bits and floats are
    stretched between the 2nd and 98th percentile of a reduced copy. No data is black.

    Raises:
        DataError: it is missing, damaged, a palette image, or too large to be read without rasterio.
        MissingExtraError: rasterio is required and not installed.
    """
    kind = image_format(path)
    if kind in ("tiff", "jp2") and _rasterio():
        with open_raster(path) as dataset:
            yield _windowed(path, dataset)
        return
    if kind != "jp2":
        with open_pillow(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} million pixels; save it as GeoTIFF")
    pixels = _three(read_image(path, bands=None))
    step = max(1, max(pixels.shape[:2]) // SAMPLE)
    yield ground_from_array(_eight_bits(pixels, _stretch(pixels[::step, ::step])))


def _rasterio() -> bool:
    from importlib.util import find_spec

    return find_spec("rasterio") is not None


def _windowed(path: Path, dataset: Any) -> Ground:
    """Ground of a raster on disk."""
    from rasterio.windows import Window

    bands = [1, 2, 3] if dataset.count >= 3 else [1]
    if dataset.colorinterp[0].name == "palette":
        raise DataError(f"{path} is a palette image; save it as RGB or as gray")
    shrink = max(1, max(dataset.width, dataset.height) / SAMPLE)
    shape = (len(bands), max(1, int(dataset.height / shrink)), max(1, int(dataset.width / shrink)))
    stretch = None
    if dataset.dtypes[0] != "uint8":
        small = dataset.read(bands, out_shape=shape, masked=True)
        stretch = _stretch(np.moveaxis(np.ma.filled(small.astype(np.float32), np.nan), 0, -1))

    def read(left: int, top: int, width: int, height: int) -> UInt8:
        result = dataset.read(bands, window=Window(left, top, width, height), masked=True)
        values = np.moveaxis(np.ma.filled(result, 0), 0, -1)
        image = _eight_bits(_three(values), stretch)
        if dataset.nodata is not None:
            image[np.asarray(np.ma.getmaskarray(result)).all(0)] = 0
        return image

    return Ground(dataset.width, dataset.height, read)


def _three(image: Array) -> Array:
    """Red, green and blue (H, W, 3) of an image (H, W, C)."""
    return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1)


def _stretch(image: Array) -> tuple[float, float] | None:
    """Darkest and brightest value that still differ in the video; None for 8 bits, which stay."""
    if image.dtype == np.uint8:
        return None
    values = image[np.isfinite(image)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (2, 98))
    return float(low), float(max(high, low + 1e-6))


def _eight_bits(image: Array, stretch: tuple[float, float] | None) -> UInt8:
    if stretch is None:
        same: UInt8 = np.array(image, dtype=np.uint8, order="C")
        return same
    low, high = stretch
    stretched = np.nan_to_num((image.astype(np.float32) - low) / (high - low)).clip(0, 1)
    result: UInt8 = (255 * stretched).round().astype(np.uint8)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="video to write, .mp4, .mov or .mkv")
    parser.add_argument("--raster", type=Path, help="GeoTIFF, PNG or JPEG; by default a synthetic scene")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--fps", type=float, default=25.0)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the random flight")
    options = parser.parse_args()
    frame = (options.size[0], options.size[1])
    scene = (
        ground_from_array(synthesize("urban", "test", options.seed, 2 * max(frame))[0])
        if options.raster is None
        else None
    )
    with (
        nullcontext(scene) if scene is not None else over(options.raster) as ground,
        write_video(options.out, options.fps) as video,
    ):
        assert ground is not None
        path = plan_flight(ground, frame, rotate=True, seed=options.seed, name=str(options.raster or "the scene"))
        for image, at in fly(ground, path, seconds=options.seconds, fps=options.fps, frame=frame):
            video.write(image, at)


if __name__ == "__main__":
    main()
