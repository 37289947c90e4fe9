from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.classes import Color
from overfly.data.reading import (
    UNKNOWN,
    from_colors,
    from_numbers,
    from_palette,
    list_codes,
    pack,
    unknown_codes,
    unpack,
)

byte = st.integers(0, 255)
color = st.tuples(byte, byte, byte)


@settings(max_examples=50, deadline=None)
@given(color)
def test_packing_is_undone(one: Color) -> None:
    assert unpack(int(pack(np.array(one, np.uint8)))) == one


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(color, st.integers(0, 253), max_size=20), st.integers(0, 2**31), st.booleans())
def test_colors_become_ids(meaning: dict[Color, int], seed: int, large: bool) -> None:
    random = np.random.default_rng(seed)
    known = np.array([*meaning, (1, 2, 3)], np.uint8)
    side = 320 if large else 9
    pixels = known[random.integers(0, len(known), (side, side))]
    pixels[0, 0] = random.integers(0, 256, 3)
    label = from_colors(pixels, meaning)
    for row, column in [(0, 0), *random.integers(0, side, (40, 2)).tolist()]:
        expected = meaning.get(tuple(pixels[row, column].tolist()), UNKNOWN)
        assert label[row, column] == expected


def test_a_large_mask_takes_less_than_100_ms() -> None:
    meaning: dict[Color, int] = {(60, 16, 152): 0, (132, 41, 246): 1, (110, 193, 228): 2, (155, 155, 155): 255}
    colors = np.array(list(meaning), np.uint8)
    pixels = colors[np.random.default_rng(0).integers(0, 4, (1479, 2149))]
    from_colors(pixels, meaning)
    took = []
    for _ in range(5):
        start = time.process_time()
        from_colors(pixels, meaning)
        took.append(time.process_time() - start)
    assert min(took) < 0.1


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.integers(0, 65535), st.integers(0, 253), max_size=8),
    st.sampled_from(["uint8", "uint16", "int32", "float32"]),
)
def test_numbers_become_ids(meaning: dict[int, int], dtype: str) -> None:
    values = [number for number in (*meaning, 0, 5, 255, 300, 65535) if dtype != "uint8" or number < 256]
    values += [-1, 70000] if dtype in ("int32", "float32") else []
    label = from_numbers(np.array([values]).astype(dtype), meaning)
    assert label.tolist() == [[meaning.get(value, UNKNOWN) for value in values]]


def test_palettes_give_their_colors() -> None:
    palette = np.array([(9, 9, 9), (1, 2, 3), (0, 0, 0)], np.uint8)
    numbers = np.array([[0, 1], [2, 7]], np.uint8)
    label = from_palette(numbers, palette, {(1, 2, 3): 4, (9, 9, 9): 255})
    assert label.tolist() == [[255, 4], [UNKNOWN, UNKNOWN]]
    assert "0,0,0 (1 pixels)" in list_codes(unknown_codes(numbers, label, palette))


def test_what_is_unknown_is_listed_commonest_first() -> None:
    pixels = np.zeros((3, 3, 3), np.uint8)
    pixels[0] = (1, 2, 3)
    label = from_colors(pixels, {})
    assert list_codes(unknown_codes(pixels, label)) == "0,0,0 (6 pixels), 1,2,3 (3 pixels)"
