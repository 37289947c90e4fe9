"""From a laid-out scene to a picture of it: trees, texture, sun and shadow, haze, lens and sensor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from overfly.core.records import UInt8
from overfly.data.synthetic.drawing import Bool, Color, Dice, Float, Sheet, clouds, crowns, direction, grain, shaded
from overfly.data.synthetic.objects import Material

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
        haze: share of the haze in the picture, 0 to 1.
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
"""The town's: high sun, clear air, sharp and quiet."""
AUTUMN = Look(
    leaves=((52, 80, 45), (66, 92, 51), (84, 94, 52), (48, 73, 47)),
    spacing=(7, 9), sun=(0.5, 1.0), slope=(0.45, 0.8), shade=(0.55, 0.56, 0.6),
    gain=(1.02, 0.99, 0.94), exposure=(0.9, 1.1), haze=(0.06, 0.2), veil=(182, 186, 182),
    blur=(0.6, 0.95), noise=(2.5, 5),
)  # fmt: skip
"""The country's: low sun from elsewhere, haze, a coarser and noisier sensor with a warm cast."""

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
"""How strongly, of 255, a material varies from pixel to pixel, over 3, over 9 and over 40 pixels."""
STRENGTH: Float = np.array([TEXTURE[material] for material in Material], np.float32)


def plant(sheet: Sheet, dice: Dice, look: Look, away: tuple[float, float]) -> None:
    """Put trees where the layout lets them stand: crowns that bulge, bright on the side of the sun."""
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


def develop(sheet: Sheet, dice: Dice, look: Look) -> UInt8:
    """Plant the trees, then take the picture (S, S, 3) of the scene with the region's light and sensor."""
    size, (to_x, to_y) = sheet.size, direction(dice.between(*look.sun))
    away = (-to_x, -to_y)
    plant(sheet, dice, look, away)
    shadow = _soft(shaded(sheet.height, away, dice.between(*look.slope), float(sheet.height.max())), 0.6)
    picture = sheet.color + _texture(sheet, dice)[..., None]
    picture *= 1 - shadow[..., None] * (1 - np.array(look.shade, np.float32))
    picture *= np.array(dice.tint(look.gain, 0.0, 0.03), np.float32) * np.float32(dice.between(*look.exposure))
    haze = np.float32(dice.between(*look.haze))
    picture = picture * (1 - haze) + np.array(look.veil, np.float32) * haze
    lens = ImageFilter.GaussianBlur(dice.between(*look.blur))
    seen = np.asarray(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(lens), np.float32)
    noise = dice.noise(size, size * 3).astype(np.float32) + dice.noise(size, size * 3) - np.float32(255)
    noise *= np.float32(dice.between(*look.noise) / 104)  # the sum of two bytes has a standard deviation of 104
    taken: UInt8 = np.clip(seen + noise.reshape(size, size, 3) + np.float32(0.5), 0, 255).astype(np.uint8)
    return taken
