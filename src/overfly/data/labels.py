"""From what a mask stores, numbers or colors, to class ids: one look-up a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from overfly.core.classes import Color
from overfly.core.records import Array, UInt8

UNKNOWN = 254
"""Stands, within a look-up, for what has no meaning; a label set has at most 254 classes, ids 0 to 253."""

Packed = NDArray[np.int32]


def pack(colors: UInt8) -> Packed:
    """Colors (..., 3) as one number each (...): red·65536 + green·256 + blue."""
    packed: Packed = colors[..., 0].astype(np.int32)
    packed <<= 8
    packed |= colors[..., 1]
    packed <<= 8
    packed |= colors[..., 2]
    return packed


def unpack(packed: int) -> Color:
    """The color (red, green, blue) of one packed number."""
    return packed >> 16 & 255, packed >> 8 & 255, packed & 255


def from_colors(colors: UInt8, meaning: Mapping[Color, int]) -> UInt8:
    """Class ids (H, W) of colors (H, W, 3); `UNKNOWN` where a color has no meaning."""
    packed = pack(colors)
    if packed.size > 100_000:
        return _color_table(tuple(sorted(meaning.items())))[packed]
    keys = pack(np.array(sorted(meaning), np.uint8).reshape(-1, 3))
    values = np.array([meaning[color] for color in sorted(meaning)], np.uint8)
    if not keys.size:
        return np.full(packed.shape, UNKNOWN, np.uint8)
    at = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
    found: UInt8 = np.where(keys[at] == packed, values[at], np.uint8(UNKNOWN))
    return found


def from_numbers(numbers: Array, meaning: Mapping[int, int]) -> UInt8:
    """Class ids (H, W) of whole numbers (H, W) of any type; `UNKNOWN` where a number has no meaning."""
    highest = max(max(meaning, default=0), 255)
    table = np.full(highest + 2, UNKNOWN, np.uint8)
    for number, value in meaning.items():
        table[number] = value
    if numbers.dtype == np.uint8:
        found: UInt8 = table[numbers]
    else:
        inside = np.where((numbers >= 0) & (numbers <= highest), numbers, highest + 1)
        found = table[inside.astype(np.int64)]
    return found


def from_palette(numbers: Array, palette: UInt8, meaning: Mapping[Color, int]) -> UInt8:
    """Class ids (H, W) of the colors that a palette (P, 3) gives to numbers (H, W); `UNKNOWN` where there is none."""
    ids = from_colors(palette, meaning)
    return from_numbers(numbers, {number: int(value) for number, value in enumerate(ids)})


def unknown_colors(colors: UInt8, label: UInt8, palette: UInt8 | None = None) -> str:
    """The commonest colors without a meaning, as words: ``1,2,3 (40 pixels) and 7 more``.

    Args:
        colors: (H, W, 3), or numbers (H, W) of a palette.
        label: what `from_colors` or `from_palette` made of them, (H, W).
        palette: (P, 3), for numbers.
    """
    odd = colors[label == UNKNOWN]
    if palette is None:
        values, counts = np.unique(pack(odd), return_counts=True)
        names = [",".join(map(str, unpack(int(value)))) for value in values]
    else:
        values, counts = np.unique(odd, return_counts=True)
        names = [",".join(map(str, palette[value])) if value < len(palette) else f"entry {value}" for value in values]
    return _commonest(names, counts)


def unknown_numbers(numbers: Array, label: UInt8) -> str:
    """The commonest numbers without a meaning, as words: ``9 (40 pixels) and 7 more``."""
    values, counts = np.unique(numbers[label == UNKNOWN], return_counts=True)
    return _commonest([f"{value:g}" for value in values], counts)


@lru_cache(maxsize=4)
def _color_table(meaning: tuple[tuple[Color, int], ...]) -> UInt8:
    """Class id of each of the 2²⁴ colors: 16 MB, and five times faster than a search per pixel."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for (red, green, blue), value in meaning:
        table[red << 16 | green << 8 | blue] = value
    return table


def _commonest(names: list[str], counts: NDArray[np.int64]) -> str:
    order = np.argsort(-counts, kind="stable")
    listed = ", ".join(f"{names[at]} ({counts[at]} pixels)" for at in order[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")
