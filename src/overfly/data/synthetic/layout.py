"""Where things lie in the synthetic world: a town of blocks and roads, a country of fields, lanes and hamlets."""

from __future__ import annotations

import numpy as np

from overfly.data.synthetic.drawing import (
    Corner,
    Dice,
    Polygon,
    Sheet,
    Vector,
    center_of,
    clouds,
    direction,
    normalized,
    rectangle,
    shrunk,
    subdivide,
)
from overfly.data.synthetic.objects import TAKEN, Material, Paints, Place, crossing, sides

M = Material

TOWN: Paints = {
    "lawn": ((88, 108, 66), (104, 118, 76), (124, 126, 84)),
    "paving": ((150, 147, 142), (136, 134, 130), (166, 158, 148), (152, 138, 128)),
    "asphalt": ((92, 93, 97), (108, 108, 110), (80, 82, 88), (126, 125, 124)),
    "water": ((48, 72, 74), (62, 88, 92), (44, 62, 84), (86, 98, 82)),
    "soil": ((178, 156, 122), (160, 132, 100), (194, 180, 154), (170, 122, 92)),
    "floor": ((38, 52, 34), (46, 58, 36)),
    "crop": ((92, 122, 60), (112, 130, 70), (130, 116, 82), (78, 106, 56), (146, 132, 88)),
    "flat": ((190, 190, 188), (160, 160, 160), (214, 210, 202), (138, 134, 132), (182, 168, 150), (112, 116, 124)),
    "gable": ((150, 84, 66), (128, 92, 78), (112, 112, 116), (160, 104, 80)),
    "shed": ((84, 118, 170), (206, 208, 212), (120, 150, 184), (142, 86, 72)),
}
COUNTRY: Paints = {
    "lawn": ((100, 116, 72), (116, 124, 80), (92, 108, 66), (128, 128, 88)),
    "paving": ((152, 148, 138), (140, 136, 128), (160, 150, 134)),
    "asphalt": ((112, 112, 112), (128, 126, 124), (96, 97, 100), (146, 144, 138)),
    "track": ((150, 136, 114), (138, 126, 108), (164, 152, 130)),
    "water": ((66, 88, 84), (58, 78, 80), (98, 110, 96), (52, 72, 84)),
    "soil": ((176, 132, 96), (188, 150, 114), (164, 132, 100), (198, 178, 146)),
    "floor": ((44, 54, 34), (52, 58, 36)),
    "crop": (
        (146, 136, 84), (160, 148, 96), (110, 124, 64), (132, 112, 82), (94, 118, 58), (164, 158, 76), (118, 128, 74),
    ),
    "flat": ((184, 182, 178), (158, 156, 152), (206, 202, 194)),
    "gable": ((146, 90, 70), (124, 96, 82), (108, 108, 112), (158, 104, 80)),
    "shed": ((78, 114, 170), (156, 168, 186), (202, 202, 204)),
}  # fmt: skip


def town(sheet: Sheet, dice: Dice) -> None:
    """Blocks between straight roads: housing, halls, parks, sites, basins, allotments; sometimes a river."""
    place = Place(sheet, dice, TOWN)
    along = direction(dice.between(-0.4, 0.4))
    whole = place.whole(along)
    street = place.color("asphalt", 8, 2)
    sheet.paint(sheet.inside(whole), street, M.ASPHALT)
    half_widths = (dice.between(8.5, 11), dice.between(5.5, 7.5), dice.between(4.5, 5.5))
    limit = (dice.between(130, 190), dice.between(110, 150))
    uses = (_houses, _halls, _park, _site, _basin, _allotments, _square)
    blocks = subdivide(dice, whole, along, limit=limit, margins=half_widths, sheet=sheet, skew=0.04)
    for block in blocks:
        lot = shrunk(block)
        if lot:
            place.ground(sheet.inside(lot), "paving", M.PAVING)
            uses[dice.pick((31, 19, 19, 10, 8, 14, 5))](place, lot, along)
    for block in blocks:
        _traffic(place, block)
    if dice.chance(0.2):
        course = place.course(14)
        wide = dice.between(26, 44)
        place.road(course, wide + 8, place.color("paving"), M.PAVING)
        place.road(course, wide, place.color("water"), M.WATER)
        ux, uy = normalized(course[-1][0] - course[0][0], course[-1][1] - course[0][1])
        across = along if abs(ux * along[0] + uy * along[1]) < 0.7 else crossing(along)
        deck = rectangle(course[7], across, 3 * sheet.size, dice.between(16, 22))
        sheet.paint(sheet.inside(deck), street, M.ASPHALT)


def _traffic(place: Place, block: Polygon) -> None:
    """Lane marks and cars on the wider roads around a block."""
    for start, end in zip(block, [*block[1:], block[0]], strict=True):
        if start.margin < 6 or (end.x - start.x) ** 2 + (end.y - start.y) ** 2 < 400:
            continue
        place.cars((start.x, start.y), (end.x, end.y), start.margin * 0.45, 40)
        if start.margin > 8:
            middle = ((start.x + end.x) / 2, (start.y + end.y) / 2)
            along = normalized(end.x - start.x, end.y - start.y)
            where = place.sheet.inside(rectangle(middle, along, 3 * place.sheet.size, 1.2))
            if where is not None:
                road = where[1] & (place.sheet.material[where[0]] == M.ASPHALT)
                place.sheet.paint((where[0], road), (190, 188, 176), height=None)


def _houses(place: Place, block: Polygon, along: Vector) -> None:
    """Lots of one size with a house on each, gardens and trees around."""
    dice, sheet = place.dice, place.sheet
    if dice.chance(0.6):
        place.ground(sheet.inside(block, 3), "lawn", M.LAWN)
    kind = ("gable", "flat")[dice.count(0, 1)]
    lot = (dice.between(32, 84), dice.between(24, 42))
    height = dice.between(6, 16)
    place.wood(sheet.inside(block, 3), dice.between(0.05, 0.25))
    for part in subdivide(dice, block, along, limit=lot, margins=(0.0,), sheet=sheet):
        length, width = sides(part, along)
        length, width = length - dice.between(7, 12), width - dice.between(6, 12)
        if min(length, width) > 7:
            place.building(center_of(part), along, (length, width, height * dice.between(0.8, 1.2)), kind)


def _halls(place: Place, block: Polygon, along: Vector) -> None:
    """One or a few large buildings with yards and parked cars."""
    dice, sheet = place.dice, place.sheet
    limit = (dice.between(80, 140), dice.between(60, 100))
    for part in subdivide(dice, block, along, limit=limit, margins=(0.0,), sheet=sheet):
        (length, width), (cx, cy) = sides(part, along), center_of(part)
        edge = width / 2 - 5
        length, width = length - dice.between(12, 24), width - dice.between(14, 26)
        if min(length, width) > 10:
            kind = ("flat", "shed")[dice.count(0, 1)]
            place.building((cx, cy), along, (length, width, dice.between(8, 22)), kind)
            x, y, half = cx + along[1] * edge, cy - along[0] * edge, length / 2
            ends = (x - along[0] * half, y - along[1] * half), (x + along[0] * half, y + along[1] * half)
            place.cars(*ends, 0, 10)


def _park(place: Place, block: Polygon, along: Vector) -> None:
    """Lawn and groves, sometimes a pond."""
    dice, sheet = place.dice, place.sheet
    where = sheet.inside(block, 3)
    place.ground(where, "lawn", M.LAWN)
    if where is None:
        return
    grove = where[1] & (clouds(dice, sheet.size, 48)[where[0]] > dice.between(-0.6, 0.0))
    place.forest((where[0], grove))
    if dice.chance(0.3):
        (x, y), reach = center_of(block), dice.between(8, 20)
        bank = (x + along[0] * reach, y + along[1] * reach)
        radius = dice.between(10, 18)
        place.ground(sheet.near((x, y), bank, radius + 3), "lawn", M.LAWN)
        place.ground(sheet.near((x, y), bank, radius), "water", M.WATER)


def _site(place: Place, block: Polygon, along: Vector) -> None:
    """A building site: bare ground, a container or two."""
    dice = place.dice
    place.ground(place.sheet.inside(block, dice.between(2, 4)), "soil", M.SOIL)
    (x, y), (length, width) = center_of(block), sides(block, along)
    for _ in range(dice.count(0, 2)):
        spot = (x + dice.between(-0.25, 0.25) * length, y + dice.between(-0.25, 0.25) * width)
        place.building(spot, along, (dice.between(14, 24), dice.between(9, 13), 5), "shed")


def _basin(place: Place, block: Polygon, along: Vector) -> None:
    """A basin with a rim, at times smaller than its block."""
    del along
    dice, sheet = place.dice, place.sheet
    place.ground(sheet.inside(block, 3), "lawn", M.LAWN)
    inset = dice.between(4, 10)
    place.ground(sheet.inside(block, inset), "paving", M.PAVING)
    place.ground(sheet.inside(block, inset + 3), "water", M.WATER)


def _allotments(place: Place, block: Polygon, along: Vector) -> None:
    """Beds in rows."""
    dice, sheet = place.dice, place.sheet
    place.ground(sheet.inside(block, 3), "lawn", M.LAWN)
    inner = shrunk(block, 5)
    if not inner:
        return
    limit = (dice.between(60, 120), dice.between(40, 70))
    for part in subdivide(dice, inner, along, limit=limit, margins=(1.5,), sheet=sheet):
        rows = along if dice.chance(0.6) else crossing(along)
        place.field(sheet.inside(part), rows, (5, 8))


def _square(place: Place, block: Polygon, along: Vector) -> None:
    """Open ground: parked cars in rows, or a lawn with a few trees."""
    dice, sheet = place.dice, place.sheet
    if dice.chance(0.5):
        place.ground(sheet.inside(block, 5), "lawn", M.LAWN)
        place.wood(sheet.inside(block, 5), 0.08)
        return
    (length, width), (cx, cy) = sides(block, along), center_of(block)
    half, row = length / 2 - 12, 10 - width / 2
    while row < width / 2 - 8 and half > 8:
        x, y = cx - along[1] * row, cy + along[0] * row
        place.cars((x - along[0] * half, y - along[1] * half), (x + along[0] * half, y + along[1] * half), 0, 12)
        row += 14


def country(sheet: Sheet, dice: Dice) -> None:
    """Fields of every shape, woods, ponds, and hamlets along a winding lane or two."""
    place = Place(sheet, dice, COUNTRY)
    along = direction(dice.between(-1, 1))
    whole = place.whole(along)
    place.ground(sheet.inside(whole), "lawn", M.BUND)
    limit = (dice.between(80, 140), dice.between(44, 80))
    for parcel in subdivide(dice, whole, along, limit=limit, margins=(2.4, 1.0), sheet=sheet, skew=0.22):
        _parcel(place, parcel, along)
    _wild(place)
    if dice.chance(0.3):
        stream, wide = place.course(16), dice.between(7, 16)
        place.road(stream, wide + 7, place.color("lawn"), M.LAWN)
        place.road(stream, wide, place.color("water"), M.WATER)
    for _ in range(dice.count(1, 2)):
        lane, paved = place.course(14), dice.chance(0.7)
        wide = dice.between(8.5, 12) if paved else dice.between(7, 9)
        place.road(lane, wide + 4, place.color("lawn"), M.BUND)
        place.road(lane, wide, place.color("asphalt" if paved else "track"), M.ASPHALT if paved else M.TRACK)
        if dice.chance(0.9):
            _hamlet(place, lane)


def _parcel(place: Place, parcel: list[Corner], along: Vector) -> None:
    """A field, a meadow, bare ground, a copse or a fish pond."""
    dice, sheet = place.dice, place.sheet
    where = sheet.inside(parcel, 0.5)
    use = dice.pick((51, 23, 7, 6, 10))
    if use == 0:
        length, width = sides(parcel, along)
        place.field(where, along if length > width else crossing(along), (4.5, 7.5))
    elif use == 1:
        place.ground(where, "lawn", M.LAWN)
        place.wood(where, dice.between(0, 0.05))
    elif use == 2:
        place.ground(where, "soil", M.SOIL)
    elif use == 3:
        place.forest(where)
    else:
        place.ground(where, "paving", M.PAVING)
        place.ground(sheet.inside(parcel, dice.between(3, 4)), "water", M.WATER)


def _wild(place: Place) -> None:
    """Woods and worn ground that do not keep to the parcels."""
    dice, sheet = place.dice, place.sheet
    all_of_it = (slice(0, sheet.size), slice(0, sheet.size))
    rough = clouds(dice, sheet.size, 14) * np.float32(0.12)
    place.forest((all_of_it, clouds(dice, sheet.size, 72) + rough > dice.between(0.3, 0.7)))
    worn = clouds(dice, sheet.size, 56) + rough > dice.between(0.72, 1.0)
    place.ground((all_of_it, worn), "soil", M.SOIL)


def _hamlet(place: Place, lane: list[Vector]) -> None:
    """Small houses on both sides of a stretch of the lane, each in its garden; often a second row behind."""
    dice, sheet = place.dice, place.sheet
    first = dice.count(2, 7)
    rows = (-1, 1, -2, 2) if dice.chance(0.7) else (-1, 1)
    for index in range(first, min(first + dice.count(3, 5), len(lane) - 1)):
        (x0, y0), (x1, y1) = lane[index], lane[index + 1]
        ux, uy = normalized(x1 - x0, y1 - y0)
        for row in rows:
            if dice.chance(0.15):
                continue
            off = row * dice.between(19, 22)
            spot = ((x0 + x1) / 2 - uy * off, (y0 + y1) / 2 + ux * off)
            lean = dice.between(-0.15, 0.15)
            turned = normalized(ux - uy * lean, uy + ux * lean)
            yard = sheet.inside(rectangle(spot, turned, 36, 33))
            if yard is not None:
                garden = (yard[0], yard[1] & ~np.isin(sheet.material[yard[0]], TAKEN))
                place.ground(garden, "paving" if dice.chance(0.3) else "lawn", M.LAWN)
                place.wood(garden, 0.12)
            kind = ("gable", "gable", "shed", "flat")[dice.count(0, 3)]
            place.building(spot, turned, (dice.between(19, 29), dice.between(13, 18), dice.between(4, 7)), kind)
