from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.records import IGNORE, Array, UInt8
from overfly.evaluation.panels import comparison_figure, confusion_figure, samples_figure, to_rgb
from overfly.evaluation.score import Sample
from overfly.evaluation.scores import Confusion

CLASSES = Classes(names=("field", "house", "Straße"), colors=((10, 200, 30), (220, 20, 60), (40, 60, 250)))


def _sample(name: str = "a", height: int = 40, width: int = 60, label: bool = True) -> Sample:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    truth = np.zeros((height, width), np.uint8)
    truth[:, width // 2 :] = 1
    truth[: height // 4] = IGNORE
    prediction = np.full((height, width), 2, np.uint8)
    return Sample(name, image, prediction, truth if label else None, 0.5 if label else None)


def _open(path: Path) -> UInt8:
    with Image.open(path) as figure:
        assert figure.format == "PNG"
        return np.asarray(figure.convert("RGB"))


def _share(figure: Array, color: tuple[int, int, int]) -> float:
    return float((figure == np.asarray(color)).all(-1).mean())


def test_panels_show_image_label_and_prediction(tmp_path: Path) -> None:
    path = samples_figure([_sample(), _sample("b")], CLASSES, tmp_path / "new" / "panels.png", side=120)
    figure = _open(path)
    tile = 120 * 80 * 2 / (figure.shape[0] * figure.shape[1])
    assert figure.shape[1] == 3 * 130
    assert _share(figure, CLASSES.colors[2]) == pytest.approx(tile, rel=0.1)
    assert _share(figure, CLASSES.colors[1]) == pytest.approx(tile * 0.375, rel=0.2)
    assert _share(figure, CLASSES.colors[0]) == pytest.approx(tile * 0.375, rel=0.2)


def test_pixels_without_a_label_are_striped(tmp_path: Path) -> None:
    with_gap = _open(samples_figure([_sample()], CLASSES, tmp_path / "a.png", side=120))
    whole = _sample()
    assert whole.label is not None
    whole.label[whole.label == IGNORE] = 0
    without = _open(samples_figure([whole], CLASSES, tmp_path / "b.png", side=120))
    assert _share(with_gap, (70, 70, 70)) > 0.01 > _share(without, (70, 70, 70))


def test_panels_without_labels_have_no_label_column(tmp_path: Path) -> None:
    figure = _open(samples_figure([_sample(label=False)], CLASSES, tmp_path / "a.png", side=100))
    assert figure.shape[1] == 2 * 110


def test_comparison_gives_each_run_a_column(tmp_path: Path) -> None:
    first, second = _sample(), _sample()
    second.prediction[:] = 1
    rows = {"urban": {"before": first, "after": second}, "rural": {"before": _sample("c")}}
    figure = _open(comparison_figure(rows.items(), CLASSES, tmp_path / "c.png", side=90))
    assert figure.shape[1] == 4 * 100
    assert _share(figure[:, -100:], CLASSES.colors[1]) > 0.15
    assert _share(figure[:, 200:300], CLASSES.colors[2]) > 0.3


def test_comparison_without_labels_has_no_label_column(tmp_path: Path) -> None:
    rows = {"rural": {"before": dataclasses.replace(_sample(), label=None), "after": _sample()}}
    assert _open(comparison_figure(rows.items(), CLASSES, tmp_path / "a.png", side=90)).shape[1] == 4 * 100
    rows["rural"]["after"] = rows["rural"]["before"]
    assert _open(comparison_figure(rows.items(), CLASSES, tmp_path / "b.png", side=90)).shape[1] == 3 * 100


def test_large_images_are_downscaled(tmp_path: Path) -> None:
    figure = _open(samples_figure([_sample(height=900, width=300)], CLASSES, tmp_path / "a.png", side=200))
    assert figure.shape[0] < 330


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_any_sensor_can_be_shown(bands: int, kind: type[np.generic]) -> None:
    image = (np.random.default_rng(0).random((8, 9, bands)) * 200).astype(kind)
    shown = to_rgb(image)
    assert shown.shape == (8, 9, 3)
    assert shown.dtype == np.uint8
    assert shown.max() > 150


def test_eight_bits_stay_as_they_are_and_others_are_stretched() -> None:
    eight = np.full((4, 4, 3), 7, np.uint8)
    np.testing.assert_array_equal(to_rgb(eight), eight)
    np.testing.assert_array_equal(to_rgb(eight[..., 0]), eight)
    sixteen = np.linspace(3000, 4000, 400).reshape(20, 20, 1).astype(np.uint16)
    shown = to_rgb(sixteen)
    assert shown.min() == 0
    assert shown.max() == 255
    assert abs(float(shown.mean()) - 127.5) < 2


def test_holes_in_float_images_are_black() -> None:
    image = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10, 1)
    image[0, 0] = np.nan
    image[0, 1] = np.inf
    shown = to_rgb(image)
    assert shown[0, 0].tolist() == shown[0, 1].tolist() == [0, 0, 0]
    assert shown.max() == 255
    assert to_rgb(np.full((3, 3, 1), np.nan)).max() == 0


def test_confusion_is_drawn_row_by_row(tmp_path: Path) -> None:
    counts = Confusion(torch.tensor([[90, 10, 0], [0, 0, 0], [5, 5, 0]]))
    first = _open(confusion_figure(counts, CLASSES, tmp_path / "new" / "c.png"))
    again = _open(confusion_figure(((900, 100, 0), (0, 0, 0), (50, 50, 0)), CLASSES, tmp_path / "d.png"))
    assert first.shape[0] > 400
    assert (first < 100).any()
    same = min(first.shape[0], again.shape[0])
    assert float((first[:same] != again[:same]).mean()) < 0.05
