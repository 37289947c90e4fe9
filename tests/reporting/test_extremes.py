from __future__ import annotations

from overfly.reporting.extremes import choose


def test_worst_best_and_where_the_networks_differ_most() -> None:
    before = {0: 0.5, 1: 0.9, 2: 0.6, 3: 0.2, 4: 0.5, 5: 0.55}
    after = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.6, 4: 0.8, 5: 0.3}
    found = choose({"before": before, "after": after})
    assert list(found) == [0, 1, 2, 4, 3]
    assert found[0] == "worst"
    assert found[1] == "worst, most lost, -70 points"
    assert found[2] == "best"
    assert found[3] == "most gained, +40 points"


def test_pictures_without_a_label_and_few_pictures() -> None:
    assert choose({"one": {0: None, 1: 0.5}}) == {1: "worst"}
    assert choose({"one": {}}) == {}
    assert choose({"one": {0: None}, "two": {0: None}}) == {}
