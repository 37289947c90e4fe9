from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from overfly.core.classes import Classes
from overfly.core.records import Array, Item, UInt8
from overfly.data.check import TURNS, better_turn
from overfly.data.domain import Domain, Split, has_fixed_top, shortest_sides
from overfly.data.synthetic import synthesize

LABEL = np.zeros((30, 20), np.uint8)


class Masks(Domain, name="masks_in_memory"):
    """Labels in memory, without images."""

    upper: int
    lower: int

    @property
    def classes(self) -> Classes:
        return Classes.model_validate(["sky", "ground"])

    def items(self, split: Split) -> Sequence[Item]:
        del split
        return [Item(f"{index}", lambda: np.zeros((30, 20, 3), np.uint8), lambda: LABEL) for index in range(4)]

    def read_label(self, item: Item) -> UInt8:
        label = np.full((30, 20), self.lower, np.uint8)
        label[:15] = self.upper if int(item.name) < 3 else self.lower
        label[:, 0] = 255
        return label


def scene(index: int) -> tuple[Array, UInt8]:
    return synthesize("urban", "train", index, 96)


@pytest.mark.parametrize("index", range(6))
def test_labels_on_their_images_have_no_better_turn(index: int) -> None:
    image, label = scene(index)
    assert better_turn(image, label) is None


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_label_is_found_with_the_turn_that_undoes_it(name: str) -> None:
    found = [better_turn(image, TURNS[name](label).copy()) for image, label in map(scene, range(6))]
    assert set(found) <= {name, None}
    assert found.count(name) >= 4


def test_uniform_images_and_labels_have_no_better_turn() -> None:
    image, label = scene(0)
    assert better_turn(np.zeros_like(image), label) is None
    assert better_turn(image, np.zeros_like(label)) is None


@pytest.mark.parametrize(("upper", "lower", "fixed"), [(0, 1, True), (1, 1, False)])
def test_images_whose_upper_and_lower_classes_differ_have_a_fixed_top(upper: int, lower: int, fixed: bool) -> None:
    assert has_fixed_top(Masks(upper=upper, lower=lower)) == fixed


def test_generated_images_have_no_sides() -> None:
    assert shortest_sides(Masks(upper=0, lower=1)) == []
