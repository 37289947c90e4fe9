from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from overfly.ops.windows import blend_weights, cut_window, slide_inference, window_grid, window_starts

sides = st.integers(1, 60)
overlaps = st.floats(0, 0.95)


@settings(deadline=None, max_examples=60)
@given(height=sides, width=sides, size=st.integers(1, 40), overlap=overlaps)
def test_windows_cover_every_pixel_and_nothing_else(height: int, width: int, size: int, overlap: float) -> None:
    covered = torch.zeros(height, width, dtype=torch.int64)
    for window in window_grid(height, width, size, overlap):
        assert (window.height, window.width) == (min(size, height), min(size, width))
        assert window.top >= 0
        assert window.left >= 0
        assert window.top + window.height <= height
        assert window.left + window.width <= width
        covered[window.rows, window.columns] += 1
    assert covered.min() >= 1


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 400), size=st.integers(1, 64), overlap=overlaps)
def test_windows_overlap_by_at_least_the_setting(length: int, size: int, overlap: float) -> None:
    at = window_starts(length, size, overlap)
    stride = max(1, round(size * (1 - overlap)))
    assert at[0] == 0
    assert all(0 < after - before <= stride for before, after in pairwise(at))
    assert at[-1] == max(0, length - size)


def test_windows_of_a_large_raster_come_row_by_row() -> None:
    grid = window_grid(20_000, 20_000, 512, 0.25)
    assert len(grid) == 52 * 52
    assert grid == sorted(grid)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_blend_weights_taper_and_stay_positive(size: int) -> None:
    weights = blend_weights(size)
    assert weights.shape == (size, size)
    assert weights.min() > 0
    assert weights.max() == 1
    torch.testing.assert_close(weights, weights.T)
    torch.testing.assert_close(weights, weights.flip(0))
    assert weights[0, 0] == weights.min()


def test_half_overlap_adds_up_to_a_constant_inside() -> None:
    weights = blend_weights(8)[4]
    torch.testing.assert_close(weights[4:] + weights[:4], torch.full((4,), float(weights[3] + weights[7])))


def test_cut_pads_by_repeating_the_border() -> None:
    image = torch.arange(6.0).reshape(1, 2, 3)
    (window,) = window_grid(2, 3, 4, 0.0)
    patch = cut_window(image, window, 4)
    assert patch.tolist() == [[[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]]
    torch.testing.assert_close(cut_window(image[None], window, 4)[0], patch)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.integers(1, 24),
    overlap=st.floats(0, 0.9),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_a_pointwise_network_gives_the_whole_images_scores(
    shape: tuple[int, int], size: int, overlap: float, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, *shape, generator=generator)
    weight = torch.randn(4, 3, 1, 1, generator=generator)

    def predict(patch: Tensor) -> Tensor:
        assert len(patch) <= batch
        assert patch.shape[-2:] == (size, size)
        return nn.functional.conv2d(patch, weight)

    whole = nn.functional.conv2d(image, weight)
    torch.testing.assert_close(slide_inference(predict, image, size, overlap, batch), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(slide_inference(predict, image[1], size, overlap, batch), whole[1], atol=1e-4, rtol=1e-4)


def test_no_seams_where_windows_disagree() -> None:
    """The prediction of a window is its mean level; on a ramp, the blend rises without a step between windows."""
    ramp = torch.linspace(0, 255, 256).expand(1, 64, 256)

    def predict(patch: Tensor) -> Tensor:
        return patch.mean((2, 3), keepdim=True).expand(-1, -1, *patch.shape[-2:])

    blended = slide_inference(predict, ramp, size=64, overlap=0.5)[0]
    differences = blended.diff(dim=1)
    assert differences.min() >= -1e-3
    assert differences.max() < 3
    without_overlap = slide_inference(predict, ramp, size=64, overlap=0.0)[0].diff(dim=1)
    assert without_overlap.max() > 60


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="overlap"):
        window_grid(10, 10, 4, 1.0)
    with pytest.raises(ValueError, match="1 pixel"):
        window_grid(10, 10, 0, 0.5)
    with pytest.raises(ValueError, match="window"):
        slide_inference(lambda patch: patch[..., ::2, ::2], torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match="empty"):
        slide_inference(lambda patch: patch, torch.zeros(0, 3, 8, 8), 4)
