"""Pictures small enough to stand inside a page: photographs as WebP, maps of classes as PNG with a table of colours."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from overfly.core.classes import PALETTE, Classes, Colour
from overfly.core.records import IGNORE, Array, UInt8
from overfly.views.panels import HATCH, displayed

SAFE = (*PALETTE[:7], (80, 80, 80), *PALETTE[8:])
"""The palette with a darker grey, which also those who see no green tell from green."""
FIRST = 8
"""Colours at the front of the palette, by Okabe and Ito and a grey; more are used only where there are more classes."""
LIGHT, DARK = 254, 255
"""Entries of the table for the two greys of the stripes that stand for pixels without a class."""


def safe(classes: Classes) -> Classes:
    """The same classes in colours that the colour-blind can tell apart; as they are where there are too many.

    Each class gets the colour of the palette that is nearest in hue to its own, so that water stays blue where it can.
    """
    number = len(classes)
    if number > len(SAFE):
        return classes
    first = SAFE[: max(number, FIRST)]
    pairs = sorted(
        (_far(own, other), index, place)
        for index, own in enumerate(classes.colours)
        for place, other in enumerate(first)
    )
    chosen: dict[int, int] = {}
    for _, index, place in pairs:
        if index not in chosen and place not in chosen.values():
            chosen[index] = place
    return Classes(names=classes.names, colours=tuple(first[chosen[index]] for index in range(number)))


def _far(one: Colour, other: Colour) -> float:
    """How different two colours look, hue counting more than lightness."""
    red, green, blue = (float(a - b) for a, b in zip(one, other, strict=True))
    return math.hypot(red - green, (red + green) / 2 - blue, 0.2 * (red + green + blue))


def small(ids: UInt8, side: int) -> UInt8:
    """A map of classes (H, W) with its longest side no longer than ``side``; colours are not blended."""
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
    """A map of class ids (H, W), 255 for none, as a PNG with a table of colours.

    Args:
        ids: of the classes; others than these and 255 are shown as 255.
        classes: colours.
        clear: leave pixels without a class transparent instead of striped.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.colours
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
