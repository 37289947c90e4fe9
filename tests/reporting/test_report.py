from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from overfly.benchmarking import SeedStatistics
from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.reporting import report as reports
from overfly.reporting.extremes import Album, Scene
from overfly.reporting.report import Entry, Evidence, Gallery, Matrix, Report, render, shares

NASTY = '"><script>alert(1)</script><img src="http://evil.example/x.png" onerror="y()">'
CLASSES = Classes(names=(NASTY, "road"))


def _entry(name: str = NASTY, **changes: Any) -> Entry:
    figure = SeedStatistics.of([0.5, 0.6])
    values: dict[str, Any] = {
        "name": name, "network": NASTY, "seeds": [0, 1], "miou": {NASTY: figure}, "gap": SeedStatistics.of([0.4, -0.1]),
        "classes": {NASTY: {NASTY: figure, "road": figure}}, "opened": "",
        "about": dict.fromkeys(("method", "source", "length", "criterion"), NASTY),
        "matrices": [Matrix(NASTY, CLASSES.names, [[30, 10], [0, 0]], True)], "losses": {NASTY: [(10, 1.0), (20, 0.5)]},
        "measured": {}, "runs": [NASTY], "recipe": f"title: {NASTY}", "machine": {NASTY: NASTY, "argv": [NASTY, "x"]},
    }  # fmt: skip
    return Entry(**(values | changes))


def _gallery(pictures: int = 1, side: int = 240) -> Gallery:
    rng = np.random.default_rng(0)
    scenes = [
        Scene(
            NASTY,
            "worst",
            rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
            rng.integers(0, 2, (side, side), dtype=np.uint8),
            {NASTY: rng.integers(0, 2, (side, side), dtype=np.uint8)},
            {NASTY: 0.5},
        )
        for _ in range(pictures)
    ]
    return Gallery(Album(NASTY, "target", scenes, 10, 20), CLASSES)


def _report(**changes: Any) -> Report:
    return Report(**({"title": NASTY, "made": "now", "split": "val", "entries": [_entry()]} | changes))


class _Page(HTMLParser):
    """What a browser would find: tags, addresses, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_from_outside_becomes_markup_and_nothing_is_asked_of_a_network() -> None:
    evidence = Evidence(NASTY, NASTY, [NASTY], [(NASTY, [NASTY], NASTY)], [NASTY], [NASTY], NASTY, 0)
    page = _Page(text := render(_report(evidence=[evidence], galleries=[_gallery()])))
    assert "script" not in page.tags
    assert not page.handlers
    assert page.tags.count("img") == 3
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    assert page.text.count(NASTY) > 10
    assert "default-src 'none'" in text
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    for wanted in ("prefers-color-scheme: dark", "@media print"):
        assert wanted in style


def test_links_within_the_page_lead_somewhere() -> None:
    text = render(_report(entries=[_entry("a"), _entry("b")], galleries=[_gallery()]))
    ids = set(re.findall(r'id="([^"]+)"', text))
    for link in re.findall(r'href="#([^"]+)"', text):
        assert link in ids


def test_a_report_of_nothing_but_an_unscored_run_says_so() -> None:
    entry = _entry("bare", miou={}, classes={}, gap=None, matrices=[], losses={}, machine={})
    text = render(_report(entries=[entry]))
    assert "None of these runs was scored yet" in text
    assert "Nothing was trained" in text
    assert "Gap closed" not in text
    note = Gallery(Album("Far", "target", [], 0, 0, "data/x is not there"), CLASSES)
    assert "data/x is not there" in render(_report(galleries=[note]))


def test_matrices_are_shares_of_the_labels() -> None:
    (name, share, cells), (_, none, empty) = Matrix("t", ("a", "b"), [[30, 10], [0, 0]]).rows
    assert (name, share, cells) == ("a", 1.0, [0.75, 0.25])
    assert (none, empty) == (0.0, [None, None])


def test_pictures_shrink_until_the_page_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    full = len(render(_report(galleries=[_gallery(2)])))
    monkeypatch.setattr(reports, "LARGEST", full // 2)
    half = render(_report(galleries=[_gallery(2)]))
    assert len(half) < full // 2
    assert half.count("<img") == 6
    monkeypatch.setattr(reports, "LARGEST", 1000)
    with pytest.raises(OverflyError, match="fewer runs"):
        render(_report())


def test_more_recipes_than_colors_take_more_charts() -> None:
    charts = _report(entries=[_entry(str(index)) for index in range(8)]).class_charts
    assert [place for place, _ in charts] == [NASTY, NASTY]


def test_a_map_in_words() -> None:
    ids = np.array([[0, 1, 1, 1]], np.uint8)
    assert shares(ids, Classes(names=("a", "b", "c"))) == "b 75 %, a 25 %"
