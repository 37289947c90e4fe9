"""Layout of the synthetic scenes: urban blocks and roads, rural fields, lanes and hamlets, and the objects on them."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from overfly.data.synthetic import drawing
from overfly.data.synthetic.drawing import Canvas, Color, Corner, Polygon, Random, Region, Vector

ColorTable = Mapping[str, Sequence[Color]]
"""Possible colors of each kind of surface."""
DOMAINS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("domains.yaml").read_text(encoding="utf-8"))
"""Colors, season, light and sensor of the urban and the rural domain, and the texture of each material."""


class Material(IntEnum):
    """Surface materials; each belongs to one class (`CLASS_OF`)."""

    LAWN, PAVING, ROOF, ASPHALT, TRACK, WATER, SOIL, FLOOR, CROWN, CROP, BUND = range(11)


CLASS_OF: dict[Material, int] = {
    Material.LAWN: 0, Material.PAVING: 0, Material.ROOF: 1, Material.ASPHALT: 2, Material.TRACK: 2, Material.WATER: 3,
    Material.SOIL: 4, Material.FLOOR: 5, Material.CROWN: 5, Material.CROP: 6, Material.BUND: 6,
}  # fmt: skip
"""Class of each material, in LoveDA's order. The grass between two fields belongs to the fields."""
OBSTACLES = (Material.ROOF, Material.ASPHALT, Material.TRACK, Material.WATER)
"""Materials on which no building is placed."""
CARS: tuple[Color, ...] = ((225, 225, 225), (40, 42, 48), (150, 40, 38), (60, 80, 130), (170, 172, 176))
M = Material


class SceneLayout:
    """Places objects on a canvas in the colors of a domain."""

    def __init__(self, canvas: Canvas, random: Random, colors: ColorTable) -> None:
        self.canvas, self.random, self.colors = canvas, random, colors

    def color(self, kind: str, tone: float = 10, hue: float = 5) -> Color:
        """Return a random color of a kind of surface."""
        return self.random.tint(self.random.choice(self.colors[kind]), tone, hue)

    def cover(self, along: Vector) -> list[Corner]:
        """Return a drawing.rectangle in drawing.direction ``along`` that covers the canvas."""
        half = self.canvas.size / 2
        return drawing.rectangle((half, half), along, self.canvas.size * 1.5, self.canvas.size * 1.5)

    def ground(self, where: Region, kind: str, material: Material, tone: float = 10) -> None:
        """Cover a region with a kind of surface."""
        self.canvas.paint(where, self.color(kind, tone), material)

    def trees(self, where: Region, density: float) -> None:
        """Set the share of possible tree positions of a region that hold a tree."""
        if where is not None:
            self.canvas.tree_density[where[0]][where[1]] = density

    def forest(self, where: Region) -> None:
        """Cover a region with closed forest."""
        self.ground(where, "floor", Material.FLOOR, 6)
        self.trees(where, 1.0)

    def field(self, where: Region, along: Vector, period: tuple[float, float]) -> None:
        """Cover a region with a crop in rows, with wheel tracks."""
        self.ground(where, "crop", Material.CROP, 12)
        random, across = self.random, drawing.perpendicular(along)
        rows, depth = random.uniform(*period), random.uniform(9, 20)
        tracks, track_depth = random.integer(4, 8), random.uniform(14, 26)
        self.canvas.draw_rows(where, across, rows, depth, tracks=tracks, track_depth=track_depth)

    def building(self, center: Vector, along: Vector, sizes: tuple[float, float, float], kind: str) -> None:
        """Place a building, of a length along a unit vector, a width and a height, unless the area is occupied.

        The kind of the roof is ``flat``, ``gable`` or ``shed`` (sheet metal).
        """
        length, width, height = sizes
        if length < width:
            along, length, width = drawing.perpendicular(along), width, length
        polygon = drawing.rectangle(center, along, length, width)
        where = self.canvas.inside(polygon)
        if where is None:
            return
        free = ~np.isin(self.canvas.material[where[0]][where[1]], OBSTACLES)
        if not free.size or np.count_nonzero(free) / free.size < 0.98:
            return
        canvas, roof, across = self.canvas, self.color(kind, 14, 7), drawing.perpendicular(along)
        canvas.paint(where, roof, Material.ROOF, height)
        if kind == "flat":
            self._deck(polygon, roof, along, (length, width, height))
            return
        slope = (center[0] + across[0] * width / 4, center[1] + across[1] * width / 4)
        shade = drawing.scale_color(roof, self.random.uniform(0.72, 0.86) if kind == "gable" else 0.93)
        canvas.paint(canvas.inside(drawing.rectangle(slope, along, length, width / 2)), shade, height=None)
        if kind == "gable":
            canvas.draw_rows(where, along, 3, 3)
        else:
            canvas.draw_rows(where, along, self.random.uniform(3, 5), 7)

    def _deck(self, polygon: Polygon, roof: Color, along: Vector, sizes: tuple[float, float, float]) -> None:
        """Draw the parapet and the structures of a flat roof."""
        canvas, random, (cx, cy), (length, width, height) = self.canvas, self.random, drawing.centroid(polygon), sizes
        canvas.paint(canvas.inside(polygon, 1.6), random.tint(roof, 6, 2), height=height - 1)
        canvas.paint(canvas.inside(polygon, 2.6), random.tint(drawing.scale_color(roof, 0.9), 8), height=height - 1)
        for _ in range(min(6, int(length * width / 150))):
            a, b = random.uniform(-0.36, 0.36) * length, random.uniform(-0.34, 0.34) * width
            spot = (cx + along[0] * a - along[1] * b, cy + along[1] * a + along[0] * b)
            box = drawing.rectangle(spot, along, random.uniform(2, 5), random.uniform(2, 4))
            canvas.paint(canvas.inside(box), random.tint(roof, 30), height=height + 2)

    def road(self, points: list[Vector], width: float, color: Color, material: Material) -> None:
        """Draw a road or a river through the points."""
        for start, end in pairwise(points):
            self.canvas.paint(self.canvas.near(start, end, width / 2), color, material)

    def cars(self, start: Vector, end: Vector, lane: float, gap: float) -> None:
        """Draw cars in a row, ``lane`` beside a line; the class of the pixels below does not change."""
        random, along = self.random, drawing.normalized(end[0] - start[0], end[1] - start[1])
        length = (end[0] - start[0]) * along[0] + (end[1] - start[1]) * along[1]
        at = random.uniform(0, gap)
        while at < length:
            spot = (start[0] + along[0] * at - along[1] * lane, start[1] + along[1] * at + along[0] * lane)
            body = self.canvas.inside(drawing.rectangle(spot, along, 7, 3.4))
            self.canvas.paint(body, random.tint(random.choice(CARS), 15), height=1.0)
            at += gap * random.uniform(0.5, 1.8)


def lay_out_urban(canvas: Canvas, random: Random) -> None:
    """Lay out blocks between straight roads: housing, halls, parks, sites, basins, allotments; sometimes a river."""
    layout = SceneLayout(canvas, random, DOMAINS["urban"]["colors"])
    along = drawing.direction(random.uniform(-0.4, 0.4))
    outline = layout.cover(along)
    street = layout.color("asphalt", 8, 2)
    canvas.paint(canvas.inside(outline), street, M.ASPHALT)
    half_widths = (random.uniform(8.5, 11), random.uniform(5.5, 7.5), random.uniform(4.5, 5.5))
    limit = (random.uniform(130, 190), random.uniform(110, 150))
    uses = (_houses, _halls, _park, _site, _basin, _allotments, _square)
    blocks = drawing.subdivide(random, outline, along, limit=limit, margins=half_widths, canvas=canvas, skew=0.04)
    for block in blocks:
        lot = drawing.shrink(block)
        if lot:
            layout.ground(canvas.inside(lot), "paving", M.PAVING)
            uses[random.weighted_index((31, 19, 19, 10, 8, 14, 5))](layout, lot, along)
    for block in blocks:
        _traffic(layout, block)
    if random.chance(0.2):
        course = drawing.winding_line(random, canvas.size, 14)
        wide = random.uniform(26, 44)
        layout.road(course, wide + 8, layout.color("paving"), M.PAVING)
        layout.road(course, wide, layout.color("water"), M.WATER)
        ux, uy = drawing.normalized(course[-1][0] - course[0][0], course[-1][1] - course[0][1])
        across = along if abs(ux * along[0] + uy * along[1]) < 0.7 else drawing.perpendicular(along)
        deck = drawing.rectangle(course[7], across, 3 * canvas.size, random.uniform(16, 22))
        canvas.paint(canvas.inside(deck), street, M.ASPHALT)


def _traffic(layout: SceneLayout, block: Polygon) -> None:
    """Draw lane marks and cars on the wider roads around a block."""
    for start, end in zip(block, [*block[1:], block[0]], strict=True):
        if start.margin < 6 or (end.x - start.x) ** 2 + (end.y - start.y) ** 2 < 400:
            continue
        layout.cars((start.x, start.y), (end.x, end.y), start.margin * 0.45, 40)
        if start.margin > 8:
            middle = ((start.x + end.x) / 2, (start.y + end.y) / 2)
            along = drawing.normalized(end.x - start.x, end.y - start.y)
            where = layout.canvas.inside(drawing.rectangle(middle, along, 3 * layout.canvas.size, 1.2))
            if where is not None:
                road = where[1] & (layout.canvas.material[where[0]] == M.ASPHALT)
                layout.canvas.paint((where[0], road), (190, 188, 176), height=None)


def _houses(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out lots of one size, each with a house, a garden and trees."""
    random, canvas = layout.random, layout.canvas
    if random.chance(0.6):
        layout.ground(canvas.inside(block, 3), "lawn", M.LAWN)
    kind = ("gable", "flat")[random.integer(0, 1)]
    lot = (random.uniform(32, 84), random.uniform(24, 42))
    height = random.uniform(6, 16)
    layout.trees(canvas.inside(block, 3), random.uniform(0.05, 0.25))
    for part in drawing.subdivide(random, block, along, limit=lot, margins=(0.0,), canvas=canvas):
        length, width = drawing.sides(part, along)
        length, width = length - random.uniform(7, 12), width - random.uniform(6, 12)
        if min(length, width) > 7:
            layout.building(drawing.centroid(part), along, (length, width, height * random.uniform(0.8, 1.2)), kind)


def _halls(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out large buildings with yards and parked cars."""
    random, canvas = layout.random, layout.canvas
    limit = (random.uniform(80, 140), random.uniform(60, 100))
    for part in drawing.subdivide(random, block, along, limit=limit, margins=(0.0,), canvas=canvas):
        (length, width), (cx, cy) = drawing.sides(part, along), drawing.centroid(part)
        edge = width / 2 - 5
        length, width = length - random.uniform(12, 24), width - random.uniform(14, 26)
        if min(length, width) > 10:
            kind = ("flat", "shed")[random.integer(0, 1)]
            layout.building((cx, cy), along, (length, width, random.uniform(8, 22)), kind)
            x, y, half = cx + along[1] * edge, cy - along[0] * edge, length / 2
            ends = (x - along[0] * half, y - along[1] * half), (x + along[0] * half, y + along[1] * half)
            layout.cars(*ends, 0, 10)


def _park(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out lawn and groves, sometimes a pond."""
    random, canvas = layout.random, layout.canvas
    where = canvas.inside(block, 3)
    layout.ground(where, "lawn", M.LAWN)
    if where is None:
        return
    grove = where[1] & (drawing.clouds(random, canvas.size, 48)[where[0]] > random.uniform(-0.6, 0.0))
    layout.forest((where[0], grove))
    if random.chance(0.3):
        (x, y), reach = drawing.centroid(block), random.uniform(8, 20)
        bank = (x + along[0] * reach, y + along[1] * reach)
        radius = random.uniform(10, 18)
        layout.ground(canvas.near((x, y), bank, radius + 3), "lawn", M.LAWN)
        layout.ground(canvas.near((x, y), bank, radius), "water", M.WATER)


def _site(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out a building site: bare ground and up to two containers."""
    random = layout.random
    layout.ground(layout.canvas.inside(block, random.uniform(2, 4)), "soil", M.SOIL)
    (x, y), (length, width) = drawing.centroid(block), drawing.sides(block, along)
    for _ in range(random.integer(0, 2)):
        spot = (x + random.uniform(-0.25, 0.25) * length, y + random.uniform(-0.25, 0.25) * width)
        layout.building(spot, along, (random.uniform(14, 24), random.uniform(9, 13), 5), "shed")


def _basin(layout: SceneLayout, block: Polygon, _along: Vector) -> None:
    """Lay out a basin with a rim."""
    random, canvas = layout.random, layout.canvas
    layout.ground(canvas.inside(block, 3), "lawn", M.LAWN)
    inset = random.uniform(4, 10)
    layout.ground(canvas.inside(block, inset), "paving", M.PAVING)
    layout.ground(canvas.inside(block, inset + 3), "water", M.WATER)


def _allotments(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out beds in rows."""
    random, canvas = layout.random, layout.canvas
    layout.ground(canvas.inside(block, 3), "lawn", M.LAWN)
    inner = drawing.shrink(block, 5)
    if not inner:
        return
    limit = (random.uniform(60, 120), random.uniform(40, 70))
    for part in drawing.subdivide(random, inner, along, limit=limit, margins=(1.5,), canvas=canvas):
        rows = along if random.chance(0.6) else drawing.perpendicular(along)
        layout.field(canvas.inside(part), rows, (5, 8))


def _square(layout: SceneLayout, block: Polygon, along: Vector) -> None:
    """Lay out parked cars in rows, or a lawn with a few trees."""
    random, canvas = layout.random, layout.canvas
    if random.chance(0.5):
        layout.ground(canvas.inside(block, 5), "lawn", M.LAWN)
        layout.trees(canvas.inside(block, 5), 0.08)
        return
    (length, width), (cx, cy) = drawing.sides(block, along), drawing.centroid(block)
    half, row = length / 2 - 12, 10 - width / 2
    while row < width / 2 - 8 and half > 8:
        x, y = cx - along[1] * row, cy + along[0] * row
        layout.cars((x - along[0] * half, y - along[1] * half), (x + along[0] * half, y + along[1] * half), 0, 12)
        row += 14


def lay_out_rural(canvas: Canvas, random: Random) -> None:
    """Lay out fields, woods, ponds, and hamlets along one or two winding lanes."""
    layout = SceneLayout(canvas, random, DOMAINS["rural"]["colors"])
    along = drawing.direction(random.uniform(-1, 1))
    outline = layout.cover(along)
    layout.ground(canvas.inside(outline), "lawn", M.BUND)
    limit = (random.uniform(80, 140), random.uniform(44, 80))
    for parcel in drawing.subdivide(random, outline, along, limit=limit, margins=(2.4, 1.0), canvas=canvas, skew=0.22):
        _parcel(layout, parcel, along)
    _woods(layout)
    if random.chance(0.3):
        stream, wide = drawing.winding_line(random, canvas.size, 16), random.uniform(7, 16)
        layout.road(stream, wide + 7, layout.color("lawn"), M.LAWN)
        layout.road(stream, wide, layout.color("water"), M.WATER)
    for _ in range(random.integer(1, 2)):
        lane, paved = drawing.winding_line(random, canvas.size, 14), random.chance(0.7)
        wide = random.uniform(8.5, 12) if paved else random.uniform(7, 9)
        layout.road(lane, wide + 4, layout.color("lawn"), M.BUND)
        layout.road(lane, wide, layout.color("asphalt" if paved else "track"), M.ASPHALT if paved else M.TRACK)
        if random.chance(0.9):
            _hamlet(layout, lane)


def _parcel(layout: SceneLayout, parcel: list[Corner], along: Vector) -> None:
    """Lay out a field, a meadow, bare ground, a copse or a fish pond."""
    random, canvas = layout.random, layout.canvas
    where = canvas.inside(parcel, 0.5)
    use = random.weighted_index((51, 23, 7, 6, 10))
    if use == 0:
        length, width = drawing.sides(parcel, along)
        layout.field(where, along if length > width else drawing.perpendicular(along), (4.5, 7.5))
    elif use == 1:
        layout.ground(where, "lawn", M.LAWN)
        layout.trees(where, random.uniform(0, 0.05))
    elif use == 2:
        layout.ground(where, "soil", M.SOIL)
    elif use == 3:
        layout.forest(where)
    else:
        layout.ground(where, "paving", M.PAVING)
        layout.ground(canvas.inside(parcel, random.uniform(3, 4)), "water", M.WATER)


def _woods(layout: SceneLayout) -> None:
    """Lay out woods and bare ground across the borders of the parcels."""
    random, canvas = layout.random, layout.canvas
    everywhere = (slice(0, canvas.size), slice(0, canvas.size))
    rough = drawing.clouds(random, canvas.size, 14) * np.float32(0.12)
    layout.forest((everywhere, drawing.clouds(random, canvas.size, 72) + rough > random.uniform(0.3, 0.7)))
    bare = drawing.clouds(random, canvas.size, 56) + rough > random.uniform(0.72, 1.0)
    layout.ground((everywhere, bare), "soil", M.SOIL)


def _hamlet(layout: SceneLayout, lane: list[Vector]) -> None:
    """Lay out small houses with gardens on both drawing.sides of a lane; often a second row behind."""
    random, canvas = layout.random, layout.canvas
    first = random.integer(2, 7)
    rows = (-1, 1, -2, 2) if random.chance(0.7) else (-1, 1)
    for index in range(first, min(first + random.integer(3, 5), len(lane) - 1)):
        (x0, y0), (x1, y1) = lane[index], lane[index + 1]
        ux, uy = drawing.normalized(x1 - x0, y1 - y0)
        for row in rows:
            if random.chance(0.15):
                continue
            off = row * random.uniform(19, 22)
            spot = ((x0 + x1) / 2 - uy * off, (y0 + y1) / 2 + ux * off)
            lean = random.uniform(-0.15, 0.15)
            turned = drawing.normalized(ux - uy * lean, uy + ux * lean)
            yard = canvas.inside(drawing.rectangle(spot, turned, 36, 33))
            if yard is not None:
                garden = (yard[0], yard[1] & ~np.isin(canvas.material[yard[0]], OBSTACLES))
                layout.ground(garden, "paving" if random.chance(0.3) else "lawn", M.LAWN)
                layout.trees(garden, 0.12)
            kind = ("gable", "gable", "shed", "flat")[random.integer(0, 3)]
            layout.building(spot, turned, (random.uniform(19, 29), random.uniform(13, 18), random.uniform(4, 7)), kind)
