from __future__ import annotations

from overfly.reporting.samples import choose_images


def test_choose_worst_best_and_largest_differences() -> None:
    before = {0: 0.5, 1: 0.9, 2: 0.6, 3: 0.2, 4: 0.5, 5: 0.55}
    after = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.6, 4: 0.8, 5: 0.3}
    result = choose_images({"before": before, "after": after})
    assert list(result) == [0, 1, 2, 4, 3]
    assert result[0] == "worst"
    assert result[1] == "worst, largest loss, -70 points"
    assert result[2] == "best"
    assert result[3] == "largest gain, +40 points"


def test_choose_from_few_or_unlabeled_images() -> None:
    assert choose_images({"one": {0: None, 1: 0.5}}) == {1: "worst"}
    assert choose_images({"one": {}}) == {}
    assert choose_images({"one": {0: None}, "two": {0: None}}) == {}
