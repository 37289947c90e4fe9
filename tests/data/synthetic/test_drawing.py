"""The tools that the synthetic world is drawn with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.data.synthetic.drawing import (
    Corner,
    Dice,
    Sheet,
    clip,
    clouds,
    crowns,
    direction,
    moved,
    rectangle,
    shaded,
    shrunk,
    subdivide,
)


def area(polygon: list[Corner]) -> float:
    following = [*polygon[1:], polygon[0]]
    return sum(a.x * b.y - b.x * a.y for a, b in zip(polygon, following, strict=True)) / 2


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.floats(4, 40), st.floats(4, 40))
def test_a_rectangle_covers_its_area(slope: float, length: float, width: float) -> None:
    sheet = Sheet(64)
    polygon = rectangle((32, 32), direction(slope), length, width)
    assert area(polygon) == pytest.approx(length * width)
    where = sheet.inside(polygon)
    assert where is not None
    assert where[1].sum() == pytest.approx(length * width, abs=2 * (length + width))


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.floats(-15, 15))
def test_two_halves_make_the_whole(slope: float, offset: float) -> None:
    polygon = rectangle((0, 0), (1.0, 0.0), 30, 30)
    x, y = direction(slope)
    parts = [part for part in (clip(polygon, (x, y), offset), clip(polygon, (-x, -y), -offset)) if part]
    assert sum(area(part) for part in parts) == pytest.approx(900)


def test_margins_are_kept_free_and_only_they() -> None:
    sheet = Sheet(96)
    whole = rectangle((48, 48), (1.0, 0.0), 96, 96)
    parts = subdivide(Dice(1), whole, (1.0, 0.0), limit=(70, 1000), margins=(4.0,), sheet=sheet)
    assert len(parts) == 2
    covered = np.zeros((96, 96), int)
    for part in parts:
        where = sheet.inside(part)
        assert where is not None
        covered[where[0]] += where[1]
    assert covered.max() == 1
    assert (covered == 0).sum() == pytest.approx(8 * 96, abs=96)
    assert sum(area(shrunk(part)) for part in parts) == pytest.approx(96 * 88)
    assert shrunk(whole, 50) == []


def test_shadow_falls_away_from_the_sun_by_height_over_slope() -> None:
    height = np.zeros((20, 20), np.float32)
    height[10, 10] = 6
    shadow = shaded(height, (1.0, 0.0), 1.5, 6.0)
    assert np.argwhere(shadow).tolist() == [[10, 11], [10, 12], [10, 13]]


def test_moved_brings_in_zeros() -> None:
    array = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert moved(array, 1, -1).tolist() == [[0, 3, 4], [0, 6, 7], [0, 0, 0]]


def test_clouds_are_smooth_and_crowns_are_discs() -> None:
    cloud = clouds(Dice(3), 128, 32)
    assert np.abs(np.diff(cloud, axis=0)).max() < 0.2
    assert cloud.std() > 0.2
    tree = crowns(Dice(3), 64, 8)
    np.testing.assert_allclose(tree.square, tree.right**2 + tree.down**2, rtol=1e-5)
    assert tree.square.max() <= 2
    assert 30 < len(np.unique(tree.number)) <= 100


def test_dice_are_fair_and_repeat() -> None:
    dice, again = Dice(1, 2), Dice(1, 2)
    assert [dice.between(0, 1) for _ in range(5)] == [again.between(0, 1) for _ in range(5)]
    picks = [dice.pick((1, 0, 3)) for _ in range(400)]
    assert picks.count(1) == 0
    assert picks.count(2) == pytest.approx(300, abs=40)
    counts = {dice.count(2, 4) for _ in range(60)}
    assert counts == {2, 3, 4}
