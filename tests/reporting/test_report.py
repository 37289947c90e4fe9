from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from overfly.benchmarking import BenchmarkRow, SeedStatistics
from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.reporting import report as reports
from overfly.reporting.report import ConfusionTable, RecipeResults, Report, describe_shares, render
from overfly.reporting.samples import SampleImage, SampleSet

UNSAFE = '"><script>alert(1)</script><img src="http://evil.example/x.png" onerror="y()">'
CLASSES = Classes(names=(UNSAFE, "road"))


def _entry(name: str = UNSAFE, **changes: Any) -> RecipeResults:
    figure = SeedStatistics.from_values([0.5, 0.6])
    texts = ("recipe", "model", "method", "augmentation", "source", "criterion", "optimizer", "scheduler", "length")
    row = BenchmarkRow(
        **dict.fromkeys(texts, UNSAFE), version=0, batch=4, split="val", labels_opened=0, runs=(UNSAFE,),
        miou={UNSAFE: figure}, classes={UNSAFE: {UNSAFE: figure, "road": figure}}, minutes=figure,
        gap_closed=SeedStatistics.from_values([0.4, -0.1]),
    )  # fmt: skip
    run = SimpleNamespace(
        recipe=SimpleNamespace(seed=0), machine=changes.pop("machine", {UNSAFE: UNSAFE, "argv": [UNSAFE, "x"]}),
        scores={"labels_opened": {"target/val": {"times": 2, "images": 80}, "source/val": {"times": 1, "images": 9}}},
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "row": row.model_copy(update=changes.pop("row", {})), "runs": [run],
        "confusions": [ConfusionTable(UNSAFE, CLASSES.names, [[30, 10], [0, 0]], True)],
        "losses": {UNSAFE: [(10, 1.0), (20, 0.5)]}, "metrics": {}, "recipe": f"title: {UNSAFE}",
    }  # fmt: skip
    return RecipeResults(**(values | changes))


def _gallery(number: int = 1, side: int = 240) -> SampleSet:
    rng = np.random.default_rng(0)
    images = [
        SampleImage(
            UNSAFE,
            "worst",
            rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
            rng.integers(0, 2, (side, side), dtype=np.uint8),
            {UNSAFE: rng.integers(0, 2, (side, side), dtype=np.uint8)},
            {UNSAFE: 0.5},
        )
        for _ in range(number)
    ]
    return SampleSet(UNSAFE, CLASSES, "target", images, 10, 20)


def _report(**changes: Any) -> Report:
    return Report(**({"title": UNSAFE, "date": "now", "split": "val", "entries": [_entry()]} | changes))


class _Page(HTMLParser):
    """Tags, links and text of a page."""

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


def test_report_escapes_text_and_loads_nothing() -> None:
    selection = SimpleNamespace(
        summary=UNSAFE, rows=lambda: [[UNSAFE] * 3], differences=[UNSAFE], reasons=[UNSAFE], labels_opened=0
    )  # fmt: skip
    page = _Page(text := render(_report(selections={UNSAFE: selection}, galleries=[_gallery()])))
    assert "script" not in page.tags
    assert not page.handlers
    assert page.tags.count("img") == 3
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    assert page.text.count(UNSAFE) > 10
    assert "default-src 'none'" in text
    assert "<td>val: 2 × (80 images)</td>" in text
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    for expected in ("prefers-color-scheme: dark", "@media print"):
        assert expected in style


def test_links_within_the_page_have_targets() -> None:
    text = render(_report(entries=[_entry("a"), _entry("b")], galleries=[_gallery()]))
    ids = set(re.findall(r'id="([^"]+)"', text))
    for link in re.findall(r'href="#([^"]+)"', text):
        assert link in ids


def test_report_of_a_run_without_scores() -> None:
    entry = _entry("bare", row={"miou": {}, "classes": {}, "gap_closed": None}, confusions=[], losses={}, machine={})
    text = render(_report(entries=[entry]))
    assert "overfly evaluate" in text
    assert "No training steps" in text
    assert "Gap closed" not in text
    note = SampleSet("Far", CLASSES, "target", [], 0, 0, "data/x is not there")
    assert "data/x is not there" in render(_report(galleries=[note]))


def test_confusion_rows_are_shares_of_the_labels() -> None:
    matrix = ConfusionTable("t", ("a", "b"), [[30, 10], [0, 0]])
    text = re.sub("<[^>]*>", " ", render(_report(entries=[_entry("x", confusions=[matrix])])).split('class="heat"')[1])
    words = " ".join(text.split())
    assert "a 100.0 % of pixels 75 25 b 0.0 % of pixels – –" in words


def test_images_shrink_to_the_limit_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    full = len(render(_report(galleries=[_gallery(2)])))
    monkeypatch.setattr(reports, "MAX_BYTES", full // 2)
    half = render(_report(galleries=[_gallery(2)]))
    assert len(half) < full // 2
    assert half.count("<img") == 6
    monkeypatch.setattr(reports, "MAX_BYTES", 1000)
    with pytest.raises(OverflyError):
        render(_report())


def test_more_recipes_than_colors_are_split_into_charts() -> None:
    text = render(_report(entries=[_entry(str(index)) for index in range(8)]))
    assert text.count('aria-label="IoU of each class in') == 2
    assert text.count('aria-label="Share of the gap') == 1


def test_describe_shares() -> None:
    ids = np.array([[0, 1, 1, 1]], np.uint8)
    assert describe_shares(ids, Classes(names=("a", "b", "c"))) == "b 75 %, a 25 %"
