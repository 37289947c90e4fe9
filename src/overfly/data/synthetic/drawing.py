"""Draw polygons, textures and shadows of the synthetic images in numpy.

Only plain IEEE arithmetic on seeded numbers is used (no sine, no matrix product, no normal variates), so that an image
has the same bytes on every machine. Lengths are pixels, x to the right, y down.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from overfly.core.records import UInt8

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Vector = tuple[float, float]
Color = tuple[float, float, float]
Slices = tuple[slice, slice]
Region = tuple[Slices, Bool] | None
"""A window of the canvas and the mask of its pixels; None if no pixel lies on the canvas."""


class Corner(NamedTuple):
    """A corner of a convex polygon; ``margin`` is the unpainted strip along the edge that starts here."""

    x: float
    y: float
    margin: float = 0.0


Polygon = Sequence[Corner]
"""Corners of a convex polygon, clockwise in an image with y down."""


class Random:
    """Random generator whose numbers are computed from raw bits, so that they do not depend on the platform."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)

    def uniform(self, low: float, high: float) -> float:
        """Draw a number from ``low`` to ``high``."""
        return low + (high - low) * self._generator.random()

    def chance(self, share: float) -> bool:
        """Return True with probability ``share``."""
        return bool(self._generator.random() < share)

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from ``low`` to ``high``, both included."""
        return low + int(self._generator.random() * (high - low + 1))

    def weighted_index(self, shares: Sequence[float]) -> int:
        """Draw an index with probabilities proportional to ``shares``."""
        left = self._generator.random() * sum(shares)
        for index, share in enumerate(shares):
            left -= share
            if left < 0:
                return index
        return len(shares) - 1

    def choice(self, colors: Sequence[Color]) -> Color:
        """Draw one of the colors."""
        return colors[self.integer(0, len(colors) - 1)]

    def noise(self, height: int, width: int) -> UInt8:
        """Draw white noise (height, width), 0 to 255."""
        return np.frombuffer(self._generator.bytes(height * width), np.uint8).reshape(height, width)

    def tint(self, color: Color, tone: float, hue: float = 0.0) -> Color:
        """Return the color, shifted by up to ``tone`` in all bands and by up to ``hue`` in each band."""
        shift = self.uniform(-tone, tone)
        red, green, blue = (value + shift + self.uniform(-hue, hue) for value in color)
        return red, green, blue


def direction(slope: float) -> Vector:
    """A unit vector, at twice the angle whose tangent is ``slope``; -1 to 1 gives -90° to 90°."""
    square = slope * slope
    return (1 - square) / (1 + square), 2 * slope / (1 + square)


def normalized(x: float, y: float) -> Vector:
    """The vector (x, y) at length 1."""
    length = sqrt(x * x + y * y)
    return x / length, y / length


def rectangle(center: Vector, along: Vector, length: float, width: float) -> list[Corner]:
    """A rectangle around ``center``, ``length`` along the unit vector and ``width`` across."""
    (cx, cy), (ux, uy) = center, along
    ax, ay, bx, by = ux * length / 2, uy * length / 2, -uy * width / 2, ux * width / 2
    return [
        Corner(cx - ax - bx, cy - ay - by), Corner(cx + ax - bx, cy + ay - by),
        Corner(cx + ax + bx, cy + ay + by), Corner(cx - ax + bx, cy - ay + by),
    ]  # fmt: skip


def clip(polygon: Polygon, normal: Vector, offset: float, margin: float = 0.0) -> list[Corner]:
    """The part of a convex polygon where ``normal · (x, y) >= offset``; the new edge gets ``margin``."""
    result: list[Corner] = []
    for start, end in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        before = normal[0] * start.x + normal[1] * start.y - offset
        after = normal[0] * end.x + normal[1] * end.y - offset
        if before >= 0:
            result.append(start)
        if (before >= 0) != (after >= 0):
            t = before / (before - after)
            x, y = start.x + t * (end.x - start.x), start.y + t * (end.y - start.y)
            result.append(Corner(x, y, margin if before >= 0 else start.margin))
    return result


def shrink(polygon: Polygon, inset: float = 0.0) -> list[Corner]:
    """Return the polygon inside its margins and ``inset``; empty if nothing is left."""
    left = [Corner(corner.x, corner.y) for corner in polygon]
    for start, end in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        dx, dy = end.x - start.x, end.y - start.y
        if dx * dx + dy * dy > 1e-9 and len(left) > 2:
            normal = normalized(-dy, dx)
            left = clip(left, normal, normal[0] * start.x + normal[1] * start.y + start.margin + inset)
    return left if len(left) > 2 else []


def extent(polygon: Polygon, along: Vector) -> tuple[float, float]:
    """Least and greatest ``along · (x, y)`` over a polygon."""
    values = [along[0] * corner.x + along[1] * corner.y for corner in polygon]
    return min(values), max(values)


def centroid(polygon: Polygon) -> Vector:
    """Mean of the corners."""
    return sum(c.x for c in polygon) / len(polygon), sum(c.y for c in polygon) / len(polygon)


def perpendicular(along: Vector) -> Vector:
    """Return the unit vector at a right angle."""
    return -along[1], along[0]


def sides(polygon: Polygon, along: Vector) -> tuple[float, float]:
    """Return the length of a polygon along a unit vector, and across it."""
    (low, high), (near, far) = extent(polygon, along), extent(polygon, perpendicular(along))
    return high - low, far - near


def scale_color(color: Color, factor: float) -> Color:
    """Return a lighter or darker color."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def winding_line(random: Random, size: int, pieces: int) -> list[Vector]:
    """Return the ``pieces`` + 1 points of a winding line across a canvas of ``size`` pixels."""
    ux, uy = direction(random.uniform(-1, 1))
    shift = random.uniform(-0.3, 0.3) * size
    first, second, third, fourth = (random.uniform(-0.16, 0.16) * size for _ in range(4))
    points = []
    for step in range(pieces + 1):
        t = step / pieces
        s = 1 - t
        bend = first * s * s * s + 3 * (second * s * s * t + third * s * t * t) + fourth * t * t * t
        on, off = (t - 0.5) * 1.6 * size, shift + bend
        points.append((size / 2 + ux * on - uy * off, size / 2 + uy * on + ux * off))
    return points


def subdivide(
    random: Random, polygon: Polygon, along: Vector, *, limit: tuple[float, float], margins: Sequence[float],
    canvas: "Canvas", skew: float = 0.0,
) -> list[list[Corner]]:  # fmt: skip
    """Divide a polygon recursively across its longer side, in a direction or the perpendicular one.

    ``limit`` is the largest length of a part along, and across, the direction ``along``; ``margins`` are half the width
    of the strip left free at the first cut, the second, and all further ones; ``skew`` is the largest tangent of the
    angle by which a cut is turned. Parts outside the canvas are dropped.
    """
    low_x, high_x, low_y, high_y = *extent(polygon, (1.0, 0.0)), *extent(polygon, (0.0, 1.0))
    if high_x < 0 or high_y < 0 or low_x > canvas.size or low_y > canvas.size:
        return []
    across = perpendicular(along)
    excess = [length / most for length, most in zip(sides(polygon, along), limit, strict=True)]
    if max(excess) <= 1:
        return [list(polygon)]
    chosen = 0 if excess[0] >= excess[1] else 1
    axis, other = (along, across) if chosen == 0 else (across, along)
    lean = random.uniform(-skew, skew)
    normal = normalized(axis[0] + lean * other[0], axis[1] + lean * other[1])
    low, high = extent(polygon, normal)
    offset = low + (high - low) * random.uniform(0.36, 0.64)
    margin, rest = margins[0], margins[1:] or margins
    halves = clip(polygon, normal, offset, margin), clip(polygon, (-normal[0], -normal[1]), -offset, margin)
    return [
        part
        for half in halves
        if len(half) > 2
        for part in subdivide(random, half, along, limit=limit, margins=rest, canvas=canvas, skew=skew)
    ]


class Canvas:
    """Material, unlit color, height, relief and tree density of each pixel of a square image."""

    def __init__(self, size: int) -> None:
        self.size, shape = size, (size, size)
        self.material: UInt8 = np.zeros(shape, np.uint8)
        self.color: Float = np.zeros((*shape, 3), np.float32)
        self.height, self.relief, self.tree_density = (np.zeros(shape, np.float32) for _ in range(3))
        self.centers: Float = (np.arange(size) + 0.5).astype(np.float32)

    def window(self, low_x: float, high_x: float, low_y: float, high_y: float) -> Slices | None:
        """Return the rows and columns that cover a box; None if it lies outside."""
        left, right = max(0, int(low_x) - 1), min(self.size, int(high_x) + 2)
        top, bottom = max(0, int(low_y) - 1), min(self.size, int(high_y) + 2)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def inside(self, polygon: Polygon, inset: float = 0.0) -> Region:
        """Return the pixels that lie inside a polygon by more than ``inset`` and the margins."""
        window = self.window(*extent(polygon, (1.0, 0.0)), *extent(polygon, (0.0, 1.0)))
        if window is None or len(polygon) < 3:
            return None
        ys, xs = self.centers[window[0], None], self.centers[None, window[1]]
        mask = np.ones((ys.shape[0], xs.shape[1]), bool)
        for start, end in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
            dx, dy = end.x - start.x, end.y - start.y
            length = sqrt(dx * dx + dy * dy)
            if length > 1e-6:
                nx, ny = -dy / length, dx / length
                least = nx * start.x + ny * start.y + start.margin + inset
                mask &= xs * nx + (ys * ny - least) >= 0
        return window, mask

    def near(self, start: Vector, end: Vector, radius: float) -> Region:
        """Return the pixels within ``radius`` of a line segment."""
        (x0, y0), (x1, y1) = start, end
        window = self.window(min(x0, x1) - radius, max(x0, x1) + radius, min(y0, y1) - radius, max(y0, y1) + radius)
        if window is None:
            return None
        ys, xs = self.centers[window[0], None] - y0, self.centers[None, window[1]] - x0
        dx, dy = x1 - x0, y1 - y0
        square = max(dx * dx + dy * dy, 1e-6)
        t = np.clip(xs * (dx / square) + ys * (dy / square), 0, 1)
        gap_x, gap_y = xs - t * dx, ys - t * dy
        return window, gap_x * gap_x + gap_y * gap_y <= radius * radius

    def paint(self, where: Region, color: Color, material: int | None = None, height: float | None = 0.0) -> None:
        """Set color and, unless None, material and height of a region; a material removes relief and trees."""
        if where is None:
            return
        window, mask = where
        self.color[window][mask] = color
        if material is not None:
            self.material[window][mask] = material
            self.relief[window][mask] = 0
            self.tree_density[window][mask] = 0
        if height is not None:
            self.height[window][mask] = height

    def draw_rows(
        self, where: Region, across: Vector, period: float, depth: float, *, tracks: float = 0.0,
        track_depth: float = 0.0,
    ) -> None:  # fmt: skip
        """Draw parallel ridges, ``period`` pixels apart across a unit vector, on a region.

        ``depth`` is the brightness, of 255, added on ridges and subtracted in furrows, ``track_depth`` that subtracted
        in wheel tracks. ``tracks`` is the number of ridges between two wheel tracks; 0 for no tracks.
        """
        if where is None:
            return
        window, mask = where
        ys, xs = self.centers[window[0], None], self.centers[None, window[1]]
        phase = xs * (across[0] / period) + ys * (across[1] / period)
        wave = (np.abs(phase - np.floor(phase) - 0.5) * 4 - 1) * depth
        if tracks:
            phase /= tracks
            wave[phase - np.floor(phase) < 1.4 / (period * tracks)] = -track_depth
        self.relief[window][mask] = wave[mask]


def clouds(random: Random, size: int, cell: int) -> Float:
    """Smooth noise (size, size), -1 to 1, with features of about ``cell`` pixels."""
    cells = -(-size // cell) + 3
    grid = Image.fromarray(random.noise(cells, cells))
    left, top = random.uniform(0.5, 1.5), random.uniform(0.5, 1.5)
    box = (left, top, left + size / cell, top + size / cell)
    grown = grid.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(grown, np.float32) / np.float32(127.5) - np.float32(1)


def grain(random: Random, size: int, radius: float) -> Float:
    """Noise (size, size), about -1 to 1, blurred over ``radius`` pixels and stretched back to contrast."""
    blurred = Image.fromarray(random.noise(size, size)).filter(ImageFilter.GaussianBlur(radius))
    return (np.asarray(blurred, np.float32) - np.float32(127.5)) * np.float32((1 + 3 * radius) / 127.5)


def shadow_mask(height: Float, away: Vector, slope: float, highest: float) -> Bool:
    """Return the mask of pixels in shadow (S, S), from heights (S, S) in pixels and the largest of them.

    ``away`` is the unit vector on the ground away from the sun, ``slope`` the tangent of the sun's elevation.
    """
    shadow, size, reach = np.zeros(height.shape, bool), len(height), int(highest / slope) + 1
    padded = np.pad(height, reach)
    for step in range(1, reach + 1):
        left, top = reach - round(away[0] * step), reach - round(away[1] * step)
        shadow |= padded[top : top + size, left : left + size] - np.float32(step * slope) > height
    return shadow


def crowns(random: Random, size: int, spacing: int) -> list[Float]:
    """Draw one tree in every cell of a grid (cellular texture; Worley, 1996); return the nearest one of each pixel.

    Four arrays (S, S): the distance of the pixel to the right of the tree and below it, in spacings, the square of the
    distance, and the tree's random number, 0 to 1.
    """
    cells = -(-size // spacing) + 2
    trees = [
        np.repeat(np.repeat(random.noise(cells, cells).astype(np.float32) / np.float32(256), spacing, 0), spacing, 1)
        for _ in range(3)
    ]
    pixel = (np.arange(size) % spacing + np.float32(0.5)) / np.float32(spacing)
    best: list[Float] = [np.full((size, size), 9, np.float32) for _ in range(4)]
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            top, left = (1 + down) * spacing, (1 + right) * spacing
            x, y, number = (tree[top : top + size, left : left + size] for tree in trees)
            dx, dy = (pixel - right).astype(np.float32) - x, (pixel - down).astype(np.float32)[:, None] - y
            square = dx * dx + dy * dy
            closer = square < best[2]
            for nearest, new in zip(best, (dx, dy, square, number), strict=True):
                np.copyto(nearest, new, where=closer)
    return best
