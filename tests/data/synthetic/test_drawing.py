"""Polygons, textures and shadows of the synthetic images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.data.synthetic.drawing import (
    Canvas,
    Corner,
    Random,
    clip,
    clouds,
    crowns,
    direction,
    rectangle,
    shadow_mask,
    shrink,
    subdivide,
)


def area(polygon: list[Corner]) -> float:
    following = [*polygon[1:], polygon[0]]
    return sum(a.x * b.y - b.x * a.y for a, b in zip(polygon, following, strict=True)) / 2


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.floats(4, 40), st.floats(4, 40))
def test_rectangle_covers_its_area(slope: float, length: float, width: float) -> None:
    canvas = Canvas(64)
    polygon = rectangle((32, 32), direction(slope), length, width)
    assert area(polygon) == pytest.approx(length * width)
    where = canvas.inside(polygon)
    assert where is not None
    assert where[1].sum() == pytest.approx(length * width, abs=2 * (length + width))


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.floats(-15, 15))
def test_clipped_halves_add_up_to_the_polygon(slope: float, offset: float) -> None:
    polygon = rectangle((0, 0), (1.0, 0.0), 30, 30)
    x, y = direction(slope)
    parts = [part for part in (clip(polygon, (x, y), offset), clip(polygon, (-x, -y), -offset)) if part]
    assert sum(area(part) for part in parts) == pytest.approx(900)


def test_subdivide_leaves_margins_free() -> None:
    canvas = Canvas(96)
    whole = rectangle((48, 48), (1.0, 0.0), 96, 96)
    parts = subdivide(Random(1), whole, (1.0, 0.0), limit=(70, 1000), margins=(4.0,), canvas=canvas)
    assert len(parts) == 2
    covered = np.zeros((96, 96), int)
    for part in parts:
        where = canvas.inside(part)
        assert where is not None
        covered[where[0]] += where[1]
    assert covered.max() == 1
    assert (covered == 0).sum() == pytest.approx(8 * 96, abs=96)
    assert sum(area(shrink(part)) for part in parts) == pytest.approx(96 * 88)
    assert shrink(whole, 50) == []


def test_shadow_length_is_height_over_slope() -> None:
    height = np.zeros((20, 20), np.float32)
    height[10, 10] = 6
    shadow = shadow_mask(height, (1.0, 0.0), 1.5, 6.0)
    assert np.argwhere(shadow).tolist() == [[10, 11], [10, 12], [10, 13]]


def test_clouds_are_smooth_and_crowns_are_disks() -> None:
    cloud = clouds(Random(3), 128, 32)
    assert np.abs(np.diff(cloud, axis=0)).max() < 0.2
    assert cloud.std() > 0.2
    right, down, square, number = crowns(Random(3), 64, 8)
    np.testing.assert_allclose(square, right**2 + down**2, rtol=1e-5)
    assert square.max() <= 2
    assert 30 < len(np.unique(number)) <= 100


def test_random_is_uniform_and_reproducible() -> None:
    random, again = Random(1, 2), Random(1, 2)
    assert [random.uniform(0, 1) for _ in range(5)] == [again.uniform(0, 1) for _ in range(5)]
    indices = [random.weighted_index((1, 0, 3)) for _ in range(400)]
    assert indices.count(1) == 0
    assert indices.count(2) == pytest.approx(300, abs=40)
    counts = {random.integer(2, 4) for _ in range(60)}
    assert counts == {2, 3, 4}
