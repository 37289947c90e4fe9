"""Objects of the synthetic scenes (fields, buildings, roads, cars, trees) and their rendering: light and sensor."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from overfly.core.records import UInt8
from overfly.data.synthetic.drawing import (
    Bool,
    Color,
    Corner,
    Dice,
    Float,
    Found,
    Polygon,
    Sheet,
    Vector,
    Window,
    center_of,
    clouds,
    crowns,
    direction,
    extent,
    grain,
    normalized,
    rectangle,
    shaded,
)

Paints = Mapping[str, tuple[Color, ...]]
"""Possible colors of each kind of surface."""


class Material(IntEnum):
    """Surface materials; each belongs to one class (`CLASS_OF`)."""

    LAWN = 0
    PAVING = 1
    ROOF = 2
    ASPHALT = 3
    TRACK = 4
    WATER = 5
    SOIL = 6
    FLOOR = 7
    CROWN = 8
    CROP = 9
    BUND = 10


CLASS_OF: dict[Material, int] = {
    Material.LAWN: 0, Material.PAVING: 0, Material.ROOF: 1, Material.ASPHALT: 2, Material.TRACK: 2, Material.WATER: 3,
    Material.SOIL: 4, Material.FLOOR: 5, Material.CROWN: 5, Material.CROP: 6, Material.BUND: 6,
}  # fmt: skip
"""Class of each material, in LoveDA's order. The grass between two fields belongs to the fields."""

TAKEN = (Material.ROOF, Material.ASPHALT, Material.TRACK, Material.WATER)
"""Materials on which no building is placed."""
CARS: tuple[Color, ...] = ((225, 225, 225), (40, 42, 48), (150, 40, 38), (60, 80, 130), (170, 172, 176))


def crossing(along: Vector) -> Vector:
    """The unit vector at a right angle."""
    return -along[1], along[0]


def sides(polygon: Polygon, along: Vector) -> tuple[float, float]:
    """How long a polygon is along a unit vector, and across it."""
    (low, high), (near, far) = extent(polygon, along), extent(polygon, crossing(along))
    return high - low, far - near


def scaled(color: Color, factor: float) -> Color:
    """A color made lighter or darker."""
    return color[0] * factor, color[1] * factor, color[2] * factor


class Place:
    """One scene being laid out: the sheet, the dice and the paints of its region."""

    def __init__(self, sheet: Sheet, dice: Dice, paints: Paints) -> None:
        self.sheet, self.dice, self.paints = sheet, dice, paints

    def color(self, what: str, tone: float = 10, hue: float = 5) -> Color:
        """One of the region's colors for this, a little off."""
        return self.dice.tint(self.dice.one_of(self.paints[what]), tone, hue)

    def whole(self, along: Vector) -> list[Corner]:
        """A rectangle turned to ``along`` that covers the sheet."""
        half = self.sheet.size / 2
        return rectangle((half, half), along, self.sheet.size * 1.5, self.sheet.size * 1.5)

    def ground(self, where: Found, what: str, material: Material, tone: float = 10) -> None:
        """Cover an area with one of the region's colors."""
        self.sheet.paint(where, self.color(what, tone), material)

    def wood(self, where: Found, density: float) -> None:
        """Let trees stand on an area, in this share of the places where one could."""
        if where is not None:
            self.sheet.wooded[where[0]][where[1]] = density

    def forest(self, where: Found) -> None:
        """Closed forest."""
        self.ground(where, "floor", Material.FLOOR, 6)
        self.wood(where, 1.0)

    def field(self, where: Found, along: Vector, period: tuple[float, float]) -> None:
        """A crop in rows, with the wheel tracks of the sprayer."""
        self.ground(where, "crop", Material.CROP, 12)
        dice, rows, depth = self.dice, self.dice.between(*period), self.dice.between(9, 20)
        self.sheet.furrow(
            where, crossing(along), rows, depth, tracks=dice.count(4, 8), track_depth=dice.between(14, 26)
        )

    def building(self, center: Vector, along: Vector, sizes: tuple[float, float, float], kind: str) -> None:
        """A building with a flat or gabled roof or one of sheet metal, unless something stands there already.

        Args:
            center: its middle.
            along: unit vector along its length.
            sizes: length, width and height.
            kind: which of the paints the roof gets: ``flat``, ``gable`` or ``shed``.
        """
        length, width, height = sizes
        if length < width:
            along, length, width = crossing(along), width, length
        polygon = rectangle(center, along, length, width)
        where = self.sheet.inside(polygon)
        if where is None or self.free(where) < 0.98:
            return
        sheet, roof, across = self.sheet, self.color(kind, 14, 7), crossing(along)
        sheet.paint(where, roof, Material.ROOF, height)
        if kind == "flat":
            self._deck(polygon, roof, along, (length, width, height))
            return
        slope = (center[0] + across[0] * width / 4, center[1] + across[1] * width / 4)
        shade = scaled(roof, self.dice.between(0.72, 0.86) if kind == "gable" else 0.93)
        sheet.paint(sheet.inside(rectangle(slope, along, length, width / 2)), shade, height=None)
        if kind == "gable":
            sheet.furrow(where, along, 3, 3)
        else:
            sheet.furrow(where, along, self.dice.between(3, 5), 7)

    def _deck(self, polygon: Polygon, roof: Color, along: Vector, sizes: tuple[float, float, float]) -> None:
        """What stands on a flat roof: a parapet around, stairs and air conditioners within."""
        sheet, dice, (cx, cy), (length, width, height) = self.sheet, self.dice, center_of(polygon), sizes
        sheet.paint(sheet.inside(polygon, 1.6), dice.tint(roof, 6, 2), height=height - 1)
        sheet.paint(sheet.inside(polygon, 2.6), dice.tint(scaled(roof, 0.9), 8), height=height - 1)
        for _ in range(min(6, int(length * width / 150))):
            a, b = dice.between(-0.36, 0.36) * length, dice.between(-0.34, 0.34) * width
            spot = (cx + along[0] * a - along[1] * b, cy + along[1] * a + along[0] * b)
            box = rectangle(spot, along, dice.between(2, 5), dice.between(2, 4))
            sheet.paint(sheet.inside(box), dice.tint(roof, 30), height=height + 2)

    def free(self, where: tuple[Window, Bool]) -> float:
        """Share of an area that no road, water or other building takes."""
        window, mask = where
        under = self.sheet.material[window][mask]
        return float(np.count_nonzero(~np.isin(under, TAKEN))) / under.size if under.size else 0.0

    def road(self, points: list[Vector], width: float, color: Color, material: Material) -> None:
        """A road, or a river, through the points."""
        for start, end in pairwise(points):
            self.sheet.paint(self.sheet.near(start, end, width / 2), color, material)

    def course(self, pieces: int) -> list[Vector]:
        """A winding line right across the sheet, in some direction."""
        dice, size = self.dice, self.sheet.size
        ux, uy = direction(dice.between(-1, 1))
        shift = dice.between(-0.3, 0.3) * size
        first, second, third, fourth = (dice.between(-0.16, 0.16) * size for _ in range(4))
        points = []
        for step in range(pieces + 1):
            t = step / pieces
            s = 1 - t
            bend = first * s * s * s + 3 * (second * s * s * t + third * s * t * t) + fourth * t * t * t
            on, off = (t - 0.5) * 1.6 * size, shift + bend
            points.append((size / 2 + ux * on - uy * off, size / 2 + uy * on + ux * off))
        return points

    def cars(self, start: Vector, end: Vector, lane: float, gap: float) -> None:
        """Cars in a row, ``lane`` beside a line; what lies under them keeps its class."""
        dice, along = self.dice, normalized(end[0] - start[0], end[1] - start[1])
        length = (end[0] - start[0]) * along[0] + (end[1] - start[1]) * along[1]
        at = dice.between(0, gap)
        while at < length:
            spot = (start[0] + along[0] * at - along[1] * lane, start[1] + along[1] * at + along[0] * lane)
            body = self.sheet.inside(rectangle(spot, along, 7, 3.4))
            self.sheet.paint(body, dice.tint(dice.one_of(CARS), 15), height=1.0)
            at += gap * dice.between(0.5, 1.8)


Range = tuple[float, float]


class Look(NamedTuple):
    """Season, light and sensor of a region; each scene takes its own values out of the ranges.

    Attributes:
        leaves: colors that the crowns of a wood are mixed from.
        spacing: pixels from tree to tree.
        sun: where the light comes from, as the argument of `direction`.
        slope: height over ground at which the light falls: the tangent of the sun's height.
        shade: what is left of each band in the shadow, 0 to 1.
        gain: what the sensor makes of each band.
        exposure: what it makes of all.
        haze: share of the haze in the image, 0 to 1.
        veil: color of the haze.
        blur: radius of the lens and the ground resolution, in pixels.
        noise: standard deviation of the sensor's noise, of 255.
    """

    leaves: tuple[Color, ...]
    spacing: tuple[int, int]
    sun: Range
    slope: Range
    shade: Color
    gain: Color
    exposure: Range
    haze: Range
    veil: Color
    blur: Range
    noise: Range


SUMMER = Look(
    leaves=((54, 82, 46), (70, 96, 54), (48, 72, 50)),
    spacing=(8, 11), sun=(-0.6, -0.2), slope=(0.9, 1.5), shade=(0.5, 0.53, 0.62),
    gain=(1.0, 1.0, 1.0), exposure=(0.9, 1.1), haze=(0.0, 0.1), veil=(190, 198, 208),
    blur=(0.35, 0.6), noise=(1, 3),
)  # fmt: skip
"""Urban: high sun, clear air, a sharp sensor with little noise."""
AUTUMN = Look(
    leaves=((52, 80, 45), (66, 92, 51), (84, 94, 52), (48, 73, 47)),
    spacing=(7, 9), sun=(0.5, 1.0), slope=(0.45, 0.8), shade=(0.55, 0.56, 0.6),
    gain=(1.02, 0.99, 0.94), exposure=(0.9, 1.1), haze=(0.06, 0.2), veil=(182, 186, 182),
    blur=(0.6, 0.95), noise=(2.5, 5),
)  # fmt: skip
"""Rural: low sun from another side, haze, a coarser and noisier sensor with a warm cast."""

TEXTURE: dict[Material, tuple[float, float, float, float]] = {
    Material.LAWN: (3, 9, 9, 7),
    Material.PAVING: (3, 4, 6, 6),
    Material.ROOF: (2, 3, 1, 3),
    Material.ASPHALT: (2, 4, 3, 4),
    Material.TRACK: (3, 6, 6, 6),
    Material.WATER: (0.5, 1.5, 3, 6),
    Material.SOIL: (5, 15, 24, 14),
    Material.FLOOR: (3, 7, 6, 3),
    Material.CROWN: (3, 6, 0, 4),
    Material.CROP: (3, 6, 4, 6),
    Material.BUND: (3, 9, 6, 4),
}
"""Strength of a material's texture, of 255, at scales of 1, 3, 9 and 40 pixels."""
STRENGTH: Float = np.array([TEXTURE[material] for material in Material], np.float32)


def plant(sheet: Sheet, dice: Dice, look: Look, away: tuple[float, float]) -> None:
    """Draw tree crowns where the layout allows trees, shaded by the direction of the sun."""
    spacing, size = dice.count(*look.spacing), sheet.size
    nearest = crowns(dice, size, spacing)
    place = np.arange(size)
    rows = np.clip(place[:, None] - (nearest.down * np.float32(spacing)).astype(np.intp), 0, size - 1)
    columns = np.clip(place[None, :] - (nearest.right * np.float32(spacing)).astype(np.intp), 0, size - 1)
    density = sheet.wooded[rows, columns]
    reach = np.where(density < 1, np.float32(0.3), np.float32(0.56))
    material = sheet.material
    stands = (nearest.number < density) & (nearest.square < reach) & (material != Material.ROOF)
    kept_clear = np.isin(material, (Material.ASPHALT, Material.TRACK, Material.WATER))
    stands &= ~kept_clear | (nearest.square < np.float32(0.1))
    first, second = (np.array(dice.one_of(look.leaves), np.float32) for _ in range(2))
    number = nearest.number[stands]
    mix, tone = (number * 7 % 1)[:, None], (number * 31 % 1)[:, None]
    sheet.color[stands] = first + (second - first) * mix + (tone - np.float32(0.5)) * 26
    sheet.relief[stands] = (nearest.right * away[0] + nearest.down * away[1])[stands] * -70
    sheet.height[stands] = (7 - 6 * nearest.square)[stands]
    material[stands] = Material.CROWN


def _texture(sheet: Sheet, dice: Dice) -> Float:
    """How much lighter or darker than its color each pixel is (S, S), by what it is made of."""
    size, strength = sheet.size, STRENGTH[sheet.material]
    fine = (dice.noise(size, size).astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    light: Float = sheet.relief + strength[..., 0] * fine
    light += strength[..., 1] * grain(dice, size, 1.2)
    light += strength[..., 2] * clouds(dice, size, 9)
    light += strength[..., 3] * clouds(dice, size, 40)
    return light + 5 * clouds(dice, size, 100)


def _soft(mask: Bool, radius: float) -> Float:
    """A mask (S, S) with soft edges, 0 to 1."""
    blurred = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(blurred, np.float32) / np.float32(255)


def render(sheet: Sheet, dice: Dice, look: Look) -> UInt8:
    """Plant the trees, then take the image (S, S, 3) of the scene with the region's light and sensor."""
    size, (to_x, to_y) = sheet.size, direction(dice.between(*look.sun))
    away = (-to_x, -to_y)
    plant(sheet, dice, look, away)
    shadow = _soft(shaded(sheet.height, away, dice.between(*look.slope), float(sheet.height.max())), 0.6)
    image = sheet.color + _texture(sheet, dice)[..., None]
    image *= 1 - shadow[..., None] * (1 - np.array(look.shade, np.float32))
    image *= np.array(dice.tint(look.gain, 0.0, 0.03), np.float32) * np.float32(dice.between(*look.exposure))
    haze = np.float32(dice.between(*look.haze))
    image = image * (1 - haze) + np.array(look.veil, np.float32) * haze
    lens = ImageFilter.GaussianBlur(dice.between(*look.blur))
    seen = np.asarray(Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(lens), np.float32)
    noise = dice.noise(size, size * 3).astype(np.float32) + dice.noise(size, size * 3) - np.float32(255)
    noise *= np.float32(dice.between(*look.noise) / 104)  # the sum of two bytes has a standard deviation of 104
    taken: UInt8 = np.clip(seen + noise.reshape(size, size, 3) + np.float32(0.5), 0, 255).astype(np.uint8)
    return taken
