from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from overfly.adaptation.reverse_validation import (
    MIN_IMAGES,
    forest_miou,
    pixel_features,
    reverse_validation,
    sample_pixels,
)
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, Logits, UInt8
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import MetricOptions, labeled_images, predict_scores, unlabeled_images
from planted import ByLevel, Constant, Patches

OFFSETS = {"train": 0, "val": 30, "test": 60}


class NoisyPatches(Patches):
    """Images that differ between splits, too noisy to classify by single pixels; records which were read."""

    images: int = 8
    noise: int = 60
    present: tuple[int, ...] = (0, 1, 2)
    read: ClassVar[list[str]] = []

    def items(self, split: Split) -> Sequence[Item]:
        return [item._replace(name=f"p{int(item.name[1:]) + OFFSETS[split]}") for item in super().items(split)]

    def _levels(self, item: Item) -> UInt8:
        levels: UInt8 = super()._levels(item)
        levels[:] = np.asarray(self.present, dtype=np.uint8)[levels % len(self.present)]
        return levels

    def read_image(self, item: Item) -> Array:
        self.read.append(item.name)
        image = super().read_image(item).astype(int)
        noise = np.random.default_rng(2000 + int(item.name[1:])).normal(0, self.noise, image.shape[:2])
        result: UInt8 = np.clip(image + noise[..., None].round().astype(int), 0, 255).astype(np.uint8)
        return result


class OtherObjects(NoisyPatches):
    """Other objects: textures and gray levels that the source does not have."""

    def read_image(self, item: Item) -> Array:
        image = super().read_image(item)
        return (image // 4 + np.arange(self.side, dtype=np.uint8)[:, None, None] * 2).astype(np.uint8)


class RandomLabels(NoisyPatches):
    """Random labels, independent of the image."""

    def read_label(self, item: Item) -> UInt8:
        rng = np.random.default_rng(int(item.name[1:]))
        return rng.integers(0, 3, (self.side, self.side)).astype(np.uint8)


class SmoothedLevels(nn.Module):
    """Classify by the brightness around each pixel; in training mode the classes are in another order."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.of, self.order = ByLevel(), order
        self.sizes: list[tuple[int, int]] = []

    def forward(self, image: Tensor) -> Logits:
        self.sizes.append((image.shape[-2], image.shape[-1]))
        main = self.of(nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)).main
        return Logits(main[:, list((2, 0, 1) if self.training else self.order)])


SOURCE, TARGET = NoisyPatches(blind=False), NoisyPatches(first=100)


def share(
    network: nn.Module, source: Domain = SOURCE, target: Domain = TARGET, held_out: Split = "val", **options: Any
) -> float:
    result = reverse_validation(network, source, target, held_out, MetricOptions(**options))
    assert result is not None
    return result


def test_correct_predictions_score_high() -> None:
    assert 0.75 < share(SmoothedLevels()) <= 1.0


def test_the_score_is_relative_to_source_labels() -> None:
    """The forest trained on source labels has an mIoU of 60 to 95 %."""
    source_pixels, test_pixels = (
        sample_pixels(labeled_images(SOURCE, "train"), 255, 0),
        sample_pixels(labeled_images(SOURCE, "val"), 255, 1),
    )
    reference = forest_miou(source_pixels, test_pixels, 3, 0)
    assert 0.6 < reference < 0.95
    predicted = (
        (image, predict_scores(SmoothedLevels().eval(), image).argmax(0)) for image in unlabeled_images(TARGET, "train")
    )
    target_pixels = sample_pixels(predicted, 255, 0)
    assert share(SmoothedLevels()) == pytest.approx(min(1.0, forest_miou(target_pixels, test_pixels, 3, 0) / reference))


@pytest.mark.parametrize(
    ("network", "most"), [(SmoothedLevels((1, 2, 0)), 0.2), (SmoothedLevels((0, 2, 1)), 0.5), (Constant(), 0.4)]
)
def test_exchanged_or_collapsed_classes_score_low(network: nn.Module, most: float) -> None:
    assert share(network) < most


def test_images_of_other_objects_score_low() -> None:
    assert share(SmoothedLevels(), target=OtherObjects(first=100)) < 0.6


def test_a_target_that_lacks_classes_scores_low() -> None:
    assert share(SmoothedLevels(), target=NoisyPatches(first=100, present=(0,))) < 0.5


def test_the_network_runs_in_evaluation_mode_and_is_restored() -> None:
    network = SmoothedLevels().train()
    assert share(network) > 0.75
    assert network.training


def test_splits_limit_crop_window_and_resize_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoisyPatches, "read", [])
    network = SmoothedLevels()
    source = NoisyPatches(blind=False, images=20, side=48)
    share(network, source, NoisyPatches(first=200, images=20, side=48), held_out="test", limit=10, crop=40, window=24)
    numbers = [int(name[1:]) for name in NoisyPatches.read]
    assert len(numbers) == 30
    assert sum(number < 20 for number in numbers) == 10  # the source's train
    assert sum(60 <= number < 80 for number in numbers) == 10  # its held-out split
    assert sum(200 <= number < 220 for number in numbers) == 10  # the target's train
    assert set(network.sizes) == {(24, 24)}
    network.sizes.clear()
    share(network, source, NoisyPatches(first=200, images=8, side=48), resize=32)
    assert set(network.sizes) == {(32, 32)}


def test_source_labels_are_read_and_target_labels_are_not() -> None:
    share(SmoothedLevels(), target=NoisyPatches(first=100, blind=True))
    with pytest.raises((DataError, AssertionError)):
        reverse_validation(SmoothedLevels(), NoisyPatches(blind=True), TARGET)


def test_few_images_or_inseparable_classes_give_none() -> None:
    assert reverse_validation(SmoothedLevels(), RandomLabels(blind=False), TARGET) is None
    assert reverse_validation(SmoothedLevels(), SOURCE, NoisyPatches(first=100, images=MIN_IMAGES - 1)) is None
    assert reverse_validation(SmoothedLevels(), SOURCE, TARGET, options=MetricOptions(limit=MIN_IMAGES - 1)) is None


def test_the_score_depends_on_the_seed_and_not_on_global_random_state() -> None:
    python, numpys = random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002
    torchs = torch.get_rng_state()
    first = share(SmoothedLevels((0, 2, 1)), seed=3)
    assert random.getstate() == python
    assert repr(np.random.get_state(legacy=False)) == numpys  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert share(SmoothedLevels((0, 2, 1)), seed=3) == first
    assert share(SmoothedLevels((0, 2, 1)), seed=4) != first


def test_pixel_features_are_bands_and_window_statistics() -> None:
    image = torch.full((4, 40, 40), 50.0)
    image[:, :, 20:] = 100.0
    result = pixel_features(image, 200.0)
    assert result.shape == (4 + 4 * 5, 40, 40)
    assert torch.allclose(result[:4], image / 200)
    assert result[8, 20, 5] == pytest.approx(0.0, abs=1e-3)  # spread in the square of 3, far from the edge
    assert result[8, 20, 19] == pytest.approx(0.25 * np.sqrt(2) / 3, abs=1e-3)  # two columns of 0.25 and one of 0.5
    assert torch.equal(pixel_features(image * 100, 20000.0), result)


def test_pixel_features_of_small_images_and_nan() -> None:
    image = torch.rand(3, 2, 5)
    image[0, 0, 0] = torch.nan
    result = pixel_features(image, 1.0)
    assert result.shape == (19, 2, 5)
    assert bool(result.isfinite().all())


def test_unlabeled_pixels_are_left_out() -> None:
    image = torch.zeros(1, 8, 8)
    label = torch.full((8, 8), IGNORE)
    label[0] = 2
    features, labels = sample_pixels([(image, label), (image, label)], 1.0, 0)
    assert len(features) == len(labels) > 0
    assert labels.unique().tolist() == [2]  # type: ignore[no-untyped-call]


@dataclass
class Pixels:
    """One feature value and one class each."""

    values: tuple[float, ...]
    classes: tuple[int, ...]

    def many(self, times: int = 30) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.values).repeat(times)[:, None], torch.tensor(self.classes).repeat(times)


def test_forest_miou_averages_over_the_test_classes() -> None:
    test_pixels = Pixels((0.0, 1.0), (0, 1)).many()
    assert forest_miou(Pixels((0.0, 1.0), (0, 1)).many(), test_pixels, 3, 0) == 1.0
    assert forest_miou(Pixels((0.0, 1.0, 2.0), (0, 1, 2)).many(), test_pixels, 3, 0) == 1.0
    assert forest_miou(Pixels((0.0, 1.0), (0, 0)).many(), test_pixels, 3, 0) == pytest.approx(0.25)
    nothing = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    assert forest_miou(nothing, test_pixels, 3, 0) == forest_miou(test_pixels, nothing, 3, 0) == 0.0


def test_the_forest_is_class_balanced() -> None:
    """The rare class has 3 of 100 pixels, and weights as high as the frequent one."""
    features = torch.tensor([0.0] * 60 + [1.0] * 40)[:, None]
    labels = torch.tensor([0] * 60 + [0] * 37 + [1] * 3)
    test_pixels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    assert forest_miou((features, labels), test_pixels, 2, 0) == 1.0
