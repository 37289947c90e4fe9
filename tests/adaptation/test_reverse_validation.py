from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from overfly.adaptation.reverse_validation import FEW, described, pixels, reverse_validation, taught
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, Logits, UInt8
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import labeled_images, predict_scores, unlabeled_images
from planted import ByLevel, Constant, Patches

OFFSETS = {"train": 0, "val": 30, "test": 60}


class Place(Patches):
    """Other pictures in every split, so noisy that no pixel alone tells its class; remembers which were read."""

    images: int = 8
    noise: int = 60
    levels: tuple[int, ...] = (0, 1, 2)
    read: ClassVar[list[str]] = []

    def items(self, split: Split) -> Sequence[Item]:
        return [item._replace(name=f"p{int(item.name[1:]) + OFFSETS[split]}") for item in super().items(split)]

    def _levels(self, item: Item) -> UInt8:
        levels: UInt8 = super()._levels(item)
        levels[:] = np.asarray(self.levels, dtype=np.uint8)[levels % len(self.levels)]
        return levels

    def read_image(self, item: Item) -> Array:
        self.read.append(item.name)
        image = super().read_image(item).astype(int)
        noise = np.random.default_rng(2000 + int(item.name[1:])).normal(0, self.noise, image.shape[:2])
        found: UInt8 = np.clip(image + noise[..., None].round().astype(int), 0, 255).astype(np.uint8)
        return found


class Other(Place):
    """Other things: textures that the source does not have, in levels of its own."""

    def read_image(self, item: Item) -> Array:
        image = super().read_image(item)
        return (image // 4 + np.arange(self.side, dtype=np.uint8)[:, None, None] * 2).astype(np.uint8)


class Shapeless(Place):
    """Labels that no look tells."""

    def read_label(self, item: Item) -> UInt8:
        rng = np.random.default_rng(int(item.name[1:]))
        return rng.integers(0, 3, (self.side, self.side)).astype(np.uint8)


class Smooth(nn.Module):
    """Tells classes apart by the brightness around each pixel; says another order of classes while it trains."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.of, self.order = ByLevel(), order
        self.sizes: list[tuple[int, int]] = []

    def forward(self, image: Tensor) -> Logits:
        self.sizes.append((image.shape[-2], image.shape[-1]))
        main = self.of(nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)).main
        return Logits(main[:, list((2, 0, 1) if self.training else self.order)])


SOURCE, TARGET = Place(blind=False), Place(first=100)


def share(network: nn.Module, source: Domain = SOURCE, target: Domain = TARGET, **how: Any) -> float:
    found = reverse_validation(network, source, target, **how)
    assert found is not None
    return found


def test_right_labels_of_the_same_classes_teach_nearly_what_true_ones_do() -> None:
    assert 0.75 < share(Smooth()) <= 1.0


def test_it_is_a_share_of_what_true_labels_teach() -> None:
    """Of held-out labels that a forest knows by 60 to 90 %."""
    home, asked = pixels(labeled_images(SOURCE, "train"), 255, 0), pixels(labeled_images(SOURCE, "val"), 255, 1)
    known = taught(home, asked, 3, 0)
    assert 0.6 < known < 0.95
    said = ((image, predict_scores(Smooth().eval(), image).argmax(0)) for image in unlabeled_images(TARGET, "train"))
    away = pixels(said, 255, 0)
    assert share(Smooth()) == pytest.approx(min(1.0, taught(away, asked, 3, 0) / known))


@pytest.mark.parametrize(("network", "most"), [(Smooth((1, 2, 0)), 0.2), (Smooth((0, 2, 1)), 0.5), (Constant(), 0.4)])
def test_labels_that_are_exchanged_or_alike_teach_other_things(network: nn.Module, most: float) -> None:
    assert share(network) < most


def test_pictures_of_other_things_teach_less() -> None:
    assert share(Smooth(), target=Other(first=100)) < 0.6


def test_a_place_that_lacks_classes_teaches_less() -> None:
    assert share(Smooth(), target=Place(first=100, levels=(0,))) < 0.5


def test_a_network_is_asked_in_evaluation_and_left_as_it_was() -> None:
    network = Smooth().train()
    assert share(network) > 0.75
    assert network.training


def test_the_splits_the_number_and_the_size_of_pictures_are_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "read", [])
    network = Smooth()
    source = Place(blind=False, images=20, side=48)
    share(network, source, Place(first=200, images=20, side=48), held="test", limit=10, crop=40, window=24)
    numbers = [int(name[1:]) for name in Place.read]
    assert len(numbers) == 30
    assert sum(number < 20 for number in numbers) == 10  # the source's train
    assert sum(60 <= number < 80 for number in numbers) == 10  # its held-out split
    assert sum(200 <= number < 220 for number in numbers) == 10  # the target's train
    assert set(network.sizes) == {(24, 24)}
    network.sizes.clear()
    share(network, source, Place(first=200, images=8, side=48), resize=32)
    assert set(network.sizes) == {(32, 32)}


def test_no_label_of_the_target_is_opened_and_the_sources_are() -> None:
    share(Smooth(), target=Place(first=100, blind=True))
    with pytest.raises((DataError, AssertionError)):
        reverse_validation(Smooth(), Place(blind=True), TARGET)


def test_where_it_would_mean_nothing_nobody_is_asked() -> None:
    assert reverse_validation(Smooth(), Shapeless(blind=False), TARGET) is None
    assert reverse_validation(Smooth(), SOURCE, Place(first=100, images=FEW - 1)) is None
    assert reverse_validation(Smooth(), SOURCE, TARGET, limit=FEW - 1) is None


def test_the_same_seed_gives_the_same_answer_and_touches_no_global_random_state() -> None:
    python, numpys = random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002
    torchs = torch.get_rng_state()
    first = share(Smooth((0, 2, 1)), seed=3)
    assert random.getstate() == python
    assert repr(np.random.get_state(legacy=False)) == numpys  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert share(Smooth((0, 2, 1)), seed=3) == first
    assert share(Smooth((0, 2, 1)), seed=4) != first


def test_a_pixel_is_described_by_its_bands_and_what_surrounds_it() -> None:
    image = torch.full((4, 40, 40), 50.0)
    image[:, :, 20:] = 100.0
    found = described(image, 200.0)
    assert found.shape == (4 + 4 * 5, 40, 40)
    assert torch.allclose(found[:4], image / 200)
    assert found[8, 20, 5] == pytest.approx(0.0, abs=1e-3)  # spread in the square of 3, far from the edge
    assert found[8, 20, 19] == pytest.approx(0.25 * np.sqrt(2) / 3, abs=1e-3)  # two columns of 0.25 and one of 0.5
    assert torch.equal(described(image * 100, 20000.0), found)


def test_a_picture_smaller_than_the_squares_and_one_with_gaps_are_described() -> None:
    image = torch.rand(3, 2, 5)
    image[0, 0, 0] = torch.nan
    found = described(image, 1.0)
    assert found.shape == (19, 2, 5)
    assert bool(found.isfinite().all())


def test_pixels_without_a_label_are_left_out() -> None:
    image = torch.zeros(1, 8, 8)
    label = torch.full((8, 8), IGNORE)
    label[0] = 2
    looks, labels = pixels([(image, label), (image, label)], 1.0, 0)
    assert len(looks) == len(labels) > 0
    assert labels.unique().tolist() == [2]  # type: ignore[no-untyped-call]


@dataclass
class Pixels:
    """One description, one class each."""

    values: tuple[float, ...]
    classes: tuple[int, ...]

    def many(self, times: int = 30) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.values).repeat(times)[:, None], torch.tensor(self.classes).repeat(times)


def test_a_class_that_nothing_taught_counts_as_missed_and_one_that_is_not_asked_for_not_at_all() -> None:
    asked = Pixels((0.0, 1.0), (0, 1)).many()
    assert taught(Pixels((0.0, 1.0), (0, 1)).many(), asked, 3, 0) == 1.0
    assert taught(Pixels((0.0, 1.0, 2.0), (0, 1, 2)).many(), asked, 3, 0) == 1.0
    assert taught(Pixels((0.0, 1.0), (0, 0)).many(), asked, 3, 0) == pytest.approx(0.25)
    nothing = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    assert taught(nothing, asked, 3, 0) == taught(asked, nothing, 3, 0) == 0.0


def test_a_rare_class_weighs_as_much_as_a_frequent_one() -> None:
    """Ninety-seven pixels say 0 and three say 1 of the same look: all classes alike, the look is as much the one."""
    looks = torch.tensor([0.0] * 60 + [1.0] * 40)[:, None]
    labels = torch.tensor([0] * 60 + [0] * 37 + [1] * 3)
    asked = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    assert taught((looks, labels), asked, 2, 0) == 1.0
