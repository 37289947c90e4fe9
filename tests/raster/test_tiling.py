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
def test_every_map_pixel_is_written_once_after_its_windows(  # noqa: PLR0917 - hypothesis draws them
    height: int, width: int, size: int, overlap: float, memory: int, scale: tuple[float, float]
) -> None:
    plan = plan_windows(height, width, classes=3, size=size, overlap=overlap, scale=scale, memory=memory)
    assert [strip.first for strip in plan.strips] == [0, *(strip.last for strip in plan.strips[:-1])]
    assert plan.strips[-1].last == width
    rows, columns = plan.working_size
    assert plan.scale == (rows / height, columns / width)
    for strip in plan.strips:
        # the strip has every window that covers one of its working pixels
        low = max(0, math.floor((strip.first + 0.5) * plan.scale[1] - 0.5)) if plan.resampled else strip.first
        high = min(columns - 1, math.floor((strip.last - 0.5) * plan.scale[1] - 0.5) + 1) if plan.resampled else (
            strip.last - 1
        )  # fmt: skip
        assert strip.left <= low
        assert high < strip.right
        whole = plan_windows(height, width, classes=3, size=size, overlap=overlap, scale=scale).strips[0].lefts
        assert set(strip.lefts) == {left for left in whole if left <= high and left + size > low}
    finished = [plan.finished_rows(row) for row in range(-1, len(plan.tops))]
    assert finished[0] == 0
    assert finished == sorted(finished)
    assert finished[-1] == height
    for row in range(len(plan.tops)):
        last = plan.finished_rows(row) - 1
        if last >= plan.finished_rows(row - 1):
            lower = math.floor((last + 0.5) * plan.scale[0] - 0.5) + 1 if plan.resampled else last
            complete = [*plan.tops[1:], plan.working_size[0]][row]
            assert min(lower, rows - 1) < complete
        again = plan.resume_row(row)
        assert again <= row
        assert all(top + size <= plan.first_needed_row(plan.finished_rows(row - 1)) for top in plan.tops[:again])


@pytest.mark.parametrize("width", [20_000, 200_000])
def test_memory_of_probabilities_is_bounded(width: int) -> None:
    plan = plan_windows(100_000, width, classes=7, size=512, overlap=0.25)
    for strip in plan.strips:
        assert 4 * 7 * 512 * (strip.right - strip.left) <= 400 * 2**20
    doubled = plan.windows / plan_windows(100_000, width, classes=7, size=512, overlap=0.25, memory=10**12).windows
    assert doubled < 1.03
