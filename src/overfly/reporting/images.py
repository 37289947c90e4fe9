"""Images inside pages: accessible class colors, photographs as WebP, class maps as palette PNG."""

from __future__ import annotations

import base64
import cmath
import colorsys
import io
import math
from functools import cache

import numpy as np
from PIL import Image

from overfly.core.classes import PALETTE, Classes, Color
from overfly.core.records import IGNORE, Array, UInt8
from overfly.evaluation.panels import HATCH, to_rgb

ACCESSIBLE = (*PALETTE[:7], (80, 80, 80), *PALETTE[8:])
"""The palette with a darker gray, distinct from green for people with deuteranopia."""
PREFERRED = 8
"""Colors at the front of the palette that suffice for up to 8 classes."""
GRAY = 0.15
"""Saturation below which a color has no hue."""
LIGHT, DARK = 254, 255
"""Palette entries of the two grays that stripe pixels without a class."""


@cache
def accessible_colors(classes: Classes) -> Classes:
    """Recolor classes with colors that the color-blind can tell apart; unchanged where there are too many classes.

    The assignment minimizes the sum of color distances, mostly of hue, so that water stays blue where possible.
    """
    from scipy.optimize import linear_sum_assignment

    if len(classes) > len(ACCESSIBLE):
        return classes
    colors = ACCESSIBLE[: max(len(classes), PREFERRED)]
    costs = [[_distance(own, color) for color in colors] for own in classes.colors]
    _, chosen = linear_sum_assignment(costs)
    return Classes(names=classes.names, colors=tuple(colors[index] for index in chosen))


def _distance(one: Color, other: Color) -> float:
    """Distance of two colors, hue weighted most; grays have no hue."""
    first, second = (colorsys.rgb_to_hsv(*(value / 255 for value in color)) for color in (one, other))
    angles = [cmath.rect(float(saturation >= GRAY), 2 * math.pi * hue) for hue, saturation, _ in (first, second)]
    return abs(angles[0] - angles[1]) + 0.2 * abs(first[1] - second[1]) + 0.1 * abs(first[2] - second[2])


def thumbnail(image: Array, side: int) -> UInt8:
    """Shrink an image (H, W, C) for display to a longest side of ``side``; class ids (H, W) are not interpolated."""
    ids = image.ndim == 2
    shown = Image.fromarray(image if ids else to_rgb(image))
    scale = min(1.0, side / max(shown.size))
    size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
    found: UInt8 = np.asarray(shown.resize(size, Image.Resampling.NEAREST if ids else Image.Resampling.LANCZOS))
    return found


def encode_webp(image: UInt8, quality: int = 78) -> bytes:
    """Encode an image (H, W, 3) as WebP."""
    return _encode(Image.fromarray(image), "WEBP", quality=quality, method=4)


def encode_png(ids: UInt8, classes: Classes, *, transparent: bool = False) -> bytes:
    """Encode class ids (H, W), 255 for none, as a palette PNG.

    Args:
        ids: class ids; others than these are shown as 255.
        classes: colors.
        transparent: leave pixels without a class transparent instead of striped.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.colors
    table[LIGHT], table[DARK] = HATCH
    shown = np.where(ids < len(classes), ids, IGNORE).astype(np.uint8)
    if not transparent:
        across, down = np.meshgrid(np.arange(ids.shape[1]), np.arange(ids.shape[0]))
        shown = np.where((shown == IGNORE) & (((across + down) // 4) % 2 == 0), LIGHT, shown).astype(np.uint8)
    image = Image.frombytes("P", (ids.shape[1], ids.shape[0]), np.ascontiguousarray(shown).tobytes())
    image.putpalette(table.tobytes())
    return _encode(image, "PNG", optimize=True, **({"transparency": IGNORE} if transparent else {}))


def data_uri(data: bytes) -> str:
    """Encode an image's bytes as a data URI."""
    kind = "webp" if data[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _encode(image: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


__all__ = ["accessible_colors", "data_uri", "encode_png", "encode_webp", "thumbnail"]
