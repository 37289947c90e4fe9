from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from planted import ByLevel, Constant, Patches
from torch import Tensor, nn

from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, UInt8
from overfly.data.domain import Split
from overfly.scoring.reverse import described, pixels, reverse, taught

SOURCE, TARGET = Patches(blind=False), Patches(first=50)


class Inverted(Patches):
    """Other things: where the source is dark this is bright, and its textures are not the source's."""

    def read_image(self, item: Item) -> Array:
        image = super().read_image(item)
        return (image // 4 + np.arange(self.side, dtype=np.uint8)[:, None, None] * 2).astype(np.uint8)


class Noise(Patches):
    """Labels that no look tells; other pictures are held out than are learnt from."""

    def items(self, split: Split) -> Sequence[Item]:
        return [item._replace(name=f"p{int(item.name[1:]) + 20 * (split == 'val')}") for item in super().items(split)]

    def read_label(self, item: Item) -> UInt8:
        rng = np.random.default_rng(int(item.name[1:]))
        return rng.integers(0, 3, (self.side, self.side)).astype(np.uint8)


def share(network: nn.Module, source: Patches, target: Patches) -> float:
    found = reverse(network, source, target)
    assert found is not None
    return found


def test_right_labels_of_the_same_classes_teach_what_true_ones_do() -> None:
    assert share(ByLevel(), SOURCE, TARGET) > 0.95


@pytest.mark.parametrize(
    ("network", "most"),
    [(ByLevel(order=(1, 2, 0)), 0.05), (ByLevel(order=(0, 2, 1)), 0.5), (Constant(), 0.35)],
)
def test_labels_that_are_exchanged_or_alike_teach_other_things(network: nn.Module, most: float) -> None:
    assert share(network, SOURCE, TARGET) < most


def test_pictures_of_other_things_teach_less() -> None:
    assert share(ByLevel(), SOURCE, Inverted(first=50)) < 0.6


def test_where_no_look_tells_the_classes_nobody_is_asked() -> None:
    assert reverse(ByLevel(), Noise(blind=False), TARGET) is None


def test_no_label_of_the_target_is_opened_and_the_sources_are() -> None:
    reverse(ByLevel(), SOURCE, Patches(blind=True))
    with pytest.raises((DataError, AssertionError)):
        reverse(ByLevel(), Patches(blind=True), TARGET)


def test_the_same_seed_gives_the_same_answer_and_touches_no_global_random_state() -> None:
    network = ByLevel(0.1, (0, 2, 1))
    python, numpys, torchs = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state()  # noqa: NPY002
    first = reverse(network, SOURCE, TARGET, seed=3)
    assert random.getstate() == python
    assert repr(np.random.get_state(legacy=False)) == numpys  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert reverse(network, SOURCE, TARGET, seed=3) == first


def test_a_network_is_left_in_the_mode_it_was_in() -> None:
    network = ByLevel().train()
    reverse(network, SOURCE, TARGET)
    assert network.training


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
