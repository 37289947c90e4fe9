from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from overfly.core.classes import PALETTE, Classes


def test_classes_in_three_spellings() -> None:
    full = Classes(names=("land", "water"), colors=((1, 2, 3), (4, 5, 6)))
    assert Classes.model_validate({"land": [1, 2, 3], "water": [4, 5, 6]}) == full
    assert Classes.model_validate(full.model_dump()) == full
    assert Classes.model_validate(["land", "water"]).colors == PALETTE[:2]


def test_many_classes_still_get_colors() -> None:
    assert len(Classes(names=tuple(f"c{i}" for i in range(40))).colors) == 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ["a", "a"]}, "more than once"),
        ({"names": ["a"], "colors": [[0, 0, 0], [1, 1, 1]]}, "1 colors"),
        ({"names": []}, "1 to 254"),
        ({"names": ["a"], "colors": [[0, 0, 300]]}, "255"),
    ],
)
def test_invalid_classes_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Classes.model_validate(values)


def test_paint_shows_each_class_in_its_color_and_ignored_pixels_black() -> None:
    classes = Classes(names=("land", "water"), colors=((1, 2, 3), (4, 5, 6)))
    painted = classes.paint(np.array([[0, 1, 255]], np.uint8))
    assert painted.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]
    assert classes.index("water") == 1
    with pytest.raises(ValueError, match="land, water"):
        classes.index("sky")


def test_yaml_booleans_as_class_names_raise() -> None:
    for classes in ([False, True], {False: [0, 0, 0], True: [1, 1, 1]}, {"names": [False, True]}):
        with pytest.raises(ValidationError, match="quote names"):
            Classes.model_validate(classes)
