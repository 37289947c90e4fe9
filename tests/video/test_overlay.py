from __future__ import annotations

import numpy as np
import pytest

from overfly.core.classes import Classes
from overfly.exporting.predictor import Floats
from overfly.video.overlay import OverlayRenderer, OverlayStyle, downscale, legend, letterbox
from streams import BLUE, GREEN, NAMES, RED, brightest, numbered_frame, rule_model

BARE = {"legend": False, "stats": False}


def test_overlay_has_the_colors_of_the_classes() -> None:
    frame = numbered_frame(5, 96, 60)
    overlay = OverlayRenderer(rule_model(), OverlayStyle(opacity=1.0, **BARE))(frame)
    assert overlay.shape == frame.shape
    for band, color in enumerate((RED, GREEN, BLUE)):
        assert (overlay[:, 32 * band : 32 * (band + 1)] == color).all()


def test_opacity_blends_colors_and_frame() -> None:
    frame = numbered_frame(5, 96, 60)
    np.testing.assert_array_equal(OverlayRenderer(rule_model(), OverlayStyle(opacity=0.0, **BARE))(frame), frame)
    mixed = OverlayRenderer(rule_model(), OverlayStyle(opacity=0.25, **BARE))(frame)
    np.testing.assert_allclose(mixed[0, 0], 0.75 * frame[0, 0] + 0.25 * np.array(RED), atol=1)


def test_size_downscales_only_the_input() -> None:
    sizes: list[tuple[int, ...]] = []

    def predict(images: Floats) -> Floats:
        sizes.append(images.shape)
        return brightest(images)

    frame = numbered_frame(5, 192, 120)
    overlay = OverlayRenderer(rule_model(predict), OverlayStyle(size=48, opacity=1.0, **BARE))(frame)
    assert sizes == [(1, 3, 30, 48)]
    assert overlay.shape == (120, 192, 3)
    for band, color in enumerate((RED, GREEN, BLUE)):
        assert (overlay[:, 64 * band + 6 : 64 * band + 58] == color).all()
    assert downscale(frame, 500) is frame
    assert downscale(frame[:1], 16).shape == (1, 16, 3)


def test_downscale_averages() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = downscale(np.repeat(board[..., None], 3, -1).astype(np.uint8), 16)
    np.testing.assert_allclose(small[2:-2, 2:-2], 127.5, atol=2)


def test_fixed_windows_cover_the_frame() -> None:
    def fixed(images: Floats) -> Floats:
        assert images.shape == (1, 3, 32, 32)
        return brightest(images)

    frame = numbered_frame(5, 96, 20)
    overlay = OverlayRenderer(rule_model(fixed, fixed=True, window=32), OverlayStyle(opacity=1.0, **BARE))(frame)
    np.testing.assert_array_equal(overlay, OverlayRenderer(rule_model(), OverlayStyle(opacity=1.0, **BARE))(frame))


def test_frames_are_scaled_to_the_value_range() -> None:
    peaks: list[float] = []

    def predict(images: Floats) -> Floats:
        peaks.append(float(images.max()))
        return brightest(images)

    frame = np.full((32, 32, 3), 255, np.uint8)
    for max_value in (255.0, 1.0, 65535.0):
        OverlayRenderer(rule_model(predict, max_value=max_value), OverlayStyle())(frame)
    assert peaks == pytest.approx([255.0, 1.0, 65535.0])


def test_legend_and_stats_have_their_corners() -> None:
    frame = np.full((240, 320, 3), 120, np.uint8)
    plain = OverlayRenderer(rule_model(), OverlayStyle(opacity=0.0, **BARE))(frame)
    named = OverlayRenderer(rule_model(), OverlayStyle(opacity=0.0, legend=True, stats=False))(frame, ["12.0 frames/s"])
    stats = OverlayRenderer(rule_model(), OverlayStyle(opacity=0.0, legend=False, stats=True))(frame, ["12.0 frames/s"])
    assert (plain == 120).all()
    changed = (named != 120).any(-1)
    assert changed[120:, :160].any()
    assert not changed[:120].any()
    assert not changed[:, 160:].any()
    for color in NAMES.colors:
        assert (named == color).all(-1).sum() >= 20, "the legend shows this color"
    changed = (stats != 120).any(-1)
    assert changed[:60].any()
    assert not changed[60:].any()


def test_legend_counts_omitted_classes() -> None:
    many = Classes(names=tuple(f"class {index}" for index in range(100)))
    sheet = legend(many, 640, 360)
    assert sheet is not None
    assert sheet.height <= 180
    assert sheet.width <= 320
    long = Classes(names=("x" * 500, "Gebäude und Höfe"))
    sheet = legend(long, 640, 360)
    assert sheet is not None
    assert sheet.width <= 320


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (64, 64), (65, 300), (300, 65), (63, 900)])
def test_overlay_of_any_size(size: tuple[int, int]) -> None:
    frame = numbered_frame(2, *size)
    assert (
        OverlayRenderer(rule_model(), OverlayStyle())(frame, ["10.0 frames/s   p50 100 ms   p95 100 ms", "more"]).shape
        == frame.shape
    )


def test_letterbox_adds_bars() -> None:
    result = letterbox(np.full((50, 100, 3), 200, np.uint8), 100, 100)
    assert result.shape == (100, 100, 3)
    assert (result[:25] == 0).all()
    assert (result[25:75] == 200).all()
    assert (result[75:] == 0).all()
