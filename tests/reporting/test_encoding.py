from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from overfly.core.classes import PALETTE, Classes
from overfly.core.records import IGNORE
from overfly.data.loveda import LoveDA
from overfly.reporting.figures import accessible_colors, data_uri, encode_image, encode_png, thumbnail

DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
"""Linear transforms that simulate color blindness (Machado, Oliveira and Fernandes, 2009)."""


def _lab(color: tuple[int, int, int], simulation: tuple[tuple[float, ...], ...] | None) -> np.ndarray:
    value = np.asarray(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    if simulation is not None:
        linear = (np.asarray(simulation) @ linear).clip(0, 1)
    white = np.array([0.95047, 1.0, 1.08883])
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(np.maximum(matrix @ linear / white, 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("simulation", [None, DEUTERANOPIA, PROTANOPIA], ids=["full", "deuteranopia", "protanopia"])
def test_accessible_colors_differ_for_the_color_blind(simulation: tuple[tuple[float, ...], ...] | None) -> None:
    shown = accessible_colors(Classes(names=tuple("abcdefg"), colors=((255, 0, 0), (0, 255, 0)) * 3 + ((9, 9, 9),)))
    apart = [
        np.linalg.norm(_lab(one, simulation) - _lab(other, simulation)) for one, other in combinations(shown.colors, 2)
    ]
    assert min(apart) > 12
    colors = [(255, 0, 0), (0, 255, 0), (0, 128, 0), (255, 128, 0)]
    plain = [
        np.linalg.norm(_lab(one, DEUTERANOPIA) - _lab(other, DEUTERANOPIA)) for one, other in combinations(colors, 2)
    ]
    assert min(plain) < 40


def test_accessible_colors_are_nearest_in_hue() -> None:
    classes = LoveDA(root="nowhere").classes
    shown = dict(zip(classes.names, accessible_colors(classes).colors, strict=True))
    assert shown["water"] == (0, 114, 178)
    assert shown["forest"] == (0, 158, 115)
    assert shown["building"] == (213, 94, 0)
    assert shown["road"] == (240, 228, 66)
    assert len(set(shown.values())) == 7
    unnamed = Classes(names=("a", "b", "c"))
    assert accessible_colors(unnamed).colors == PALETTE[:3]
    many = Classes(names=tuple(map(str, range(20))))
    assert accessible_colors(many) == many


def test_png_round_trip() -> None:
    classes = Classes(names=("a", "b"), colors=((1, 2, 3), (200, 100, 50)))
    ids = np.array([[0, 1, 1], [IGNORE, IGNORE, 0]], np.uint8)
    transparent = Image.open(io.BytesIO(encode_png(ids, classes, transparent=True)))
    assert transparent.mode == "P"
    np.testing.assert_array_equal(np.asarray(transparent), ids)
    simulation = np.asarray(transparent.convert("RGBA"))
    assert tuple(simulation[0, 1]) == (200, 100, 50, 255)
    assert simulation[1, 0, 3] == 0
    striped = np.asarray(
        Image.open(io.BytesIO(encode_png(np.full((16, 16), IGNORE, np.uint8), classes))).convert("RGB")
    )
    assert {tuple(color) for color in striped.reshape(-1, 3)} == {(70, 70, 70), (0, 0, 0)}


def test_thumbnails_are_never_enlarged() -> None:
    assert thumbnail(np.zeros((100, 50), np.uint8), 20).shape == (20, 10)
    assert thumbnail(np.zeros((10, 8, 3), np.uint8), 20).shape == (10, 8, 3)
    assert thumbnail(np.zeros((30, 300, 5), np.uint16), 20).shape == (2, 20, 3)
    assert data_uri(encode_image(Image.new("RGB", (4, 4)), "WEBP")).startswith("data:image/webp;base64,")
