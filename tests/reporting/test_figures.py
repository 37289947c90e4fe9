from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from overfly.core.errors import RunError
from overfly.reporting.figures import (
    SERIES,
    Bar,
    bars,
    draw_curves,
    grouped_bars,
    line_chart,
    moving_average,
    training_curves,
)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "source": 2 / step, "boundary": 1 / step, "lr": 0.01 - step * 1e-4} for step in range(1, 41)
    ]
    rows.insert(20, {"step": 20, "event": "validation", "source_miou": 0.4})
    rows += [
        {"step": 40, "event": "scored", "domain": "target", "split": "val", "miou": 0.3},
        {"step": 40, "event": "not finite", "terms": "source = nan", "items": "a, b"},
    ]
    return rows


def test_training_curves_separate_losses_rates_and_metrics() -> None:
    losses, rates, measured = training_curves(_rows())
    assert set(losses) == {"source", "boundary"}
    assert set(rates) == {"lr"}
    assert measured == {"source_miou": [(20, 0.4)], "target val miou": [(40, 0.3)]}
    assert losses["source"][:2] == [(1, 2.0), (2, 1.0)]


def test_training_curves_skip_non_finite_values_and_keep_the_last_row() -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": float("nan"), "b": True}, {"a": 3.0}, {"step": 2, "a": 4.0}]
    assert training_curves(rows) == ({"a": [(2, 4.0)]}, {}, {})


@pytest.mark.parametrize("rows_kind", ["all", "losses", "measured"])
def test_draw_curves(tmp_path: Path, rows_kind: str) -> None:
    rows = [row for row in _rows() if rows_kind == "all" or ("event" in row) == (rows_kind == "measured")]
    with Image.open(draw_curves(rows, tmp_path / "new" / "curves.png")) as image:
        assert image.format == "PNG"
        assert image.width == 960
        darkest, _ = image.convert("L").getextrema()
        assert float(str(darkest)) < 100


def test_draw_curves_of_an_empty_log(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        draw_curves([{"step": 1, "event": "not finite"}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_is_symmetric() -> None:
    line = [float(value) for value in range(20)]
    assert moving_average(line, 7) == pytest.approx(line)
    assert moving_average([0.0, 0.0, 3.0, 0.0, 0.0], 3) == pytest.approx([0, 1, 1, 1, 0])
    assert moving_average([5.0, 1.0], 1) == [5.0, 1.0]


UNSAFE = '<script>alert("1")</script> & Straße $x$'


def _read(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  (our own figures)


def _all(root: ET.Element, name: str) -> list[ET.Element]:
    return root.findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def _extent(path: ET.Element) -> tuple[float, float]:
    """Left and right of a path."""
    xs = [float(pair.split()[0]) for pair in re.findall(r"[-\d.]+ [-\d.]+", path.get("d") or "")]
    return min(xs), max(xs)


def _filled(root: ET.Element) -> list[ET.Element]:
    return [path for path in _all(root, "path") if path.get("fill") in SERIES]


def test_svg_escapes_text_and_has_no_styles() -> None:
    for svg in (
        bars([Bar(UNSAFE, 0.5)], UNSAFE),
        grouped_bars({UNSAFE: [0.5]}, [UNSAFE], UNSAFE),
        line_chart({UNSAFE: [(0, 1.0), (10, 0.5)]}, UNSAFE),
    ):
        root = _read(svg)
        assert not _all(root, "script")
        assert not _all(root, "style")
        assert root.get("aria-label") == UNSAFE
        assert any((text.text or "").startswith("<script>") for text in _all(root, "text"))
        tags = "".join(re.findall(r"<[^>]*>", svg))
        assert "style=" not in tags
        assert "var(--line)" in tags


def test_grouped_bars_are_proportional_to_their_values() -> None:
    root = _read(grouped_bars({"a": [0.25, 0.75], "b": [None, 1.0]}, ["one", "two"], "t"))
    widths = [right - left for left, right in map(_extent, _filled(root))]
    assert [round(width / widths[0], 1) for width in widths[:4]] == [1.0, 0.0, 3.0, 4.0]


def test_bars_exceed_zero_and_one_hundred_percent() -> None:
    root = _read(bars([Bar("worse", -0.5, 0.1, (-0.4, -0.6)), Bar("better", 1.5, None, (1.5,))], "t"))
    (worse, zero), (start, _) = map(_extent, _filled(root))
    assert worse < zero == start
    texts = [text.text for text in _all(root, "text")]
    assert "-50.0 % ± 10.0" in texts
    assert "150.0 %" in texts


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    svg = line_chart({"loss": [(step, 1 / (1 + step)) for step in range(5000)]}, "t", smoothing=0)
    (path, _) = [path for path in _all(_read(svg), "path") if path.get("stroke") == SERIES[0]]
    points = re.findall(r"[ML] ([\d.]+)", path.get("d") or "")
    assert 10 < len(points) <= 241
    assert float(points[0]) == 46
    assert float(points[-1]) == 350


def test_more_curves_than_colors_differ_by_their_dashes() -> None:
    svg = line_chart({f"term {index}": [(0, index), (5, index + 1)] for index in range(8)}, "t")
    kinds = {(path.get("stroke"), path.get("stroke-dasharray")) for path in _all(_read(svg), "path")}
    assert len([kind for kind in kinds if kind[0] in SERIES]) == 8
    assert line_chart({}, "t") == ""
