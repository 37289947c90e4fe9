from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from overfly.reporting.charts import SERIES, Bar, bars, grouped, lines

NASTY = '<script>alert("1")</script> & Straße'


def _read(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  (our own pictures)


def _all(root: ET.Element, name: str) -> list[ET.Element]:
    return root.findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def test_names_from_outside_are_text_and_nothing_else() -> None:
    for svg in (
        bars([Bar(NASTY, 0.5)], NASTY),
        grouped({NASTY: [0.5]}, [NASTY], NASTY),
        lines({NASTY: [(0, 1.0), (10, 0.5)]}, NASTY),
    ):
        root = _read(svg)
        assert not _all(root, "script")
        assert root.get("aria-label") == NASTY
        assert any(NASTY in (each.text or "") for each in _all(root, "title"))


def test_bars_are_as_long_as_their_values() -> None:
    root = _read(grouped({"a": [0.25, 0.75], "b": [None, 1.0]}, ["one", "two"], "t"))
    widths = [float(each.get("width") or 0) for each in _all(root, "rect") if each.get("height") != "10"]
    assert widths[1] / widths[0] == 3
    assert widths[2] < 1
    assert widths[3] / widths[0] == 4


def test_a_bar_may_reach_below_zero_and_beyond_the_oracle() -> None:
    root = _read(
        bars([Bar("worse", -0.5, 0.1, (-0.4, -0.6)), Bar("better", 1.5, None, (1.5,)), Bar("none", None)], "t")
    )
    first, second = _all(root, "rect")
    zero = float(second.get("x") or 0)
    assert float(first.get("x") or 0) + float(first.get("width") or 0) == zero
    dots = [float(each.get("cx") or 0) for each in _all(root, "circle")]
    assert dots[1] < dots[0] < zero < dots[2]
    words = " ".join(each.text or "" for each in _all(root, "text"))
    assert "-50.0 % ± 10.0" in words
    assert "150.0 %" in words


def test_curves_are_thinned_and_keep_both_ends() -> None:
    root = _read(lines({"loss": [(step, 1 / (1 + step)) for step in range(5000)]}, "t", smooth=0))
    (line,) = _all(root, "polyline")
    points = [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]
    assert 200 < len(points) < 260
    assert points[0][1] < points[-1][1]
    assert points[-1][0] == max(x for x, _ in points)
    assert all(4 <= y <= 156 for _, y in points)


def test_more_curves_than_colors_differ_by_their_dashes() -> None:
    svg = lines({f"term {index}": [(0, index), (5, index + 1)] for index in range(8)}, "t")
    kinds = re.findall(r'<polyline [^>]*stroke="(#\w+)" stroke-width="1.6"( stroke-dasharray="[^"]+")?', svg)
    assert len(set(kinds)) == 8
    assert {color for color, _ in kinds} == set(SERIES)
    assert lines({}, "t") == ""
