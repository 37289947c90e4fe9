"""Pictures small enough to stand inside a page: photographs as WebP, maps of classes as PNG with a table of colors."""

from __future__ import annotations

import base64
import cmath
import colorsys
import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from overfly.core.classes import PALETTE, Classes, Color
from overfly.core.records import IGNORE, Array, UInt8
from overfly.evaluation.panels import HATCH, displayed

SAFE = (*PALETTE[:7], (80, 80, 80), *PALETTE[8:])
"""The palette with a darker gray, which also those who see no green tell from green."""
FIRST = 8
"""Colors at the front of the palette, by Okabe and Ito and a gray; more are used only where there are more classes."""
GRAY = 0.15
"""Saturation below which a color has no hue to speak of."""
LIGHT, DARK = 254, 255
"""Entries of the table for the two grays of the stripes that stand for pixels without a class."""


def safe(classes: Classes) -> Classes:
    """The same classes in colors that the color-blind can tell apart; as they are where there are too many.

    Each class gets the color of the palette that is nearest in hue to its own, so that water stays blue where it can.
    """
    number = len(classes)
    if number > len(SAFE):
        return classes
    first = SAFE[: max(number, FIRST)]
    chosen = list(range(number))
    better = True
    while better:  # exchanges, and unused colors, as long as the sum of distances falls
        better = False
        for index, place in itertools.product(range(number), range(len(first))):
            other = chosen.index(place) if place in chosen else None
            trial = list(chosen)
            trial[index] = place
            if other is not None:
                trial[other] = chosen[index]
            if _cost(classes.colors, first, trial) < _cost(classes.colors, first, chosen) - 1e-9:
                chosen, better = trial, True
    return Classes(names=classes.names, colors=tuple(first[place] for place in chosen))


def _cost(own: Sequence[Color], shown: Sequence[Color], chosen: Sequence[int]) -> float:
    return sum(_far(color, shown[place]) for color, place in zip(own, chosen, strict=True))


def _far(one: Color, other: Color) -> float:
    """How different two colors look, hue counting most; grays have none."""
    (hue, strength, light), (second, weaker, darker) = (
        colorsys.rgb_to_hsv(*(x / 255 for x in c)) for c in (one, other)
    )
    angles = [cmath.rect(float(s >= GRAY), 2 * math.pi * h) for h, s in ((hue, strength), (second, weaker))]
    return abs(angles[0] - angles[1]) + 0.2 * abs(strength - weaker) + 0.1 * abs(light - darker)


def small(ids: UInt8, side: int) -> UInt8:
    """A map of classes (H, W) with its longest side no longer than ``side``; colors are not blended."""
    height, width = _fitted(ids.shape[0], ids.shape[1], side)
    found: UInt8 = np.asarray(Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST))
    return found


def small_picture(image: Array, side: int) -> UInt8:
    """An image (H, W, C) of any sensor as a picture (h, w, 3) with its longest side no longer than ``side``."""
    shown = displayed(image)
    height, width = _fitted(shown.shape[0], shown.shape[1], side)
    found: UInt8 = np.asarray(Image.fromarray(shown).resize((width, height), Image.Resampling.LANCZOS))
    return found


def webp(picture: UInt8, quality: int = 78) -> bytes:
    """A picture (H, W, 3) as WebP."""
    return _bytes(Image.fromarray(picture), "WEBP", quality=quality, method=4)


def png(ids: UInt8, classes: Classes, *, clear: bool = False) -> bytes:
    """A map of class ids (H, W), 255 for none, as a PNG with a table of colors.

    Args:
        ids: of the classes; others than these and 255 are shown as 255.
        classes: colors.
        clear: leave pixels without a class transparent instead of striped.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.colors
    table[LIGHT], table[DARK] = HATCH
    shown = np.where(ids < len(classes), ids, IGNORE).astype(np.uint8)
    if not clear:
        across, down = np.meshgrid(np.arange(ids.shape[1]), np.arange(ids.shape[0]))
        shown = np.where((shown == IGNORE) & (((across + down) // 4) % 2 == 0), LIGHT, shown).astype(np.uint8)
    picture = Image.frombytes("P", (ids.shape[1], ids.shape[0]), np.ascontiguousarray(shown).tobytes())
    picture.putpalette(table.tobytes())
    return _bytes(picture, "PNG", optimize=True, **({"transparency": IGNORE} if clear else {}))


def uri(data: bytes) -> str:
    """A picture's bytes as an address that holds them."""
    kind = "webp" if data[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _fitted(height: int, width: int, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _bytes(picture: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


__all__ = ["png", "safe", "small", "small_picture", "uri", "webp"]
