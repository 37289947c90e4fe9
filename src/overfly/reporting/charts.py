"""Charts as SVG for pages: readable on a phone, in light and dark, and without the rest of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from overfly.reporting.curves import smoothed

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colors that the color-blind can tell apart and that show on white and on black (Okabe and Ito, 2008)."""
WIDE = 360
"""Width of every chart in units of its own: about the pixels of a phone, so that its letters have their size there."""
POINTS = 240
"""Points that a curve is thinned to."""
NAMES_WIDE = 110
"""Room for the names on the left of a bar chart."""


class Bar(NamedTuple):
    """One bar: what it is called, its length from 0 to 1 or beyond, and what went into it.

    Attributes:
        name: shown beside it.
        value: None where there is nothing to show.
        spread: standard deviation over the seeds.
        values: one a seed.
    """

    name: str
    value: float | None
    spread: float | None = None
    values: Sequence[float | None] = ()


def bars(entries: Sequence[Bar], title: str) -> Markup:
    """Horizontal bars in percent, a dot for each seed; they may reach below 0 and beyond 100.

    Args:
        entries: from top to bottom.
        title: what a reader who cannot see it is told.
    """
    numbers = [value for bar in entries for value in (bar.value, *bar.values) if value is not None]
    low, high = min(0.0, *numbers, 0.0), max(1.0, *numbers, 1.0)
    left, right, tall = 10.0, WIDE - 14.0, 40

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [_rule(place(tick), 4, tall * len(entries) + 4, strong=tick == 0) for tick in (0.0, 0.5, 1.0)]
    for row, bar in enumerate(entries):
        top = row * tall + 8
        words = "–" if bar.value is None else f"{100 * bar.value:.1f} %"
        spread = f" ± {100 * bar.spread:.1f}" if bar.spread is not None and bar.value is not None else ""
        parts.append(_text(left, top + 9, f"{_short(bar.name, 38)}"))
        parts.append(_text(right, top + 9, f"{words}{spread}", anchor="end", strong=True))
        if bar.value is None:
            continue
        start, end = sorted((place(0), place(bar.value)))
        hint = _title(f"{bar.name}: {words}{spread}")
        parts.append(
            f'<rect x="{start:.1f}" y="{top + 14}" width="{max(end - start, 1):.1f}" height="10" rx="2" '
            f'fill="{SERIES[0]}">{hint}</rect>'
        )
        parts += [_dot(place(value), top + 19, f"{100 * value:.1f} %") for value in bar.values if value is not None]
    foot = tall * len(entries) + 18
    parts += [_text(place(tick), foot, f"{100 * tick:.0f}", anchor="middle") for tick in (0.0, 0.5, 1.0)]
    return _svg(foot + 6, title, parts)


def grouped(rows: Mapping[str, Sequence[float | None]], series: Sequence[str], title: str) -> Markup:
    """Bars from 0 to 100 percent, several beside each other for each name; the key of the series stands below.

    Args:
        rows: for each name, such as a class, one value a series, 0 to 1.
        series: names of the series, at most as many as there are colors.
        title: what a reader who cannot see it is told.
    """
    left, right = float(NAMES_WIDE), WIDE - 34.0
    thick = 9
    tall = thick * len(series) + 9
    parts = [_rule(left + tick * (right - left), 2, tall * len(rows) + 2) for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for row, (name, values) in enumerate(rows.items()):
        top = row * tall + 5
        parts.append(_text(left - 6, top + thick * len(series) / 2 + 4, _short(name, 16), anchor="end", hint=name))
        for place, value in enumerate(values):
            y = top + place * thick
            words = "–" if value is None else f"{100 * value:.1f}"
            width = 0.0 if value is None else value * (right - left)
            hint = _title(f"{name}, {series[place]}: {words}")
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{thick - 1}" '
                f'fill="{SERIES[place % len(SERIES)]}">{hint}</rect>'
            )
            parts.append(_text(left + width + 3, y + thick - 1.5, words, size=9))
    foot = tall * len(rows) + 12
    marks = ((0.0, "0"), (0.5, "50"), (1.0, "100"))
    parts += [_text(left + tick * (right - left), foot, words, anchor="middle") for tick, words in marks]
    for place, name in enumerate(series):
        y = foot + 10 + 16 * place
        parts.append(f'<rect x="10" y="{y}" width="10" height="10" fill="{SERIES[place % len(SERIES)]}"/>')
        parts.append(_text(26, y + 9, _short(name, 52), hint=name))
    return _svg(foot + 12 + 16 * len(series), title, parts)


def lines(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, *, smooth: float = 0.05) -> Markup:
    """Curves over the steps; the vertical axis is logarithmic where values span more than a factor of 100.

    Args:
        curves: by name, points (step, value) in the order of the steps.
        title: what a reader who cannot see it is told.
        smooth: share of a curve's points that each is averaged over.
    """
    drawn = {name: _thin(points, smooth) for name, points in curves.items() if points}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return Markup("")
    lowest, highest = min(value for _, value in every), max(value for _, value in every)
    logarithmic = lowest > 0 and highest / lowest > 100
    scale = math.log10 if logarithmic else float
    low, high = scale(lowest) if logarithmic else min(0.0, lowest), scale(highest)
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    left, right, top, bottom = 44.0, WIDE - 8.0, 8.0, 150.0

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / max(last - first, 1)
        up = (scale(value) - low) / max(high - low, 1e-12)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for share in (0.0, 0.5, 1.0):
        height = low + share * (high - low)
        value = 10**height if logarithmic else height
        y = bottom - share * (bottom - top)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(_text(left - 4, y + 4, f"{value:.3g}", anchor="end"))
    parts += [
        _text(left, bottom + 14, f"{first:,}"),
        _text(right, bottom + 14, f"{last:,} steps", anchor="end"),
    ]
    for index, (name, points) in enumerate(drawn.items()):
        color = SERIES[index % len(SERIES)]
        dashes = ("", ' stroke-dasharray="5 3"', ' stroke-dasharray="2 2"')[index // len(SERIES) % 3]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        hint = _title(f"{name}: {points[0][1]:.3g} to {points[-1][1]:.3g}")
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}>{hint}</polyline>'
        )
        y, x = bottom + 24 + 15 * (index // 2), 10 + (index % 2) * 175
        parts.append(
            f'<line x1="{x}" x2="{x + 16}" y1="{y + 5}" y2="{y + 5}" stroke="{color}"{dashes} stroke-width="3"/>'
        )
        parts.append(_text(x + 21, y + 9, _short(name, 24), hint=name))
    return _svg(bottom + 28 + 15 * math.ceil(len(drawn) / 2), title, parts)


def _thin(points: Sequence[tuple[int, float]], smooth: float) -> list[tuple[int, float]]:
    values = smoothed([value for _, value in points], round(smooth * len(points)))
    every = max(1, math.ceil(len(points) / POINTS))
    kept = list(zip([step for step, _ in points], values, strict=True))
    return [point for index, point in enumerate(kept) if index % every == 0 or index == len(kept) - 1]


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _dot(x: float, y: float, words: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="3.5" class="dot">{_title(words)}</circle>'


def _rule(x: float, top: float, bottom: float, *, strong: bool = False) -> str:
    kind = "axis" if strong else "rule"
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="{kind}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", strong: bool = False, size: int = 11, hint: str = ""
) -> str:
    weight = ' font-weight="600"' if strong else ""
    more = _title(hint) if hint and hint != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}{more}</text>'
    )


def _svg(height: float, title: str, parts: Sequence[str]) -> Markup:
    """The parts as one picture; everything that came from outside was escaped where it was put in."""
    box = f'viewBox="0 0 {WIDE} {height:.0f}"'
    return Markup(  # noqa: S704
        f'<svg class="chart" {box} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )


__all__ = ["SERIES", "Bar", "bars", "grouped", "lines"]
