from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from overfly.raster.tiling import plan_windows


@settings(deadline=None, max_examples=150)
@given(
    height=some.integers(1, 700), width=some.integers(1, 700), size=some.sampled_from([32, 64, 96]),
    overlap=some.sampled_from([0.0, 0.25, 0.5, 0.7]), memory=some.sampled_from([1, 60_000, 10**9]),
    scale=some.sampled_from([(1.0, 1.0), (0.4, 0.4), (1.7, 1.3), (0.15, 2.0)]),
)  # fmt: skip
def test_every_output_pixel_is_made_once_and_after_its_windows(  # noqa: PLR0917 - hypothesis draws them
    height: int, width: int, size: int, overlap: float, memory: int, scale: tuple[float, float]
) -> None:
    plan = plan_windows(height, width, classes=3, size=size, overlap=overlap, scale=scale, memory=memory)
    assert [slab.first for slab in plan.slabs] == [0, *(slab.last for slab in plan.slabs[:-1])]
    assert plan.slabs[-1].last == width
    rows, columns = plan.working
    assert plan.scale == (rows / height, columns / width)
    for slab in plan.slabs:
        # every window that sees a working pixel of the slab's columns is one of its own
        low = max(0, math.floor((slab.first + 0.5) * plan.scale[1] - 0.5)) if plan.resampled else slab.first
        high = min(columns - 1, math.floor((slab.last - 0.5) * plan.scale[1] - 0.5) + 1) if plan.resampled else (
            slab.last - 1
        )  # fmt: skip
        assert slab.left <= low
        assert high < slab.right
        whole = plan_windows(height, width, classes=3, size=size, overlap=overlap, scale=scale).slabs[0].lefts
        assert set(slab.lefts) == {left for left in whole if left <= high and left + size > low}
    made = [plan.made(row) for row in range(-1, len(plan.tops))]
    assert made[0] == 0
    assert made == sorted(made)
    assert made[-1] == height
    for row in range(len(plan.tops)):
        last = plan.made(row) - 1
        if last >= plan.made(row - 1):
            lower = math.floor((last + 0.5) * plan.scale[0] - 0.5) + 1 if plan.resampled else last
            assert min(lower, rows - 1) < plan.complete(row)
        again = plan.first_for(row)
        assert again <= row
        assert all(top + size <= plan.above(plan.made(row - 1)) for top in plan.tops[:again])


@pytest.mark.parametrize("width", [20_000, 200_000])
def test_probabilities_in_memory_are_bounded(width: int) -> None:
    plan = plan_windows(100_000, width, classes=7, size=512, overlap=0.25)
    for slab in plan.slabs:
        assert 4 * 7 * 512 * (slab.right - slab.left) <= 400 * 2**20
    doubled = plan.windows / plan_windows(100_000, width, classes=7, size=512, overlap=0.25, memory=10**12).windows
    assert doubled < 1.03
