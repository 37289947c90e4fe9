from __future__ import annotations

import numpy as np
import pytest
import torch

from overfly.exporting.predictor import Floats, Predictor
from overfly.ops.windows import Window, cut_window, slide_inference
from overfly.raster.tiling import Blend, TilingPlan, plan_windows
from rasters import pointwise, position_dependent


def blended(predictor: Predictor, image: Floats, plan: TilingPlan) -> Floats:
    """Probabilities (K, H, W) of an image (C, H, W) on the working grid, by strips and rows."""
    result = np.full((3, plan.height, plan.width), np.nan, np.float32)
    for strip in plan.strips:
        blend = Blend.start(plan, strip, 3)
        for row, top in enumerate(plan.tops):
            for left in strip.lefts:
                window = Window(top, left, min(plan.size, image.shape[1] - top), min(plan.size, image.shape[2] - left))
                patch = cut_window(torch.from_numpy(image), window, plan.size).numpy()
                blend.add(predictor(patch[None])[0], window)
            first, last = plan.finished_rows(row - 1), plan.finished_rows(row)
            sums = blend.read(first, last)
            result[:, first:last, strip.first : strip.last] = sums / sums.sum(0)
            blend.drop(last)
    return result


@pytest.mark.parametrize("memory", [1, 10**9])
@pytest.mark.parametrize(("height", "width"), [(200, 300), (40, 130), (64, 64), (129, 65)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_blended_rows_equal_sliding_windows(height: int, width: int, overlap: float, memory: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (3, height, width)).astype(np.float32)
    predictor = position_dependent()
    expected = slide_inference(
        lambda x: torch.from_numpy(predictor(x.numpy())), torch.from_numpy(image), 64, overlap
    ).numpy()
    plan = plan_windows(height, width, classes=3, size=64, overlap=overlap, memory=memory)
    assert (len(plan.strips) > 1) == (memory == 1 and width > 64)
    np.testing.assert_allclose(blended(predictor, image, plan), expected, atol=1e-5)


def test_overlap_removes_seams_of_a_position_dependent_network() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 500, dtype=np.float32), (3, 400, 500))
    steps = {}
    for overlap in (0.0, 0.25, 0.5):
        plan = plan_windows(400, 500, classes=3, size=64, overlap=overlap, memory=300_000)
        last = blended(position_dependent(), np.ascontiguousarray(ramp), plan)[2]
        steps[overlap] = max(np.abs(np.diff(last, axis=0)).max(), np.abs(np.diff(last, axis=1)).max())
    assert steps[0.0] > 0.25  # without overlap there are seams
    assert steps[0.25] < 0.03
    assert steps[0.5] < 0.015


def test_resampled_probabilities_are_interpolated() -> None:
    image = np.broadcast_to(np.linspace(0, 255, 120, dtype=np.float32), (3, 90, 120))
    plan = plan_windows(180, 240, classes=3, size=32, overlap=0.25, scale=(0.5, 0.5), memory=1)
    result = blended(pointwise(), np.ascontiguousarray(image), plan)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pointwise()(np.ascontiguousarray(image)[None])), scale_factor=2, mode="bilinear"
    )[0].numpy()
    assert len(plan.strips) > 2
    np.testing.assert_allclose(result, expected, atol=1e-5)
