"""Draw charts as SVG for light and dark pages, training curves as PNG, and images and class maps for pages."""

import base64
import cmath
import colorsys
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from overfly.core.classes import PALETTE, Classes, Color
from overfly.core.errors import RunError
from overfly.core.progress import percent
from overfly.core.records import IGNORE, Array, UInt8
from overfly.evaluation.panels import STRIPE_COLORS, save_figure, to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = dict[str, list[tuple[int, float]]]
"""Points (step, value) by name."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colors distinguishable with color blindness, visible on white and on black (Okabe and Ito, 2008)."""
DASHES = ("-", (0, (5, 3)), (0, (2, 2)))
FOREGROUND, BACKGROUND, GRID_COLOR = "#010101", "#fefefe", "#d9dce1"
"""Colors that are replaced by the variables of the page's style."""
VARIABLES = {FOREGROUND: "var(--ink)", BACKGROUND: "var(--paper)", GRID_COLOR: "var(--line)"}
WIDTH = 360
"""Width of an SVG in points, about that of a phone."""
MAX_POINTS = 240
"""Maximum points of a curve in an SVG."""
ACCESSIBLE = (*PALETTE[:7], (80, 80, 80), *PALETTE[8:])
"""The palette with a darker gray, distinct from green with deuteranopia."""
PREFERRED_COLORS = 8
"""Number of palette colors used for up to 8 classes."""
MIN_SATURATION = 0.15
"""Saturation below which hue is ignored."""
STRIPE_LIGHT, STRIPE_DARK = 254, 255
"""Palette entries of the two grays that stripe pixels without a class."""


class Bar(NamedTuple):
    """A bar: name, length (1 is 100 %), standard deviation over seeds, and one value per seed."""

    name: str
    value: float
    deviation: float | None = None
    values: Sequence[float | None] = ()


def bars(entries: Sequence[Bar], title: str) -> Markup:
    """Draw horizontal bars in percent, from top to bottom, with a dot for each seed; they may exceed 0 to 100.

    ``title`` is the text for screen readers.
    """
    figure, axes = _new_figure(40 * len(entries), left=12, right=14, bottom=20)
    axes.barh(range(len(entries)), [bar.value for bar in entries], 0.28, color=SERIES[0], clip_on=False)
    for row, bar in enumerate(entries):
        deviation = "" if bar.deviation is None else f" ± {percent(bar.deviation, 1)}"
        across = axes.get_yaxis_transform()
        length = f"{percent(bar.value, 1)} %{deviation}"
        axes.text(0, row - 0.25, _shorten(bar.name, 38), va="bottom", fontsize=11, transform=across)
        axes.text(1, row - 0.25, length, va="bottom", ha="right", fontsize=11, fontweight="bold", transform=across)
        values = [value for value in bar.values if value is not None]
        axes.plot(values, [row] * len(values), "o", mfc=BACKGROUND, mec=FOREGROUND, markersize=6, clip_on=False)
    numbers = [0.0, 1.0, *(value for bar in entries for value in (bar.value, *bar.values) if value is not None)]
    axes.set(xlim=(min(numbers), max(numbers)), ylim=(len(entries) - 0.6, -0.8), yticks=[])
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.axvline(0, color=FOREGROUND, linewidth=0.8)
    return _svg(figure, title)


def grouped_bars(rows: Mapping[str, Sequence[float | None]], series: Sequence[str], title: str) -> Markup:
    """Draw bars from 0 to 100 percent, one per name and series, with a legend below.

    ``rows`` holds for each name, such as a class, one value per series, 0 to 1. There are at most as many series as
    `SERIES`; ``title`` is the text for screen readers.
    """
    number = len(series)
    figure, axes = _new_figure(9 * (number + 1) * len(rows), left=110, right=34, bottom=22 + 17 * number)
    for index, name in enumerate(series):
        values = [values[index] for values in rows.values()]
        positions = [row + (index + 0.5 - number / 2) / (number + 1) for row in range(len(rows))]
        drawn = axes.barh(
            positions, [value or 0.0 for value in values], 0.85 / (number + 1), color=SERIES[index], label=name,
            clip_on=False,
        )  # fmt: skip
        axes.bar_label(drawn, [percent(value, 1) for value in values], padding=3, fontsize=9)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50", "", "100"])
    axes.set_yticks(range(len(rows)), [_shorten(name, 16) for name in rows])
    _legend(figure, axes, longest=52)
    return _svg(figure, title)


def line_chart(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, *, smoothing: float = 0.05) -> Markup:
    """Draw curves over the steps, on a logarithmic axis where values span more than a factor of 100.

    ``curves`` holds, by name, points (step, value) in the order of the steps; each is averaged over a share of them,
    ``smoothing``. ``title`` is the text for screen readers.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    figure, axes = _new_figure(142, left=46, right=10, bottom=24 + 17 * math.ceil(len(curves) / 2))
    for index, (name, points) in enumerate(curves.items()):
        stride = math.ceil(len(points) / MAX_POINTS)
        smooth = moving_average([value for _, value in points], round(smoothing * len(points)))
        shown = sorted({*range(0, len(points), stride), len(points) - 1})
        steps, values = [points[at][0] for at in shown], [smooth[at] for at in shown]
        axes.plot(
            steps, values, color=SERIES[index % len(SERIES)],
            linestyle=DASHES[index // len(SERIES) % len(DASHES)], linewidth=1.6, label=name, clip_on=False,
        )  # fmt: skip
    steps = [step for points in curves.values() for step, _ in points]
    low, high = axes.get_ylim()
    if not _use_log_scale(axes, curves):
        axes.set_ylim(min(0.0, low), high)
        axes.locator_params(axis="y", nbins=4)
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.set_xticks([min(steps), max(steps)], [f"{min(steps):,}", f"{max(steps):,} steps"])
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    _legend(figure, axes, columns=2, longest=24)
    return _svg(figure, title)


def draw_curves(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Draw losses, learning rate and validation metrics over the steps, one below the other, into a PNG.

    The rows are those of `training_curves`; the folder of ``path`` is created. Raises `RunError`: the log has no
    numbers yet.
    """
    from matplotlib.figure import Figure

    losses, rates, metrics = training_curves(rows)
    if all(len(points) < 2 for points in metrics.values()) and losses:  # one score makes no curve
        metrics = {}
    panels = [(name, part) for name, part in (("loss", losses), ("learning rate", rates), ("score", metrics)) if part]
    if not panels:
        raise RunError("the log has no numbers yet; train some steps first")
    heights = [1.0 if name == "learning rate" else 2.0 for name, _ in panels]
    figure = Figure(figsize=(8, 0.8 + 1.5 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (name, part) in zip(grid[:, 0], panels, strict=True):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(name)
        for index, (label, points) in enumerate(part.items()):
            steps, values = [step for step, _ in points], [value for _, value in points]
            color = "#444444" if part is rates else SERIES[index % len(SERIES)]
            if part is losses:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                values = moving_average(values, round(0.05 * len(values)))
            marker = "o" if part is metrics else ""
            axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)
        if part is rates:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            continue
        if part is losses:
            _use_log_scale(axes, losses)
        axes.legend(frameon=False, fontsize=9, ncols=3)
    grid[-1, 0].set_xlabel("step")
    save_figure(figure, path, 120)
    return path


def training_curves(rows: Iterable[Mapping[str, Any]]) -> tuple[Points, Points, Points]:
    """Return losses, learning rate and metrics of a log as points by name, without non-finite numbers.

    A row without ``event`` is a training step: ``lr`` is the learning rate, ``confident_share`` a metric, every other
    number a loss. The numbers of a row with ``event`` are metrics, prefixed by ``domain`` and ``split``. Of several
    rows of a step the last is used.
    """
    result: tuple[dict[str, dict[int, float]], ...] = ({}, {}, {})
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        prefix = " ".join(str(row[key]) for key in ("domain", "split") if isinstance(row.get(key), str))
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                kind = 2 if "event" in row or key == "confident_share" else int(key == "lr")
                result[kind].setdefault(f"{prefix} {key}".strip(), {})[step] = float(value)
    losses, rates, metrics = ({key: sorted(part[key].items()) for key in part} for part in result)
    return losses, rates, metrics


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Return the centered moving average over ``width`` values, or fewer near the ends."""
    radii = [min(width // 2, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - radius : index + radius + 1]) for index, radius in enumerate(radii)]


def _use_log_scale(axes: "Axes", curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Make the vertical axis logarithmic where positive values span more than a factor of 100."""
    values = [value for points in curves.values() for _, value in points]
    logarithmic = min(values) > 0 and max(values) / min(values) > 100
    if logarithmic:
        axes.set_yscale("log")
    return logarithmic


def _new_figure(height: float, *, left: float, right: float, bottom: float) -> "tuple[Figure, Axes]":
    """Create a figure whose axes have a height and margins in points."""
    from matplotlib.figure import Figure

    total = height + bottom + 6
    figure = Figure(figsize=(WIDTH / 72, total / 72), facecolor="none")
    box = (left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total)
    axes = figure.add_axes(box, facecolor="none")
    axes.spines[:].set_visible(False)
    axes.grid(axis="y" if left == 46 else "x", color=GRID_COLOR, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, which="both")
    return figure, axes


def _legend(figure: "Figure", axes: "Axes", *, longest: int, columns: int = 1) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, [_shorten(name, longest) for name in names], loc="lower left", bbox_to_anchor=(0.01, 0), ncols=columns,
        mode="expand" if columns > 1 else None, frameon=False, fontsize=11, borderpad=0, borderaxespad=0.2,
        handlelength=1.2, handleheight=0.8, labelspacing=0.42, handletextpad=0.5,
    )  # fmt: skip


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _svg(figure: "Figure", title: str) -> Markup:
    """Convert a figure to inline SVG with presentation attributes, and the page's font and colors."""
    file = io.StringIO()
    save_figure(figure, file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", _clean_tag, svg[svg.index("<svg") : svg.rindex("</svg>")])
    height = round(72 * figure.get_size_inches()[1])
    return Markup(  # noqa: S704  (matplotlib escapes text)
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"{body[body.index('>') + 1 :]}</svg>"
    )


def _clean_tag(match: re.Match[str]) -> str:
    tag = re.sub(r"(\.\d\d)\d+", r"\1", match[0].replace("\n", " "))
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r' style="([^"]*)"', lambda style: "".join(map(_attribute, style[1].split("; "))), tag)
    for color, variable in VARIABLES.items():
        tag = tag.replace(color, variable)
    return tag


def _attribute(declaration: str) -> str:
    name, _, value = declaration.partition(": ")
    return "" if name == "font-family" else f' {name}="{value.removesuffix("px")}"'


@cache
def accessible_colors(classes: Classes) -> Classes:
    """Recolor classes with colors distinguishable with color blindness; unchanged for too many classes.

    The assignment minimizes the sum of color distances, weighted towards hue, so that water stays blue if possible.
    """
    from scipy.optimize import linear_sum_assignment

    if len(classes) > len(ACCESSIBLE):
        return classes
    colors = ACCESSIBLE[: max(len(classes), PREFERRED_COLORS)]
    costs = [[_distance(own, color) for color in colors] for own in classes.colors]
    _, chosen = linear_sum_assignment(costs)
    return Classes(names=classes.names, colors=tuple(colors[index] for index in chosen))


def _distance(color: Color, reference: Color) -> float:
    """Return the distance of two colors, mostly of hue; the hue of grays is ignored."""
    first, second = (colorsys.rgb_to_hsv(*(value / 255 for value in rgb)) for rgb in (color, reference))
    angles = [cmath.rect(float(depth >= MIN_SATURATION), 2 * math.pi * hue) for hue, depth, _ in (first, second)]
    return abs(angles[0] - angles[1]) + 0.2 * abs(first[1] - second[1]) + 0.1 * abs(first[2] - second[2])


def thumbnail(image: Array, side: int) -> UInt8:
    """Shrink an image (H, W, C) for display to a longest side of ``side``; class ids (H, W) are not interpolated."""
    ids = image.ndim == 2
    shown = Image.fromarray(image if ids else to_rgb(image))
    shown.thumbnail((side, side), Image.Resampling.NEAREST if ids else Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(shown)


def encode_png(ids: UInt8, classes: Classes, *, transparent: bool = False) -> bytes:
    """Encode class ids (H, W) as a palette PNG; pixels without a class are striped, or ``transparent``."""
    table = classes.paint(np.arange(256).astype(np.uint8))
    table[STRIPE_LIGHT], table[STRIPE_DARK] = STRIPE_COLORS
    shown = np.where(ids < len(classes), ids, IGNORE).astype(np.uint8)
    if not transparent:
        across, down = np.meshgrid(np.arange(ids.shape[1]), np.arange(ids.shape[0]))
        shown = np.where((shown == IGNORE) & (((across + down) // 4) % 2 == 0), STRIPE_LIGHT, shown).astype(np.uint8)
    image = Image.frombytes("P", (ids.shape[1], ids.shape[0]), np.ascontiguousarray(shown).tobytes())
    image.putpalette(table.tobytes())
    return encode_image(image, "PNG", optimize=True, **({"transparency": IGNORE} if transparent else {}))


def data_uri(data: bytes) -> str:
    """Encode an image's bytes as a data URI."""
    kind = "webp" if data[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def encode_image(image: Image.Image, kind: str, **settings: object) -> bytes:
    """Encode an image of Pillow in a format such as PNG, with settings of its encoder."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()
